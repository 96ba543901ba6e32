"""Small networks with one set of weights per embodiment (sections 3 and 5).

Shapes: B states, each of one embodiment; what lies between B and the last axis is free; P width of a time's code.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Embodiment = int | Int[Tensor, " B"]
"""Slot of each state. An int says that all states share it: its weights are then a view, nothing is gathered. Only the
caller can know this without reading a tensor back from the accelerator."""


class CategoryLinear(nn.Module):
    """x W[e] + b[e]. `W` is [embodiment, in, out], the transpose of nn.Linear's."""

    def __init__(self, num_embodiments: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.W = nn.Parameter(0.02 * torch.randn(num_embodiments, inputs, outputs))
        self.b = nn.Parameter(torch.zeros(num_embodiments, outputs))

    def forward(
        self, x: Float[Tensor, "#B *rest inputs"], embodiment: Embodiment, rows: slice | None = None, bias: bool = True
    ) -> Float[Tensor, "B *rest outputs"]:
        """In `x`'s dtype.

        Args:
            x: one axis at least between the first and the last.
            embodiment: slot of each state.
            rows: of `W` that take part; None is all.
            bias: whether to add b.
        """
        weight = (self.W if rows is None else self.W[:, rows])[embodiment].to(x.dtype)
        if isinstance(embodiment, int):
            product = x @ weight
            return product + self.b[embodiment].to(x.dtype) if bias else product
        product = x.flatten(1, -2) @ weight
        if bias:
            product = product + self.b[embodiment].to(x.dtype)[:, None]
        return product.unflatten(1, x.shape[1:-1])


class CategoryMlp(nn.Module):
    """layer2(relu(layer1(x)))."""

    def __init__(self, num_embodiments: int, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layer1 = CategoryLinear(num_embodiments, inputs, hidden)
        self.layer2 = CategoryLinear(num_embodiments, hidden, outputs)

    def forward(
        self, x: Float[Tensor, "B *rest inputs"], embodiment: Embodiment, dtype: torch.dtype
    ) -> Float[Tensor, "B *rest outputs"]:
        """The first layer in `dtype`, the second and what comes out in float32."""
        hidden = F.relu(self.layer1(x.to(dtype), embodiment))
        return self.layer2(hidden.float(), embodiment)


class ActionEncoder(nn.Module):
    """W3 silu(W2 [W1 x | code of the time])."""

    def __init__(self, num_embodiments: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.W1 = CategoryLinear(num_embodiments, action_dim, width)
        self.W2 = CategoryLinear(num_embodiments, 2 * width, width)
        self.W3 = CategoryLinear(num_embodiments, width, width)

    def forward(
        self,
        x: Float[Tensor, "B N H A"],
        buckets: Float[Tensor, "#B #N"],
        embodiment: Embodiment,
        dtype: torch.dtype,
    ) -> Float[Tensor, "B N H C"]:
        """The actions' own product in float32, the rest in `dtype`.

        W2's product with the code of the time is the same for all steps of a chunk: it is made once and added (section
        6, item 5).
        """
        width = self.W1.W.shape[-1]
        actions = self.W1(x.float(), embodiment).to(dtype)
        of_actions = self.W2(actions, embodiment, slice(width), bias=False)
        of_time = self.W2(time_code(buckets, width).to(dtype), embodiment, slice(width, None))
        return self.W3(F.silu(of_actions + of_time[..., None, :]), embodiment)


def time_code(buckets: Float[Tensor, "*batch"], width: int) -> Float[Tensor, "*batch width"]:
    """[sin | cos] of bucket * 10000^(-2k / width), float32 (section 5). The transformer's own has other conventions."""
    half = width // 2
    # Buckets go up to 1000: a float32 rounding of the exponent shows. This order of operations is the original's.
    step = torch.log(torch.tensor(10_000.0)).item() / half
    angles = buckets.float()[..., None] * torch.exp(-torch.arange(half, device=buckets.device).float() * step)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
