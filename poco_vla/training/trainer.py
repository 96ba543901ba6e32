"""One run: both stages, what it is made of, and how it is interrupted and taken up again."""

import logging
import math
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType
from torch import Tensor

from poco_vla import report
from poco_vla.algorithm import Poco, Stage, parts
from poco_vla.config import DatasetConfig, EnvSpec, TrainConfig, to_json, to_scalars
from poco_vla.data import BatchSource, Episode, Replay, chunk_batch, network_obs, open_dataset, read_episodes
from poco_vla.data.dataset import info_of
from poco_vla.data.episode import first_of_each_task
from poco_vla.data.folder import read_info
from poco_vla.data.signals import check_reward
from poco_vla.data.statistics import meta_in_use
from poco_vla.demonstrations.scripted import demonstrations_root, ensure_demonstrations
from poco_vla.errors import CheckpointError, ConfigError, DataError, NonFiniteError, SimulatorError, UnknownNameError
from poco_vla.evaluation import EvalResult, EvaluationStopped, SuccessRate, evaluate
from poco_vla.files import wait_for_space, write_json
from poco_vla.flow import Draws
from poco_vla.hub.rate import note_rate
from poco_vla.joint_names import check_same_names
from poco_vla.policy import FlowPolicy
from poco_vla.prefix_cache.identity import installed_versions
from poco_vla.prefix_cache.source import PrefixSource
from poco_vla.progress import Bar, Display
from poco_vla.recording.recorder import EpisodeRecorder
from poco_vla.registry import check_options, load_adapter
from poco_vla.rollout import Actor, EnvPool
from poco_vla.rollout.actor import Weights
from poco_vla.rollout.interaction import Interaction, Received
from poco_vla.rollout.video import write_episode_video
from poco_vla.simulators import environment
from poco_vla.simulators.instructions import settle_instruction
from poco_vla.training import checkpoint
from poco_vla.training.backends import learner_of, open_accelerator
from poco_vla.training.broadcast import Sharing, shared
from poco_vla.training.compatibility import check_env_pictures, check_fit, check_inputs, check_pictures, check_rollout
from poco_vla.training.failures import Failures, OtherProcessError
from poco_vla.training.finite_check import FiniteWatch
from poco_vla.training.guard import CollapseGuard
from poco_vla.training.interactions import (
    RANK_SEED,
    Acting,
    open_admission,
    open_recorder,
    picture_shapes,
    picture_shapes_of,
)
from poco_vla.training.launcher import launched_precision, precision_told
from poco_vla.training.logbook import Logbook
from poco_vla.training.main_guard import check_main_guard
from poco_vla.training.memory import Budget
from poco_vla.training.outlook import Outlook
from poco_vla.training.parent import ParentWatch
from poco_vla.training.prefixes import open_prefixes
from poco_vla.training.progress import Progress
from poco_vla.training.provenance import Provenance
from poco_vla.training.schedule import CheckpointClock
from poco_vla.training.statistics import RunStatistics
from poco_vla.training.versions import VersionBound
from poco_vla.types import ChunkBatch, Metrics

logger = logging.getLogger(__name__)

UPDATES_PER_ROUND = 8
"""Updates after which a learner that is never idle looks what acting has brought."""
EPISODES_AT_ONCE = 50
"""Episodes with pictures that are read together."""
NEEDED = ("progress", "batches", "acting", "base_version", "guard", "logbook")
"""Keys that a checkpoint's state must have."""
PACKAGES = ("poco-vla", "lerobot", "torch", "transformers", "accelerate", "peft")
"""Whose versions a run notes."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after everything was saved. `checkpoint` says where."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"interrupted; saved in {checkpoint}. Continue with --resume.")
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class TrainResult:
    """What a run ends with, also in ``result.json``.

    Attributes:
        output_dir: the run's folder.
        policy_dir: the exported LeRobot policy.
        before: success after SFT, None without an environment.
        after: success at the end, likewise.
        env_steps: environment steps taken online.
        seconds: wall time, interruptions left out.
    """

    output_dir: Path
    policy_dir: Path
    before: SuccessRate | None
    after: SuccessRate | None
    env_steps: int
    seconds: float


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


def runs_of(config: TrainConfig) -> list[Path]:
    """Folders of the runs of this seed that `output_dir` stands for, oldest first."""
    root = Path(config.output_dir.anchor)
    pattern = str(config.output_dir.relative_to(root)).replace("{time}", f"*-seed{config.seed}")
    return sorted(path for path in root.glob(pattern) if (path / "config.json").is_file())


class Trainer:
    """One run. `train` is the door; this class is for those who want to step through it."""

    def __init__(self, config: TrainConfig) -> None:
        self.progress = Progress()
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self._refuse_unknown_trackers(config)
        check_options(load_adapter(config.adapter), config.policy_options, pretrained=config.policy is not None)
        self.accelerator = open_accelerator(config)
        precision = launched_precision(config)
        told = precision_told(config, precision)
        config = replace(config, mixed_precision=precision, output_dir=self._choose_folder(config))
        self.config = config
        self.is_main = self.accelerator.is_main_process
        self.failures = Failures(config.output_dir, self.accelerator.process_index, self.accelerator.num_processes)
        self._lock = checkpoint.claim_folder(config.output_dir, lock=self.is_main)
        self._stop = False
        self.interaction: Interaction | None = None
        self._eval_envs: EnvPool | None = None
        self.prefixes: PrefixSource | None = None
        try:
            if self.is_main:
                self.failures.forget()
            self.accelerator.wait_for_everyone()  # the main process has put the folder in order
            with self.failures.watch():
                self._prepare(config, told)
        except BaseException:
            self._close_parts()
            raise

    def _prepare(self, config: TrainConfig, told: str | None) -> None:
        """Data, policy and all else, in a folder that is the run's own."""
        self._refuse_to_overwrite()
        folders = self.accelerator.project_configuration
        folders.project_dir = folders.logging_dir = str(config.output_dir)
        self.display = Display(enabled=self.is_main)
        if told is not None:
            self.display.say(told)
        self.logbook = Logbook(config.output_dir, self.accelerator, self.progress, config.log_every, self._written)
        self.guard = CollapseGuard(config.guard)
        self._good_head: dict[str, Tensor] = {}
        self.weights = Weights()
        beside = config.interaction.mode != "synchronous"  # else a resumed run makes the same weights again
        self.versions = VersionBound(config.output_dir, self._written, used=self.is_main and beside)
        self.clock = CheckpointClock(config.checkpoint_minutes)
        self.outlook = Outlook(self.display.say)
        self._failure: SimulatorError | None = None
        self._idle = False
        self._saved = 0

        self._open_data()
        self._build()
        if config.resume:
            self._resume()
        elif self.is_main:
            self._written("config.json", lambda: write_json(config.output_dir / "config.json", to_json(config)))
        if config.trackers:
            self.accelerator.init_trackers("poco_vla", config=to_scalars(config))

    # -- the run ------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Both stages, evaluation before and after, export, report."""
        with self.failures.watch():
            self._run_stages()
            return self._finish()

    def _run_stages(self) -> None:
        with self._watch_interrupts(), ParentWatch(self._orphaned):
            if self.progress.stage == "sft":
                self._imitate()
                if self.config.sft_steps and self._saved != self.progress.update:
                    self._save()  # before anything else may fail
                self._calibrate()
                self._evaluate("after SFT" if self.config.sft_steps else "untrained", videos="before")
                self._tell_guard()
                self._keep_head()
                self.progress.enter("online")
                self._save()
            if self.progress.stage == "online":
                self._learn_online()
                if self.config.online_steps:
                    self._evaluate("after POCO", videos="after")
                self.progress.enter("done")
                self._save()
            self.versions.settle(self.weights.version)

    def close(self) -> None:
        """Stop workers and trackers."""
        with ExitStack() as stack:
            if self.config.trackers:
                stack.callback(self.accelerator.end_training)
            stack.callback(self._close_parts)

    def _close_parts(self) -> None:
        """Stop workers, and give the folder back."""
        self._stop = True  # nobody waits for space on a disk any more
        with ExitStack() as stack:  # each is closed, whatever happens to the others
            stack.callback(self._lock.release)
            for part in (self._eval_envs, self.interaction, self.prefixes):
                if part is not None:
                    stack.callback(part.close)

    # -- stages -------------------------------------------------------------------------------------------------

    def _imitate(self) -> None:
        self._set_actor_lr(self.config.optim.sft_lr or self.config.optim.actor_lr)
        total = self.config.sft_steps
        self.logbook.begin()
        with self.display.stage("SFT", total, self.progress.stage_update) as bar:
            while self.progress.stage_update < total:
                self._update("sft", bar)
                bar.advance()
                self._after_update()

    def _learn_online(self) -> None:
        """Act, learn meanwhile from what came before, take in what has come since."""
        config, now = self.config, self.progress
        if self.interaction is None and self.acts and config.online_steps:
            self.interaction = self.acting.begin(now.env_steps, now.episodes)
        self._evaluate_when_due()
        self.logbook.begin()
        with self.display.stage("online", config.online_steps, now.env_steps) as bar:
            while now.env_steps < config.online_steps and not now.stopped:
                self._act()
                self._learn_what_is_owed(bar)
                episodes, steps = self._receive()
                self._count(steps)
                self._take(episodes)
                bar.to(min(now.env_steps, config.online_steps))
                self._evaluate_when_due()
                self._after_update()
            if self.interaction is not None:
                self.interaction.pause()
            while not now.stopped and now.owed_updates >= 1 and self.replay.num_online_steps:
                self._learn_what_is_owed(bar, ahead=False)
                self._after_update()
        if config.online_steps and not self.replay.num_online_steps:
            self.display.say(
                f"no episode came into the pool within {now.env_steps} steps: neither critic nor actor was trained "
                "online. Give more (--online-steps), or fewer environments at once (--env.num-envs)"
            )
        elif 0 < now.stage_update <= config.warmup_steps:
            self.display.say(f"critic warm-up took all {now.stage_update} updates: the actor was never trained online")

    def _act(self) -> None:
        """Let acting go on, as far as learning follows."""
        config, now = self.config, self.progress
        self._gather()
        if self.interaction is None:
            return
        # Before it has learned anything, the critic has no say in what is executed.
        best_of_n = config.best_of_n if now.stage_update > config.warmup_steps else 1
        until = float(config.online_steps)
        if self.replay.num_online_steps:  # learning begins with the first episode
            until = min(until, now.env_steps + config.interaction.ahead - now.owed_updates / config.updates_per_step)
        with self._simulators():
            self.interaction.act(best_of_n=best_of_n, until=until / self.acting.num_ranks)
        self._tell(self.interaction)

    @contextmanager
    def _simulators(self) -> Iterator[None]:
        """Let simulators that fail again and again stop the run like Ctrl-C does, with a checkpoint."""
        try:
            yield
        except SimulatorError as error:
            self._failure, self._stop = error, True

    def _tell(self, interaction: Interaction) -> None:
        told = {"online_steps": self.config.online_steps, "set_aside": self.admission.num_set_aside}
        interaction.tell(self.logbook.told() | told)

    def _learn_what_is_owed(self, bar: Bar, *, ahead: bool = True) -> None:
        """`updates_per_step` for every environment step so far, once a first online episode is in the pool; beside an
        interaction that goes on by itself some more, as far as it may run `ahead`, and not too many at once."""
        config, now = self.config, self.progress
        optim, share = config.optim, min(1.0, now.env_steps / max(1, config.online_steps))
        self._set_actor_lr(_cosine(optim.actor_lr, optim.actor_lr_end, share))
        beside = config.interaction.mode != "synchronous"
        most = UPDATES_PER_ROUND if beside else math.inf
        credit = config.interaction.ahead * config.updates_per_step if beside and ahead else 0.0
        while now.owed_updates + credit >= 1 and self.replay.num_online_steps and most > 0:
            now.owed_updates -= 1
            most -= 1
            self._update("warmup" if now.stage_update < config.warmup_steps else "online", bar)
        self._idle = most > 0

    def _update(self, stage: Stage, bar: Bar) -> None:
        """One update of a stage: loss, backward, step, target."""
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

    def _backward(self, batch: ChunkBatch, stage: Stage) -> tuple[Tensor, Metrics]:
        """Gradients of a batch, in parts that suit the memory; its loss and metrics."""
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

    def _stored(self) -> int:
        """Bytes of prefixes on the device."""
        store = self.prefixes.store if self.prefixes is not None else None
        return store.num_bytes["device"] if store is not None else 0

    def _changed(self, *, apart: bool) -> AbstractContextManager[None]:
        """While the weights that others read change: those of the learner itself, or of its copy `apart`."""
        return self.weights.change(self.progress.version) if apart == self.learner.apart else nullcontext()

    def _gather(self) -> None:
        """What the learner has learned, for all that acts, evaluates or saves. All processes call this together."""
        if self.learner.apart and self.weights.version != self.progress.version:
            with self._changed(apart=True):
                self.learner.gather()

    def _not_finite(self, stage: Stage, update: int, batch: ChunkBatch, loss: Tensor, metrics: Metrics) -> Exception:
        """Say that a loss or a gradient is not finite, on the first process that has it; all of them call
        this together."""
        accelerator, name = self.accelerator, f"{stage} update {update}"
        flags = accelerator.gather(~torch.isfinite(loss.detach()).reshape(1))
        assert isinstance(flags, Tensor)
        first = int(flags.int().argmax())  # the main process where only the gradient, which all share, is not finite
        if accelerator.process_index != first:
            return OtherProcessError(f"{name}: not finite on process {first}; that one says what, and keeps the batch")
        what = (
            f"the loss is {loss.item()}" if flags.any() else f"the loss is {loss.item():.4g}, its gradient not finite"
        )
        kept = checkpoint.save_batch(self.config.output_dir, batch, accelerator.process_index)
        return NonFiniteError(
            f"{name}: {what} ({', '.join(f'{k} {v.item():.3g}' for k, v in metrics.items())}); nothing was changed by "
            "it. " + (f"The batch is kept in {kept}." if kept.is_file() else "There was no room to keep the batch.")
        )

    def _calibrate(self) -> None:
        if self.config.poco.zeta != "auto":
            return
        self._gather()
        rng, draws = np.random.default_rng(self.config.seed), Draws(torch.Generator().manual_seed(self.config.seed))
        errors = []
        for raw in self.replay.demo_transitions(4096, rng).split(self.config.optim.batch_size):
            with self.accelerator.autocast():
                errors.append(self.poco.data_errors(chunk_batch(self.policy, raw, bootstrap=False), draws))
        zeta = self.poco.calibrate_zeta(torch.cat(errors))
        self.display.say(
            f"zeta = auto: {zeta:.4f}, the {self.config.poco.zeta_quantile:.0%} quantile of the demonstrations"
        )

    def _evaluate(self, label: str, *, videos: str | None = None) -> None:
        self._gather()
        result = self._play_evaluation(label)
        if self._on_any_process(self._stop)[0]:
            self._end()
        if result is not None:
            self._take_evaluation(label, result, videos)
        self.accelerator.wait_for_everyone()

    def _evaluate_when_due(self) -> None:
        """Evaluate every so many control steps while online."""
        config, now = self.config, self.progress
        every = config.eval.every
        if every and now.env_steps // every > now.evaluated_at // every and now.env_steps < config.online_steps:
            self._evaluate(f"at {now.env_steps} steps")
            now.evaluated_at = now.env_steps

    def _play_evaluation(self, label: str) -> EvalResult | None:
        """Play the episodes of an evaluation on the main process; None elsewhere, and where the run is to stop."""
        if self._eval_envs is None:
            return None
        settings = self.config.eval
        with self.display.stage(f"evaluating {label}", settings.episodes) as bar, self._simulators():
            try:
                return evaluate(
                    self.policy, self._eval_envs, episodes=settings.episodes, seed=settings.seed, on_episode=bar.to
                )
            except EvaluationStopped:
                return None
        return None

    def _take_evaluation(self, label: str, result: EvalResult, videos: str | None) -> None:
        settings, now = self.config.eval, self.progress
        self.display.say(f"success {label}: {result.success} of {settings.episodes} episodes")
        figures = {"label": label, "env_steps": now.env_steps, "update": now.update} | result.success.figures()
        now.evaluations.append(figures)
        self.outlook.evaluated(now)
        self.logbook.evaluated(figures)
        self._keep_best(figures)
        if settings.videos and videos:
            self._written(f"the videos {videos}", lambda: self._write_videos(result.episodes, videos))

    def _write_videos(self, episodes: Sequence[Episode], when: str) -> None:
        """The first success and the first failure."""
        for outcome in ("success", "failure"):
            episode = next((e for e in episodes if e.succeeded == (outcome == "success")), None)
            if episode is not None:
                path = self.config.output_dir / f"{outcome}_{when}.mp4"
                try:
                    write_episode_video(episode, self._env, path, every=1 + len(episode) // 200)
                except SimulatorError as error:
                    self.display.say(f"{path.name} is not written: {error}")

    def _finish(self) -> TrainResult:
        config, now = self.config, self.progress
        policy_dir = config.output_dir / "policy"
        rates = [SuccessRate(e["successes"], e["episodes"], e["mean_length"]) for e in now.evaluations]
        before, after = (rates[0], rates[-1]) if rates else (None, None)
        self._gather()
        if self.is_main:
            self._written("the final policy", partial(self._export, self.policy.save_pretrained, policy_dir))
            if self.policy.base is not None:
                self._written(
                    "the final head", partial(self._export, self.policy.save_head, config.output_dir / "head")
                )
            figures = self._figures()
            self._written("result.json", lambda: write_json(config.output_dir / "result.json", figures))
            self._written("the report", lambda: report.finish(config.output_dir, self.display.console))
            if self.interaction is not None:
                self._tell(self.interaction)
                self.interaction.finish()
        self.accelerator.wait_for_everyone()
        return TrainResult(config.output_dir, policy_dir, before, after, now.env_steps, self.progress.elapsed())

    def _export(self, save: Callable[[Path], None], folder: Path) -> None:
        save(folder)
        note_rate(folder, self.info.fps)

    # -- parts --------------------------------------------------------------------------------------------------

    def _open_data(self) -> None:
        config = self.config
        self.dataset_config = config.dataset
        env_config = environment(config.env) if config.env is not None else None
        if config.demonstrations is not None and not (config.dataset.root or config.dataset.repo_id):
            assert config.env is not None
            root = demonstrations_root(config.env, config.demonstrations)
            if self.is_main and not (root / "meta" / "info.json").is_file():
                with self.display.stage("demonstrations", config.demonstrations.episodes) as bar:
                    ensure_demonstrations(config.env, config.demonstrations, bar.to)
            self.accelerator.wait_for_everyone()
            self.dataset_config = replace(config.dataset, repo_id=f"local/{root.name}", root=root)
        self.dataset = open_dataset(self.dataset_config)
        self.statistics = RunStatistics(config, info_of(self.dataset), self.display.say)
        self.info = self.statistics.info
        check_reward(self.info.features, config.reward)
        if env_config is not None:
            check_fit(self.info, env_config)
        self.env_config = env_config

    def _build(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.policy = self.statistics.put_on(self._make_policy())
        check_inputs(self.policy, self.info, self.env_config)
        demos = read_episodes(
            self.dataset,
            self.dataset_config,
            self.policy.input_keys,
            horizon=config.horizon,
            shrink=self.policy.shrink_images,
            say=self.display.say,
        )
        self.statistics.check(self.policy, demos)
        self.replay = Replay(
            horizon=config.horizon,
            gamma=config.poco.gamma,
            reward=config.reward,
            config=config.replay,
            folder=config.output_dir,
        )
        self.replay.extend(demos, is_demo=True)
        self.provenance = Provenance.of(demos, self.statistics.found, self.policy.input_keys)
        self.outlook.demonstrated(demos)
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        each = config.interaction.ranks == "each"
        self.acts = self.is_main or each
        self.sharing = Sharing(self.accelerator, each=each)
        # Drawn where they are used: a copy from the host would make it wait for a GPU.
        place = self.accelerator.device if self.accelerator.device.type == "cuda" else "cpu"
        self.draws = Draws(torch.Generator(place).manual_seed(config.seed), rank, world_size)
        self.learner = learner_of(self.accelerator, Poco(self.policy, config.poco, self.draws), config.optim)
        self.poco, self.optimizer = self.learner.poco, self.learner.optimizer
        self.policy = self.poco.policy
        self.actor_parameters = [p for p in self.policy.parameters() if p.requires_grad]
        # Looking at a loss makes the host wait for a GPU.
        late = self.accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU)
        late = late and self.accelerator.device.type == "cuda"
        self.finite = FiniteWatch(self.optimizer.optimizer, self._processes, late=late)
        self.budget = Budget(
            config,
            self.poco,
            self.optimizer,
            self.accelerator,
            self.learner.rehearse,
            self._stored,
            lambda: self.prefixes.batch_bytes if self.prefixes is not None else 0,
            self.display.say,
        )
        self.prefixes = open_prefixes(config, self.policy, self.replay, demos, self.accelerator, self.display.say)
        if self.prefixes is not None:
            self.logbook.beside = self.prefixes.rates
        self.batches = BatchSource(
            self.replay,
            self.policy,
            config.optim.batch_size,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            prefixes=self.prefixes,
        )
        critic = self.poco.target_critic if config.best_of_n > 1 else None
        self.actor = Actor(
            self.policy, config.seed + RANK_SEED * rank, config.best_of_n, critic, config.poco.aggregation
        )
        self._rehearse(demos)
        self.admission = open_admission(
            config, self.policy, demos, self.display.say, lambda: self._stop, is_main=self.is_main
        )
        recorder = self._open_recorder() if self.is_main else None
        ranks = (rank, world_size) if each else (0, 1)
        say = self.display.say
        acted = self.prefixes.acted if self.prefixes is not None else None
        acting = replace(config, env=self.env_spec)
        stop = lambda: self._stop  # noqa: E731
        self.acting = Acting(
            acting, self.actor, self.weights, recorder, self.info, demos[0].task, say, acted, *ranks, stop
        )
        steps = self.replay.num_demo_steps
        trained = sum(p.numel() for p in self.actor_parameters)
        self.display.say(
            f"{config.adapter}: {trained:,} trained parameters on {self.accelerator.device}; "
            f"{len(demos)} demonstrations ({sum(demo.succeeded for demo in demos)} succeed), {steps:,} steps"
        )

    def _open_recorder(self) -> EpisodeRecorder:
        config, say = self.config, self.display.say
        features = {key: self.info.features[key] for key in self.policy.input_keys}
        envs = self._eval_envs if config.interaction.mode != "remote" else None
        shapes = picture_shapes(features) if envs is None else picture_shapes_of(envs.obs)
        self.recorder = open_recorder(
            config, self._episodes, self.info.fps, shapes, say, lambda: self._stop, self.admission
        )
        return self.recorder

    @property
    def _episodes(self) -> Path:
        """The dataset of online episodes."""
        return self.config.output_dir / "episodes"

    def _rehearse(self, demos: list[Episode]) -> None:
        """Show the policy every instruction and a first observation of the environment: what it cannot read, and what
        of the two does not fit together, is told before any work."""
        self.policy.check_prompts(list(first_of_each_task(demos)))
        for task, (episode, step) in first_of_each_task(demos).items():
            first = {key: column[step : step + 1].copy() for key, column in episode.obs.items()}
            network_obs(self.policy, first, [task])
        self.env_spec = self._first_rollout(demos) if self.config.env is not None else None

    def _first_rollout(self, demos: list[Episode]) -> EnvSpec:
        """Try the environment before any work; give it with the instruction that the policy is told."""
        spec, say = self._env, self.display.say
        if self.is_main:
            envs = self._eval_envs = EnvPool(spec, self.config.horizon, say=say, give_up=lambda: self._stop)
            envs.reset(self.config.eval.seed)
            spec = settle_instruction(spec, envs.tasks, first_of_each_task(demos), say)
            envs.tell(spec.instruction)
            check_env_pictures(self.policy, envs)
            network_obs(self.policy, envs.obs, envs.tasks)
            check_pictures(self.policy, demos[0].obs, envs.obs)
            check_rollout(envs, demos[0].action, say)
        (instruction, _), *_ = self.sharing.values(spec.instruction, [])
        return replace(spec, instruction=instruction)

    def _make_policy(self) -> FlowPolicy:
        config = self.config
        adapter = load_adapter(config.adapter)
        device = self.accelerator.device
        # LeRobot knows "cuda:1", but neither "cpu:0" nor "mps:0".
        options = config.policy_options | {"device": str(device) if device.type == "cuda" else device.type}
        if config.policy is None:
            return adapter.from_dataset(self.info.features, self.info.stats, horizon=config.horizon, **options)
        return adapter.from_pretrained(
            config.policy,
            horizon=config.horizon,
            features=self.info.features,
            stats=self.info.stats,
            statistics=config.statistics,
            dataset_meta=meta_in_use(self.dataset),
            **options,
        )

    @property
    def _env(self) -> EnvSpec:
        assert self.config.env is not None
        return self.config.env

    def _set_actor_lr(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr

    def _receive(self) -> tuple[list[Episode], int]:
        """Episodes that ended, as the pool keeps them, and control steps taken, on every process those of all."""
        received = Received()
        if self.interaction is not None and self._failure is None:
            with self._simulators():
                received = self.interaction.receive(wait=self._idle)
        self.logbook.acted(received.versions)
        if self.acting.num_ranks == 1:
            return self.sharing.episodes([self._shrunk(episode) for episode in received.episodes], received.steps)
        episodes, steps = self.sharing.episodes(received.episodes, received.steps)
        episodes = [episode for episode in episodes if self.admission.admits(episode)]
        for episode in episodes if self.is_main else ():
            self.recorder.add(episode)
        return [self._shrunk(episode) for episode in episodes], steps

    def _shrunk(self, episode: Episode) -> Episode:
        return episode.with_images(self.policy.shrink_images)

    def _count(self, steps: int) -> None:
        self.progress.env_steps += steps
        self.progress.owed_updates += steps * self.config.updates_per_step

    def _take(self, episodes: list[Episode], *, recorded: bool = False) -> None:
        now = self.progress
        for episode in episodes:
            self._pool(episode, recorded=recorded)
            self.provenance.add(episode)
            now.episodes += 1
            now.recent = [*now.recent, episode.succeeded][-report.WINDOW :]
            self.logbook.episode(len(episode), episode.succeeded)
            if now.stage_update <= self.config.warmup_steps:
                self._imitated(episode.succeeded)
            elif not now.stopped:
                self._watch(episode.succeeded)

    def _pool(self, episode: Episode, *, recorded: bool = False) -> None:
        """Put an episode into the pool; one that does not fit there stays on disk alone. One that was `recorded` by an
        earlier process may be one that training cannot bear."""
        if recorded and not self.admission.admits(episode):
            return
        try:
            first = self._written("an episode of the pool", partial(self.replay.add, episode, is_demo=False))
        except DataError as error:
            self.display.say(f"an episode stays out of the pool: {error}")
            return
        if self.prefixes is not None:
            self.prefixes.adopt(episode, first)

    def _tell_guard(self) -> None:
        """How well the imitating policy does, on every process: all of them watch."""
        first = self.progress.evaluations[:1]
        mine = [first[0]["successes"], first[0]["episodes"]] if first else [0, 0]
        successes, episodes = (int(x) for x in shared(torch.tensor(mine, device=self.accelerator.device)))
        if episodes:
            self.guard.reference = (successes, episodes)

    def _imitated(self, success: bool) -> None:
        """Without an environment to evaluate in, the episodes of the warm-up say how well the imitating policy does."""
        if self.config.env is None:
            successes, episodes = self.guard.reference or (0, 0)
            self.guard.reference = (successes + success, episodes + 1)

    def _watch(self, success: bool) -> None:
        """Let the guard see an episode. Every process sees the same ones and decides alike."""
        verdict = self.guard.add(success)
        if verdict == "good":
            self._keep_head()
        elif verdict == "collapsed":
            recent, (successes, episodes) = self.guard.recent, self.guard.reference or (0, 1)
            go_on = self.guard.restored()
            self._restore_head()
            self.poco.beta.mul_(self.config.guard.beta_factor if go_on else 1)
            self.progress.stopped = not go_on
            self.display.say(
                f"collapse: {sum(recent)} of the last {len(recent)} episodes succeeded; after SFT "
                f"{successes} of {episodes} did. The last good head is back; "
                + (f"going on with beta {self.poco.beta.item():g}" if go_on else "the run ends here")
            )

    def _keep_head(self) -> None:
        """The present head, should a later one collapse; on disk too, for a resumed run."""
        if self.config.guard.action != "off" and self.config.online_steps:
            self._gather()
            self._good_head = {name: p.detach().cpu().clone() for name, p in self._head_parameters()}
            if self.is_main:
                save = partial(checkpoint.save_good_head, self.config.output_dir, self._good_head)
                self._written("the head of the collapse guard", save)

    def _restore_head(self) -> None:
        """The last good head, its optimizer state begun anew."""
        self._gather()
        with torch.no_grad(), self.weights.change(self.progress.version):
            for name, parameter in self._head_parameters():
                parameter.copy_(self._good_head[name])
            self.learner.scatter()
        self.learner.forget_actor()

    def _keep_best(self, figures: dict[str, Any]) -> None:
        """The policy, when no evaluation before was better."""
        best = self.progress.best
        if best is not None and figures["success_rate"] < best["success_rate"]:
            return
        save = self.policy.save_pretrained if self.policy.base is None else self.policy.save_head
        self._written("the best policy", partial(self._export, save, self.config.output_dir / "best"))
        self.progress.best = figures | {"policy": "best"}

    def _head_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]

    # -- what is seen and kept ----------------------------------------------------------------------------------

    def _figures(self) -> dict[str, Any]:
        now, config = self.progress, self.config
        return {
            "seed": config.seed,
            "command": sys.argv,
            "env": to_json(self.env_spec) if self.env_spec else None,
            "before": now.evaluations[0] if now.evaluations else None,
            "after": now.evaluations[-1] if now.evaluations else None,
            "evaluations": now.evaluations,
            "best": now.best,
            "zeta": self.poco.zeta.item(),
            "sft_steps": config.sft_steps,
            "updates": now.update,
            "env_steps": now.env_steps,
            "online_episodes": now.episodes,
            "set_aside": self.admission.num_set_aside,
            "restored_heads": self.guard.restores,
            "stopped_early": now.stopped,
            "seconds": round(self.progress.elapsed(), 1),
            "adapter": config.adapter,
            "fps": self.info.fps,
            "sizes": {
                "feature_dim": self.policy.feature_dim,
                "horizon": self.policy.spec.horizon,
                "action_dim": self.policy.spec.action_dim,
            },
            "versions": {"python": platform.python_version()} | installed_versions(PACKAGES),
            "device": self.accelerator.device.type,
            "prefixes": self.prefixes.figures() if self.prefixes is not None else {"on": False},
            "policy": "policy",
            "lerobot_arguments": [*self.policy.lerobot_arguments, *_where_lerobot_finds(self.env_config)],
            "demonstrations": {"steps": self.replay.num_demo_steps, "repo_id": self.dataset_config.repo_id},
        }

    # -- interruption, checkpoints ------------------------------------------------------------------------------

    @contextmanager
    def _watch_interrupts(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) lets the current update end and saves; a second one is Python's own."""

        def stop(signum: int, _: Any) -> None:
            if not self._stop:  # launchers and clusters send it more than once
                self.display.say("stopping after this update; press Ctrl-C again to stop at once without saving")
            self._stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a terminal that is closed; nohup ignores it
            signals.append(signal.SIGHUP)
        old = {s: signal.signal(s, stop) for s in signals}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _orphaned(self, launcher: int) -> None:
        """End as after Ctrl-C, since the launcher is gone. Called in another thread."""
        self.display.say(f"the launcher (process {launcher}) is gone: saving, then stopping")
        self._stop = True

    def _after_update(self) -> None:
        every, now = self.config.checkpoint_every, self.progress
        stop, due = self._on_any_process(self._stop, self.is_main and self.clock.is_due())
        if stop:
            self._end()
        if (every and now.update // every != self._saved // every) or (due and now.update != self._saved):
            self._save()

    def _end(self) -> NoReturn:
        """Save, and stop the run with an exception that says why."""
        path = self._save()
        self.versions.settle(self.weights.version)
        if self._failure is not None:
            raise SimulatorError(
                f"{self._failure}. The run is saved in {path}; continue with --resume."
            ) from self._failure.__cause__
        raise Interrupted(path)

    def _on_any_process(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag True if it is set on one of the processes: they go on together or not at all, and a
        signal may reach them on different sides of an update."""
        if self.accelerator.num_processes == 1:
            return flags
        total = self._processes(torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device))
        return tuple(bool(count > 0) for count in total.tolist())

    def _processes(self, flag: Tensor) -> Tensor:
        """On how many processes a flag is up."""
        total = self.accelerator.reduce(flag, "sum") if self.accelerator.num_processes > 1 else flag
        assert isinstance(total, Tensor)
        return total

    def _save(self) -> Path:
        """Everything that the next update depends on. Called where a synchronous interaction has no chunk in flight."""
        config, now = self.config, self.progress
        self.finite.look()
        self._gather()
        optimizer = self.learner.optimizer_state()
        self._saved = now.update
        self.clock.began()
        root = config.output_dir / "checkpoints"
        path = root / f"{now.update:08d}"
        acting, tensors = self._acting_state()
        if self.is_main:
            tensors |= {"draws": self.draws.generator.get_state()}
            state = {
                "progress": now.state(),
                "batches": self.batches.rng.bit_generator.state,
                "acting": acting,
                "base_version": self.policy.base_version,
                "names": {key: list(names) for key, names in self.policy.names.items()},
                "guard": self.guard.state(),
                "logbook": self.logbook.state(),
                "data": self.provenance.state(),
            }
            write = partial(
                checkpoint.save,
                root,
                now.update,
                weights=checkpoint.trainable_state(self.poco),
                optimizer=optimizer,
                tensors=tensors,
                state=state,
                config=config,
                head=config.output_dir / checkpoint.GOOD_HEAD,
                keep_every=config.checkpoint_keep_every,
                statistics=self.statistics.state(self.policy),
            )
            self._written(f"checkpoint {path.name}", write)
        self.accelerator.wait_for_everyone()
        self.clock.ended()
        return path

    def _acting_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `_resume_acting` needs, of all processes that act: values, and tensors by name."""
        acting = dict(self.interaction.state()) if self.interaction is not None else {}
        chunks = {f"chunks.{i}": one for i, one in enumerate(acting.pop("chunks", []))}
        given = self.sharing.values(acting, [chunks | {"actor": self.actor.generator.get_state().numpy()}])
        tensors = {
            (f"rank{rank}." if rank else "") + name: torch.from_numpy(one)
            for rank, (_, (arrays,)) in enumerate(given)
            for name, one in arrays.items()
        }
        (values, _), *others = given
        return values | ({"others": [one for one, _ in others]} if others else {}), tensors

    def _written[T](self, what: str, write: Callable[[], T]) -> T:
        """Write something; while the disk is full, the run pauses and says so."""
        return wait_for_space(
            write, what=what, where=self.config.output_dir, tell=self.display.say, give_up=lambda: self._stop
        )

    def _resume(self) -> None:
        root = self.config.output_dir / "checkpoints"
        path, (weights, optimizer, tensors, state) = checkpoint.load_newest(root, self.config, self.display.say, NEEDED)
        self.accelerator.wait_for_everyone()  # all have read
        if self.is_main:
            checkpoint.set_newer_aside(path)
        if state["base_version"] != self.policy.base_version:
            raise CheckpointError(
                f"{path} was trained on the base model {state['base_version']}, and {self.config.policy} is now "
                f"{self.policy.base_version}. Give the same one (policy_options.revision pins a Hub revision)."
            )
        check_same_names(state.get("names"), self.policy.names, str(path))
        checkpoint.load_trainable_state(self.poco, weights)
        self.learner.scatter()
        self.learner.load_optimizer_state(optimizer)
        self.progress.load(state["progress"])
        self._check_data(state.get("data", {}))
        (seen,) = shared(torch.tensor([self.versions.newest_seen()], device=self.accelerator.device)).tolist()
        self.progress.begin_at_version(int(seen))
        self._saved = self.progress.update
        self.guard.load(state["guard"])
        self._good_head = checkpoint.load_good_head(path)
        self._set_draws(tensors["draws"])
        self.batches.rng.bit_generator.state = state["batches"]
        self.logbook.load(state["logbook"])
        self.weights.version = self.progress.version
        if self.progress.stage == "online":
            self._resume_acting(state["acting"], tensors, state.get("data", {}))
        self.display.say(f"resumed from {path}: stage {self.progress.stage}, update {self.progress.update}")

    def _check_data(self, noted: Mapping[str, Any]) -> None:
        """Compare the demonstrations with those of the checkpoint; a run that is done learns from none any more."""
        accept = self.config.accept_changed_data or self.progress.stage == "done"
        where = str(self.dataset_config.root or self.dataset_config.repo_id)
        self.provenance.check_demonstrations(noted, where, accept=accept, tell=self.display.say)

    def _set_draws(self, state: Tensor) -> None:
        """The random numbers go on where they were; on another kind of device than before they begin anew."""
        generator = self.draws.generator
        if len(state) == len(generator.get_state()):
            generator.set_state(state)
            return
        generator.manual_seed(self.config.seed + self.progress.update)
        self.display.say("the run was on another kind of device: its random numbers begin anew")

    def _resume_acting(self, acting: dict[str, Any], tensors: Mapping[str, Tensor], noted: Mapping[str, Any]) -> None:
        """Episodes back into the pool, and on from there. In step with learning, those that a checkpoint does not cover
        are run again, and come out the same; otherwise they count as if they had just come."""
        now, synchronous = self.progress, self.config.interaction.mode == "synchronous"
        taken, steps, total = now.episodes, 0, self._num_recorded()
        if total < taken:
            raise CheckpointError(
                f"{self._episodes} holds {total} episodes, the checkpoint has seen {taken}: put back what was taken "
                "away"
            )
        changed = []
        for number, episode in enumerate(self._recorded(0, taken)):
            accept = self.config.accept_changed_data
            changed.append(self.provenance.check_episode(noted, number, episode, self._episodes, accept=accept))
            self._pool(episode, recorded=True)
            steps += len(episode)
        if any(changed):
            self.display.say(f"not what the run learned from before: {', '.join(filter(None, changed))}")
        if not synchronous:
            self._count(steps - now.env_steps)  # running episodes are gone
            for episode in self._recorded(taken, total):
                self._count(len(episode))
                self._take([episode], recorded=True)
        self.accelerator.wait_for_everyone()  # all have read before more episodes come
        if self.is_main and self.config.online_steps and synchronous:
            self.recorder.rewind(taken)
        if self.acts and self.config.online_steps:
            self.interaction = self.acting.begin(now.env_steps, now.episodes)
            self._restore_acting(acting, tensors)

    def _restore_acting(self, acting: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The running episodes of this process, and its noise.

        Raises:
            CheckpointError: another number of processes acts now, and acts in step with learning.
        """
        assert self.interaction is not None
        all_of_them = [acting, *acting.pop("others", [])]
        rank, num_ranks = self.acting.rank, self.acting.num_ranks
        if len(all_of_them) != num_ranks:
            if acting and self.config.interaction.mode == "synchronous":
                raise CheckpointError(
                    f"the checkpoint holds running episodes of {len(all_of_them)} processes, and {num_ranks} act now: "
                    f"launch {len(all_of_them)}, as before"
                )
            return
        mine, prefix = all_of_them[rank], f"rank{rank}." if rank else ""
        self.actor.generator.set_state(tensors[f"{prefix}actor"])
        count = sum(name.startswith(f"{prefix}chunks.") for name in tensors)
        chunks = [tensors[f"{prefix}chunks.{i}"].numpy() for i in range(count)]
        self.interaction.restore(mine | {"chunks": chunks} if chunks else mine)

    def _num_recorded(self) -> int:
        """Online episodes on disk."""
        self.accelerator.wait_for_everyone()  # the main process has put the folder in order
        found = (self._episodes / "meta" / "info.json").is_file()
        return int(read_info(self._episodes).total_episodes) if found else 0

    def _recorded(self, first: int, end: int) -> Iterator[Episode]:
        """These online episodes, as the pool keeps them; of those with pictures a few are in memory at once."""
        pictures = any(self.info.features[key]["dtype"] in ("image", "video") for key in self.policy.input_keys)
        size = EPISODES_AT_ONCE if pictures else max(1, end - first)
        for begin in range(first, end, size):
            numbers = tuple(range(begin, min(begin + size, end)))
            config = DatasetConfig("local/episodes", self._episodes, episodes=numbers, max_image_bytes=sys.maxsize)
            yield from read_episodes(
                open_dataset(config), config, self.policy.input_keys, shrink=self.policy.shrink_images
            )

    def _choose_folder(self, config: TrainConfig) -> Path:
        """`output_dir`, "{time}" in it replaced: by start time and seed, alike on all processes, or by the newest
        run's of this seed."""
        if "{time}" not in str(config.output_dir):
            return config.output_dir
        if config.resume:
            runs = runs_of(config)
            if not runs:
                raise CheckpointError(
                    f"nothing to resume: no run of seed {config.seed} matches {config.output_dir}; --seed names another"
                )
            return runs[-1]
        seconds = torch.tensor([int(time.time())], device=self.accelerator.device)
        start = time.strftime("%Y%m%d-%H%M%S", time.localtime(int(shared(seconds))))
        return Path(str(config.output_dir).format(time=f"{start}-seed{config.seed}"))

    @staticmethod
    def _refuse_unknown_trackers(config: TrainConfig) -> None:
        """Accelerate leaves a tracker that is not installed out without a word."""
        known = {"all", *map(str, get_available_trackers())}
        for name in config.trackers:
            if name not in known:
                raise UnknownNameError("installed tracker", name, known)

    def _refuse_to_overwrite(self) -> None:
        folder, config = self.config.output_dir, self.config
        if config.resume:
            checkpoint.latest(folder / "checkpoints")
        elif (folder / "config.json").exists():
            resumable = checkpoint.can_resume(folder)
            state = "a run. Continue it with --resume" if resumable else "a run that has no checkpoint yet"
            raise ConfigError(f"{folder} already holds {state}, choose another --output-dir, or delete it.")


def _where_lerobot_finds(env_config: Any) -> list[str]:
    """What LeRobot's commands need to be told of an environment type that neither they nor a plug-in registers."""
    module = type(env_config).__module__
    if env_config is None or module.startswith("lerobot"):
        return []
    package = module if hasattr(sys.modules[module], "__path__") else module.rpartition(".")[0] or module
    return [f"--env.discover_packages_path={package}"]


def _seen(metrics: Metrics, look: Callable[[Metrics], None], norms: Metrics) -> None:
    """Put norms among an update's metrics, then look at them."""
    metrics |= norms
    look(norms)


def _cosine(start: float, end: float | None, progress: float) -> float:
    """Half a cosine from `start` to `end` (None: `start` all along)."""
    return start if end is None else end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
