"""Does poco_vla compute what the authors' simulation code computes? ``python check_poco.py FILE``

FILE holds weights, random draws and results of the published objective (see README.md beside this file). Our real code
runs on the same weights and draws, in float64; one row per group of tensors says how far the results are apart.

Exit status: 0 all groups match, 1 a group does not, 2 FILE is not of the format.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from golden import Actor, FormatError, Scripted
from safetensors import SafetensorError, safe_open
from torch import Tensor

from poco_vla import ActionSpec, ChunkBatch, ChunkCritic, Poco, PocoConfig
from poco_vla.critic import aggregate, polyak_update, td_target
from poco_vla.distill import flow_errors
from poco_vla.flow import integrate, interpolate, target_velocity
from poco_vla.policy import propose
from poco_vla.posterior import posterior_weights

TOLERANCE = 1e-5
PUBLISHED = {"flow_steps": 10, "discount": 0.99, "tau": 0.005, "lr": 3e-4}
"""Constants of the published code, where the file's own metadata does not say."""
JOINT_UPDATE = {"eta": 0.1, "zeta": 2.0, "beta": 1.0}
"""Options of the whole updates that the file stores, likewise."""
INPUTS = {
    r"init\.": "input: the weights that our networks are given",
    r"draw\.": "input: the random numbers that our code is given",
    r"batch\.(obs|actions|next_obs|raw_\w+)$": "input: the window that our code is given",
}
"""Names of what is given, not computed."""
NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"
OPTIONS = rf"temp{NUMBER}\.zeta(none|{NUMBER})(?:\.beta{NUMBER})?"

type Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One group of tensors: how far ours are from the file's, or why they were not compared."""

    group: str
    tensors: int
    difference: float | None
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.difference is None or self.difference <= TOLERANCE  # NaN is not ok

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.group:32} {self.tensors:4}  {'-':>10}  skipped: {self.reason}"
        return f"{self.group:32} {self.tensors:4}  {self.difference:10.2e}  {'ok' if self.ok else 'FAIL'}"


class Case:
    """A golden file: its tensors in float64, its sizes, and our code set up with its weights."""

    def __init__(self, path: str | Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                self.tensors: Tensors = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
                info = json.loads((file.metadata() or {}).get("info", "{}"))
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise FormatError(f"{path} cannot be read as safetensors: {error}") from error
        self.constants = PUBLISHED | {k: v for k, v in info.get("sizes", {}).items() if k in PUBLISHED}
        stated = re.search(r"temperature ([\d.]*\d), zeta ([\d.]*\d)", info.get("updates", ""))
        self.joint = JOINT_UPDATE | ({"eta": float(stated[1]), "zeta": float(stated[2])} if stated else {})
        self.batch, self.horizon, self.action_dim = self["batch.actions"].shape
        self.obs_dim = self["batch.obs"].shape[1]
        self.num = self["draw.cand.noise"].shape[1]
        self.members = len({n.split(".")[2] for n in self.tensors if n.startswith("init.critic.")})
        self.layers = len({n for n in self.tensors if re.fullmatch(r"init\.actor\.l\d+\.w", n)})
        self.hidden = [self[f"init.actor.l{i}.w"].shape[1] for i in range(self.layers - 1)]
        self.critic_hidden = [self[f"init.critic.0.l{i}.w"].shape[1] for i in range(self.layers - 1)]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise FormatError(f'tensor "{name}" is missing')
        return self.tensors[name]

    def names(self, pattern: str) -> Iterator[re.Match[str]]:
        return (match for name in self.tensors if (match := re.fullmatch(pattern, name)))

    def chunks(self, name: str) -> Tensor:
        """A stored tensor of flat chunks [..., H * A], unflattened."""
        return self[name].unflatten(-1, (self.horizon, self.action_dim))

    def chunk_batch(self) -> ChunkBatch:
        rows = torch.ones(self.batch, dtype=torch.bool)
        return ChunkBatch(
            obs={"state": self["batch.obs"]},
            next_obs={"state": self["batch.next_obs"]},
            actions=self["batch.actions"],
            valid=self["batch.valid"].bool(),
            # The authors' own cumulation: it runs on past the end of an episode.
            returns=self["batch.rewards_cum"][:, -1],
            discount=self.constants["discount"] ** self.horizon * self["batch.masks_cum"][:, -1],
            is_demo=rows,
            is_success=rows,
        )

    def poco(self, **options: object) -> Poco:
        """Poco as published, with the file's initial weights."""
        config = PocoConfig(
            **{
                "num_candidates": self.num,
                "gamma": self.constants["discount"],
                "tau": self.constants["tau"],
                "critic_hidden": tuple(self.critic_hidden),
                "critic_members": self.members,
                "critic_activation": "gelu",
                "critic_layer_norm_eps": 1e-6,
                "drop_crossing": True,
                "error_mean": "all",
                "anchor": "all",
            }
            | options
        )
        spec = ActionSpec(self.horizon, self.action_dim, self.action_dim, int(self.constants["flow_steps"]))
        poco = Poco(Actor(self.obs_dim, spec, self.hidden), config).double()
        for ours, theirs in actor_names(poco):
            ours.data.copy_(transposed(self.shaped(f"init.actor.{theirs}", transposed(ours))))
        for critic, prefix in ((poco.critic, "init.critic"), (poco.target_critic, "init.target_critic")):
            self.load_critic(critic, prefix)
        return poco

    def load_critic(self, critic: ChunkCritic, prefix: str) -> None:
        for k in range(self.members):
            for ours, theirs in critic_names(critic, k):
                ours.data.copy_(self.shaped(f"{prefix}.{k}.{theirs}", ours))

    def shaped(self, name: str, like: Tensor) -> Tensor:
        if self[name].shape != like.shape:
            raise FormatError(f'tensor "{name}" has shape {list(self[name].shape)}, expected {list(like.shape)}')
        return self[name]

    def draws(self, prefix: str = "draw") -> Scripted:
        """In the order of `online_loss`: the critic's next chunk, the candidates, flow errors of [data, candidates]."""
        noise = torch.cat([self[f"{prefix}.bc.x0"][:, None], self[f"{prefix}.post.x0"]], dim=1)
        t = torch.cat([self[f"{prefix}.bc.t"], self[f"{prefix}.post.t"][..., 0]], dim=1)
        return Scripted([self[f"{prefix}.critic.noise"], self[f"{prefix}.cand.noise"], noise], [t])


def actor_names(poco: Poco) -> list[tuple[Tensor, str]]:
    """Our actor's parameters and their names in the file, which stores weights transposed."""
    layers = list(enumerate(poco.policy.head.layers))
    return [(layer.weight, f"l{i}.w") for i, layer in layers] + [(layer.bias, f"l{i}.b") for i, layer in layers]


def critic_names(critic: ChunkCritic, member: int) -> list[tuple[Tensor, str]]:
    """One member's parameters (views into ours) and their names in the file."""
    groups = {"l{}.w": critic.weights, "l{}.b": critic.biases, "ln{}.g": critic.gains, "ln{}.b": critic.shifts}
    return [
        (p[member] if name == "l{}.w" else p[member, 0], name.format(i))
        for name, parameters in groups.items()
        for i, p in enumerate(parameters)
    ]


def transposed(p: Tensor) -> Tensor:
    """A Linear's weight in the file's orientation [in, out], or the other way round; biases as they are."""
    return p.T if p.ndim == 2 else p


def e_step(case: Case) -> Iterator[tuple[str, Tensor]]:
    """Candidates, their values and weights."""
    poco = case.poco()
    prefix, noise = poco.policy.encode({"state": case["batch.obs"]}), case.chunks("draw.cand.noise")
    steps = poco.policy.spec.flow_steps
    with torch.no_grad():
        v0 = poco.policy.velocity(prefix, noise, torch.zeros(noise.shape[:2]).double())
        x = propose(poco.policy, prefix, case.num, noise=noise)
        yield "cand.v0", v0.flatten(-2)
        yield "cand.step1", (noise + v0 / steps).flatten(-2)
        yield "cand.raw", integrate(poco.policy, prefix, noise, steps).flatten(-2)
        yield "cand.actions", x.flatten(-2)
        q = poco.target_critic(prefix.features, x)
    yield "cand.q_each", q
    yield "cand.q", aggregate(q, "mean")
    yield "cand.q_min", aggregate(q, "min")
    for match in case.names(rf"weights\.temp{NUMBER}"):
        yield match[0], posterior_weights(aggregate(q, "mean"), eta=float(match[1]))


def flow(case: Case) -> Iterator[tuple[str, Tensor]]:
    """Flow errors of the data chunk and of the candidates."""
    poco = case.poco()
    prefix, batch = poco.policy.encode({"state": case["batch.obs"]}), case.chunk_batch()
    candidates = propose(poco.policy, prefix, case.num, noise=case.chunks("draw.cand.noise"))
    data = batch.actions[:, None]
    for kind, chunk, noise, t in (
        ("bc", data, case.chunks("draw.bc.x0")[:, None], case["draw.bc.t"]),
        ("post", candidates, case.chunks("draw.post.x0"), case["draw.post.t"][..., 0]),
    ):
        with torch.no_grad():
            x_t = interpolate(noise, chunk, t)
            velocity = poco.policy.velocity(prefix, x_t, t)
            errors = flow_errors(poco.policy, prefix, chunk, batch.valid, noise=noise, t=t, mean_over="all")
        if kind == "bc":
            yield "bc.xt", x_t[:, 0].flatten(-2)
            yield "bc.target", target_velocity(noise, chunk)[:, 0].flatten(-2)
            yield "bc.pred", velocity[:, 0].flatten(-2)
            yield "bc.per_sample", errors[:, 0]
        else:
            yield "post.xt", x_t.flatten(-2)
            yield "post.target", target_velocity(noise, chunk).flatten(-2)
            yield "post.pred", velocity.flatten(-2)
            yield "post.l", errors


def critic(case: Case) -> Iterator[tuple[str, Tensor]]:
    """TD target and critic loss."""
    batch = case.chunk_batch()
    for how, name in (("mean", "critic.loss"), ("min", "critic.loss.q_agg_min")):
        poco = case.poco(aggregation=how)
        poco.rng = Scripted([case["draw.critic.noise"]])
        prefix, next_prefix = poco.policy.encode(batch.obs), poco.policy.encode(batch.next_obs)
        yield name, poco.critic_loss(prefix, batch)[0]
        if how == "min":
            return
        with torch.no_grad():
            chunk = propose(poco.policy, next_prefix, 1, noise=case.chunks("draw.critic.noise")[:, None])
            next_q = poco.target_critic(next_prefix.features, chunk)[..., 0]
            q = poco.critic(prefix.features, batch.actions[:, None])[..., 0]
        target = td_target(batch.returns, batch.discount, aggregate(next_q[..., None])[:, 0])
        yield "critic.next_action", chunk[:, 0].flatten(-2)
        yield "critic.next_q_each", next_q
        yield "critic.target", target
        yield "critic.q", q
        yield "critic.td", (q - target).square() * batch.valid[:, -1]


def objective(case: Case) -> Iterator[tuple[str, Tensor]]:
    """Every stored loss and gradient of the joint update, by Poco.online_loss itself."""
    batch = case.chunk_batch()

    @cache
    def update(eta: float, zeta: float, beta: float = 1.0) -> tuple[Poco, Tensors]:
        poco = case.poco(eta=eta, zeta=zeta, beta=beta)
        poco.rng = case.draws()
        loss, metrics = poco(batch, "online")
        loss.backward()
        return poco, metrics | {"loss": loss.detach()}

    def options(match: re.Match[str]) -> dict[str, float]:
        zeta, beta = match[2], match[4]
        return {
            "eta": float(match[1]),
            "zeta": float("inf") if zeta == "none" else float(zeta),
            "beta": float(beta or 1),
        }

    for match in case.names(rf"post\.loss\.{OPTIONS}"):
        yield match[0], update(**options(match))[1]["posterior_loss"]
    for match in case.names(rf"actor_loss\.{OPTIONS}"):
        _, metrics = update(**options(match))
        yield match[0], metrics["loss"] - metrics["critic_loss"]
    for match in case.names(rf"post\.loss\.uniform\.zeta(none|{NUMBER})"):
        zeta = float("inf") if match[1] == "none" else float(match[1])
        yield match[0], update(float("inf"), zeta)[1]["posterior_loss"]
    for match in case.names(rf"post\.clip_ratio\.zeta(none|{NUMBER})"):
        zeta = float("inf") if match[1] == "none" else float(match[1])
        yield match[0], update(0.1, zeta)[1]["clipped_fraction"]
    poco, metrics = update(0.1, 1.0)
    yield "bc.loss", metrics["bc_loss"]
    for k in range(case.members):
        for (_, name), grad in zip(critic_names(poco.critic, k), critic_grads(poco.critic, k), strict=True):
            yield f"grad.critic.{k}.{name}", grad
    for match in case.names(rf"(grad\.actor\.{OPTIONS})\.l0\.w"):
        inner = re.fullmatch(rf"grad\.actor\.{OPTIONS}", match[1])
        assert inner is not None
        poco, _ = update(**options(inner))
        for p, name in actor_names(poco):
            assert p.grad is not None
            yield f"{match[1]}.{name}", transposed(p.grad)


def critic_grads(critic: ChunkCritic, member: int) -> list[Tensor]:
    """In the order of critic_names."""
    groups = (critic.weights, critic.biases, critic.gains, critic.shifts)
    return [
        p.grad[member] if i == 0 else p.grad[member, 0]
        for i, parameters in enumerate(groups)
        for p in parameters
        if p.grad is not None
    ]


def updates(case: Case) -> Iterator[tuple[str, Tensor]]:
    """Whole updates with Adam, where the file has them.

    Deviation 1: the authors mix the critic from before the step into the target, we the one after it. Their target is
    therefore put in place before each update, and what mixing the new critic into it gives is compared.
    """
    numbers = sorted({int(match[1]) for match in case.names(r"update(\d+)\..*")})
    poco, batch = case.poco(**case.joint), case.chunk_batch()
    optimizer = torch.optim.Adam(
        [*poco.policy.head.parameters(), *poco.critic.parameters()], lr=case.constants["lr"], eps=1e-8
    )
    for u in numbers:
        name = f"update{u}"
        if u > numbers[0]:
            case.load_critic(poco.target_critic, f"update{u - 1}.target_critic")
        poco.rng = case.draws(f"draw.{name}")
        loss, metrics = poco(batch, "online")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield f"{name}.critic_loss", metrics["critic_loss"]
        yield f"{name}.bc_loss", metrics["bc_loss"]
        yield f"{name}.post_loss", metrics["posterior_loss"]
        yield f"{name}.actor_loss", (loss - metrics["critic_loss"]).detach()
        yield f"{name}.total_loss", loss.detach()
        yield f"{name}.clip_ratio", metrics["clipped_fraction"]
        for p, parameter in actor_names(poco):
            yield f"{name}.actor.{parameter}", transposed(p.detach()).clone()
        polyak_update(poco.target_critic, poco.critic, case.constants["tau"])
        for kind, critic in (("critic", poco.critic), ("target_if_new_params", poco.target_critic)):
            for k in range(case.members):
                for p, parameter in critic_names(critic, k):
                    yield f"{name}.{kind}.{k}.{parameter}", p.detach().clone()


def window(case: Case) -> Iterator[tuple[str, Tensor]]:
    """What the README says of the batch: this holds the file and its constants to account, not code of ours."""
    steps = torch.arange(case.horizon).double()
    if "batch.raw_rewards" in case.tensors:
        discounted = case["batch.raw_rewards"] * case.constants["discount"] ** steps
        yield "batch.rewards_cum", discounted.cumsum(dim=1)
    if "batch.raw_masks" in case.tensors:
        yield "batch.masks_cum", case["batch.raw_masks"].cummin(dim=1).values
    if "batch.raw_terminals" in case.tensors:
        ended = case["batch.raw_terminals"].cummax(dim=1).values[:, :-1]
        yield "batch.valid", torch.cat([torch.ones_like(ended[:, :1]), 1 - ended], dim=1)


def skipped(name: str) -> str | None:
    """Why a tensor is not compared; None when it must be."""
    if re.match(r"update\d+\.target_critic\.", name):
        return "Deviation 1: theirs mixes in the critic from before the step (see update*.target_if_new_params)"
    return next((reason for pattern, reason in INPUTS.items() if re.match(pattern, name)), None)


def group_of(name: str) -> str:
    """update1.critic.0.l0.w -> update1.critic; grad.actor.temp1... -> grad.actor; cand.q -> cand."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "grad" or parts[0].startswith("update") else parts[0]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; infinite when the shapes do not fit or something is not finite."""
    if ours.numel() != theirs.numel():
        return float("inf")
    largest = (ours.reshape(-1).double() - theirs.reshape(-1)).abs().max().item()
    return largest if largest == largest else float("inf")


def compare(path: str | Path) -> list[Row]:
    """One row per group of the file, in the file's order.

    Raises:
        FormatError: the file is not of the golden format, or holds nothing to compare.
    """
    try:
        case = Case(path)
        parts = (window, e_step, flow, critic, objective, updates)
        ours = {name: value for part in parts for name, value in part(case)}
    except (RuntimeError, IndexError, ValueError) as error:  # our code on tensors whose sizes contradict each other
        raise FormatError(f"sizes of the tensors do not fit each other: {error}") from error
    compared: dict[str, list[float]] = {}
    left: dict[tuple[str, str], int] = {}
    for name, theirs in case.tensors.items():
        if reason := skipped(name):
            left[group_of(name), reason] = left.get((group_of(name), reason), 0) + 1
        elif name in ours:
            compared.setdefault(group_of(name), []).append(difference(ours[name], theirs))
        else:
            left[name, "not a name of the published format"] = 1
    rows = [Row(group, len(values), max(values)) for group, values in compared.items()]
    if compared.keys() <= {"batch"}:
        raise FormatError("it holds inputs but no results to compare")
    return rows + [Row(group, count, None, reason) for (group, reason), count in left.items()]


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: check_poco.py FILE", file=sys.stderr)
        return 2
    try:
        rows = compare(arguments[0])
    except FormatError as error:
        print(f"{arguments[0]} is not a golden file of the published objective: {error}", file=sys.stderr)
        return 2
    print(f"{'group':32} {'n':>4}  {'difference':>10}")
    for row in rows:
        print(row)
    failed = [row.group for row in rows if not row.ok]
    print(f"FAIL: {', '.join(failed)}" if failed else f"ok: all within {TOLERANCE:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
