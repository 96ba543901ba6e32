"""POCO behind LeRobot's interface for RL algorithms, so that what is written against it (`lerobot.rl.RLTrainer`, its
log lines, its checkpoints) drives :class:`poco_vla.algorithms.poco.Poco` unchanged:

    pool = Replay(horizon=policy.spec.horizon, gamma=config.poco.gamma)
    pool.extend(read_episodes(dataset, dataset_config, policy.input_keys), is_demo=True)
    trainer = RLTrainer(PocoAlgorithm(policy, config), ChunkMixer(pool, policy), batch_size=256)
    trainer.training_step().to_log_dict()

Importing this module registers the configuration as ``poco``: LeRobot's command lines parse ``--algorithm.type=poco``
with ``--algorithm.poco.zeta`` and the rest. LeRobot 0.6.1 goes no further: its factory makes "sac" alone, and its
learner and actor feed a Gaussian policy with single steps. POCO wants chunks, hence a data source of its own.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lerobot.lerobot_types import BatchType
from lerobot.rl import DataMixer, RLAlgorithm, RLAlgorithmConfig, TrainingStats
from torch import Tensor
from torch.optim import Adam, Optimizer

from poco_vla.algorithms import Algorithm, Stage
from poco_vla.algorithms.poco import Poco
from poco_vla.checkpointing.checkpoint import load_trainable_state, trainable_state
from poco_vla.config import PocoConfig
from poco_vla.data import Replay, chunk_batch
from poco_vla.errors import DataError, NonFiniteError
from poco_vla.noise import GlobalBatchRNG
from poco_vla.policy import FlowPolicy
from poco_vla.types import ChunkBatch

POLICY, DRAWS = "policy", "draws"


@RLAlgorithmConfig.register_subclass("poco")
@dataclass
class PocoAlgorithmConfig(RLAlgorithmConfig):
    """What LeRobot's loop needs to know beside the algorithm's own options.

    Attributes:
        poco: the algorithm's own options.
        sft_steps: first updates, which imitate.
        warmup_steps: updates after these, in which only the critic learns.
        actor_lr: learning rate of the flow head.
        critic_lr: learning rate of the critic.
        grad_clip_norm: clips actor and critic gradients, each by itself; None only measures them.
        seed: of candidates, noise and flow times.
    """

    poco: PocoConfig = field(default_factory=PocoConfig)
    sft_steps: int = 0
    warmup_steps: int = 5000
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    grad_clip_norm: float | None = None
    seed: int = 0

    @classmethod
    def from_policy_config(cls, policy_cfg: Any) -> "PocoAlgorithmConfig":
        """The defaults: none depends on the policy."""
        return cls()


class ChunkMixer(DataMixer):
    """LeRobot's source of data, over a pool of ours. Its batches are processed: the RLTrainer needs no preprocessor.

    Args:
        replay: demonstrations and online episodes.
        policy: whose processors are used.
        seed: of the sampling order; `rng` is the generator itself.
    """

    def __init__(self, replay: Replay, policy: FlowPolicy, seed: int = 0) -> None:
        self.replay, self.policy = replay, policy
        self.rng = np.random.default_rng(seed)

    def sample(self, batch_size: int) -> BatchType:
        """The fields of a :class:`poco_vla.types.ChunkBatch`, by name."""
        return dict(vars(chunk_batch(self.policy, self.replay.sample(batch_size, self.rng))))


class PocoAlgorithm(RLAlgorithm):
    """Poco, one update per call. `optimization_step` decides the stage, so that a resumed run goes on in its own.

    Args:
        policy: the adapter, its backbone frozen.
        config: stages, learning rates and the algorithm's options.
    """

    config_class = PocoAlgorithmConfig
    name = "poco"

    def __init__(self, policy: FlowPolicy, config: PocoAlgorithmConfig) -> None:
        self.policy = policy
        self.config: PocoAlgorithmConfig = config  # pyright: ignore[reportIncompatibleVariableOverride]
        rng = GlobalBatchRNG(torch.Generator().manual_seed(config.seed))
        self.poco: Algorithm = Poco(policy, config.poco, rng).to(next(policy.parameters()).device)
        self.optimizers: dict[str, Optimizer] = {}

    @property
    def stage(self) -> Stage:
        """Return the stage of the next update."""
        after = self.optimization_step - self.config.sft_steps
        return "sft" if after < 0 else "warmup" if after < self.config.warmup_steps else "online"

    def update(self, batch_iterator: Iterator[BatchType]) -> TrainingStats:
        """Loss, backward, step, target, as poco_vla's own trainer does it.

        Raises:
            DataError: the batch is none of :class:`ChunkMixer`.
            NonFiniteError: the loss or its gradient is NaN or infinite; nothing was changed by it.
        """
        stage = self.stage
        loss, metrics = self.poco(_chunks(next(batch_iterator)), stage)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"update {self.optimization_step} ({stage}): the loss is {loss.item()}")
        loss.backward()
        norms = self._clipped()
        if not all(map(math.isfinite, norms.values())):
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            raise NonFiniteError(
                f"update {self.optimization_step} ({stage}): the loss is {loss.item():.4g}, its gradient not finite "
                f"({', '.join(f'{name} {norm:.3g}' for name, norm in norms.items())}); nothing was changed by it"
            )
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        self.poco.after_step(stage)
        self.optimization_step += 1
        values = _numbers(metrics)
        losses = {name: values.pop(name) for name in list(values) if name.endswith("_loss")}
        return TrainingStats(losses=losses, grad_norms=norms, extra=values)

    def _clipped(self) -> dict[str, float]:
        """Clip the gradient of each part by itself; the norms of those that there were."""
        norms: dict[str, Tensor] = {}
        limit = self.config.grad_clip_norm or float("inf")
        for name, optimizer in (self.optimizers or self.make_optimizers_and_scheduler()).items():
            trained = [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]
            if trained:  # before its stage begins, a part has no gradient
                norms[name] = torch.nn.utils.clip_grad_norm_(trained, limit)
        return _numbers(norms)

    def make_optimizers_and_scheduler(self) -> dict[str, Optimizer]:
        """Make one Adam for each group of parameters: the flow head, and the critic."""
        groups = self.poco.parameter_groups(self.config.actor_lr, self.config.critic_lr)
        self.optimizers = {group["name"]: Adam(group["params"], lr=group["lr"], fused=True) for group in groups}
        return self.optimizers

    def get_optimizers(self) -> dict[str, Optimizer]:
        return self.optimizers

    def get_weights(self) -> dict[str, Any]:
        """Return what was trained of the policy: the head, or its LoRA. The backbone is never sent."""
        return {POLICY: self._part(of_policy=True)}

    def load_weights(self, weights: Mapping[str, Any], device: str | torch.device = "cpu") -> None:
        """Put :meth:`get_weights` of another process into this policy.

        Raises:
            CheckpointError: names or shapes differ.
        """
        load_trainable_state(self.poco, self._part(of_policy=False) | weights[POLICY])

    def state_dict(self) -> dict[str, Tensor]:
        """Critic, target critic, zeta, beta, and the state of the random numbers."""
        return self._part(of_policy=False) | {DRAWS: self.poco.rng.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], device: str | torch.device = "cpu") -> None:
        """Put :meth:`state_dict` back, in place.

        Raises:
            CheckpointError: names or shapes differ.
        """
        rest = {name: tensor for name, tensor in state_dict.items() if name != DRAWS}
        load_trainable_state(self.poco, self._part(of_policy=True) | rest)
        if DRAWS in state_dict:
            self.poco.rng.generator.set_state(state_dict[DRAWS].cpu())

    def _part(self, *, of_policy: bool) -> dict[str, Tensor]:
        everything = trainable_state(self.poco)
        return {n: t.detach().cpu() for n, t in everything.items() if n.startswith(f"{POLICY}.") == of_policy}


def _chunks(batch: BatchType) -> ChunkBatch:
    try:
        return ChunkBatch(**batch)
    except TypeError as error:
        raise DataError(
            f"a batch of {', '.join(batch)}; POCO learns from chunks of several steps, which LeRobot's replay buffer "
            "does not have: give the RLTrainer a poco_vla.lerobot_rl.ChunkMixer and no preprocessor"
        ) from error


def _numbers(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Read scalars [] back from their device, all at once: each time that the host waits for a GPU, the GPU idles."""
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True)) if scalars else {}
