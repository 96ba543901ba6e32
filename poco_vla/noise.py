"""Random numbers of a global batch, alike on one process and on many, and micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from poco_vla.types import ChunkBatch


@runtime_checkable  # for the test run's machine-checked signatures
class TimeSampler(Protocol):
    """Draw flow times of a shape from a model's training distribution."""

    def __call__(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor: ...


class GlobalBatchRNG:
    """Draw the random numbers of an update, the same for one process as for many.

    Each process draws for the *global* batch from the same generator and keeps its own rows, so that the loss of a
    global batch does not depend on how many processes share it.

    Args:
        generator: seeded alike on every process.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, generator: torch.Generator, rank: int = 0, world_size: int = 1) -> None:
        self.generator = generator
        self.rank = rank
        self.world_size = world_size

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return standard normal numbers of `shape`, whose first axis is this process's batch.

        Args:
            shape: of the result.
            like: gives its device and dtype.
        """
        rows, *rest = shape
        # Drawn in the generator's own precision and place: float32 on the CPU unless the caller chose otherwise.
        drawn = torch.randn((rows * self.world_size, *rest), generator=self.generator, device=self.generator.device)
        return self._own_rows(drawn, rows).to(like)

    def time(self, sampler: TimeSampler, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return flow times of `shape` from a policy's own distribution, likewise."""
        rows, *rest = shape
        return self._own_rows(sampler((rows * self.world_size, *rest), self.generator), rows).to(like)

    def members(self, count: int, size: int, rows: int, like: Tensor) -> Int[Tensor, "B M"]:
        """Return `count` different numbers of an ensemble's members, the same ones for each row.

        Args:
            count: M, members that are drawn.
            size: members of the ensemble.
            rows: B.
            like: gives the device.
        """
        drawn = torch.randperm(size, generator=self.generator, device=self.generator.device)[:count]
        return drawn.to(like.device).expand(rows, -1)

    def _own_rows(self, drawn: Tensor, rows: int) -> Tensor:
        return drawn[self.rank * rows : (self.rank + 1) * rows]


@dataclass(frozen=True)
class UpdateNoise:
    """Hold what is drawn or counted over the global batch before an update is computed.

    The losses of micro-batches then add up to that of the batch, and the computation itself draws nothing and
    communicates nothing. An algorithm adds its own fields: tensors of B rows, or None in stages that need none.
    """

    def rows(self, rows: slice) -> "UpdateNoise":
        """Return the part that belongs to some of the transitions."""
        return replace(self, **{name: value[rows] for name, value in vars(self).items() if value is not None})


def row_weights(mask: Bool[Tensor, " B"], like: Tensor) -> Float[Tensor, " B"]:
    """Return the weight of each row, so that the mean of x * weights is the mean of `x` where `mask`, over the global
    batch when several processes share it; 0 where nothing is selected.

    Under data-parallel training gradients are averaged over processes, so each process divides by the *mean* number of
    selected rows per process: the average is then the mean over all selected rows.

    Args:
        mask: rows that count.
        like: gives the dtype.
    """
    count = mask.sum().to(like.dtype)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return mask * torch.where(count > 0, mask.shape[0] / count, 0)


def crossing_weights(batch: ChunkBatch, *, drop: bool, mean_over: Literal["valid", "all"]) -> Float[Tensor, " B"]:
    """Return the weight of each transition in a critic loss.

    Args:
        batch: the transitions.
        drop: leave out chunks whose episode ended before their last step.
        mean_over: the loss is a mean over the chunks that are left ("valid"), or over all.
    """
    # Deviation 2: chunks that met an episode end stay, with their exact n-step return (POCO's and QC's code drop them).
    kept = batch.valid[:, -1] if drop else torch.ones_like(batch.is_demo)
    return row_weights(kept, batch.actions) if mean_over == "valid" else kept.to(batch.actions.dtype)


def of_global_batch(x: Float[Tensor, " B"]) -> Float[Tensor, " G"]:
    """Return the entries of the global batch, those of all processes that share it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def micro_batches(batch: ChunkBatch, noise: UpdateNoise, size: int) -> Iterator[tuple[ChunkBatch, UpdateNoise, float]]:
    """Yield a batch and its noise in micro-batches of about `size` transitions, none larger, each with its share of the
    batch. The gradients of share * loss add up to those of the batch."""
    count = -(-len(batch) // size)
    bounds = [len(batch) * i // count for i in range(count + 1)]
    for begin, end in pairwise(bounds):
        rows = slice(begin, end)
        yield (batch, noise, 1.0) if count == 1 else (batch.rows(rows), noise.rows(rows), (end - begin) / len(batch))
