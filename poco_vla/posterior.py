"""E-step: how much each candidate chunk counts (POCO section 4.1)."""

import torch
from jaxtyping import Float
from torch import Tensor


def posterior_weights(q: Float[Tensor, "B N"], *, eta: float | Float[Tensor, ""]) -> Float[Tensor, "B N"]:
    """E-step weights w_j = softmax_j(Q_j / eta) (Eq. 17). No gradient reaches `q` or `eta`.

    Args:
        q: value of each candidate, in units of discounted reward; not normalised.
        eta: temperature, same units; -> 0 picks the best candidate, -> inf weighs all alike.
    """
    q, eta = q.detach(), eta.detach() if isinstance(eta, Tensor) else eta
    best = q.amax(dim=-1, keepdim=True)
    return torch.softmax((q - best) / eta, dim=-1)


def effective_sample_size(w: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """1 / sum_j w_j^2: 1 when one candidate takes all, N when all count alike (Kish, 1965)."""
    return 1 / w.square().sum(dim=-1)
