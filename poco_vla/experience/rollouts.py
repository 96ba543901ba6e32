"""The latest rollout of an algorithm that learns from nothing else, and batches of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from poco_vla.algorithms import Algorithm
from poco_vla.algorithms.on_policy.contract import OnPolicy
from poco_vla.config import TrainConfig
from poco_vla.data import preprocess_obs
from poco_vla.data.episode import step_rewards
from poco_vla.errors import ConfigError
from poco_vla.types import RolloutBatch


@dataclass(frozen=True)
class Round:
    """One chunk of each of E environments.

    Attributes:
        obs: raw observations [E, ...] that the chunks were chosen in.
        tasks: [E] instruction of each.
        tensors: [E, ...] `chunk`, what was noted of it (`acted.NAME`), `reward` (the sum over the chunk), `terminated`,
            `first` (of an episode) and `counts` (False where the simulator failed).
    """

    obs: Mapping[str, np.ndarray]
    tasks: Sequence[str]
    tensors: Mapping[str, Tensor]


class Rollouts:
    """Keep the rounds since the last updates, and make batches of them once there are enough.

    Args:
        config: of the run.
        algorithm: what acts and learns.
        accelerator: its device and precision.
    """

    def __init__(self, config: TrainConfig, algorithm: OnPolicy, accelerator: Accelerator) -> None:
        assert config.env is not None
        self.config, self.algorithm, self.accelerator = config, algorithm, accelerator
        self.generator = torch.Generator().manual_seed(config.seed)
        self.rounds: list[Round] = []
        self._first = torch.ones(config.env.num_envs, dtype=torch.bool)
        self._running = torch.zeros(config.env.num_envs, dtype=torch.float64)
        self._chosen: tuple[Mapping[str, np.ndarray], Sequence[str], dict[str, Tensor]] | None = None
        self._next: tuple[Mapping[str, np.ndarray], Sequence[str]] | None = None

    # -- acting -------------------------------------------------------------------------------------------------------

    def acted(
        self, obs: Mapping[str, np.ndarray], tasks: Sequence[str], chunk: Tensor, acted: Mapping[str, Tensor]
    ) -> None:
        """Take the chunks that were chosen in a round, and what the algorithm noted of them."""
        noted = {f"acted.{name}": value.cpu() for name, value in acted.items()}
        self._chosen = dict(obs), list(tasks), {"chunk": chunk.cpu()} | noted

    def received(
        self,
        brought: Sequence[Mapping[str, Any] | None],
        obs: Mapping[str, np.ndarray],
        tasks: Sequence[str],
    ) -> None:
        """Take what they brought, and the states that follow. Chunks in which a simulator failed do not count."""
        assert self._chosen is not None
        rule, (before, before_tasks, noted) = self.config.reward, self._chosen
        rewards = [float(step_rewards(rule, x["reward"], x["success"]).sum()) if x else 0.0 for x in brought]
        outcome = {
            "reward": torch.tensor(rewards, dtype=torch.float64),
            "terminated": torch.tensor([bool(x and x["terminal"][-1]) for x in brought]),
            "first": self._first,
            "counts": torch.tensor([x is not None for x in brought]),
        }
        self.rounds.append(Round(before, before_tasks, noted | outcome))
        self._first = torch.tensor([x is None or bool(x["ended"]) for x in brought])
        self._chosen, self._next = None, (dict(obs), list(tasks))

    # -- learning -----------------------------------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        """Return True if there are `rollout_steps` rounds."""
        return len(self.rounds) >= self.algorithm.config.rollout_steps

    def begin(self) -> None:
        """Forget the rollout, and begin the next one."""
        self.rounds = []
        self.algorithm.begin_rollout()

    def batches(self) -> Iterator[RolloutBatch]:
        """Yield the minibatches of all epochs, each chunk once per epoch."""
        options, rows = self.algorithm.config, self._rows()
        counted = rows.counts.nonzero().flatten()
        for _ in range(options.epochs):
            order = counted[torch.randperm(len(counted), generator=self.generator)]
            for index in order.tensor_split(-(-len(order) // options.minibatch)):
                yield rows.batch(index)

    def _rows(self) -> "_Rows":
        """Return the rollout as S * E rows, with values, log-probabilities and advantages by the weights that acted."""
        assert self._next is not None
        device, algorithm = self.accelerator.device, self.algorithm
        names = self.rounds[0].tensors
        grid = {name: torch.stack([one.tensors[name] for one in self.rounds]).to(device) for name in names}
        flat = {name: value.flatten(0, 1) for name, value in grid.items()}
        obs = {key: np.concatenate([one.obs[key] for one in self.rounds]) for key in self.rounds[0].obs}
        rows = _Rows(algorithm, obs, [task for one in self.rounds for task in one.tasks], flat)
        values, log_probs = [], []
        with torch.no_grad(), self.accelerator.autocast():
            for index in torch.arange(len(rows.tasks)).split(self.config.optim.batch_size):
                value, log_prob = algorithm.look_back(algorithm.policy.encode(rows.obs_of(index)), rows.acted(index))
                values.append(value.float())
                log_probs.append(log_prob)
            last = algorithm.state_values(algorithm.policy.encode(preprocess_obs(algorithm.policy, *self._next)))
        rows.tensors["log_prob"], rows.tensors["values"] = torch.cat(log_probs), torch.cat(values)
        shape = grid["reward"].shape
        states = torch.cat([rows.tensors["values"].view(shape), last.float()[None]])
        running = self._running.to(device)
        of_rollout = (grid["reward"].float(), states, grid["terminated"], grid["first"], running)
        advantages, targets = algorithm.advantages(*of_rollout)
        self._running = running.cpu()
        rows.tensors["advantages"], rows.tensors["value_targets"] = advantages.flatten(), targets.flatten()
        return rows

    # -- a checkpoint's -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the rounds so far, and where the order of minibatches stands."""
        tensors = {
            "rollout.generator": self.generator.get_state(),
            "rollout.first": self._first,
            "rollout.running": self._running,
        }
        for i, one in enumerate(self.rounds):
            tensors |= {f"rollout.{i}.obs.{key}": torch.from_numpy(column) for key, column in one.obs.items()}
            tensors |= {f"rollout.{i}.tensors.{name}": value for name, value in one.tensors.items()}
        return {"tasks": [list(one.tasks) for one in self.rounds]} | tensors

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with the rollout of a checkpoint."""
        if "rollout.generator" not in state:
            return
        self.generator.set_state(state["rollout.generator"])
        self._first, self._running = state["rollout.first"], state["rollout.running"]

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}

        self.rounds = [
            Round(
                {key: column.numpy() for key, column in part(f"rollout.{i}.obs.").items()},
                tasks,
                part(f"rollout.{i}.tensors."),
            )
            for i, tasks in enumerate(state["tasks"])
        ]


@dataclass(frozen=True)
class _Rows:
    """A rollout as S * E rows: raw observations, instructions and tensors of each."""

    algorithm: OnPolicy
    obs: Mapping[str, np.ndarray]
    tasks: Sequence[str]
    tensors: dict[str, Tensor]

    @property
    def counts(self) -> Tensor:
        """Return [S * E] bool: rows that may be learned from."""
        return self.tensors["counts"].cpu()

    def obs_of(self, index: Tensor) -> dict[str, Any]:
        """Return processed observations of some rows."""
        rows = index.numpy()
        obs = {key: column[rows] for key, column in self.obs.items()}
        return preprocess_obs(self.algorithm.policy, obs, [self.tasks[int(i)] for i in rows])

    def acted(self, index: Tensor) -> dict[str, Tensor]:
        """Return what the algorithm noted of some rows."""
        found = {name: value for name, value in self.tensors.items() if name.startswith("acted.")}
        return {name.removeprefix("acted."): value[index.to(value.device)] for name, value in found.items()}

    def batch(self, index: Tensor) -> RolloutBatch:
        """Return some rows as a batch."""
        own = {name: value[index.to(value.device)] for name, value in self.tensors.items()}
        chunk = own["chunk"]
        nothing = torch.zeros(len(chunk), device=chunk.device)
        return RolloutBatch(
            obs=self.obs_of(index),
            next_obs={},
            actions=chunk,
            valid=torch.ones(chunk.shape[:2], dtype=torch.bool, device=chunk.device),
            returns=nothing,
            discount=nothing,
            is_demo=nothing.bool(),
            is_success=nothing.bool(),
            acted=self.acted(index),
            **{name: own[name] for name in ("log_prob", "values", "advantages", "value_targets")},
        )


def open_rollouts(config: TrainConfig, algorithm: Algorithm, accelerator: Accelerator) -> Rollouts | None:
    """Return the rollouts of a run whose algorithm learns from its latest ones; None for others.

    Raises:
        ConfigError: several processes were launched.
    """
    if not isinstance(algorithm, OnPolicy) or not config.online_steps:
        return None
    if accelerator.num_processes > 1:
        raise ConfigError(
            f'algorithm "{config.algorithm}" learns from the rollouts of one process, and {accelerator.num_processes} '
            "were launched: launch one, with more environments (--env.num-envs)"
        )
    return Rollouts(config, algorithm, accelerator)
