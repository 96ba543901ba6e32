"""Acting: environments, how acting and learning go side by side, evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from poco_vla.config.checks import check_choices, require, require_seed
from poco_vla.roles import machine, method, reporting

DEFAULT_ENV, DEFAULT_TASK = "ogbench", "cube-single-singletask-task1-v0"
"""Environment type of an :class:`EnvSpec`, and its task."""


@dataclass(frozen=True)
class EnvSpec:
    """A simulated environment, by its LeRobot name."""

    type: str = method(DEFAULT_ENV)
    """LeRobot environment type (an `EnvConfig` choice), such as "ogbench" or "pusht"."""
    task: str = method("")
    """Its task; empty takes the type's own default. Several with commas between them, or the name of a suite where the
    type has some, are one environment: episodes cycle over the tasks."""
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
    trust_remote_code: bool = machine(False)
    """Consent to download and run a Hub environment's code (LeRobot's own flag)."""

    def __post_init__(self) -> None:
        if not self.task and self.type == DEFAULT_ENV:
            object.__setattr__(self, "task", DEFAULT_TASK)
        require(self.num_envs >= 1, f"num_envs is {self.num_envs}; at least 1")
        for name in ("step_timeout", "reset_timeout"):
            require(getattr(self, name) >= 0, f"env.{name} is {getattr(self, name)}; it must not be negative (0: none)")
        require(
            self.max_episode_steps is None or self.max_episode_steps >= 1,
            f"env.max_episode_steps is {self.max_episode_steps}; at least 1, or None",
        )
        require(self.max_failures >= 1, f"env.max_failures is {self.max_failures}; at least 1")


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
        check_choices(self)
        require(
            self.ranks == "main" or self.mode in ("synchronous", "asynchronous"),
            f'interaction.ranks is "each", but with mode "{self.mode}" one process deals with all that act: '
            'leave it at "main"',
        )
        require(
            0 <= self.port <= 65535,
            f"interaction.port is {self.port}; a port is a number from 1 to 65535, or 0 for a free one",
        )
        require(self.ahead >= 1, f"interaction.ahead is {self.ahead}; at least 1 control step")
        require(self.workers >= 1, f"interaction.workers is {self.workers}; at least 1")
        require(self.worker_cpus > 0, f"interaction.worker_cpus is {self.worker_cpus}; it must be above 0")
        require(self.worker_gpus >= 0, f"interaction.worker_gpus is {self.worker_gpus}; it must not be negative")
        require(
            self.address is None or "://" not in self.address,
            f'interaction.address is "{self.address}"; expected "host:port" of the cluster\'s head, or "auto". The '
            "learner has to run on one of the cluster's machines: Ray's client (ray://) has no object store",
        )
        require(
            self.mode != "synchronous" or self.images != "video",
            'interaction.images is "video", which is not exact, but a synchronous run repeats bit for bit: use "png"',
        )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation by success rate."""

    episodes: int = method(50)
    """Episodes per evaluation (paper: 50 in simulation); of a suite, of each of its tasks."""
    every: int = method(0)
    """Environment steps between evaluations while online; 0 evaluates only after SFT and at the end."""
    seed: int = method(100_000)
    """Seed of the first episode; episode i starts from seed + i. Every evaluation meets the same starts."""
    videos: bool = reporting(True)
    """Write a video of a success and of a failure, after SFT and at the end, as far as there are any."""

    def __post_init__(self) -> None:
        require_seed("eval.seed", self.seed)
        require(self.episodes >= 1, f"eval.episodes is {self.episodes}; at least 1")
        require(self.every >= 0, f"eval.every is {self.every}; it must not be negative")
