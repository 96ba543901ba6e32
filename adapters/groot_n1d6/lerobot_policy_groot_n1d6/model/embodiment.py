"""Small networks with one set of weights per embodiment (sections 3 and 5).

Shapes: B states, each of one embodiment; what lies between B and the last axis is free; P width of a time's code.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Embodiment = int | Int[Tensor, " B"]
"""Slot of each state. An int says that all states share it: its weights are then a view, nothing is gathered. Only the
caller can know this without reading a tensor back from the accelerator."""


class CategoryLinear(nn.Module):
    """x W[e] + b[e]. `W` is [embodiment, in, out], the transpose of nn.Linear's.

    After :meth:`train_slot` the parameters are one slot's, `W` [in, out] and `b` [out]; its state dict has all of them.
    """

    def __init__(self, num_embodiments: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.W = nn.Parameter(0.02 * torch.randn(num_embodiments, inputs, outputs))
        self.b = nn.Parameter(torch.zeros(num_embodiments, outputs))
        self._all: AllSlots | None = None

    def train_slot(self, slot: int) -> None:
        """Leave one slot as parameters; the others' weights, which get no gradient from it, stay in main memory.

        Without weight decay the slot learns as it would among all of them.
        """
        self._all = AllSlots(slot, {name: p.detach().cpu() for name, p in self.named_parameters()})
        self.W, self.b = (nn.Parameter(p.detach()[slot].clone()) for p in (self.W, self.b))

    def forward(
        self, x: Float[Tensor, "#B *rest inputs"], embodiment: Embodiment, rows: slice | None = None, bias: bool = True
    ) -> Float[Tensor, "B *rest outputs"]:
        """In `x`'s dtype.

        Args:
            x: one axis at least between the first and the last.
            embodiment: slot of each state.
            rows: of `W` that take part; None is all.
            bias: whether to add b.

        Raises:
            ValueError: one slot is left, and another one is asked for, or one for each state.
        """
        if self._all is not None:
            self._all.check(embodiment)
            weight, added = self.W, self.b
        elif isinstance(embodiment, int):
            weight, added = self.W[embodiment], self.b[embodiment]
        else:
            weight, added = self.W[embodiment], self.b[embodiment][:, None]
        weight = (weight if rows is None else weight[..., rows, :]).to(x.dtype)
        if weight.ndim == 2:
            product = x @ weight
            return product + added.to(x.dtype) if bias else product
        product = x.flatten(1, -2) @ weight
        if bias:
            product = product + added.to(x.dtype)
        return product.unflatten(1, x.shape[1:-1])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._all is None:
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, own in self.named_parameters():
            destination[prefix + name] = self._all.joined(name, own.detach())
        return None

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self._all is not None:  # what is of one slot is loaded as any parameter is
            whole = {name: state_dict.get(prefix + name) for name in ("W", "b")}
            found = {name: t for name, t in whole.items() if t is not None and t.shape == self._all.tensors[name].shape}
            state_dict = {**state_dict, **{prefix + name: self._all.split(name, t) for name, t in found.items()}}
        others = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *others)


class AllSlots:
    """Weights of all slots in main memory, of which one is a parameter elsewhere. Copies of a layer share them.

    Args:
        slot: the one that trains; what stands here in its place is out of date.
        tensors: name -> [embodiment, ...] weights.
    """

    def __init__(self, slot: int, tensors: dict[str, Tensor]) -> None:
        self.slot, self.tensors = slot, tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> "AllSlots":
        return self

    def check(self, embodiment: Embodiment) -> None:
        """Raise ValueError unless all states are of the slot, and the caller says so."""
        if not isinstance(embodiment, int) or embodiment != self.slot:
            raise ValueError(f"only slot {self.slot} is trained here: give embodiment={self.slot}, not {embodiment}")

    def joined(self, name: str, own: Tensor) -> Tensor:
        """Return the weights of all slots, the trained one's among them."""
        whole = self.tensors[name].clone()
        whole[self.slot] = own.to(whole.device)
        return whole

    def split(self, name: str, whole: Tensor) -> Tensor:
        """Take over the weights of all slots, and return the trained one's."""
        self.tensors[name] = whole.detach().cpu().clone()
        return whole[self.slot]


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
