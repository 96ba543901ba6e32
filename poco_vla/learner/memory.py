"""How many transitions of a batch are computed at once: as many as the memory that a user gives allows."""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from poco_vla.algorithms import Algorithm, Phase
from poco_vla.config import TrainConfig, num_bytes
from poco_vla.dense import states_at_once
from poco_vla.errors import ConfigError
from poco_vla.noise import UpdateNoise
from poco_vla.types import ChunkBatch

MARGIN = 0.95
"""Share of the memory that is planned with; an allocator's rounding and a matrix library's scratch take the rest."""

NEVER = 2**62
"""Bytes that no device has."""

type GradientPass = Callable[[ChunkBatch, Phase, UpdateNoise], None]


class Budget:
    """The size of a part of each phase, found at the first update that has it.

    Args:
        config: ``optim.micro_batch`` says it outright; else it is what fits ``memory``; else the whole batch, or, on a
            CPU, what suits its caches.
        algorithm: what is trained, its frozen parts included.
        optimizer: Adam, two moments for each trained parameter; they may not be there yet.
        accelerator: its device and processes: all of them get the same size.
        run: loss and gradients of a batch, no step. The gradients are dropped afterwards.
        beside: bytes on the device that the memory is not about.
        prefixes: bytes of those that a batch brings along: while it is learned from, the next one's are loaded.
        say: tells a person one line.

    Raises:
        ConfigError: ``memory`` is given, and the device is no GPU.
    """

    def __init__(
        self,
        config: TrainConfig,
        algorithm: Algorithm,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        run: GradientPass,
        beside: Callable[[], int] = lambda: 0,
        prefixes: Callable[[], int] = lambda: 0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config, self.algorithm, self.optimizer = config, algorithm, optimizer
        self.accelerator, self.run, self.beside, self.prefixes = accelerator, run, beside, prefixes
        self.say = say
        if config.memory is not None and accelerator.device.type != "cuda":
            raise ConfigError(
                f"memory is {config.memory}, which is measured on a GPU, and this run is on {accelerator.device.type}: "
                "leave it out (a CPU computes in micro-batches that suit its caches), or give optim.micro_batch"
            )
        self._sizes: dict[Phase, int] = {}

    def part(self, batch: ChunkBatch, noise: UpdateNoise, phase: Phase) -> int:
        """Transitions of `batch` that are computed at once.

        Raises:
            ConfigError: not even one fits the memory; the message says what takes it.
        """
        if phase not in self._sizes:
            self._sizes[phase] = self._find(batch, noise, phase)
        return self._sizes[phase]

    def _find(self, batch: ChunkBatch, noise: UpdateNoise, phase: Phase) -> int:
        config = self.config
        if config.optim.micro_batch is not None:
            return config.optim.micro_batch
        if config.memory is not None:
            return self._fitting(batch, noise, phase, num_bytes(config.memory))
        return states_at_once(len(batch), self.algorithm.chunks_per_state(phase), self.accelerator.device.type)

    def _fitting(self, batch: ChunkBatch, noise: UpdateNoise, phase: Phase, memory: int) -> int:
        """Parts are measured, each twice as large as the one before, until one does not fit. Between the last two the
        peak is taken for linear: as the largest of several that are, it lies below."""
        held = self._held()
        room = int(memory * MARGIN) - held
        sizes, peaks = [0, 1], [0, self._peak(batch, noise, phase, 1)]
        while sizes[-1] < len(batch) and peaks[-1] <= room:
            sizes.append(min(2 * sizes[-1], len(batch)))
            peaks.append(self._peak(batch, noise, phase, sizes[-1]))
        size = sizes[-1]
        if peaks[-1] > room:
            size = sizes[-2] + int((sizes[-1] - sizes[-2]) * (room - peaks[-2]) / (peaks[-1] - peaks[-2]))
        size = int(self.accelerator.gather(torch.tensor([size], device=self.accelerator.device)).min())  # pyright: ignore[reportAttributeAccessIssue]
        if size < 1:
            one = _shown(peaks[1]) if peaks[1] < NEVER else "more than the device has"
            least = f" (at least {_shown((held + peaks[1]) / MARGIN)})" if peaks[1] < NEVER else ""
            raise ConfigError(
                f"memory is {self.config.memory}, but weights, optimizer and batch take {_shown(held)} and one "
                f"transition {one} beside them, gradients included. Give more{least}, draw smaller batches, or, of a "
                "large model, train less (a LoRA) or keep the frozen part in bfloat16."
            )
        self.say(f"{phase}: {size} of {len(batch)} transitions at once fit {self.config.memory}")
        return size

    def _held(self) -> int:
        """Bytes of what is there however it is cut: weights, batch and noise, and, be they there yet or not, the
        optimizer's moments and the next batch's prefixes."""
        trained = [p for p in self.algorithm.parameters() if p.requires_grad]
        missing = 2 * sum(_bytes(p) for p in trained if p not in self.optimizer.state)
        return torch.cuda.memory_allocated(self.accelerator.device) - self.beside() + missing + self.prefixes()

    def _peak(self, batch: ChunkBatch, noise: UpdateNoise, phase: Phase, size: int) -> int:
        """Most bytes that a part of this size takes beside what is there, gradients included."""
        rows = slice(0, size)
        part, its_noise = batch.rows(rows), noise.rows(rows)
        try:
            return peak_bytes(lambda: self.run(part, phase, its_noise), self.accelerator.device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return NEVER
        finally:
            self.optimizer.zero_grad()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that were there at once while `work` ran, over those that were there before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def _shown(count: float | int) -> str:
    """Bytes in a unit that `memory` is written in, rounded up."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{math.ceil(100 * count / size) / 100:g}{unit}"
    return f"{math.ceil(count / 1e3)}KB"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
