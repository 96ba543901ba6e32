"""The contract of an algorithm: its losses, how it acts, and what trains. Training and acting know only this."""

from collections.abc import Iterable
from copy import copy
from typing import Any, ClassVar, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poco_vla.noise import GlobalBatchRNG, UpdateNoise
from poco_vla.policy import FlowPolicy, Prefix, propose
from poco_vla.types import ChunkBatch, Metrics

type Stage = Literal["sft", "warmup", "online"]
STAGES: tuple[Stage, ...] = ("sft", "warmup", "online")

type Loss = tuple[Float[Tensor, ""], Metrics]
"""A loss to call backward on, and named scalars for the log, detached."""


class ParameterGroup(TypedDict):
    """A group of the optimizer, as torch takes it: its name, its parameters and their learning rate."""

    name: str
    params: list[nn.Parameter]
    lr: float


class Algorithm(nn.Module):
    """An algorithm over a policy: one module, with whatever else learns, so that one `prepare` and one backward serve
    every Accelerate backend.

    A subclass writes the losses of its stages and `draw_noise`; the rest has defaults. By itself this class acts with
    plain samples of the policy and learns nothing. A loop of one's own reads::

        optimizer = torch.optim.Adam(algorithm.parameter_groups())
        for batch in batches:
            loss, metrics = algorithm.online_loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            algorithm.after_step("online")

    Args:
        policy: the actor, its backbone already frozen.
        config: the algorithm's options, a `config_class`.
        rng: source of the random numbers of updates; torch's default generator when None.
    """

    config_class: ClassVar[type[Any]]
    """Frozen dataclass of the algorithm's options."""
    on_policy: ClassVar[bool] = False
    """True if the algorithm learns from its own latest rollouts alone, not from a replay buffer."""
    has_warmup: ClassVar[bool] = True
    """True if there is something to learn before the actor changes, such as a critic."""
    ranks_candidates: ClassVar[bool] = False
    """True if `act` chooses the best of n > 1 candidates."""

    def __init__(self, policy: FlowPolicy, config: Any = None, rng: GlobalBatchRNG | None = None) -> None:
        super().__init__()
        # Deviation 7: eval mode throughout, so that candidates are plain samples and `rng` is the only randomness.
        self.policy = policy.eval()
        self.config = config
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

    def draw_noise(self, batch: ChunkBatch, stage: Stage) -> Any:
        """Return the :class:`UpdateNoise` of an update. On several processes all of them call this together."""
        return UpdateNoise()

    def forward(self, batch: ChunkBatch, stage: Stage, noise: Any = None) -> Loss:
        """Return the loss of a stage. Accelerate's wrappers call this."""
        losses = {"sft": self.sft_loss, "warmup": self.warmup_loss, "online": self.online_loss}
        return losses[stage](batch, noise)

    def after_step(self, stage: Stage) -> None:
        """Update what follows the weights after an optimizer step, such as target networks."""

    def parameter_groups(self, actor_lr: float = 3e-4, critic_lr: float = 3e-4) -> list[ParameterGroup]:
        """Return what trains, each group with its learning rate. The first group is the policy's, "actor"."""
        return [{"name": "actor", "params": [p for p in self.policy.parameters() if p.requires_grad], "lr": actor_lr}]

    def trained_groups(self, stage: Stage) -> frozenset[str]:
        """Return the names of the parameter groups that have a gradient in a stage."""
        return frozenset(group["name"] for group in self.parameter_groups())

    def reads_next(self, stage: Stage) -> bool:
        """Return True if the loss of a stage reads the next observations of a batch."""
        return stage != "sft"

    def chunks_per_state(self, stage: Stage) -> int:
        """Return the chunks of each state whose flow errors have a gradient in a stage; 0 if none has."""
        return 1

    @classmethod
    def gamma(cls, config: Any) -> float:
        """Return the discount per control step of the returns that the losses read."""
        return 1.0

    # -- acting ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, prefix: Prefix, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return a chunk for each of B states: a plain sample of the policy, or the best of `n` (`ranks_candidates`).

        Args:
            prefix: B encoded states.
            n: candidates per state.
            generator: draws the noise.
        """
        assert n == 1, f"{type(self).__name__} does not rank candidates"
        return propose(self.policy, prefix, 1, generator=generator)[:, 0]

    def acts_with(self, n: int) -> tuple[str, ...]:
        """Return the names of the submodules beside the policy that `act` with `n` candidates reads."""
        return ()

    def for_acting(self, n: int = 1) -> "Algorithm":
        """Return an algorithm that shares this one's weights and holds only what `act` with `n` candidates reads."""
        view = copy(self)
        modules = {name: self._modules[name] for name in ("policy", *self.acts_with(n))}
        view.__dict__.update(_modules=modules, rng=None)
        return view

    # -- a run ----------------------------------------------------------------------------------------------------

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

    def draw_times(self, batch: ChunkBatch, n: int) -> Float[Tensor, "B N"]:
        """Return the flow times of `n` chunks for each state of a batch, from the policy's training distribution."""
        return self.rng.time(self.policy.sample_time, (len(batch), n), like=batch.actions)
