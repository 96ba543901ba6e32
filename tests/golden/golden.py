"""A golden file: weights, random draws and a batch of small networks, and what official code makes of them.

A check gets the inputs alone and yields results by the file's names; `compare` holds them against all that the file
has. A tensor of the file that a check does not yield fails.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lerobot_policy_flow_mlp.adapter import MlpPrefix
from lerobot_policy_flow_mlp.modeling_flow_mlp import VectorField
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from poco_vla import ActionSpec, ChunkBatch, ChunkCritic, FlowPolicy
from poco_vla.noise import GlobalBatchRNG

TOLERANCE = 1e-5
"""Of a tensor whose largest stored absolute value is at most 1; times that value where it is larger."""
RESULTS_OF_BATCH = ("batch.rewards_cum", "batch.masks_cum", "batch.valid")
"""Tensors that follow from the rest of the batch."""
RESULTS_OF_NETS = ("net.velocity", "net.time_embedding_out")
"""Outputs of the networks that stand by themselves (`net.*`)."""

type Entries = list[tuple[str, nn.Parameter, Callable[[Tensor], Tensor]]]
"""A network's parameters: name in the file, parameter, and the view of it (or of its gradient) that the file stores."""
type Numbers = Iterator[tuple[str, Tensor]]


class FormatError(Exception):
    """The file is not a golden file."""


def is_input(name: str) -> bool:
    """Return True for what is given: `init`, `draw` or `batch` is one of the parts of its name."""
    if name.startswith("net."):
        return name not in RESULTS_OF_NETS
    return name not in RESULTS_OF_BATCH and not {"init", "draw", "batch"}.isdisjoint(name.split("."))


class Golden:
    """The inputs of a golden file in float64.

    Attributes:
        info: the file's metadata: source, sizes, config.
        config: hyper-parameters of the official code.
        sizes: of the tensors.
        results: names of the tensors that are to be reproduced.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                self._stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                self.info: dict[str, Any] = json.loads((file.metadata() or {}).get("info", "{}"))
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise FormatError(f"{path} cannot be read as safetensors: {error}") from error
        self.config: dict[str, Any] = self.info.get("config", {})
        self.sizes: dict[str, Any] = self.info.get("sizes", {})
        self.inputs = {name: value.double() for name, value in self._stored.items() if is_input(name)}
        self.results = frozenset(self._stored.keys() - self.inputs.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.inputs:
            raise FormatError(f'input tensor "{name}" is missing')
        return self.inputs[name]

    def __contains__(self, name: str) -> bool:
        return name in self.inputs

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the results that are to be reproduced; not for checks."""
        return ((name, self._stored[name].double()) for name in self._stored if name in self.results)

    def updates(self) -> list[int]:
        """Return the numbers of the whole updates that the file has."""
        heads = (name.split(".")[0] for name in self.results)
        return sorted({int(head.removeprefix("update")) for head in heads if head.startswith("update")})

    def hidden(self, prefix: str) -> list[int]:
        """Return the hidden widths of the dense network at `init.NET`."""
        widths = [self[f"{prefix}.l{i}.w"].shape[1] for i in range(sum(f"{prefix}.l{i}.w" in self for i in range(99)))]
        return widths[:-1] if f"{prefix}.mean.w" not in self else widths

    def load(self, entries: Entries, prefix: str) -> None:
        """Copy the file's weights at `prefix` into a network."""
        for name, parameter, view in entries:
            ours, theirs = view(parameter.data), self[f"{prefix}.{name}"]
            if ours.shape != theirs.shape:
                raise FormatError(
                    f'tensor "{prefix}.{name}" has shape {list(theirs.shape)}, expected {list(ours.shape)}'
                )
            ours.copy_(theirs)


def dense(layers: Iterable[nn.Module], name: str = "l{}") -> Entries:
    """Return the entries of Linear layers "l0", "l1", ..., which a file stores transposed."""
    found: Entries = []
    for i, layer in enumerate(layers):
        assert isinstance(layer, nn.Linear)
        found += [
            (f"{name.format(i)}.w", layer.weight, lambda t: t.T),
            (f"{name.format(i)}.b", layer.bias, lambda t: t),
        ]
    return found


def ensemble(critic: ChunkCritic) -> Entries:
    """Return the entries of an ensemble's members: "0.l0.w", "0.l0.b", "0.ln0.g", ..., "1.l0.w", ..."""
    groups = {"l{}.w": critic.weights, "l{}.b": critic.biases, "ln{}.g": critic.gains, "ln{}.b": critic.shifts}
    return [
        (f"{k}.{name.format(i)}", parameter, (lambda t, k=k: t[k]) if name == "l{}.w" else (lambda t, k=k: t[k, 0]))
        for k in range(critic.weights[0].shape[0])
        for name, parameters in groups.items()
        for i, parameter in enumerate(parameters)
    ]


def values(entries: Entries, prefix: str) -> Numbers:
    """Yield the present parameters of a network by the file's names."""
    return ((f"{prefix}.{name}", view(parameter.detach()).clone()) for name, parameter, view in entries)


def gradients(entries: Entries, prefix: str) -> Numbers:
    """Yield the present gradients of a network by the file's names."""
    for name, parameter, view in entries:
        assert parameter.grad is not None, f"{name} has no gradient"
        yield f"{prefix}.{name}", view(parameter.grad).clone()


class Scripted(GlobalBatchRNG):
    """The file's draws in the order in which the code asks for random numbers; anything else is an error."""

    def __init__(self, normals: Sequence[Tensor], times: Sequence[Tensor] = ()) -> None:
        self.normals, self.times = list(normals), list(times)

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return self.normals.pop(0).reshape(shape).to(like)

    def time(self, sampler: object, shape: Sequence[int], like: Tensor) -> Tensor:
        return self.times.pop(0).reshape(shape).to(like)


@contextmanager
def drawn(*normals: Tensor) -> Iterator[None]:
    """Let `torch.randn` return the file's draws, where a policy acts: it draws by itself there."""
    left = list(normals)
    with patch("torch.randn", lambda shape, **_: left.pop(0).reshape(shape)):
        yield
    assert not left, "acting drew less than the file has"


class Actor(FlowPolicy):
    """The authors' actor: flow_mlp's vector field over raw observations, nothing around it."""

    def __init__(self, feature_dim: int, spec: ActionSpec, hidden: list[int]) -> None:
        super().__init__()
        self.spec, self.feature_dim = spec, feature_dim
        self.head = VectorField(feature_dim, spec.horizon * spec.width, hidden, "gelu")

    def encode(self, obs):
        return MlpPrefix(obs["state"])

    def velocity(self, prefix, x, t):
        return self.head(prefix.features, x.flatten(-2), t).unflatten(-1, x.shape[-2:])


def chunk_window(golden: Golden) -> Numbers:
    """Yield rewards, masks and valid steps of the windows of H transitions, cumulated as the official data set does."""
    gamma, rewards = golden.config["discount"], golden["batch.raw_rewards"]
    yield "batch.rewards_cum", (rewards * gamma ** torch.arange(rewards.shape[1]).double()).cumsum(dim=1)
    yield "batch.masks_cum", golden["batch.raw_masks"].cummin(dim=1).values
    ended = golden["batch.raw_terminals"].cummax(dim=1).values[:, :-1]
    yield "batch.valid", torch.cat([torch.ones_like(ended[:, :1]), 1 - ended], dim=1)


def chunk_batch(golden: Golden) -> ChunkBatch:
    """Return the file's batch: its windows of H transitions, or single transitions as chunks of one step."""
    actions = golden["batch.actions"]
    rows = torch.ones(len(actions), dtype=torch.bool)
    gamma = golden.config["discount"]
    if actions.ndim == 3:
        window = dict(chunk_window(golden))
        valid, returns = window["batch.valid"].bool(), window["batch.rewards_cum"][:, -1]
        discount = gamma ** actions.shape[1] * window["batch.masks_cum"][:, -1]
    else:
        actions, valid = actions[:, None], rows[:, None]
        returns, discount = golden["batch.rewards"], gamma * golden["batch.masks"]
    return ChunkBatch(
        obs={"state": golden["batch.obs"]},
        next_obs={"state": golden["batch.next_obs"]},
        actions=actions,
        valid=valid,
        returns=returns,
        discount=discount,
        is_demo=rows,
        is_success=rows,
    )


def actor(golden: Golden, net: str = "init.actor", steps: int | None = None) -> Actor:
    """Return the file's flow policy, in float64."""
    actions = golden["batch.actions"]
    horizon, width = (1, *actions.shape[1:])[-2:]
    spec = ActionSpec(horizon, width, width, steps or golden.config["flow_steps"])
    policy = Actor(golden["batch.obs"].shape[-1], spec, golden.hidden(net)).double()
    golden.load(dense(policy.head.layers), net)
    return policy


@dataclass(frozen=True)
class Row:
    """One group of tensors: how far ours are from the file's, in units of their tolerance.

    Attributes:
        group: first parts of the tensors' names.
        tensors: how many the file has.
        difference: largest difference over tolerance; infinite where one was not computed or is not finite.
        worst: name of the tensor that is furthest apart.
    """

    group: str
    tensors: int
    difference: float
    worst: str

    @property
    def ok(self) -> bool:
        return self.difference <= 1

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"FAIL: {self.worst}"
        return f"{self.group:32} {self.tensors:4}  {self.difference * TOLERANCE:10.2e}  {verdict}"


def compare(golden: Golden, check: Callable[[Golden], Numbers]) -> list[Row]:
    """Return a row per group of the file's results, in the file's order.

    Raises:
        FormatError: an input is missing or does not fit the others, or there is nothing to reproduce.
    """
    if not {name for name in golden.results if name not in RESULTS_OF_BATCH}:
        raise FormatError("it holds inputs but no results to compare")
    try:
        ours = dict(check(golden))
    except (KeyError, RuntimeError, IndexError, ValueError) as error:
        raise FormatError(f"sizes, options and tensors do not fit each other: {error!r}") from error
    groups: dict[str, list[tuple[float, str]]] = {}
    for name, theirs in golden.stored():
        apart = difference(ours[name], theirs) if name in ours else float("inf")
        groups.setdefault(group_of(name), []).append((apart, name))
    return [Row(group, len(found), *max(found)) for group, found in groups.items()]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference over the tolerance; infinite where numbers differ or are not finite."""
    if ours.numel() != theirs.numel():
        return float("inf")
    apart = (ours.detach().reshape(-1).double() - theirs.reshape(-1)).abs().max().item()
    scale = TOLERANCE * max(1.0, theirs.abs().max().item())
    return apart / scale if apart == apart else float("inf")


def group_of(name: str) -> str:
    """Return update1.critic of update1.critic.0.l0.w, grad.actor of grad.actor.l0.w, cand of cand.q."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0].startswith(("update", "grad")) and len(parts) > 2 else parts[0]
