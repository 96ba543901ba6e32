"""A dense network, as actors and values beside the flow policy have it."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poco_vla.critic import ACTIVATIONS, Activation
from poco_vla.dense import linear


class Mlp(nn.Module):
    """Linear layers with an activation after each but the last. Computes in the precision of its own weights.

    Args:
        input_dim: I, numbers that it reads.
        hidden: widths of the hidden layers.
        output_dim: O, numbers that it returns.
        activation: by name, as :data:`poco_vla.critic.ACTIVATIONS` has them.
    """

    def __init__(self, input_dim: int, hidden: Sequence[int], output_dim: int, activation: Activation = "silu") -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise((input_dim, *hidden, output_dim)))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        last = len(self.layers) - 1
        with torch.autocast(x.device.type, enabled=False):
            for i, layer in enumerate(self.layers):
                assert isinstance(layer, nn.Linear)
                x = linear(x.to(layer.weight), layer.weight, layer.bias, None if i == last else self.activation)
        return x
