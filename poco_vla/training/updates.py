"""Updates: a batch, its loss and gradients in micro-batches, the optimizer's step and the target critic."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from poco_vla.algorithm import Poco, Stage, parts
from poco_vla.config import TrainConfig
from poco_vla.data import BatchSource, Replay, chunk_batch
from poco_vla.errors import ConfigError, NonFiniteError, OtherProcessError
from poco_vla.flow import Draws
from poco_vla.progress import Bar
from poco_vla.rollout.actor import WeightsVersion
from poco_vla.training import checkpoint
from poco_vla.training.backends import Learner
from poco_vla.training.finite_check import FiniteWatch
from poco_vla.training.logbook import Logbook
from poco_vla.training.memory import Budget
from poco_vla.training.progress import Progress
from poco_vla.training.versions import VersionBound
from poco_vla.types import ChunkBatch, Metrics


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
        versions: VersionBound,
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
    def poco(self) -> Poco:
        """Return what is trained, whole."""
        return self.learner.poco

    @property
    def actor_parameters(self) -> list[nn.Parameter]:
        """Return the policy's trained parameters."""
        return list(self.head_parameters().values())

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Return the policy's trained parameters by name."""
        return {name: p for name, p in self.poco.policy.named_parameters() if p.requires_grad}

    def begin_sft(self) -> None:
        """Set the actor's learning rate of supervised fine-tuning."""
        self._set_actor_lr(self.config.optim.sft_lr or self.config.optim.actor_lr)

    def anneal(self) -> None:
        """Set the actor's learning rate of the online stage, by the share of its environment steps that is over."""
        optim, share = self.config.optim, min(1.0, self.progress.env_steps / max(1, self.config.online_steps))
        self._set_actor_lr(_cosine(optim.actor_lr, optim.actor_lr_end, share))

    def update(self, stage: Stage, bar: Bar) -> None:
        """Make one update of a stage: loss, backward, step, target.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; no weight has changed.
            ConfigError: it does not fit the device's memory.
        """
        try:
            batch = self.batches.draw(bootstrap=stage != "sft")
            loss, metrics = self._backward(batch, stage)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"an update of {self.config.optim.batch_size} transitions does not fit {self.accelerator.device}: "
                f"{error}. Give `memory` less than the device has (such as --memory 22GB), and it is computed in parts "
                "that fit; or, under FSDP and DeepSpeed, optim.micro_batch."
            ) from error
        self.finite.see(loss, partial(self._not_finite, stage, self.progress.stage_update, batch, loss, metrics))
        self.progress.update += 1
        self.versions.cover(self.progress.version)
        with self._changed(apart=False):
            # `metrics` is what `_not_finite` shows: it gets the norms before they are looked at.
            look = partial(_seen, metrics, self.finite.see_gradients)
            metrics |= self.learner.step(stage, self.config.optim.max_grad_norm, look)
            if stage != "sft":
                self.learner.update_target()
        self.progress.stage_update += 1
        self.logbook.updated(stage, metrics, bar)

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

    def put_head(self, head: dict[str, Tensor]) -> None:
        """Give the policy another head; its optimizer state begins anew."""
        self.gather()
        with torch.no_grad(), self.weights.change(self.progress.version):
            for name, parameter in self.head_parameters().items():
                parameter.copy_(head[name])
            self.learner.scatter()
        self.learner.forget_actor()

    def calibrate_zeta(self, replay: Replay, say: Callable[[str], None]) -> None:
        """Set zeta from the demonstrations, where the configuration asks for that."""
        if self.config.poco.zeta != "auto":
            return
        self.gather()
        rng, draws = np.random.default_rng(self.config.seed), Draws(torch.Generator().manual_seed(self.config.seed))
        errors = []
        for raw in replay.demo_transitions(4096, rng).split(self.config.optim.batch_size):
            with self.accelerator.autocast():
                errors.append(self.poco.data_errors(chunk_batch(self.poco.policy, raw, bootstrap=False), draws))
        zeta = self.poco.calibrate_zeta(torch.cat(errors))
        say(f"zeta = auto: {zeta:.4f}, the {self.config.poco.zeta_quantile:.0%} quantile of the demonstrations")

    def _set_actor_lr(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr

    def _backward(self, batch: ChunkBatch, stage: Stage) -> tuple[Tensor, Metrics]:
        """Return loss and metrics of a batch, and add its gradients, in micro-batches that fit the memory."""
        plan = self.poco.plan(batch, stage)
        pieces = list(parts(batch, plan, self.budget.part(batch, plan, stage)))
        total, means, names = 0.0, 0.0, []
        for i, (rows, its_plan, share) in enumerate(pieces, start=1):
            loss, metrics = self.learner.backward(rows, stage, its_plan, share, last=i == len(pieces))
            total = total + loss * share
            names, means = list(metrics), means + torch.stack(list(metrics.values())) * share
        assert isinstance(total, Tensor)
        assert isinstance(means, Tensor)
        return total, dict(zip(names, means, strict=True))

    def _changed(self, *, apart: bool) -> AbstractContextManager[None]:
        """Return the context in which the weights that others read change: the learner's own, or its copy (`apart`)."""
        return self.weights.change(self.progress.version) if apart == self.learner.apart else nullcontext()

    def _not_finite(self, stage: Stage, update: int, batch: ChunkBatch, loss: Tensor, metrics: Metrics) -> Exception:
        """Return the error that says which loss or gradient is not finite, on the first process that has it; all of
        them call this together."""
        accelerator, name = self.accelerator, f"{stage} update {update}"
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


def _seen(metrics: Metrics, look: Callable[[Metrics], None], norms: Metrics) -> None:
    """Put norms among an update's metrics, then look at them."""
    metrics |= norms
    look(norms)


def _cosine(start: float, end: float | None, progress: float) -> float:
    """Return half a cosine from `start` to `end` (None: `start` all along)."""
    return start if end is None else end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
