"""Parts of a run that are nothing but state: weights, optimizer, random numbers, and what must not change."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from poco_vla.checkpointing import checkpoint
from poco_vla.checkpointing.statistics import RunStatistics
from poco_vla.checkpointing.versions import ReservedVersions
from poco_vla.errors import CheckpointError
from poco_vla.joint_names import check_same_names
from poco_vla.learner.backends import Learner
from poco_vla.learner.broadcast import shared
from poco_vla.noise import GlobalBatchRNG
from poco_vla.policy import FlowPolicy
from poco_vla.rollout.actor import WeightsVersion
from poco_vla.run.context import RunContext


class BaseVersion:
    """Refuse a checkpoint that was trained on another base model.

    Args:
        policy: with its base model.
        name: of the base model.
    """

    def __init__(self, policy: FlowPolicy, name: str | None) -> None:
        self._policy, self._name = policy, name

    def state(self) -> Any:
        """Return the version of the base model."""
        return self._policy.base_version

    def load(self, state: Any) -> None:
        """Compare with a checkpoint's.

        Raises:
            CheckpointError: they differ.
        """
        if state != self._policy.base_version:
            raise CheckpointError(
                f"the checkpoint was trained on the base model {state}, and {self._name} is now "
                f"{self._policy.base_version}. Give the same one (policy_options.revision pins a Hub revision)."
            )


class VectorNames:
    """Refuse a checkpoint whose states or actions have other names, or another order.

    Args:
        policy: with the names.
    """

    def __init__(self, policy: FlowPolicy) -> None:
        self._policy = policy

    def state(self) -> dict[str, list[str]]:
        """Return the names of each vector."""
        return {key: list(names) for key, names in self._policy.names.items()}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Compare with a checkpoint's, if it holds some.

        Raises:
            CheckpointError: they differ.
        """
        check_same_names(state, self._policy.names, "the checkpoint")


class LearnedWeights:
    """Keep the algorithm: what trains, target networks and buffers.

    Args:
        learner: of the run.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def state(self) -> dict[str, Tensor]:
        """Return all of it by name."""
        return checkpoint.trainable_state(self._learner.algorithm)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a checkpoint's."""
        checkpoint.load_trainable_state(self._learner.algorithm, state)
        self._learner.scatter()


class OptimizerState:
    """Keep Adam's moments and step counts, as one process's Adam has them.

    Args:
        learner: of the run.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def state(self) -> dict[str, Any]:
        """Return all of it."""
        return self._learner.optimizer_state()

    def load(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's."""
        self._learner.load_optimizer_state(state)


class ResumedVersion:
    """Give the weights of a resumed run a version that nobody has seen.

    Args:
        context: of the run.
        bound: versions that may have been seen.
        weights: get the version.
    """

    def __init__(self, context: RunContext, bound: ReservedVersions, weights: WeightsVersion) -> None:
        self._context, self._bound, self._weights = context, bound, weights

    def state(self) -> dict[str, Any]:
        """Return nothing: versions are reserved on disk as they come."""
        return {}

    def load(self, state: None) -> None:
        """Go on above all versions that were reserved."""
        progress = self._context.progress
        newest = torch.tensor([self._bound.newest_seen()], device=self._context.accelerator.device)
        (seen,) = shared(newest).tolist()
        progress.begin_at_version(int(seen))
        self._weights.version = progress.version


class RandomNumbers:
    """Keep the generator of the updates' noise.

    Args:
        context: of the run.
        rng: the generator.
    """

    def __init__(self, context: RunContext, rng: GlobalBatchRNG) -> None:
        self._context, self._rng = context, rng

    def state(self) -> dict[str, Tensor]:
        """Return the generator's state."""
        return {"draws": self._rng.generator.get_state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where the generator was; on another kind of device than before its numbers begin anew."""
        generator, saved = self._rng.generator, state["draws"]
        if len(saved) == len(generator.get_state()):
            generator.set_state(saved)
            return
        generator.manual_seed(self._context.config.seed + self._context.progress.update)
        self._context.display.say("the run was on another kind of device: its random numbers begin anew")


class NormalisationStatistics:
    """Keep the statistics that the policy normalises by.

    Args:
        statistics: of the run.
        policy: its policy.
    """

    def __init__(self, statistics: RunStatistics, policy: FlowPolicy) -> None:
        self._statistics, self._policy = statistics, policy

    def state(self) -> dict[str, Tensor]:
        """Return all of them."""
        return self._statistics.state(self._policy)

    def load(self, state: None) -> None:
        """Do nothing: the policy was built with the checkpoint's statistics."""
