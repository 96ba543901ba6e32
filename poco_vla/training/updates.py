"""Updates: a batch, its loss and gradients in micro-batches, the optimizer's step and the target critic."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from poco_vla.algorithms import Algorithm, Stage
from poco_vla.checkpointing import checkpoint
from poco_vla.checkpointing.progress import Progress
from poco_vla.checkpointing.versions import ReservedVersions
from poco_vla.config import TrainConfig
from poco_vla.data import BatchSource, Replay, chunk_batch
from poco_vla.errors import ConfigError, NonFiniteError, OtherProcessError
from poco_vla.learner.backends import Learner
from poco_vla.learner.finite_check import FiniteWatch
from poco_vla.learner.memory import Budget
from poco_vla.noise import GlobalBatchRNG
from poco_vla.progress import Bar
from poco_vla.rollout.actor import WeightsVersion
from poco_vla.run.logbook import Logbook
from poco_vla.types import ChunkBatch, Metrics

BESIDE = "algorithm."
"""Begins the names of parameters of networks beside the policy, where they stand beside those of the policy."""


class Updater:
    """Make updates of every stage, and publish the weights that come of them.

    Args:
        config: of the run.
        accelerator: its backend.
        learner: what is updated.
        batches: what it learns from.
        budget: size of a micro-batch.
        finite: ends the run at a loss or a gradient that is not finite.
        progress: counts the updates.
        weights: whoever acts reads them between two updates.
        versions: reserves their versions on disk.
        logbook: gets the metrics.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        learner: Learner,
        batches: BatchSource,
        budget: Budget,
        finite: FiniteWatch,
        *,
        progress: Progress,
        weights: WeightsVersion,
        versions: ReservedVersions,
        logbook: Logbook,
    ) -> None:
        self.config, self.accelerator, self.learner = config, accelerator, learner
        self.batches, self.budget, self.finite = batches, budget, finite
        self.progress, self.weights, self.versions, self.logbook = progress, weights, versions, logbook

    @property
    def optimizer(self) -> AcceleratedOptimizer:
        """Return the optimizer, whose first group is the actor's."""
        return self.learner.optimizer

    @property
    def algorithm(self) -> Algorithm:
        """Return what is trained, whole."""
        return self.learner.algorithm

    @property
    def actor_parameters(self) -> list[nn.Parameter]:
        """Return the policy's trained parameters."""
        return list(self.head_parameters().values())

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Return the policy's trained parameters by name."""
        return {name: p for name, p in self.algorithm.policy.named_parameters() if p.requires_grad}

    def begin_sft(self) -> None:
        """Set the actor's learning rate of supervised fine-tuning."""
        self._set_actor_lr(self.config.optim.sft_lr or self.config.optim.actor_lr)

    def anneal(self) -> None:
        """Set the actor's learning rate of the online stage, by the share of its environment steps that is over."""
        optim, share = self.config.optim, min(1.0, self.progress.env_steps / max(1, self.config.online_steps))
        self._set_actor_lr(_cosine(optim.actor_lr, optim.actor_lr_end, share))

    def update(self, stage: Stage, bar: Bar, batch: ChunkBatch | None = None) -> Metrics:
        """Make one update of a stage: loss, backward, step, target. Return its metrics.

        Args:
            stage: of the update.
            bar: shows them.
            batch: what is learned from; drawn from the replay buffer when None.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; no weight has changed.
            ConfigError: it does not fit the device's memory.
        """
        began, number = time.perf_counter(), self.progress.stage_update
        phases = self.algorithm.phases(stage, number)
        if batch is None:
            batch = self.batches.draw(bootstrap=any(map(self.algorithm.reads_next, phases)))
        metrics: Metrics = {}
        for i, phase in enumerate(phases):
            with self._explain_out_of_memory():
                loss, found = self.learner.backward(batch, phase, self.budget.part)
                kept = _without_pictures(batch) if self.finite.late else batch
                self.finite.see(loss, partial(self._not_finite, f"{stage} update {number}", kept, loss, found))
                if i == 0:
                    self.progress.update += 1
                    self.versions.cover(self.progress.version)
                with self._changed(apart=False):
                    norms = self.learner.clip(phase)
                    found |= norms
                    self.finite.see_gradients(norms)
                    self.learner.step(phase)
            metrics |= found
        self.progress.stage_update += 1
        self.progress.update_seconds += time.perf_counter() - began if stage == "online" else 0.0
        self.logbook.updated(stage, metrics, bar)
        return metrics

    @contextmanager
    def _explain_out_of_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"an update of {self.config.optim.batch_size} transitions does not fit {self.accelerator.device}: "
                f"{error}. Give `memory` less than the device has (such as --memory 22GB), and it is computed in parts "
                "that fit; or, under FSDP and DeepSpeed, optim.micro_batch."
            ) from error

    def gather(self) -> None:
        """Bring the weights that act, are evaluated and saved up to date. All processes call this together."""
        if self.learner.apart and self.weights.version != self.progress.version:
            with self._changed(apart=True):
                self.learner.gather()

    def settle(self) -> None:
        """Wait for the newest update, and gather its weights. All processes call this together.

        Raises:
            NonFiniteError: its loss or gradient was not finite.
        """
        self.finite.look()
        self.gather()

    def acting_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all that acts by name: the policy's trained ones, and those of the networks beside
        it, whose names begin with `BESIDE`."""
        algorithm = self.algorithm
        beside = {
            f"{BESIDE}{module}.{name}": parameter
            for module in algorithm.acts_with(1)
            for name, parameter in algorithm.get_submodule(module).named_parameters()
        }
        return self.head_parameters() | beside

    def put_acting(self, weights: Mapping[str, Tensor]) -> None:
        """Give all that acts other weights, by `acting_parameters`; their optimizer state begins anew."""
        self.gather()
        acting = self.acting_parameters()
        with torch.no_grad(), self.weights.change(self.progress.version):
            for name, parameter in acting.items():
                parameter.copy_(weights[name])
            self.learner.scatter()
        changed = {id(parameter) for parameter in acting.values()}
        groups = self.algorithm.parameter_groups()
        self.learner.forget({group["name"] for group in groups if changed & {id(p) for p in group["params"]}})

    def prepare_online(self, replay: Replay, say: Callable[[str], None]) -> None:
        """Let the algorithm prepare its online stage on demonstrations, as it calibrates its options."""
        self.gather()
        rng = np.random.default_rng(self.config.seed)
        raw = replay.demo_transitions(4096, rng).split(self.config.optim.batch_size)
        batches = (chunk_batch(self.algorithm.policy, part, bootstrap=False) for part in raw)
        with self.accelerator.autocast():
            noise = GlobalBatchRNG(torch.Generator().manual_seed(self.config.seed))
            line = self.algorithm.prepare_online(batches, noise)
        if line is not None:
            say(line)

    def _set_actor_lr(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr

    def _changed(self, *, apart: bool) -> AbstractContextManager[None]:
        """Return the context in which the weights that others read change: the learner's own, or its copy (`apart`)."""
        return self.weights.change(self.progress.version) if apart == self.learner.apart else nullcontext()

    def _not_finite(self, name: str, batch: ChunkBatch, loss: Tensor, metrics: Metrics) -> Exception:
        """Return the error that says which loss or gradient is not finite, on the first process that has it; all of
        them call this together."""
        accelerator = self.accelerator
        flags = accelerator.gather(~torch.isfinite(loss.detach()).reshape(1))
        assert isinstance(flags, Tensor)
        first = int(flags.int().argmax())  # the main process where only the gradient, which all share, is not finite
        if accelerator.process_index != first:
            return OtherProcessError(f"{name}: not finite on process {first}")
        what = (
            f"the loss is {loss.item()}" if flags.any() else f"the loss is {loss.item():.4g}, its gradient not finite"
        )
        kept = checkpoint.save_batch(self.config.output_dir, batch, accelerator.process_index)
        return NonFiniteError(
            f"{name}: {what} ({', '.join(f'{k} {v.item():.3g}' for k, v in metrics.items())}); nothing was changed by "
            "it. " + (f"The batch is kept in {kept}." if kept.is_file() else "There was no room to keep the batch.")
        )


@dataclass(frozen=True)
class _Features:
    """A prefix without its keys and values."""

    features: Tensor


def _without_pictures(batch: ChunkBatch) -> ChunkBatch:
    """Return what is kept of a batch until its loss is looked at: on a GPU that is while the next batch is learned
    from, and pictures or prefixes of both would be there at once."""
    small = {
        name: {key: value for key, value in getattr(batch, name).items() if value.ndim <= 2}
        for name in ("obs", "next_obs")
    }
    prefixes = {
        name: _Features(prefix.features)
        for name in ("prefix", "next_prefix")
        if (prefix := getattr(batch, name)) is not None
    }
    return replace(batch, **small, **prefixes)


def _cosine(start: float, end: float | None, progress: float) -> float:
    """Return half a cosine from `start` to `end` (None: `start` all along)."""
    return start if end is None else end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
