"""Data: rewards, demonstrations, the replay buffer and the prefix cache."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from poco_vla.config.checks import check_choices, require, require_seed
from poco_vla.errors import UnknownNameError
from poco_vla.roles import machine, method


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

    def __post_init__(self) -> None:
        check_choices(self)

    def largest_return(self, gamma: float) -> float:
        """Return the most that an episode can be worth, discounted by `gamma` per control step; inf where rewards are
        recorded. Nothing comes after a success, so that the best one comes at once, unless steps are worth more."""
        if self.source == "recorded":
            return math.inf
        endless = self.step / (1 - gamma) if gamma < 1 else math.copysign(math.inf, self.step) if self.step else 0.0
        return max(self.step + self.success, endless)

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
        require(self.tolerance_s > 0, f"dataset.tolerance_s is {self.tolerance_s}; it must be above 0 seconds")
        require(self.cameras is None or len(self.cameras) > 0, "dataset.cameras is empty; leave it out to use all")


@dataclass(frozen=True)
class DemonstrationConfig:
    """Offline data made on the spot by the simulator's own scripted expert, kept for the next run."""

    kind: Literal["expert", "play", "noisy"] = method("expert")
    """"expert" solves the task; "play" and "noisy" do something or other, as OGBench's published sets (state only)."""
    episodes: int = method(30)
    """Episodes to record; of an expert the successful ones. Of a suite, of each of its tasks."""
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
        check_choices(self)
        require_seed("demonstrations.seed", self.seed)
        require(self.episodes >= 1, f"demonstrations.episodes is {self.episodes}; at least 1")
        require(0 <= self.recovery <= 1, f"demonstrations.recovery is {self.recovery}; it must lie in [0, 1]")
        require(
            self.kind == "expert" or self.recovery == 0,
            f'demonstrations.recovery is {self.recovery} but kind is "{self.kind}": play recovers from nothing',
        )
        require(self.steps >= 2, f"demonstrations.steps is {self.steps}; at least 2")


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
        check_choices(self)
        require(self.capacity >= 1, f"replay.capacity is {self.capacity}; at least 1 step")
        require(self.max_bytes is None or self.max_bytes >= 1, f"replay.max_bytes is {self.max_bytes}; at least 1")
        require(
            self.demo_capacity is None or self.demo_capacity >= 1,
            f"replay.demo_capacity is {self.demo_capacity}; at least 1 step, or None to keep all demonstrations",
        )
        require(
            self.demo_fraction is None or 0 <= self.demo_fraction <= 1,
            f"replay.demo_fraction is {self.demo_fraction}; it must lie in [0, 1], or be None for one uniform pool",
        )
        require(
            self.outlier_multiple is None or self.outlier_multiple >= 1,
            f"replay.outlier_multiple is {self.outlier_multiple}; at least 1 times the demonstrations' largest "
            "magnitude, or None for no bound",
        )
        require(self.consecutive >= 1, f"replay.consecutive is {self.consecutive}; at least 1 transition")


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
        check_choices(self)
        for name in ("device_bytes", "ram_bytes", "disk_bytes"):
            require(getattr(self, name) >= 0, f"prefixes.{name} is {getattr(self, name)}; it must not be negative")
        require(
            self.folder is None or self.disk_bytes > 0 or self.mode == "off",
            f"prefixes.folder is {self.folder}, but prefixes.disk_bytes is 0, which keeps nothing there: say how many "
            "bytes it may take, such as --prefixes.disk-bytes 200000000000",
        )
