"""Configuration: frozen dataclasses, validated when they are built, never changed afterwards.

Every field's docstring says its unit and where its default comes from ("paper": arXiv 2604.01860; "authors' code":
their released simulation code; neither: measured by this library). Every field states its role
(:mod:`poco_vla.roles`), by itself or by the record around it: what may change at a resume, what makes another setting
in a report and what the Hub is told follow from it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.hints import fits, kind_of
from poco_vla.roles import machine, method, reporting

DEFAULT_ENV, DEFAULT_TASK = "ogbench", "cube-single-singletask-task1-v0"
"""Environment type of an :class:`EnvSpec`, and its task."""
ALGORITHM_SECTIONS = ("poco",)
"""Algorithms whose options are a field of :class:`TrainConfig` of their name; others have `algorithm_options`."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _require_seed(name: str, seed: int) -> None:
    _require(0 <= seed < 2**31, f"{name} is {seed}; a seed is a number from 0 to {2**31 - 1}")


@dataclass(frozen=True)
class PocoConfig:
    """The algorithm (sections and equations of the paper)."""

    num_candidates: int = 32
    """N, candidate chunks per state in the E-step (paper: 32 for an MLP, 16 for a VLA)."""
    eta: float = 0.1
    """E-step temperature, in units of discounted reward (paper: 0.1 OGBench, 0.001 RoboMimic and robots)."""
    beta: float = 1.0
    """Weight of the posterior loss beside the anchor (paper: 1)."""
    zeta: float | Literal["auto"] = 0.3
    """Clip of a candidate's flow error, in units of the BC loss (paper: 0.01 to 0.3 by task). "auto" takes
    `zeta_quantile` of the demonstrations' errors after SFT."""
    zeta_quantile: float = 0.9
    """Quantile for zeta = "auto", in (0, 1)."""
    gamma: float = 0.99
    """Discount per control step (paper)."""
    tau: float = 0.005
    """Share of the critic mixed into its target at every update (paper)."""
    aggregation: Literal["mean", "min"] = "mean"
    """How the critics' values become one, in the target and in the E-step (authors' code: mean)."""
    anchor: Literal["all", "demos", "demos_and_successes"] = "all"
    """What the BC term of Eq. 23 imitates: all of D (paper), the demonstrations, or those and own successes."""
    flow_steps: int | None = None
    """K, Euler steps when sampling candidates; None is the model's own number (paper: 10)."""
    sampling_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the E-step's candidates are sampled. bfloat16 rounds what is proposed, not what is learned of
    it; where a CPU or GPU has it, an MLP's update takes about half the time. A VLA samples in its own."""
    warmup_bc: bool = False
    """Go on imitating during critic warm-up (default of the authors' code; paper: the actor is frozen)."""
    drop_crossing: bool = False
    """Leave chunks whose episode ended before their last step out of the critic loss (authors' code). False keeps
    them with their exact n-step return."""
    error_mean: Literal["valid", "all"] = "valid"
    """Denominator of masked means: entries that count, or all of them (authors' code)."""
    critic_hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden widths of each critic (paper)."""
    critic_members: int = 2
    """E, critics in the ensemble (paper)."""
    critic_activation: Literal["silu", "gelu", "relu"] = "silu"
    """Critic activation (paper: silu; authors' code: tanh-approximated gelu)."""
    critic_layer_norm_eps: float = 1e-5
    """LayerNorm epsilon (authors' code: 1e-6)."""

    def __post_init__(self) -> None:
        _require(self.num_candidates >= 1, f"num_candidates (N) is {self.num_candidates}; it must be at least 1")
        _require(self.eta > 0, f"eta is {self.eta}; the E-step temperature must be above 0 (0.001 is nearly greedy)")
        _require(self.beta >= 0, f"beta is {self.beta}; it must not be negative (0 is pure imitation)")
        _require(
            self.zeta == "auto" or (isinstance(self.zeta, int | float) and self.zeta > 0),
            f'zeta is {self.zeta!r}; it must be above 0, or "auto" (to switch the posterior term off, set beta to 0)',
        )
        _require(0 < self.zeta_quantile < 1, f"zeta_quantile is {self.zeta_quantile}; it must lie in (0, 1)")
        _require(0 < self.gamma <= 1, f"gamma is {self.gamma}; it must lie in (0, 1]")
        _require(0 < self.tau <= 1, f"tau is {self.tau}; it must lie in (0, 1]")
        _require(self.flow_steps is None or self.flow_steps >= 1, f"flow_steps is {self.flow_steps}; at least 1")
        _require(self.critic_members >= 1, f"critic_members is {self.critic_members}; at least 1")
        _require(
            len(self.critic_hidden) > 0 and min(self.critic_hidden) > 0,
            f"critic_hidden is {self.critic_hidden}; it needs at least one positive width",
        )


@dataclass(frozen=True)
class RewardConfig:
    """What a control step is worth: the same rule for offline data and for online episodes.

    A step is worth ``step``, plus ``success`` when it reaches success, or plus the recorded reward. `named` has the
    usual ones.
    """

    source: Literal["success", "recorded"] = "success"
    """"success" derives the reward from the success signal; "recorded" takes next.reward, the environment's own."""
    success: float = 1.0
    """Added at the step that reaches success, in units of reward; source "success" only (paper: sparse 0/1)."""
    step: float = 0.0
    """Added at every step, in units of reward (paper's text: 0; authors' code: -0.01)."""

    @classmethod
    def named(cls, name: str) -> "RewardConfig":
        """A reward that papers go by (`REWARDS` says what each is). Raises UnknownNameError."""
        if name not in REWARDS:
            raise UnknownNameError("reward", name, REWARDS)
        return REWARDS[name]


REWARDS = {
    "sparse": RewardConfig(success=1.0, step=0.0),
    "minus_one": RewardConfig(success=1.0, step=-1.0),
    "semi_sparse": RewardConfig(source="recorded"),
    "step_cost": RewardConfig(source="recorded", step=-0.01),
}
"""Name -> reward. "sparse": 1 at success, else 0 (POCO's text). "minus_one": -1 per step, 0 at success (RLPD, QC;
learns faster where episodes are long). "semi_sparse": the environment's own; OGBench's is minus the number of unmet
subgoals after the step, robosuite's is the sparse one. "step_cost": the environment's own less 0.01 per step (POCO's
released code)."""


@dataclass(frozen=True)
class DatasetConfig:
    """Demonstrations: any LeRobot v3 dataset with state or images and actions."""

    repo_id: str = method("", resume="same data")
    """Hub id, or a name for a local folder."""
    root: Path | None = method(None, resume="same data", published=False)
    """Local folder of the dataset; None downloads `repo_id` from the Hub (or takes it from LeRobot's cache)."""
    revision: str | None = method(None, resume="same data")
    """Hub revision (branch, tag or commit)."""
    episodes: tuple[int, ...] | None = method(None, resume="same data")
    """Episodes to use; None is all of them."""
    success_at_end: bool = method(True)
    """A dataset that records neither success nor reward is taken as demonstrations that succeed at their last step."""
    success_reward: float | None = method(None)
    """Where next.success is not recorded: a step whose next.reward reaches this is a success. None understands 0/1 and
    -1/0 rewards by itself, by one convention for the whole dataset."""
    success_threshold: float | None = method(None)
    """Threshold of a numeric next.success: a step that reaches it is a success. None understands true/false and 0/1
    by itself."""
    cameras: tuple[str, ...] | None = method(None)
    """Cameras to use, by their columns, in the order in which the policy is to see them; None takes all that are not
    depth cameras."""
    tolerance_s: float = method(1e-4)
    """Most by which a video frame may be off the time of its row, in seconds (LeRobot)."""
    max_image_bytes: int = machine(8 * 1024**3)
    """Most memory that decoded images may take, in bytes."""

    def __post_init__(self) -> None:
        _require(self.tolerance_s > 0, f"dataset.tolerance_s is {self.tolerance_s}; it must be above 0 seconds")
        _require(self.cameras is None or len(self.cameras) > 0, "dataset.cameras is empty; leave it out to use all")


@dataclass(frozen=True)
class EnvSpec:
    """A simulated environment, by its LeRobot name."""

    type: str = method(DEFAULT_ENV)
    """LeRobot environment type (an `EnvConfig` choice), such as "ogbench" or "pusht"."""
    task: str = method("")
    """Its task; empty takes the type's own default."""
    options: dict[str, Any] = method({})
    """Further fields of that EnvConfig, such as {"episode_length": 120}."""
    num_envs: int = method(4)
    """Environments stepped side by side; each chunk is sampled for all of them at once."""
    in_process: bool = machine(False)
    """Step them inside this process instead of in worker processes (debugging; small tests). A step that hangs cannot
    be ended there: the time limits in seconds do not hold."""
    instruction: str | None = method(None)
    """The instruction that the policy is told in every episode, and that is recorded. None: what the environment says
    after each reset; where it says nothing and all demonstrations have one instruction, that one."""
    step_timeout: float = machine(60.0)
    """Seconds after which a control step counts as hung: the worker process is ended and replaced, its episode dropped;
    0 sets no limit."""
    reset_timeout: float = machine(300.0)
    """The same for starting an environment, a reset, and the first step after a start; 0 sets no limit."""
    max_episode_steps: int | None = method(None)
    """Control steps after which an episode is cut off, as by a time limit. None: twice what the environment declares,
    2,000 where it declares nothing."""
    max_failures: int = machine(5)
    """Failures of one environment in a row (errors, NaN, hung or dead workers), without a finished episode in between,
    after which the run stops."""

    def __post_init__(self) -> None:
        if not self.task and self.type == DEFAULT_ENV:
            object.__setattr__(self, "task", DEFAULT_TASK)
        _require(self.num_envs >= 1, f"num_envs is {self.num_envs}; at least 1")
        for name in ("step_timeout", "reset_timeout"):
            _require(
                getattr(self, name) >= 0, f"env.{name} is {getattr(self, name)}; it must not be negative (0: none)"
            )
        _require(
            self.max_episode_steps is None or self.max_episode_steps >= 1,
            f"env.max_episode_steps is {self.max_episode_steps}; at least 1, or None",
        )
        _require(self.max_failures >= 1, f"env.max_failures is {self.max_failures}; at least 1")


@dataclass(frozen=True)
class DemonstrationConfig:
    """Offline data made on the spot by the simulator's own scripted expert, kept for the next run."""

    kind: Literal["expert", "play", "noisy"] = method("expert")
    """"expert" solves the task; "play" and "noisy" do something or other, as OGBench's published sets (state only)."""
    episodes: int = method(30)
    """Episodes to record; of an expert the successful ones."""
    noise: float = method(0.1)
    """The expert's own noise level (OGBench: its oracle's `noise`; 0.1 in the published sets)."""
    recovery: float = method(0.0)
    """Share of the expert's attempts that begin with a disturbance, which is not recorded: how to recover (DAgger)."""
    steps: int = method(1001)
    """Rows of one play trajectory (OGBench's published sets: 1,001)."""
    seed: int = method(0)
    """Seed of environment and expert. Not the training seed: all training seeds share one dataset."""
    root: Path = machine(Path("runs/data"), resume="same data")
    """Folder that holds the datasets, one sub-folder per task and settings."""
    video: bool = method(True)
    """Camera images as video, LeRobot's usual form; False stores PNG, bit for bit."""
    workers: int | None = machine(None)
    """Processes that collect side by side; None is one per core. The dataset does not depend on it."""

    def __post_init__(self) -> None:
        _require_seed("demonstrations.seed", self.seed)
        _require(self.episodes >= 1, f"demonstrations.episodes is {self.episodes}; at least 1")
        _require(0 <= self.recovery <= 1, f"demonstrations.recovery is {self.recovery}; it must lie in [0, 1]")
        _require(
            self.kind == "expert" or self.recovery == 0,
            f'demonstrations.recovery is {self.recovery} but kind is "{self.kind}": play recovers from nothing',
        )
        _require(self.steps >= 2, f"demonstrations.steps is {self.steps}; at least 2")


@dataclass(frozen=True)
class ReplayConfig:
    """The pool D of offline and online transitions."""

    capacity: int = method(2_000_000)
    """Online control steps that are kept; the oldest episodes go first (paper: 2M)."""
    max_bytes: int | None = method(None)
    """Most bytes that online steps may take, mapped pictures included; None sets no limit. The smaller of this and
    `capacity` holds."""
    demo_capacity: int | None = method(None)
    """Demonstration steps that are kept, the oldest going first; None keeps all."""
    demo_fraction: float | None = method(None)
    """Share of each batch drawn from demonstrations; None draws uniformly from the whole pool (authors' code), 0.5 is
    a 50/50 mix (RLPD)."""
    consecutive: int = method(1)
    """Transitions that are drawn together: chunks of one episode that follow on each other, so that so many need one
    prefix more instead of twice as many. Each transition is as likely as without, but a batch is less varied."""
    images: Literal["memory", "mapped"] = machine("memory")
    """Where pictures lie: in memory, or in a mapped file without a name in the run's folder, of which the system keeps
    in memory what it has room for."""
    outlier_multiple: float | None = method(100.0, resume="free")
    """An online episode with a state, an action or a recorded reward beyond so many times the largest magnitude of the
    demonstrations is not learned from: it is set aside in the run's folder. None takes any number that stays finite."""

    def __post_init__(self) -> None:
        _require(self.capacity >= 1, f"replay.capacity is {self.capacity}; at least 1 step")
        _require(self.max_bytes is None or self.max_bytes >= 1, f"replay.max_bytes is {self.max_bytes}; at least 1")
        _require(
            self.demo_capacity is None or self.demo_capacity >= 1,
            f"replay.demo_capacity is {self.demo_capacity}; at least 1 step, or None to keep all demonstrations",
        )
        _require(
            self.demo_fraction is None or 0 <= self.demo_fraction <= 1,
            f"replay.demo_fraction is {self.demo_fraction}; it must lie in [0, 1], or be None for one uniform pool",
        )
        _require(
            self.outlier_multiple is None or self.outlier_multiple >= 1,
            f"replay.outlier_multiple is {self.outlier_multiple}; at least 1 times the demonstrations' largest "
            "magnitude, or None for no bound",
        )
        _require(self.consecutive >= 1, f"replay.consecutive is {self.consecutive}; at least 1 transition")


@dataclass(frozen=True)
class PrefixConfig:
    """The store of prefixes: the frozen part of a policy sees a state once, what it made of it is kept."""

    mode: Literal["off", "auto", "on"] = machine("auto")
    """"auto" measures in the first updates whether it pays, and says so; it stays off where acting is in step with
    learning, which repeats bit for bit: which states are encoded together depends on what was found, so that with a
    store a VLA's results repeat but for rounding."""
    device_bytes: int = machine(0)
    """Most bytes of the accelerator's memory, of each process; they are not part of `memory`."""
    ram_bytes: int = machine(4 * 1024**3)
    """Most bytes of RAM, of each process; where acting goes on beside learning, an eighth is for what acting has
    encoded, which learning takes over."""
    disk_bytes: int = machine(0)
    """Most bytes on disk, of each process."""
    folder: Path | None = machine(None)
    """Where on disk: demonstrations' prefixes stay there for later runs, which then start warm. None is the run's
    folder."""
    dtype: Literal["exact", "fp8"] = method("exact")
    """"exact" keeps what the model computed; "fp8" half as many bytes of keys, values and tokens (8-bit floats with a
    scale per token)."""

    def __post_init__(self) -> None:
        for name in ("device_bytes", "ram_bytes", "disk_bytes"):
            _require(getattr(self, name) >= 0, f"prefixes.{name} is {getattr(self, name)}; it must not be negative")
        _require(
            self.folder is None or self.disk_bytes > 0 or self.mode == "off",
            f"prefixes.folder is {self.folder}, but prefixes.disk_bytes is 0, which keeps nothing there: say how many "
            "bytes it may take, such as --prefixes.disk-bytes 200000000000",
        )


@dataclass(frozen=True)
class InteractionConfig:
    """How acting and learning go side by side (the two threads of Algorithm 1)."""

    mode: Literal["synchronous", "asynchronous", "remote", "ray"] = method("synchronous")
    """"synchronous" takes turns in one process and repeats bit for bit; "asynchronous" acts in a thread of its own;
    "remote" serves the policy to robots (`poco-vla robot`), which send their episodes; "ray" acts in simulators on the
    machines of a Ray cluster."""
    ranks: Literal["main", "each"] = method("main")
    """Of several processes, those that act: the main one, or each with `env.num_envs` environments of its own and seeds
    that no other plays. Their episodes go to all of them, and the main one records them."""
    ahead: int = method(1000)
    """Control steps by which either side may run ahead of `updates_per_step`; synchronous: 0."""
    images: Literal["auto", "png", "video"] = method("auto")
    """How pictures of online episodes are stored: PNG is exact, video is small. "auto" is PNG where a resumed run
    repeats bit for bit, else video."""
    host: str = machine("127.0.0.1")
    """Remote: address to listen on; 0.0.0.0 is all of this machine's, for which the environment variable
    POCO_VLA_TOKEN has to hold a token."""
    port: int = machine(8000)
    """Remote: port; 0 takes a free one."""
    certificate: Path | None = machine(None)
    """Remote: TLS certificate (PEM)."""
    key: Path | None = machine(None)
    """Remote: its private key (PEM)."""
    insecure: bool = machine(False)
    """Remote: serve other machines without a token."""
    address: str | None = machine(None)
    """Ray: the cluster, as "host:port" of its head or "auto" for the one that this machine belongs to. None takes what
    the environment variable RAY_ADDRESS says, or starts a cluster on this machine for as long as the run takes."""
    workers: int = machine(2)
    """Ray: processes that act, each with `env.num_envs` environments and a policy of its own."""
    worker_cpus: float = machine(1.0)
    """Ray: CPU cores that each worker asks for."""
    worker_gpus: float = machine(0.0)
    """Ray: GPUs that each worker asks for, such as 0.25; above 0 the policy acts on one."""

    def __post_init__(self) -> None:
        _require(
            self.ranks == "main" or self.mode in ("synchronous", "asynchronous"),
            f'interaction.ranks is "each", but with mode "{self.mode}" one process deals with all that act: '
            'leave it at "main"',
        )
        _require(
            0 <= self.port <= 65535,
            f"interaction.port is {self.port}; a port is a number from 1 to 65535, or 0 for a free one",
        )
        _require(self.ahead >= 1, f"interaction.ahead is {self.ahead}; at least 1 control step")
        _require(self.workers >= 1, f"interaction.workers is {self.workers}; at least 1")
        _require(self.worker_cpus > 0, f"interaction.worker_cpus is {self.worker_cpus}; it must be above 0")
        _require(self.worker_gpus >= 0, f"interaction.worker_gpus is {self.worker_gpus}; it must not be negative")
        _require(
            self.address is None or "://" not in self.address,
            f'interaction.address is "{self.address}"; expected "host:port" of the cluster\'s head, or "auto". The '
            "learner has to run on one of the cluster's machines: Ray's client (ray://) has no object store",
        )
        _require(
            self.mode != "synchronous" or self.images != "video",
            'interaction.images is "video", which is not exact, but a synchronous run repeats bit for bit: use "png"',
        )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation by success rate."""

    episodes: int = method(50)
    """Episodes per evaluation (paper: 50 in simulation)."""
    every: int = method(0)
    """Environment steps between evaluations while online; 0 evaluates only after SFT and at the end."""
    seed: int = method(100_000)
    """Seed of the first episode; episode i starts from seed + i. Every evaluation meets the same starts."""
    videos: bool = reporting(True)
    """Write a video of a success and of a failure, after SFT and at the end, as far as there are any."""

    def __post_init__(self) -> None:
        _require_seed("eval.seed", self.seed)
        _require(self.episodes >= 1, f"eval.episodes is {self.episodes}; at least 1")
        _require(self.every >= 0, f"eval.every is {self.every}; it must not be negative")


@dataclass(frozen=True)
class GuardConfig:
    """What happens when practice makes the policy significantly worse than it was after SFT."""

    action: Literal["restore", "stop", "off"] = "restore"
    """"restore" goes on from the last good head with a smaller beta; "stop" ends the run with that head."""
    window: int = 50
    """Most training episodes over which success is compared; as many lie between two heads that are kept."""
    least: int = 20
    """Fewest training episodes over which it is."""
    beta_factor: float = 0.5
    """What beta is multiplied by at each restoration."""
    max_restores: int = 3
    """Restorations after which the run ends with the last good head."""

    def __post_init__(self) -> None:
        _require(self.least >= 5, f"guard.least is {self.least}; fewer than 5 episodes prove nothing")
        _require(self.window >= self.least, f"guard.window is {self.window}, fewer than guard.least ({self.least})")
        _require(0 < self.beta_factor <= 1, f"guard.beta_factor is {self.beta_factor}; it must lie in (0, 1]")
        _require(self.max_restores >= 0, f"guard.max_restores is {self.max_restores}; it must not be negative")


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation: Adam with one parameter group for the actor and one for the critic."""

    batch_size: int = method(256)
    """Transitions per update, over all processes (paper: 256, VLA 64)."""
    actor_lr: float = method(3e-4)
    """Learning rate of the flow head while online (paper: 3e-4, VLA 5e-5)."""
    critic_lr: float = method(3e-4)
    """Learning rate of the critic (paper)."""
    actor_lr_end: float | None = method(None)
    """Learning rate of the flow head at the last online step, reached along a half cosine; None keeps `actor_lr`
    (paper). A policy that is judged where it ends is steadier for it."""
    sft_lr: float | None = method(None)
    """Learning rate of the flow head during SFT; None is `actor_lr`."""
    micro_batch: int | None = machine(None)
    """Transitions of a batch, per process, that are computed at once; their gradients add up to those of the batch (but
    for rounding). None: as many as fit `memory`."""
    max_grad_norm: float | None = method(None)
    """Clips actor and critic gradients, each group by itself; None only measures them (authors' code: no clipping)."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, f"batch_size is {self.batch_size}; at least 1")
        for name in ("actor_lr", "critic_lr"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("actor_lr_end", "sft_lr"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} is {value}; it must be above 0, or None")
        _require(self.micro_batch is None or self.micro_batch >= 1, f"micro_batch is {self.micro_batch}; at least 1")
        _require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm must be above 0, or None")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run: data, policy, both stages, evaluation. A recipe is a function that returns one."""

    adapter: str = method("flow_mlp")
    """Model adapter by name (`poco-vla adapters` lists the installed ones)."""
    policy: str | None = method(None, published=False)
    """LeRobot policy folder or Hub id to start from; None builds a fresh one from the dataset's features."""
    statistics: Literal["auto", "dataset", "checkpoint"] = method("auto")
    """Whose cameras, dimensions and normalisation hold: "dataset" as when fine-tuning a base model, "checkpoint" as
    when going on with a policy that was trained on this data; "auto" takes a fine-tuned policy's own, and the
    dataset's for a base."""
    outside_statistics: Literal["refuse", "allow"] = reporting("refuse")
    """Reaction to demonstrations that do not fit the statistics in use (other units, deltas in the place of
    positions): "refuse" ends the run before training, "allow" says so and trains."""
    policy_options: dict[str, Any] = method({})
    """The adapter's own options, such as {"hidden_dims": [512, 512, 512, 512]} for flow_mlp."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    """Offline demonstrations."""
    demonstrations: DemonstrationConfig | None = None
    """Make the dataset with the environment's scripted expert when it is not there yet; a `dataset` that is given comes
    before it."""
    env: EnvSpec | None = None
    """Where the policy acts, and is evaluated; None trains stage 1 only, or on robots (`interaction`)."""
    reward: RewardConfig = method(RewardConfig())
    """What a step is worth."""
    horizon: int = method(5)
    """H, control steps per chunk (paper: 5 in simulation, 4 and 10 on robots)."""
    algorithm: str = method("poco")
    """Algorithm by name (`poco-vla algorithms` lists the installed ones)."""
    algorithm_options: dict[str, Any] = method({})
    """Options of an algorithm that has no section of its own here, such as {"anchor": "demos"} for "bc"; on the
    command line below the algorithm's name (`--bc.anchor demos`)."""
    poco: PocoConfig = method(PocoConfig())
    """POCO's options."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimisation."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """The pool."""
    prefixes: PrefixConfig = field(default_factory=PrefixConfig)
    """The store of prefixes."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    guard: GuardConfig = method(GuardConfig())
    """What happens on a collapse."""
    sft_steps: int = method(20_000)
    """Updates of stage 1 (paper: 20k to 500k by task)."""
    warmup_steps: int = method(5_000)
    """Critic updates with the actor frozen (paper: 5k in simulation, 2k VLA)."""
    online_steps: int = method(200_000)
    """Environment steps of stage 2."""
    updates_per_step: float = method(1.0)
    """UTD, updates per environment step (authors' code: 1 in simulation)."""
    interaction: InteractionConfig = field(default_factory=InteractionConfig)
    """How acting and learning go side by side."""
    best_of_n: int = method(1)
    """Candidates per acting step in training, the critic's favourite is executed; 1 is a plain sample (paper)."""
    seed: int = method(0, setting=False)
    """Seed of initial weights, batches, draws and episode starts."""
    output_dir: Path = machine(Path("runs/poco/{time}"))
    """Folder of this run; "{time}" becomes its start time and seed."""
    resume: bool = machine(False)
    """Continue the run in `output_dir` (with "{time}": the newest one) from its last checkpoint."""
    checkpoint_every: int = reporting(10_000)
    """Updates between checkpoints; 0 saves at the end of each stage and on Ctrl-C only. The newest two are kept."""
    checkpoint_minutes: float = reporting(5.0)
    """Minutes after which a checkpoint is written besides, so that a kill takes no more back; 0 writes none by time.
    Where writing takes long, at most 5 % of the time goes into it."""
    checkpoint_keep_every: int = reporting(0)
    """Checkpoints that are kept besides: those of every so many updates; 0 keeps none besides."""
    accept_changed_data: bool = reporting(False)
    """Resume although demonstrations or online episodes are not those that the run was trained on."""
    log_every: int = reporting(50)
    """Updates between log lines."""
    mixed_precision: Literal["no", "bf16"] = method("no")
    """Accelerate's mixed precision for the policy; the critic stays in float32."""
    memory: str | None = machine(None)
    """Most memory that the learner takes on its GPU, such as "24GB" or "22.5GiB": an update is computed in parts
    that fit, whose size is measured at the first one. None: at once, on a CPU in parts that suit its caches."""
    trackers: tuple[str, ...] = reporting(())
    """Accelerate trackers that get the same scalars: "tensorboard", "wandb", "trackio", ..."""
    num_threads: int | None = machine(None)
    """Torch threads of the learner on a CPU; None is torch's own choice."""

    def __post_init__(self) -> None:
        _require_seed("seed", self.seed)
        _require(self.horizon >= 1, f"horizon (H) is {self.horizon}; at least 1")
        for name in ("sft_steps", "warmup_steps", "online_steps", "checkpoint_every", "checkpoint_keep_every"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")
        _require(
            0 <= self.checkpoint_minutes < float("inf"),
            f"checkpoint_minutes is {self.checkpoint_minutes}; it must not be negative (0 writes none by time)",
        )
        _require(self.log_every >= 1, f"log_every is {self.log_every}; at least 1")
        _require(self.best_of_n >= 1, f"best_of_n is {self.best_of_n}; at least 1")
        _require(self.updates_per_step > 0, f"updates_per_step is {self.updates_per_step}; it must be above 0")
        if self.memory is not None:
            num_bytes(self.memory)
        ahead = self.interaction.ahead * self.updates_per_step
        _require(
            self.interaction.mode == "synchronous" or ahead >= 1,
            f"interaction.ahead is {self.interaction.ahead} steps, at {self.updates_per_step} updates a step not "
            "enough for one update: acting and learning would wait for each other. Raise it.",
        )
        _require(
            self.env is not None or self.online_steps == 0 or self.interaction.mode == "remote",
            f"online_steps is {self.online_steps} but there is no env to act in; give one, serve robots "
            '(interaction.mode "remote"), or set online_steps to 0',
        )
        _require(
            self.memory is None or self.optim.micro_batch is None,
            f"memory {self.memory} finds how much of a batch is computed at once, and optim.micro_batch "
            f"{self.optim.micro_batch} says it: give one of them",
        )
        _require(
            self.demonstrations is None or self.env is not None,
            "demonstrations are made by the environment's scripted expert, but env is None",
        )


def num_bytes(text: str) -> int:
    """Bytes that a text such as "24GB", "22.5 GiB" or "500 MB" stands for. Raises ConfigError for any other."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in units or float(found[1]) == 0:
        raise ConfigError(f'"{text}" is no amount of memory; write it like 24GB, 22.5GiB or 500MB')
    return int(float(found[1]) * units[found[2].upper()])


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return json.loads(json.dumps(asdict(config), default=str))


def to_scalars(config: Any) -> dict[str, int | float | str]:
    """A configuration as one flat table of plain values, as trackers show it; what is neither is its text."""
    table = flat(to_json(config))
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in table.items()}


def from_json(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """Rebuild a configuration from :func:`to_json`.

    Raises:
        UnknownNameError: `cls` does not have a field.
        ConfigError: a value is not of its field's type.
    """
    known = {f.name for f in fields(cls)}
    for name in values:
        if name not in known:
            raise UnknownNameError(f"field of {cls.__name__}", name, known)
    hints = get_type_hints(cls)
    for name, value in values.items():
        if not fits(hints[name], value):
            raise ConfigError(f"{name} of {cls.__name__} is {value!r}; expected {kind_of(hints[name])}")
    return cls(**{name: _revive(hints[name], value) for name, value in values.items()})


def _revive(hint: Any, value: Any) -> Any:
    options = getattr(hint, "__args__", ()) if not isinstance(hint, type) or hasattr(hint, "__origin__") else ()
    kinds = [hint, *options]
    if isinstance(value, dict):
        nested = next((kind for kind in kinds if is_dataclass(kind)), None)
        return from_json(nested, value) if isinstance(nested, type) else value
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    return value


def differences(old: Any, new: Any) -> list[str]:
    """Fields in which two configurations differ, as "name: old -> new" lines."""
    a, b = flat(to_json(old)), flat(to_json(new))
    return [f"{name}: {a.get(name)!r} -> {b.get(name)!r}" for name in sorted(a | b) if a.get(name) != b.get(name)]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one table with dotted names: {"poco": {"eta": 0.1}} -> {"poco.eta": 0.1}."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out
