"""The contract of an algorithm: its losses, how it acts, and what trains. Training and acting know only this."""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poco_vla.config import TrainConfig
from poco_vla.errors import ConfigError
from poco_vla.noise import GlobalBatchRNG, UpdateNoise
from poco_vla.policy import FlowPolicy, Prefix, propose
from poco_vla.types import ChunkBatch, Metrics

type Stage = Literal["sft", "warmup", "online"]
STAGES: tuple[Stage, ...] = ("sft", "warmup", "online")
type Phase = str
"""One optimizer step of an update, by the method that gives its loss: "sft" is that of `sft_loss`."""

type Loss = tuple[Float[Tensor, ""], Metrics]
"""A loss to call backward on, and named scalars for the log, detached."""


class ParameterGroup(TypedDict):
    """A group of the optimizer, as torch takes it: its name, its parameters and their learning rate."""

    name: str
    params: list[nn.Parameter]
    lr: float


def group(name: str, module: nn.Module, lr: float) -> ParameterGroup:
    """Return the parameter group of a module."""
    return {"name": name, "params": list(module.parameters()), "lr": lr}


class Algorithm(nn.Module):
    """An algorithm over a policy: one module, with whatever else learns, so that one `prepare` and one backward serve
    every Accelerate backend.

    A subclass writes the losses of its stages and `draw_noise`; the rest has defaults. By itself this class acts with
    plain samples of the policy and learns nothing. An update is one optimizer step on the loss of its stage, unless
    `phases` names several. A loop of one's own reads::

        optimizer = torch.optim.Adam(algorithm.parameter_groups())
        for batch in batches:
            loss, metrics = algorithm.online_loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            algorithm.after_step("online")

    Args:
        policy: the actor, its backbone already frozen.
        config: the algorithm's options, a `config_class`; its defaults when None.
        rng: source of the random numbers of updates; torch's default generator when None.
    """

    title: ClassVar[str]
    """Name in tables and pictures; that of the class where a subclass gives none."""
    config_class: ClassVar[type[Any]]
    """Frozen dataclass of the algorithm's options."""
    has_sft: ClassVar[bool] = True
    """True if supervised fine-tuning of the policy is what the algorithm begins with."""
    has_warmup: ClassVar[bool] = True
    """True if there is something to learn before the actor changes, such as a critic."""
    ranks_candidates: ClassVar[bool] = False
    """True if `act` chooses the best of n > 1 candidates."""
    tiny_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Options with which a run takes seconds on a CPU: small networks, few candidates."""
    sft_trains_policy: ClassVar[bool] = True
    """True if SFT trains the policy alone, so that a policy from another algorithm's SFT serves as well."""
    horizon: ClassVar[int | None] = None
    """Control steps of a chunk, where the algorithm works with no other number; None works with any."""
    own_options: ClassVar[frozenset[str]] = frozenset()
    """Options that keep their defaults where a recipe gives POCO's of the same name another value
    (:mod:`poco_vla.algorithms.scaling`)."""
    learning_rates: ClassVar[tuple[float, float] | None] = None
    """Learning rates of policy and value that its authors give, at POCO's own 3e-4; None takes POCO's."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "title" not in cls.__dict__:
            cls.title = cls.__name__

    def __init__(self, policy: FlowPolicy, config: Any = None, rng: GlobalBatchRNG | None = None) -> None:
        super().__init__()
        # Deviation 7: eval mode throughout, so that candidates are plain samples and `rng` is the only randomness.
        self.policy = policy.eval()
        self.config = self.config_class() if config is None and hasattr(self, "config_class") else config
        self.rng = rng or GlobalBatchRNG(torch.default_generator)

    # -- learning -------------------------------------------------------------------------------------------------

    def sft_loss(self, batch: ChunkBatch, noise: Any = None) -> Loss:
        """Return the loss of stage 1, supervised fine-tuning on demonstrations.

        Args:
            batch: transitions.
            noise: `draw_noise` of the batch in this stage; drawn here when None.
        """
        raise NotImplementedError(f"{type(self).__name__} has no sft_loss")

    def warmup_loss(self, batch: ChunkBatch, noise: Any = None) -> Loss:
        """Return the loss of the updates before the actor changes online, likewise."""
        raise NotImplementedError(f"{type(self).__name__} has no warmup_loss")

    def online_loss(self, batch: ChunkBatch, noise: Any = None) -> Loss:
        """Return the loss of an online update, likewise."""
        raise NotImplementedError(f"{type(self).__name__} has no online_loss")

    @classmethod
    def stages(cls) -> tuple[Stage, ...]:
        """Return the stages in which the algorithm learns."""
        has = {"sft": cls.has_sft, "warmup": cls.has_warmup, "online": True}
        return tuple(stage for stage in STAGES if has[stage])

    def phases(self, stage: Stage, update: int) -> tuple[Phase, ...]:
        """Return the optimizer steps of an update, in their order; all are computed on its one batch.

        Args:
            stage: of the update.
            update: its number in that stage, from 0.
        """
        return (stage,)

    def draw_noise(self, batch: ChunkBatch, phase: Phase) -> Any:
        """Return the :class:`UpdateNoise` of a phase. On several processes all of them call this together."""
        return UpdateNoise()

    def forward(self, batch: ChunkBatch, phase: Phase, noise: Any = None) -> Loss:
        """Return the loss of a phase. Accelerate's wrappers call this."""
        return getattr(self, f"{phase}_loss")(batch, noise)

    def after_step(self, phase: Phase) -> None:
        """Update what follows the weights after a phase's optimizer step, such as target networks."""

    def parameter_groups(self, actor_lr: float = 3e-4, critic_lr: float = 3e-4) -> list[ParameterGroup]:
        """Return what trains, each group with its learning rate. The first group is the policy's, "actor"."""
        return [{"name": "actor", "params": [p for p in self.policy.parameters() if p.requires_grad], "lr": actor_lr}]

    def trained_groups(self, phase: Phase) -> frozenset[str]:
        """Return the names of the parameter groups that have a gradient in a phase."""
        return frozenset(group["name"] for group in self.parameter_groups())

    def reads_next(self, phase: Phase) -> bool:
        """Return True if the loss of a phase reads the next observations of a batch."""
        return phase != "sft"

    def chunks_per_state(self, phase: Phase) -> int:
        """Return the chunks of each state whose flow errors have a gradient in a phase; 0 if none has."""
        return 1

    @classmethod
    def gamma(cls, config: Any) -> float:
        """Return the discount per control step of the returns that the losses read: the option `gamma` if there is one,
        else 1."""
        return getattr(config, "gamma", 1.0)

    # -- acting ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, prefix: Prefix, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return a chunk for each of B states, as this algorithm acts in the online stage and in evaluations.

        Args:
            prefix: B encoded states.
            n: candidates per state of which the best is taken (`TrainConfig.best_of_n`, in training alone); 1 leaves it
                to the algorithm, here to take a plain sample of the policy.
            generator: draws the noise.
        """
        assert n == 1, f"{type(self).__name__} does not rank candidates"
        return propose(self.policy, prefix, 1, generator=generator)[:, 0]

    @torch.no_grad()
    def act_untrained(self, prefix: Prefix, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return a chunk for each of B states before the algorithm has learned anything but SFT: at the evaluation
        after SFT, and until the warm-up is over."""
        return propose(self.policy, prefix, 1, generator=generator)[:, 0]

    def acts_with(self, n: int) -> tuple[str, ...]:
        """Return the names of the submodules beside the policy that `act` with `n` candidates reads. If there are none
        for n = 1, the policy that is exported acts as it was trained."""
        return ()

    def for_acting(self, n: int = 1) -> "Algorithm":
        """Return an algorithm that shares this one's weights and holds only what `act` with `n` candidates reads."""
        view = copy(self)
        modules = {name: self._modules[name] for name in ("policy", *self.acts_with(n))}
        view.__dict__.update(_modules=modules, rng=None)
        return view

    # -- a run ----------------------------------------------------------------------------------------------------

    @classmethod
    def fit(cls, config: TrainConfig) -> TrainConfig:
        """Return the configuration of a run as this algorithm needs it, such as without a stage that it does not have.

        Raises:
            ConfigError: the run lacks what the algorithm needs.
        """
        if config.best_of_n > 1 and not cls.ranks_candidates:
            raise ConfigError(
                f'best_of_n is {config.best_of_n}, but algorithm "{config.algorithm}" has no critic to rank by'
            )
        missing = {f"{stage}_steps": 0 for stage in STAGES if stage not in cls.stages()}
        return replace(config, **missing)

    def prepare_online(self, demonstrations: Iterable[ChunkBatch], rng: GlobalBatchRNG) -> str | None:
        """Prepare the online stage after SFT, as a calibration does, and return a line for the user.

        Args:
            demonstrations: batches of the demonstrations; what is not read is not loaded.
            rng: random numbers that do not depend on those of the updates.
        """
        return None

    def weaken(self, factor: float) -> str:
        """Make updates depart less from the data, by a factor, after a collapse; return what changed, in words."""
        return "the same settings"

    def figures(self) -> dict[str, float]:
        """Return numbers that belong into result.json beside the configuration."""
        return {}

    # -- for subclasses -------------------------------------------------------------------------------------------

    def encode(self, batch: ChunkBatch) -> Prefix:
        """Return the batch's prefix, from the cache if it brings one."""
        return batch.prefix if batch.prefix is not None else self.policy.encode(batch.obs)

    def encode_next(self, batch: ChunkBatch) -> Prefix:
        """Return the prefix of the batch's next observations, likewise."""
        return batch.next_prefix if batch.next_prefix is not None else self.policy.encode(batch.next_obs)

    def draw_chunks(self, batch: ChunkBatch, n: int) -> Float[Tensor, "B N H A"]:
        """Return the noise a_0 of `n` chunks for each state of a batch."""
        spec = self.policy.spec
        return self.rng.normal((len(batch), n, spec.horizon, spec.width), like=batch.actions)

    def draw_actions(self, batch: ChunkBatch, *n: int) -> Float[Tensor, "B ... H R"]:
        """Return noise of the R real action dimensions for a batch, [B, *n, H, R]."""
        spec = self.policy.spec
        return self.rng.normal((len(batch), *n, spec.horizon, spec.action_dim), like=batch.actions)

    def draw_times(self, batch: ChunkBatch, n: int) -> Float[Tensor, "B N"]:
        """Return the flow times of `n` chunks for each state of a batch, from the policy's training distribution."""
        return self.rng.time(self.policy.sample_time, (len(batch), n), like=batch.actions)
