"""What a model must offer to be fine-tuned by POCO, and how candidates are proposed.

An adapter subclasses :class:`FlowPolicy`; :func:`poco_vla.check_policy` tells if it keeps the contract.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poco_vla.dense import row_blocks
from poco_vla.errors import NotWrittenError
from poco_vla.flow import integrate, uniform_time
from poco_vla.raw import raw_batch
from poco_vla.types import ActionSpec


@runtime_checkable  # for the test run's machine-checked signatures
class Prefix(Protocol):
    """Everything that does not depend on the noisy action, for B states: features, and a VLA's KV cache.

    Attributes:
        features: [B, D], what the critic sees of the state.
    """

    @property
    def features(self) -> Float[Tensor, "B D"]: ...

    def select(self, index: Any) -> "Prefix":
        """The prefix of some of the states, by anything that indexes a tensor's first axis."""
        ...

    def to(self, device: Any) -> "Prefix": ...


type Packed = dict[str, Tensor]
"""What a store keeps of one state, by names of the adapter's own; vectors, and tensors whose last axis is one token's
numbers."""


class FlowPolicy(nn.Module):
    """A generative policy with a flow action head, behind one interface.

    Only `head` trains; everything else is frozen. Subclasses are found by entry point (group ``poco_vla.adapters``).

    Attributes:
        spec: sizes of the action chunk.
        feature_dim: D of this policy's prefixes.
        head: the module whose parameters are trained (or that holds the LoRA).
        preprocess: LeRobot's pre-processor pipeline of this policy: raw batch (``observation.*``, ``action``, ``task``)
            to network units. Works on batches that hold only some of those keys.
        postprocess: LeRobot's post-processor: normalised actions [..., action_dim] to the robot's units.
        input_keys: the raw observation keys that `preprocess` reads.
        base: Hub id or folder of the frozen model that a head alone can be put on again; None where there is none.
        base_version: what tells that model from another of the same name: a run is only resumed on the same.
        terms: what whoever gets weights derived from this model's must be told; None where nothing beyond the licence's
            name.
        lerobot_arguments: what LeRobot's commands need beside ``--policy.path`` to load what `save_pretrained` writes.
        option_record: dataclass whose fields are options beside the arguments of `from_pretrained` and `from_dataset`;
            `--help-all` takes types, defaults and descriptions of the options from there.
        takes_shared_time: `velocity` also takes one time [1, 1] that all chunks share, and embeds it once.
        names: names of the numbers of raw states and actions, by column (``action``, ``observation.state``), in the
            order that `preprocess` takes and `postprocess` gives; columns without names are left out.
    """

    spec: ActionSpec
    feature_dim: int
    head: nn.Module
    preprocess: Callable[[dict[str, Any]], dict[str, Any]]
    postprocess: Callable[[Tensor], Tensor]
    input_keys: tuple[str, ...]
    base: str | None = None
    base_version: str | None = None
    terms: str | None = None
    lerobot_arguments: tuple[str, ...] = ()
    names: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    option_record: type[Any] | None = None
    takes_shared_time: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if old := cls.__dict__.get("shrink_images"):
            warnings.warn(
                f"{cls.__name__}.shrink_images is resize_images now; the old name goes with the next release",
                FutureWarning,
                2,
            )
            cls.resize_images = old

    @classmethod
    def option_names(cls, *, pretrained: bool) -> frozenset[str] | None:
        """Return the names of arguments that `from_pretrained` or `from_dataset` takes; None if only loading can tell.
        A run refuses other names in its `policy_options` before it loads anything.

        Args:
            pretrained: True if the policy starts from a checkpoint, False if it is built from a dataset alone.
        """
        return None

    def resize_images(self, images: Any) -> Any:
        """Return camera pictures, uint8 [T, height, width, 3], at the size at which the replay buffer keeps them: no
        larger than the network can use.

        The pictures of dataset and environment, which may differ in resolution, must agree after this. The default
        returns them unchanged.
        """
        return images

    @torch.no_grad()
    def act(
        self,
        observation: Mapping[str, Any],
        task: str | Sequence[str] | None = None,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B H A"]:
        """Return one sampled chunk for each of B raw observations, in the robot's units: the whole way from what a
        robot sees to what it does.

        Args:
            observation: arrays or tensors by LeRobot's names (`input_keys`), of one state or of B; pictures uint8 or in
                [0, 1], of either axis order.
            task: the instruction of all states, or one for each; None takes the observation's own "task".
            steps: Euler steps; the model's own number when None.
            generator: draws the noise.

        Raises:
            DataError: the observation lacks what the policy reads.
        """
        processed = self.preprocess(raw_batch(observation, self.input_keys, task))
        obs = {key: value for key, value in processed.items() if key.startswith("observation.") and value is not None}
        chunk = propose(self, self.encode(obs), 1, steps=steps, generator=generator)
        return self.postprocess(chunk[:, 0, :, : self.spec.action_dim])

    def check_prompts(self, tasks: Sequence[str]) -> None:
        """Raise DataError if one of these instructions does not fit the model's prompt, with whatever state beside it.
        A run asks before its first update; a policy that reads no text takes all."""

    def encode(self, obs: Mapping[str, Any]) -> Prefix:
        """Prefix of B processed observations: frozen, in eval mode, without gradient.

        Raw observations go through `preprocess` first, or to `act`; :func:`poco_vla.raw.refuse_raw` tells them apart.
        """
        raise NotWrittenError(f"{type(self).__name__} has no encode: its adapter has to write it")

    @property
    def can_pack(self) -> bool:
        """Return True if `pack` and `unpack` exist and a state's prefix is always the same (no augmentation)."""
        return type(self).pack is not FlowPolicy.pack

    def pack(self, prefix: Any) -> list[Packed]:
        """Return what is to be stored of each of B states: its valid tokens without padding, and nothing that
        trained weights made."""
        raise NotWrittenError(f"{type(self).__name__} has no pack: its adapter has to write it")

    def unpack(self, states: Sequence[Mapping[str, Tensor]]) -> Prefix:
        """The prefix of what `pack` gave, of any states in any order, on the device that the tensors are on. What
        weights make that train is made anew, by those of now."""
        raise NotWrittenError(f"{type(self).__name__} has no unpack: its adapter has to write it")

    def preprocess_actions(self, batch: dict[str, Any]) -> Tensor:
        """Return what `preprocess` makes of a batch's actions, where its pictures were left out; states and `task` are
        there."""
        return self.preprocess(batch)["action"]

    def normalised_columns(self, batch: dict[str, Any]) -> Sequence[Any] | None:
        """Return states and actions as the pre-processor normalises them, with the statistics that it does so by, of a
        batch without pictures: :class:`poco_vla.adapting.normalization.NormalisedColumn`. None leaves it to LeRobot's
        own normaliser."""
        return None

    def velocity(
        self, prefix: Prefix, x: Float[Tensor, "B N H A"], t: Float[Tensor, "#B #N"]
    ) -> Float[Tensor, "B N H A"]:
        """v(x, t | state), every candidate with a time of its own, all N attending to the one prefix of their state."""
        raise NotWrittenError(f"{type(self).__name__} has no velocity: its adapter has to write it")

    def sampling(self) -> AbstractContextManager[None]:
        """Return the context of a sample's Euler steps, in which no weight changes and no gradient is recorded: an
        adapter may keep there what its weights make that each step needs."""
        return nullcontext()

    def sample_time(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Flow times from the distribution this model trains with (t = 1 is the action)."""
        return uniform_time(shape, generator)

    def native_sample(self, obs: Mapping[str, Any], noise: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        """The model's *own* sampler, in the model's own convention, from this noise, not clipped.

        `check_policy` holds `integrate` against it: this is what proves the adapter's time convention.
        """
        raise NotWrittenError(f"{type(self).__name__} has no native_sample: its adapter has to write it")

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | Path,
        *,
        horizon: int | None = None,
        device: str = "cpu",
        features: Mapping[str, Any] | None = None,
        stats: Mapping[str, Any] | None = None,
        statistics: Literal["auto", "dataset", "checkpoint"] = "auto",
        dataset_meta: Any = None,
        **options: Any,
    ) -> "FlowPolicy":
        """Load a LeRobot policy folder or Hub repository. Raises PolicyError on anything but a complete match.

        `features` and `stats` are those of the dataset to fine-tune on, `statistics` says whether they hold or those of
        the checkpoint: by "auto" a base model takes the dataset's, and a policy that was trained already keeps its own.
        The trainer checks that they fit the data. `dataset_meta` is LeRobot's own description of that dataset, for a
        policy whose processors need more of it (statistics of relative actions).
        """
        raise NotWrittenError(f"{cls.__name__} has no from_pretrained: its adapter has to write it")

    @classmethod
    def from_dataset(
        cls, features: Mapping[str, Any], stats: Mapping[str, Any], *, horizon: int, **options: Any
    ) -> "FlowPolicy":
        """A fresh policy for a dataset: its LeRobot features and statistics. For models small enough to start from
        nothing; a VLA raises PolicyError and asks for a pretrained base."""
        raise NotWrittenError(
            f"{cls.__name__} has no from_dataset, so that a fresh policy cannot be built from a dataset alone: give a "
            "pretrained one (--policy FOLDER_OR_HUB_ID)"
        )

    @classmethod
    def tiny(cls, seed: int = 0) -> "FlowPolicy":
        """The real architecture with small random weights, for tests and CPUs."""
        raise NotWrittenError(f"{cls.__name__} has no tiny: its adapter has to write it")

    def example_obs(self, batch_size: int, seed: int = 0) -> dict[str, Any]:
        """Random processed observations of the right keys and shapes, for the conformance kit."""
        raise NotWrittenError(
            f"{type(self).__name__} has no example_obs (it is optional): give observations of your own, such as "
            "check_policy(policy, policy.preprocess(batch))"
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that LeRobot itself loads: config, weights, both processors. Whole or not at all."""
        raise NotWrittenError(f"{type(self).__name__} has no save_pretrained: its adapter has to write it")

    def save_head(self, path: str | Path) -> None:
        """Write what was trained and where its base is; `from_pretrained` loads it. For policies that have a `base`.

        :mod:`poco_vla.pretrained.heads` has the file format and what writes and reads it.
        """
        raise NotWrittenError(f"{type(self).__name__} has no save_head: its adapter has to write it")


@torch.no_grad()
def propose(
    policy: FlowPolicy,
    prefix: Prefix,
    n: int,
    *,
    steps: int | None = None,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "B N H A"] | None = None,
) -> Float[Tensor, "B N H A"]:
    """N plain samples of the policy in each of B states (POCO section 4.1): no gradient, clipped, padding zero.

    Args:
        policy: the current policy.
        prefix: B encoded states; all candidates of a state share its prefix.
        n: candidates per state.
        steps: Euler steps; the model's own number when None.
        generator: draws the noise a_0; torch's default when None.
        noise: a_0 itself, when the caller has drawn it.
    """
    if noise is None:
        noise = initial_noise(policy, prefix, n, generator)
    steps, blocks = steps or policy.spec.flow_steps, row_blocks(noise)
    with policy.sampling():
        if len(blocks) == 1:
            return policy.spec.limit(integrate(policy, prefix, noise, steps))
        parts = [integrate(policy, prefix.select(rows), noise[rows], steps) for rows in blocks]
    return policy.spec.limit(torch.cat(parts))


def copy_policy(policy: FlowPolicy) -> FlowPolicy:
    """Return a copy on the same parameters and buffers: its processors, and what it remembers, are its own."""
    return deepcopy(policy, {id(tensor): tensor for tensor in (*policy.parameters(), *policy.buffers())})


def initial_noise(
    policy: FlowPolicy, prefix: Prefix, n: int, generator: torch.Generator | None = None
) -> Float[Tensor, "B N H A"]:
    """Draw the noise a_0 of N chunks in each of B states, in the precision of the features, float32 at least.

    Args:
        policy: gives the shape of a chunk.
        prefix: B encoded states.
        n: chunks per state.
        generator: draws it, on its own device; torch's default when None.
    """
    spec, features = policy.spec, prefix.features
    dtype = torch.promote_types(features.dtype, torch.float32)
    place = generator.device if generator is not None else features.device
    shape = (features.shape[0], n, spec.horizon, spec.width)
    return torch.randn(shape, generator=generator, device=place, dtype=dtype).to(features.device)


def sampling_precision(name: str, device: torch.device) -> Any:
    """Return a context in which a policy's own matrix products are of this precision. Adapters that choose theirs by
    themselves (a VLA's `compute`) keep it."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else nullcontext()
