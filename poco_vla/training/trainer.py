"""The loop of a run: act, learn, take episodes in, evaluate, save."""

import math
from typing import NoReturn

from poco_vla.config import TrainConfig
from poco_vla.experience.rollouts import Rollouts
from poco_vla.progress import Bar
from poco_vla.run.folder import runs_of
from poco_vla.run.interruption import Interrupted
from poco_vla.training.main_guard import check_main_guard
from poco_vla.training.results import TrainResult, finish
from poco_vla.training.run import build

__all__ = ["Interrupted", "TrainResult", "Trainer", "runs_of", "train"]

UPDATES_PER_ROUND = 8
"""Updates after which a learner that is never idle looks what acting has brought."""


def train(config: TrainConfig) -> TrainResult:
    """Run both stages of POCO as `config` says.

    Raises:
        PocoError: a bad configuration, dataset, policy or checkpoint, before any long work.
        Interrupted: Ctrl-C; the run is saved and can be resumed.
    """
    check_main_guard(config)
    trainer = Trainer(config)
    try:
        return trainer.run()
    finally:
        trainer.close()


class Trainer:
    """Step through one run; `train` is the door for all others.

    Args:
        config: of the run.

    Attributes:
        parts: what the run consists of.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.parts = parts = build(config)
        context = parts.context
        self.config, self.progress, self.accelerator = context.config, context.progress, context.accelerator
        self.display, self.logbook, self.interruption = context.display, context.logbook, context.interruption
        self.updater, self.replay, self.collector = parts.updater, parts.replay, parts.collector
        self.experience, self.recovery, self.rollouts = parts.experience, parts.recovery, parts.rollouts
        self.evaluations, self.checkpoints = parts.evaluations, parts.checkpoints
        self._idle = False

    def run(self) -> TrainResult:
        """Run both stages, with evaluations before and after, export and report."""
        with self.parts.failures.watch():
            with self.interruption.watch():
                self._run_stages()
            return finish(self.parts)

    def close(self) -> None:
        """Stop workers and trackers."""
        self.parts.close()

    def _run_stages(self) -> None:
        if self.progress.stage == "sft":
            self._fine_tune()
            if self.config.sft_steps and self.checkpoints.saved != self.progress.update:
                self._save()  # before anything else may fail
            self.updater.prepare_online(self.replay, self.display.say)
            self._evaluate("after SFT" if self.config.sft_steps else "untrained", videos="before")
            self.recovery.take_reference()
            self.recovery.keep_head()
            self.progress.enter("online")
            self._save()
        if self.progress.stage == "online":
            self._learn_online()
            if self.config.online_steps:
                self._evaluate(f"after {self.updater.algorithm.title}", videos="after")
            self.progress.enter("done")
            self._save()
        self.parts.versions.settle(self.parts.weights.version)

    def _fine_tune(self) -> None:
        """Imitate the demonstrations."""
        total = self.config.sft_steps
        self.updater.begin_sft()
        if not total:
            return
        self.logbook.begin()
        with self.display.stage("SFT", total, self.progress.stage_update) as bar:
            while self.progress.stage_update < total:
                self.updater.update("sft", bar)
                bar.advance()
                self._after_update()

    def _learn_online(self) -> None:
        """Act, learn meanwhile from what came before, take in what has come since."""
        config, now = self.config, self.progress
        if not config.online_steps:
            return
        self.collector.begin()
        self._evaluate_when_due()
        self.logbook.begin()
        with self.display.stage("online", config.online_steps, now.env_steps) as bar:
            while now.env_steps < config.online_steps and not now.stopped:
                self.updater.gather()
                self.collector.act()
                if self.rollouts is None:
                    self._learn(bar)
                episodes, steps = self.collector.receive(wait=self._idle)
                self.experience.count(steps)
                self.experience.take(episodes)
                if self.rollouts is not None:
                    self._learn_from(self.rollouts, bar)
                bar.to(min(now.env_steps, config.online_steps))
                self._evaluate_when_due()
                self._after_update()
            self.collector.pause()
            while not now.stopped and now.owed_updates >= 1 and self.replay.num_online_steps:
                self._learn(bar, ahead=False)
                self._after_update()
        self._say_untrained()

    def _learn(self, bar: Bar, *, ahead: bool = True) -> None:
        """Make `updates_per_step` updates for every environment step so far, once a first online episode has come.
        Beside an interaction that goes on by itself make some more, as far as learning may run `ahead`, and not too
        many at once."""
        config, now = self.config, self.progress
        beside = config.interaction.mode != "synchronous"
        most = UPDATES_PER_ROUND if beside else math.inf
        credit = config.interaction.ahead * config.updates_per_step if beside and ahead else 0.0
        self.updater.anneal()
        # Deviation 8: what is owed before the first online episode has come is made up for afterwards.
        while now.owed_updates + credit >= 1 and self.replay.num_online_steps and most > 0:
            now.owed_updates -= 1
            most -= 1
            self.updater.update("warmup" if now.stage_update < config.warmup_steps else "online", bar)
        self._idle = most > 0

    def _learn_from(self, rollouts: Rollouts, bar: Bar) -> None:
        """Make the updates of a rollout, once it is complete."""
        now = self.progress
        now.owed_updates = 0.0  # as many updates as a rollout has
        if not rollouts.is_complete:
            return
        self.updater.anneal()
        for batch in rollouts.batches():
            warming_up = now.stage_update < self.config.warmup_steps
            metrics = self.updater.update("warmup" if warming_up else "online", bar, batch)
            if not warming_up and rollouts.algorithm.has_departed(metrics):
                break
        rollouts.begin()

    def _evaluate(self, label: str, *, videos: str | None = None) -> None:
        self.updater.gather()
        result = self.evaluations.play(label)
        if self.interruption.anywhere(self.interruption.requested)[0]:
            self._end()
        if result is not None:
            self.evaluations.note(label, result, videos)
        self.accelerator.wait_for_everyone()

    def _evaluate_when_due(self) -> None:
        if self.evaluations.is_due:
            self._evaluate(f"at {self.progress.env_steps} steps")
            self.progress.evaluated_at = self.progress.env_steps

    def _after_update(self) -> None:
        """Stop or save where that is due, on all processes together."""
        stop, by_time = self.interruption.anywhere(self.interruption.requested, self.checkpoints.is_due_by_time)
        if stop:
            self._end()
        if self.checkpoints.is_due(by_time=by_time):
            self._save()

    def _save(self) -> None:
        self.updater.settle()
        self.checkpoints.save()

    def _end(self) -> NoReturn:
        """Save, and stop the run with an exception that says why."""
        self._save()
        self.parts.versions.settle(self.parts.weights.version)
        self.interruption.end(self.checkpoints.path)

    def _say_untrained(self) -> None:
        config, now = self.config, self.progress
        if config.online_steps and not self.replay.num_online_steps:
            self.display.say(
                f"no episode was added to the replay buffer within {now.env_steps} steps: neither critic nor actor was "
                "trained online. Give more (--online-steps), or fewer environments at once (--env.num-envs)"
            )
        elif 0 < now.stage_update <= config.warmup_steps:
            self.display.say(f"critic warm-up took all {now.stage_update} updates: the actor was never trained online")
