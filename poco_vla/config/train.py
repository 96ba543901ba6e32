"""A whole run: the record of records."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from poco_vla.config.acting import EnvSpec, EvalConfig, InteractionConfig
from poco_vla.config.checks import check_choices, require, require_seed
from poco_vla.config.data import DatasetConfig, DemonstrationConfig, PrefixConfig, ReplayConfig, RewardConfig
from poco_vla.config.poco import PocoConfig
from poco_vla.config.values import num_bytes
from poco_vla.roles import machine, method, reporting

ALGORITHM_SECTIONS = ("poco",)
"""Algorithms whose options are a field of :class:`TrainConfig` of their name; others have `algorithm_options`."""


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
        check_choices(self)
        require(self.least >= 5, f"guard.least is {self.least}; fewer than 5 episodes prove nothing")
        require(self.window >= self.least, f"guard.window is {self.window}, fewer than guard.least ({self.least})")
        require(0 < self.beta_factor <= 1, f"guard.beta_factor is {self.beta_factor}; it must lie in (0, 1]")
        require(self.max_restores >= 0, f"guard.max_restores is {self.max_restores}; it must not be negative")


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
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}; at least 1")
        for name in ("actor_lr", "critic_lr"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("actor_lr_end", "sft_lr"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}; it must be above 0, or None")
        require(self.micro_batch is None or self.micro_batch >= 1, f"micro_batch is {self.micro_batch}; at least 1")
        require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm must be above 0, or None")


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
    rename_map: dict[str, str] = method({}, resume="same data")
    """Columns of the dataset -> the names by which they are read, such as {"actions": "action", "state":
    "observation.state"} for openpi's. As LeRobot's, but for actions too; environments and robots have the new names."""
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
    precision: Literal["fp32", "tf32"] = method("fp32")
    """How a GPU multiplies float32 numbers, as the critic's: as they are, or by TF32 (10 bits of mantissa)."""
    memory: str | None = machine(None)
    """Most memory that the learner takes on its GPU, such as "24GB" or "22.5GiB": an update is computed in parts
    that fit, whose size is measured at the first one. None: at once, on a CPU in parts that suit its caches."""
    trackers: tuple[str, ...] = reporting(())
    """Accelerate trackers that get the same scalars: "tensorboard", "wandb", "trackio", ..."""
    num_threads: int | None = machine(None)
    """Torch threads of the learner on a CPU; None is torch's own choice."""

    def __post_init__(self) -> None:
        check_choices(self)
        require_seed("seed", self.seed)
        require(self.horizon >= 1, f"horizon (H) is {self.horizon}; at least 1")
        for name in ("sft_steps", "warmup_steps", "online_steps", "checkpoint_every", "checkpoint_keep_every"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")
        require(
            0 <= self.checkpoint_minutes < float("inf"),
            f"checkpoint_minutes is {self.checkpoint_minutes}; it must not be negative (0 writes none by time)",
        )
        require(self.log_every >= 1, f"log_every is {self.log_every}; at least 1")
        require(self.best_of_n >= 1, f"best_of_n is {self.best_of_n}; at least 1")
        require(self.updates_per_step > 0, f"updates_per_step is {self.updates_per_step}; it must be above 0")
        if self.memory is not None:
            num_bytes(self.memory)
        ahead = self.interaction.ahead * self.updates_per_step
        require(
            self.interaction.mode == "synchronous" or ahead >= 1,
            f"interaction.ahead is {self.interaction.ahead} steps, at {self.updates_per_step} updates a step not "
            "enough for one update: acting and learning would wait for each other. Raise it.",
        )
        require(
            self.env is not None or self.online_steps == 0 or self.interaction.mode == "remote",
            f"online_steps is {self.online_steps} but there is no env to act in; give one, serve robots "
            '(interaction.mode "remote"), or set online_steps to 0',
        )
        require(
            self.memory is None or self.optim.micro_batch is None,
            f"memory {self.memory} finds how much of a batch is computed at once, and optim.micro_batch "
            f"{self.optim.micro_batch} says it: give one of them",
        )
        require(
            self.demonstrations is None or self.env is not None,
            "demonstrations are made by the environment's scripted expert, but env is None",
        )
