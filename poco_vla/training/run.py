"""A run as a record of named parts, built from its configuration."""

from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from accelerate.utils import DistributedType

from poco_vla.algorithms import load_algorithm, options_of
from poco_vla.checkpointing import checkpoint
from poco_vla.checkpointing.progress import Progress
from poco_vla.checkpointing.provenance import Provenance
from poco_vla.checkpointing.versions import ReservedVersions
from poco_vla.config import EnvSpec, TrainConfig, differences, to_json, to_scalars
from poco_vla.data import BatchSource, Episode, Replay
from poco_vla.experience.collector import Collector
from poco_vla.experience.dataset import RunData, open_data, open_policy
from poco_vla.experience.environments import check_demonstrations, open_environments
from poco_vla.experience.episodes import Experience
from poco_vla.experience.interactions import (
    RANK_SEED,
    Acting,
    open_admission,
    open_recorder,
    picture_shapes,
    picture_shapes_of,
)
from poco_vla.experience.prefixes import open_prefixes
from poco_vla.experience.rollouts import Rollouts, open_rollouts
from poco_vla.learner.accelerator import learner_of, open_accelerator
from poco_vla.learner.allocator import keep_freed_memory
from poco_vla.learner.arithmetic import arithmetic_told, gpu_arithmetic
from poco_vla.learner.backends import Learner
from poco_vla.learner.broadcast import Sharing
from poco_vla.learner.failures import Failures
from poco_vla.learner.finite_check import FiniteWatch
from poco_vla.learner.launcher import launched_precision, precision_told
from poco_vla.learner.memory import Budget
from poco_vla.noise import GlobalBatchRNG
from poco_vla.policy import FlowPolicy
from poco_vla.prefix_cache.source import PrefixSource
from poco_vla.progress import Display
from poco_vla.recording.admission import Admission
from poco_vla.recording.recorder import EpisodeRecorder
from poco_vla.registry import check_options, load_adapter
from poco_vla.rollout import Actor, EnvPool
from poco_vla.rollout.actor import WeightsVersion
from poco_vla.run.context import RunContext
from poco_vla.run.folder import RunFolder, choose_folder, refuse_to_overwrite
from poco_vla.run.interruption import Interruption
from poco_vla.run.logbook import Logbook, refuse_unknown_trackers
from poco_vla.run.outlook import Outlook
from poco_vla.training.checkpoints import Checkpoints, Part
from poco_vla.training.collapse import CollapseRecovery
from poco_vla.training.evaluations import Evaluations
from poco_vla.training.guard import CollapseGuard
from poco_vla.training.parts import (
    BaseVersion,
    LearnedWeights,
    NormalisationStatistics,
    OptimizerState,
    RandomNumbers,
    ResumedVersion,
    VectorNames,
)
from poco_vla.training.updates import Updater


@dataclass(frozen=True)
class TrainingRun:
    """All that a run consists of. `checkpoints.parts` are those of its parts that a checkpoint holds.

    Attributes:
        context: services that all parts share.
        failures: tells the processes which of them failed first.
        versions: of the weights, reserved on disk.
        weights: version of the weights that act.
        data: the demonstrations.
        policy: what acts, is evaluated and exported.
        replay: the replay buffer.
        prefixes: the prefix cache; None without one.
        learner: the trained module on the accelerator's backend.
        updater: makes updates.
        recovery: goes back to a good head after a collapse.
        experience: takes episodes in.
        collector: lets the policy act.
        evaluations: evaluates it.
        rollouts: the latest ones, of an algorithm that learns from these alone; None of others.
        checkpoints: saves the run.
        env: the environment, with the instruction that the policy gets; None without one.
        resources: closes workers, threads and the folder's lock.
    """

    context: RunContext
    failures: Failures
    versions: ReservedVersions
    weights: WeightsVersion
    data: RunData
    policy: FlowPolicy
    replay: Replay
    prefixes: PrefixSource | None
    learner: Learner
    updater: Updater
    recovery: CollapseRecovery
    experience: Experience
    collector: Collector
    evaluations: Evaluations
    rollouts: Rollouts | None
    checkpoints: Checkpoints
    env: EnvSpec | None
    resources: ExitStack

    @property
    def admission(self) -> Admission:
        """Return what decides which online episodes are learned from."""
        return self.collector.admission

    def close(self) -> None:
        """Stop workers and trackers, and give the folder back."""
        self.context.interruption.requested = True  # nobody waits for space on a disk any more
        with ExitStack() as stack:  # each is closed, whatever happens to the others
            if self.context.config.trackers:
                stack.callback(self.context.accelerator.end_training)
            stack.callback(self.resources.close)


def build(config: TrainConfig) -> TrainingRun:
    """Build a run, or load it from its newest checkpoint where `config` says to resume.

    Raises:
        PocoError: a bad configuration, dataset, policy or checkpoint, before any long work.
    """
    progress = Progress()  # its clock begins here
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    refuse_unknown_trackers(config.trackers)
    check_options(load_adapter(config.adapter), config.policy_options, pretrained=config.policy is not None)
    asked, config = config, load_algorithm(config.algorithm).fit(config)
    options_of(config)  # they are checked before anything is opened
    fitted = "; ".join(differences(asked, config))
    accelerator = open_accelerator(config)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    precision = launched_precision(config)
    told = precision_told(config, precision)
    config = replace(config, mixed_precision=precision, output_dir=choose_folder(config, accelerator))
    display = Display(enabled=accelerator.is_main_process)
    interruption = Interruption(accelerator, display)
    folder = RunFolder(config.output_dir, display, interruption.is_requested)
    logbook = Logbook(config.output_dir, accelerator, progress, config.log_every, folder.write)
    context = RunContext(config, accelerator, display, folder, interruption, progress, logbook)
    failures = Failures(config.output_dir, accelerator.process_index, accelerator.num_processes)
    with ExitStack() as resources:
        resources.enter_context(gpu_arithmetic(config.precision, accelerator.device))
        if accelerator.is_main_process and not config.output_dir.exists():
            resources.callback(checkpoint.remove_unused_folder, config.output_dir)
        lock = checkpoint.claim_folder(config.output_dir, lock=accelerator.is_main_process)
        resources.callback(lock.release)
        if accelerator.is_main_process:
            failures.forget()
        accelerator.wait_for_everyone()  # the main process has put the folder in order
        with failures.watch():
            refuse_to_overwrite(config)
            if fitted:
                display.say(f'algorithm "{config.algorithm}" changes the run: {fitted}')
            if told is not None:
                display.say(told)
            try:
                return _assemble(context, failures, resources)
            except BaseException:
                interruption.requested = True  # nobody waits for space on a disk any more
                raise
    raise AssertionError("the parts are returned, or an error is raised")


def _assemble(context: RunContext, failures: Failures, resources: ExitStack) -> TrainingRun:
    """Build the parts from the ground up, in a folder that is the run's own; what `resources` holds is the run's."""
    config, accelerator, display, folder = context.config, context.accelerator, context.display, context.folder
    progress, logbook, interruption = context.progress, context.logbook, context.interruption
    is_main, rank, num_ranks = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    project = accelerator.project_configuration
    project.project_dir = project.logging_dir = str(config.output_dir)
    beside = config.interaction.mode != "synchronous"  # else a resumed run makes the same weights again
    versions, weights = ReservedVersions(config.output_dir, folder.write, used=is_main and beside), WeightsVersion()
    algorithm_class, options = load_algorithm(config.algorithm), options_of(config)
    gamma = algorithm_class.gamma(options)
    outlook = Outlook(display.say, config.reward, gamma)
    logbook.watch = outlook.learned
    data = open_data(config, accelerator, display)
    torch.manual_seed(config.seed)
    policy = open_policy(config, data, accelerator)
    demos = data.read(policy, config, display)
    replay = Replay(
        horizon=config.horizon,
        gamma=gamma,
        reward=config.reward,
        config=config.replay,
        folder=config.output_dir,
    )
    replay.extend(demos, is_demo=True)
    provenance = Provenance.of(demos, data.statistics.found, policy.input_keys)
    outlook.demonstrated(demos)

    # Drawn where they are used: a copy from the host would make it wait for a GPU.
    place = accelerator.device if accelerator.device.type == "cuda" else "cpu"
    rng = GlobalBatchRNG(torch.Generator(place).manual_seed(config.seed), rank, num_ranks)
    learner = learner_of(accelerator, algorithm_class(policy, options, rng), config.optim)
    policy = learner.algorithm.policy
    # Looking at a loss makes the host wait for a GPU.
    late = accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU)
    late = late and accelerator.device.type == "cuda"
    finite = FiniteWatch(learner.optimizer.optimizer, interruption.count, late=late)
    prefixes = open_prefixes(config, policy, replay, demos, accelerator, display.say)
    if prefixes is not None:
        resources.callback(prefixes.close)
        logbook.beside = prefixes.rates
    budget = Budget(
        config,
        learner.algorithm,
        learner.optimizer,
        accelerator,
        learner.measure,
        lambda: prefixes.store.num_bytes["device"] if prefixes is not None and prefixes.store is not None else 0,
        lambda: prefixes.batch_bytes if prefixes is not None else 0,
        display.say,
    )
    batches = BatchSource(
        replay,
        policy,
        config.optim.batch_size,
        seed=config.seed,
        rank=rank,
        world_size=num_ranks,
        prefixes=prefixes,
    )
    updater = Updater(
        config,
        accelerator,
        learner,
        batches,
        budget,
        finite,
        progress=progress,
        weights=weights,
        versions=versions,
        logbook=logbook,
    )
    recovery = CollapseRecovery(context, CollapseGuard(config.guard), updater)

    each = config.interaction.ranks == "each"
    sharing = Sharing(accelerator, each=each)
    actor = Actor(learner.algorithm, config.seed + RANK_SEED * rank, config.best_of_n)
    rollouts = open_rollouts(config, learner.algorithm, accelerator)
    actor.rollouts = rollouts
    check_demonstrations(policy, demos)
    envs, env = open_environments(context, policy, demos, sharing, resources)
    admission = open_admission(config, policy, demos, display.say, interruption.is_requested, is_main=is_main)
    recorder = _open_recorder(context, data, policy, envs, admission) if is_main else None
    acting = Acting(
        replace(config, env=env),
        actor,
        weights,
        recorder,
        data.info,
        demos[0].task,
        display.say,
        prefixes.actor_buffer if prefixes is not None else None,
        *((rank, num_ranks) if each else (0, 1)),
        interruption.is_requested,
    )
    collector = Collector(context, acting, sharing, recorder, admission, replay)
    resources.callback(collector.close)
    experience = Experience(
        context,
        data,
        policy,
        replay,
        prefixes=prefixes,
        admission=admission,
        provenance=provenance,
        watch=recovery.add,
    )
    evaluations = Evaluations(context, learner.algorithm, envs, data.info.fps, outlook)
    parts: dict[str, Part] = {  # in the order in which they are loaded
        "base_version": BaseVersion(policy, config.policy),
        "names": VectorNames(policy),
        "statistics": NormalisationStatistics(data.statistics, policy),
        "weights": LearnedWeights(learner),
        "optimizer": OptimizerState(learner),
        "progress": progress,
        "versions": ResumedVersion(context, versions, weights),
        "guard": recovery.guard,
        "good_head": recovery,
        "draws": RandomNumbers(context, rng),
        "batches": batches,
        "logbook": logbook,
        "data": experience,
        "acting": collector,
    }
    parts |= {} if rollouts is None else {"rollouts": rollouts}
    checkpoints = Checkpoints(context, parts)
    _say_sizes(context, updater, demos, replay)
    if config.resume:
        checkpoints.resume()
    elif is_main:
        folder.write_json("config.json", to_json(config))
    if config.trackers:
        accelerator.init_trackers("poco_vla", config=to_scalars(config))
    return TrainingRun(
        context=context,
        failures=failures,
        versions=versions,
        weights=weights,
        data=data,
        policy=policy,
        replay=replay,
        prefixes=prefixes,
        learner=learner,
        updater=updater,
        recovery=recovery,
        experience=experience,
        collector=collector,
        evaluations=evaluations,
        rollouts=rollouts,
        checkpoints=checkpoints,
        env=env,
        resources=resources.pop_all(),
    )


def _open_recorder(
    context: RunContext, data: RunData, policy: FlowPolicy, envs: EnvPool | None, admission: Admission
) -> EpisodeRecorder:
    """Return the recorder of online episodes, for pictures of the environment's sizes or, of robots, the dataset's."""
    config, say, give_up = context.config, context.display.say, context.interruption.is_requested
    features = {key: data.info.features[key] for key in policy.input_keys}
    simulated = envs is not None and config.interaction.mode != "remote"
    shapes = picture_shapes_of(envs.obs) if envs is not None and simulated else picture_shapes(features)
    return open_recorder(config, context.folder.episodes, data.info.fps, shapes, say, give_up, admission)


def _say_sizes(context: RunContext, updater: Updater, demos: list[Episode], replay: Replay) -> None:
    trained = sum(p.numel() for p in updater.actor_parameters)
    context.display.say(
        f"{context.config.adapter}: {trained:,} trained parameters on {context.accelerator.device}; "
        f"{len(demos)} demonstrations ({sum(demo.succeeded for demo in demos)} succeed), {replay.num_demo_steps:,} "
        "steps"
    )
    if context.accelerator.device.type == "cuda":
        sampling = getattr(updater.algorithm.config, "sampling_dtype", None)
        context.display.say(arithmetic_told(context.config.precision, sampling))
