"""Evaluations of a run: episodes on the main process, their figures, videos, and the best policy so far."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from poco_vla.algorithms import Algorithm
from poco_vla.data import Episode
from poco_vla.errors import SimulatorError
from poco_vla.evaluation import EvalResult, EvaluationStopped, SuccessRate, evaluate
from poco_vla.hub.rate import note_run
from poco_vla.rollout import EnvPool
from poco_vla.rollout.video import write_episode_video
from poco_vla.run.context import RunContext
from poco_vla.run.outlook import Outlook


class Evaluations:
    """Evaluate the policy, and keep what is worth keeping.

    Args:
        context: of the run.
        algorithm: what is evaluated, and whose policy is kept.
        envs: where; None on processes that evaluate nothing.
        fps: rate of the demonstrations, which an exported policy notes.
        outlook: warns when nothing ever succeeds.
    """

    def __init__(
        self, context: RunContext, algorithm: Algorithm, envs: EnvPool | None, fps: int, outlook: Outlook
    ) -> None:
        self.algorithm, self.envs, self.fps, self.outlook = algorithm, envs, fps, outlook
        self.config, self.progress, self.display = context.config, context.progress, context.display
        self.folder, self.interruption, self.logbook = context.folder, context.interruption, context.logbook

    @property
    def about(self) -> dict[str, Any]:
        """Return what result.json and an exported policy note: the rate, the algorithm, and the networks beside the
        policy that it acts with, once it does."""
        config, beside = self.config, list(self.algorithm.acts_with(1))
        trained = self.progress.update > config.sft_steps + config.warmup_steps
        about = {"fps": self.fps, "title": self.algorithm.title}
        return about | ({"acts_with": beside} if beside and trained else {})

    @property
    def is_due(self) -> bool:
        """Return True if an evaluation on the way is due."""
        every, now = self.config.eval.every, self.progress
        due = bool(every) and now.env_steps // every > now.evaluated_at // every
        return due and now.env_steps < self.config.online_steps

    def play(self, label: str) -> EvalResult | None:
        """Return the result of an evaluation on the main process; None elsewhere, and where the run is to stop."""
        if self.envs is None:
            return None
        settings, now = self.config.eval, self.progress
        trained = now.stage == "online" and now.stage_update > self.config.warmup_steps
        total = settings.episodes * self.envs.num_tasks
        with self.display.stage(f"evaluating {label}", total) as bar, self.interruption.simulators():
            try:
                return evaluate(
                    self.algorithm,
                    self.envs,
                    episodes=settings.episodes,
                    seed=settings.seed,
                    trained=trained,
                    on_episode=bar.to,
                )
            except EvaluationStopped:
                return None
        return None

    def note(self, label: str, result: EvalResult, videos: str | None) -> None:
        """Note a result; write videos with `videos` in their names, and the policy if none was better before."""
        settings, now = self.config.eval, self.progress
        success = result.success
        asked = settings.episodes * max(1, len(result.suite))
        self.display.say(f"success {label}: {success} of {asked} episodes" + _by_task(success))
        figures = {"label": label, "env_steps": now.env_steps, "update": now.update} | success.figures()
        now.evaluations.append(figures)
        self.outlook.evaluated(now)
        self.logbook.evaluated(figures)
        self.keep_best(figures)
        if settings.videos and videos:
            self.folder.write(f"the videos {videos}", lambda: self._write_videos(result.episodes, videos))

    def keep_best(self, figures: dict[str, Any]) -> None:
        """Export the policy, unless an evaluation before was better."""
        best = self.progress.best
        if best is not None and figures["success_rate"] < best["success_rate"]:
            return
        policy = self.algorithm.policy
        save = policy.save_pretrained if policy.base is None else policy.save_head
        self.display.say(f"writing the best policy so far to {self.folder.path / 'best'}")
        self.folder.write("the best policy", partial(export, save, self.folder.path / "best", self.about))
        self.progress.best = figures | {"policy": "best"}

    def _write_videos(self, episodes: Sequence[Episode], when: str) -> None:
        """Write the first success and the first failure."""
        assert self.config.env is not None
        for outcome in ("success", "failure"):
            episode = next((e for e in episodes if e.succeeded == (outcome == "success")), None)
            if episode is not None:
                path = self.folder.path / f"{outcome}_{when}.mp4"
                self.display.say(f"writing the video {path}")
                try:
                    write_episode_video(episode, self.config.env, path, every=1 + len(episode) // 200)
                except SimulatorError as error:
                    self.display.say(f"{path.name} is not written: {error}")


def _by_task(success: SuccessRate) -> str:
    """Return each task's rate, of a suite."""
    rates = ", ".join(f"{name} {one.rate:.0%}" for name, one in success.tasks)
    return f", mean over {len(success.tasks)} tasks: {rates}" if rates else ""


def export(save: Callable[[Path], None], folder: Path, about: Mapping[str, Any]) -> None:
    """Let `save` write a policy or a head, and note beside it the rate of its demonstrations and how its run acts."""
    save(folder)
    note_run(folder, about)
