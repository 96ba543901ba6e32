"""rlpd: SAC with an ensemble of ikostrikov/rlpd. rlpd_ac: the same over chunks, of ColinQiyangLi/qc."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from golden import Actor, Golden, Numbers, Scripted, chunk_batch, chunk_window, dense, ensemble, gradients, values
from torch import Tensor, nn

from poco_vla import ActionSpec, ChunkBatch
from poco_vla.algorithms.rlpd import Rlpd, RlpdAc
from poco_vla.algorithms.soft_actor_critic import SoftActorCritic
from poco_vla.gaussian import GaussianNetwork, Temperature


class ScriptedMembers(Scripted):
    """The file's draws of an ensemble's members beside its other draws."""

    def __init__(self, normals: Sequence[Tensor], members: Tensor | None = None) -> None:
        super().__init__(normals)
        self.drawn = members

    def members(self, count: int, size: int, rows: int, like: Tensor) -> Tensor:
        assert self.drawn is not None
        assert self.drawn.shape == (count,)
        assert self.drawn.max() < size
        return self.drawn.long().expand(rows, -1)


def gaussian(actor: GaussianNetwork) -> list[Any]:
    """Return the entries of a Gaussian network: "l0.w", ..., "ln0.g", ..., "mean.w", "log_std.w"."""
    entries = dense(actor.layers)
    for i, norm in enumerate(actor.norms):
        assert isinstance(norm, nn.LayerNorm)
        entries += [(f"ln{i}.g", norm.weight, lambda t: t), (f"ln{i}.b", norm.bias, lambda t: t)]
    return entries + dense([actor.mean], "mean") + dense([actor.log_std], "log_std")


def networks(algorithm: SoftActorCritic) -> dict[str, list[Any]]:
    """Return the entries of each network that a file stores."""
    return {
        "actor": gaussian(algorithm.actor),
        "critic": ensemble(algorithm.critic),
        "target_critic": ensemble(algorithm.target_critic.network),
    }


def log_alpha(temperature: Temperature, name: str) -> list[Any]:
    """Return the entry of a temperature."""
    return [(name, temperature.log_alpha, lambda t: t)]


def learner(golden: Golden, kind: type[Rlpd], **options: Any) -> Rlpd:
    """Return the algorithm with the file's weights and options, in float64."""
    config, actions = golden.config, golden["batch.actions"]
    horizon, width = (1, *actions.shape[1:])[-2:]
    policy = Actor(golden["batch.obs"].shape[-1], ActionSpec(horizon, width, width, 1), [4])
    found: dict[str, Any] = {
        "gamma": config["discount"],
        "tau": config["tau"],
        "critic_members": config["num_qs"],
        "target_entropy": config["target_entropy"] / (horizon * width),
        "hidden": tuple(golden.hidden("init.critic.0")),
        "error_mean": "all",
    }
    algorithm = kind(policy, kind.config_class(**found | options)).double()
    for net, entries in networks(algorithm).items():
        golden.load(entries, f"init.{net}")
    if algorithm.target_critic.before is not None:
        golden.load(ensemble(algorithm.target_critic.before), "init.critic")
    golden.load(log_alpha(algorithm.temperature, "log_temp"), "init")
    return algorithm


def pieces(golden: Golden) -> list[ChunkBatch]:
    """Return the batch in the pieces of which each is a step of the critics."""
    batch, utd = chunk_batch(golden), golden.sizes["utd"]
    size = len(batch) // utd
    return [batch.rows(slice(i * size, (i + 1) * size)) for i in range(utd)]


def rlpd(golden: Golden) -> Numbers:
    """Yield each loss by itself at the initial weights, and whole updates of several steps of the critics."""
    config, parts = golden.config, pieces(golden)
    options = {
        "target_members": config["num_min_qs"],
        "backup_entropy": config["backup_entropy"],
        "actor_every": golden.sizes["utd"],
    }
    batch, algorithm = parts[0], learner(golden, Rlpd, **options)
    actor, critic = gaussian(algorithm.actor), ensemble(algorithm.critic)
    temperature = log_alpha(algorithm.temperature, "log_temp")

    prefix, next_prefix = algorithm.encode(batch), algorithm.encode_next(batch)
    draw = golden["draw.critic.noise"][:, None]
    with torch.no_grad():
        distribution = algorithm.distribution(next_prefix.features)
        chunk, log_prob = distribution.sample(draw)
        yield "critic.next_dist.mean", distribution.base.mean
        yield "critic.next_dist.std", distribution.base.std
        yield "critic.next_action", chunk
        yield "critic.next_log_prob", log_prob
        yield "critic.next_q_each", algorithm.target_critic(next_prefix.features, chunk[:, None])
        yield "critic.q", algorithm.critic(prefix.features, batch.actions[:, None])
        yield "act.mode", algorithm.distribution(prefix.features).mode

    algorithm.rng = ScriptedMembers([draw], golden["draw.critic.members"])
    noise = algorithm.draw_noise(batch, "critic")
    with torch.no_grad():
        yield "critic.target", batch.returns + batch.discount * algorithm.next_value(next_prefix, noise)
    loss, metrics = algorithm.critic_loss(batch, noise)
    loss.backward()
    yield "loss.critic.critic_loss", loss
    yield "loss.critic.q_mean", metrics["q"]
    yield from gradients(critic, "grad.critic")
    algorithm.config = replace(algorithm.config, backup_entropy=False)
    yield "loss.critic.critic_loss.no_backup_entropy", algorithm.critic_loss(batch, noise)[0]
    algorithm.config = replace(algorithm.config, backup_entropy=config["backup_entropy"])

    algorithm.rng = ScriptedMembers([golden["draw.actor.noise"]])
    noise = algorithm.draw_noise(batch, "actor")
    loss, metrics = algorithm.actor_loss(batch, noise)
    loss.backward()
    with torch.no_grad():
        chunk, log_prob = algorithm.sample(prefix, noise)
        yield "actor.action", chunk
        yield "actor.log_prob", log_prob
        yield "actor.q_each", algorithm.critic(prefix.features, chunk[:, None])
    yield "loss.actor.actor_loss", metrics["actor_loss"]
    yield "loss.actor.entropy", metrics["entropy"]
    yield "loss.temp.temperature", metrics["temperature"]
    yield "loss.temp.temperature_loss", metrics["temperature_loss"]
    yield from gradients(actor, "grad.actor")
    yield from gradients(temperature, "grad")
    algorithm.zero_grad()
    yield from whole_updates(golden, algorithm, parts)


def whole_updates(golden: Golden, algorithm: Rlpd, parts: list[ChunkBatch]) -> Numbers:
    """Yield metrics and parameters of updates in the phases of :meth:`Rlpd.phases`, one for each piece of the batch."""
    config = golden.config
    rates = {"gaussian": config["actor_lr"], "critic": config["critic_lr"], "temperature": config["temp_lr"]}
    groups = [group | {"lr": rates[group["name"]]} for group in algorithm.parameter_groups()[1:]]
    optimizer = torch.optim.Adam([{"params": group["params"], "lr": group["lr"]} for group in groups])
    number = 0
    for u in golden.updates():
        metrics = {}
        for i, batch in enumerate(parts):
            for phase in algorithm.phases("online", number):
                draw = f"draw.update{u}.{f'critic{i}' if phase == 'critic' else phase}"
                members = golden[f"{draw}.members"] if phase == "critic" else None
                algorithm.rng = ScriptedMembers([golden[f"{draw}.noise"]], members)
                loss, found = algorithm(batch, phase)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                algorithm.after_step(phase)
                metrics |= found
            number += 1
        for name in ("actor_loss", "critic_loss", "entropy", "temperature", "temperature_loss"):
            yield f"update{u}.metric.{name}", metrics[name]
        yield f"update{u}.metric.q", metrics["q"]
        for net, entries in networks(algorithm).items():
            yield from values(entries, f"update{u}.{net}")
        yield from values(log_alpha(algorithm.temperature, "log_temp"), f"update{u}")


def rlpd_ac(golden: Golden) -> Numbers:
    """Yield the joint loss at the initial weights, and whole updates, with the target of either order."""
    config, batch = golden.config, chunk_batch(golden)
    options = {"drop_crossing": True, "target_mixes": "before", "aggregation": config["q_agg"]}
    yield from chunk_window(golden)

    def noise_of(algorithm: Rlpd, draw: str) -> Any:
        algorithm.rng = ScriptedMembers([golden[f"{draw}.critic.noise"], golden[f"{draw}.actor.noise"]])
        return algorithm.draw_noise(batch, "joint")

    def metrics_of(loss: Tensor, metrics: dict[str, Tensor], q: Tensor) -> dict[str, Tensor]:
        """Return the official code's metrics of a step."""
        bc_loss = metrics.get("bc_loss", torch.zeros(1).double())
        return {
            "actor.actor_loss": metrics["actor_loss"],
            "actor.alpha": metrics["temperature"],
            "actor.alpha_loss": metrics["temperature_loss"],
            "actor.bc_loss": bc_loss,
            "actor.entropy": metrics["entropy"],
            "actor.q": metrics["actor_q"],
            "actor.total_loss": loss.detach() - metrics["critic_loss"],
            "critic.critic_loss": metrics["critic_loss"],
            "critic.q_max": q.max(),
            "critic.q_mean": metrics["q"],
            "critic.q_min": q.min(),
        }

    matches = (re.fullmatch(r"loss\.actor\.bc_loss\.bc(.+)", name) for name in golden.results)
    variants = sorted(match[1] for match in matches if match)
    for variant in ["", *variants]:
        weight = float(variant) if variant else config["bc_alpha"]
        algorithm = learner(golden, RlpdAc, bc_weight=weight, **options)
        noise = noise_of(algorithm, "draw")
        loss, metrics = algorithm(batch, "joint", noise)
        loss.backward()
        prefix = algorithm.encode(batch)
        q = algorithm.critic(prefix.features, batch.actions[:, None])[..., 0].detach()
        found = metrics_of(loss, metrics, q)
        if variant:
            yield f"loss.actor.bc_loss.bc{variant}", found["actor.bc_loss"]
            yield f"loss.actor.total_loss.bc{variant}", found["actor.total_loss"]
            yield from gradients(gaussian(algorithm.actor), f"grad.bc{variant}.actor")
            continue
        yield "loss.total", loss
        for name, value in found.items():
            yield f"loss.{name}", value
        yield from gradients(gaussian(algorithm.actor), "grad.actor")
        yield from gradients(ensemble(algorithm.critic), "grad.critic")
        yield from gradients(log_alpha(algorithm.temperature, "log_temp"), "grad")
        with torch.no_grad():
            next_prefix = algorithm.encode_next(batch)
            next_chunk, _ = algorithm.distribution(next_prefix.features).sample(noise.next_noise)
            chunk, log_prob = algorithm.sample(prefix, noise)
            yield "critic.next_action", next_chunk
            yield "critic.next_q_each", algorithm.target_critic(next_prefix.features, next_chunk[:, None])
            yield "critic.target", batch.returns + batch.discount * algorithm.next_value(next_prefix, noise)
            yield "critic.q", q
            yield "actor.action", chunk
            yield "actor.log_prob", log_prob
            yield "actor.q_each", algorithm.critic(prefix.features, chunk[:, None])
            yield "bc.log_prob", algorithm.distribution(prefix.features).log_prob(batch.actions)

    algorithm = learner(golden, RlpdAc, bc_weight=config["bc_alpha"], **options)
    optimizer = torch.optim.Adam([p for p in algorithm.parameters() if p.requires_grad], lr=config["lr"])
    for u in golden.updates():
        q = algorithm.critic(algorithm.encode(batch).features, batch.actions[:, None]).detach()
        target = networks(algorithm)["target_critic"]
        before = [view(parameter.detach()).clone() for _, parameter, view in target]
        (phase,) = algorithm.phases("online", u - 1)
        loss, metrics = algorithm(batch, phase, noise_of(algorithm, f"draw.update{u}"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        algorithm.after_step(phase)
        for name, value in metrics_of(loss, metrics, q).items():
            yield f"update{u}.metric.{name}", value
        for net, entries in networks(algorithm).items():
            yield from values(entries, f"update{u}.{net}")
        yield from values(log_alpha(algorithm.temperature, "log_temp"), f"update{u}")
        after = learner(golden, RlpdAc, **options | {"target_mixes": "after"})
        after.critic.load_state_dict(algorithm.critic.state_dict())
        for (_, parameter, view), value in zip(networks(after)["target_critic"], before, strict=True):
            view(parameter.data).copy_(value)
        after.after_step(phase)
        yield from values(networks(after)["target_critic"], f"update{u}.target_if_new_params")
