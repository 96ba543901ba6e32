"""qc, qc_fql: ColinQiyangLi/qc. fql: seohongpark/fql."""

from collections.abc import Iterator, Mapping

import torch
from golden import (
    Golden,
    Numbers,
    Scripted,
    actor,
    chunk_batch,
    chunk_window,
    dense,
    drawn,
    ensemble,
    gradients,
    values,
)

from poco_vla.algorithms.best_of_n import BestOfN, BestOfNConfig, QChunking
from poco_vla.algorithms.one_step import OneStepConfig, QcFql
from poco_vla.critic import TargetNetwork, aggregate
from poco_vla.flow import interpolate
from poco_vla.policy import propose


def official(golden: Golden) -> dict[str, object]:
    """Return the options that the families share, those that restore the official behaviour among them."""
    config = golden.config
    return {
        "gamma": config["discount"],
        "tau": config["tau"],
        "aggregation": config["q_agg"],
        "drop_crossing": True,
        "error_mean": "all",
        "target_mixes": "before",
        "critic_hidden": tuple(golden.hidden("init.critic.0")),
        "critic_members": members(golden),
    }


def members(golden: Golden) -> int:
    return len({name.split(".")[2] for name in golden.inputs if name.startswith("init.critic.")})


def networks(algorithm: QChunking) -> Iterator[tuple[str, list]]:
    yield "actor", dense(algorithm.policy.head.layers)
    yield "critic", ensemble(algorithm.critic)
    if isinstance(algorithm, QcFql):
        yield "onestep", dense(algorithm.one_step.mlp.layers)


def loaded[A: QChunking](algorithm: A, golden: Golden) -> A:
    """Return the algorithm with the file's initial weights."""
    algorithm = algorithm.double()
    for name, entries in networks(algorithm):
        golden.load(entries, f"init.{name}")
    golden.load(ensemble(algorithm.target_critic.network), "init.target_critic")
    if algorithm.target_critic.before is not None:
        golden.load(ensemble(algorithm.target_critic.before), "init.critic")
    return algorithm


def best_of_n(golden: Golden, **options: object) -> BestOfN:
    config = official(golden) | {"num_candidates": golden.config["actor_num_samples"]} | options
    return loaded(BestOfN(actor(golden), BestOfNConfig(**config)), golden)


def one_step(golden: Golden, **options: object) -> QcFql:
    config = official(golden) | {
        "alpha": golden.config["alpha"],
        "normalize_q_loss": golden.config["normalize_q_loss"],
        "hidden": tuple(golden.hidden("init.onestep")),
    }
    return loaded(QcFql(actor(golden), OneStepConfig(**(config | options))), golden)


def draws(golden: Golden, prefix: str = "draw") -> Scripted:
    """Return the draws of an update in the order of `draw_noise`: a', the flow's, the distillation's."""
    distill = [golden[f"{prefix}.distill.noise"]] if f"{prefix}.distill.noise" in golden else []
    normals = [golden[f"{prefix}.critic.noise"], golden[f"{prefix}.bc.x0"], *distill]
    return Scripted(normals, [golden[f"{prefix}.bc.t"]])


def backward(algorithm: QChunking, golden: Golden, prefix: str = "draw") -> dict[str, torch.Tensor]:
    """Make the gradients of one update; return its loss and metrics, with losses by their official names."""
    algorithm.rng = draws(golden, prefix)
    algorithm.zero_grad(set_to_none=True)
    loss, metrics = algorithm(chunk_batch(golden), "online")
    loss.backward()
    named = {
        "total": loss.detach(),
        "critic.critic_loss": metrics["critic_loss"],
        "actor.actor_loss": loss.detach() - metrics["critic_loss"],
        "actor.bc_flow_loss": metrics["bc_loss"],
        "actor.distill_loss": metrics.get("distill_loss", torch.zeros(1)),
    }
    if "q_loss" in metrics:
        named |= {"actor.q_loss": metrics["q_loss"], "actor.q": metrics["actor_q"]}
    return named


def statistics(q: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Return what the official code logs of the values of data chunks, [E, B]."""
    return {"critic.q_mean": q.mean(), "critic.q_max": q.max(), "critic.q_min": q.min()}


def data_values(algorithm: QChunking, golden: Golden) -> torch.Tensor:
    with torch.no_grad():
        return algorithm.critic(golden["batch.obs"], chunk_batch(golden).actions[:, None])[..., 0]


def critic(golden: Golden, algorithm: QChunking) -> Numbers:
    """Yield the TD target at the initial weights and what it is made of."""
    batch, width = chunk_batch(golden), golden["draw.critic.noise"].shape[-1]
    noise = golden["draw.critic.noise"].reshape(len(batch), -1, *batch.actions.shape[1:])
    prefix = algorithm.policy.encode(batch.next_obs)
    with torch.no_grad():
        chunk = algorithm.next_chunk(prefix, noise)
        next_q = algorithm.target_critic(prefix.features, chunk[:, None])[..., 0]
        if isinstance(algorithm, BestOfN):
            x = propose(algorithm.policy, prefix, noise.shape[1], noise=noise)
            online = algorithm.critic(prefix.features, x)
            yield "critic.candidates", x.flatten(-2)
            yield "critic.candidates_q_online_each", online
            yield "critic.candidates_q_target_each", algorithm.target_critic(prefix.features, x)
            yield "critic.chosen", aggregate(online, algorithm.config.aggregation).argmax(dim=1)
    yield "critic.next_action", chunk.reshape(-1, width)
    yield "critic.next_q_each", next_q
    q = data_values(algorithm, golden)
    yield "critic.q", q
    algorithm.rng = draws(golden)
    drawn_noise = algorithm.draw_noise(batch, "online")
    yield "critic.target", algorithm.target(batch, drawn_noise.next_noise)
    for name, value in statistics(q).items():
        yield f"loss.{name}", value


def updates(golden: Golden, algorithm: QChunking) -> Numbers:
    """Yield losses, parameters and targets of whole updates with one Adam."""
    lr = golden.config["lr"]
    optimizer = torch.optim.Adam(algorithm.parameter_groups(lr, lr))
    for u in golden.updates():
        q = data_values(algorithm, golden)
        one = {"actor.mse": mse(golden, algorithm, f"draw.update{u}")} if f"draw.update{u}.mse.noise" in golden else {}
        for name, value in (backward(algorithm, golden, f"draw.update{u}") | statistics(q) | one).items():
            yield f"update{u}.metric.{name}", value
        optimizer.step()
        ours = TargetNetwork(algorithm.target_critic.network, algorithm.config.tau, "after")
        ours.follow(algorithm.critic)
        algorithm.after_step("online")
        for name, entries in networks(algorithm):
            yield from values(entries, f"update{u}.{name}")
        yield from values(ensemble(algorithm.target_critic.network), f"update{u}.target_critic")
        yield from values(ensemble(ours.network), f"update{u}.target_if_new_params")


def mse(golden: Golden, algorithm: QcFql, prefix: str) -> torch.Tensor:
    """Return the squared error of the one-step policy on data, which the official code logs."""
    actions = chunk_batch(golden).actions
    noise = golden[f"{prefix}.mse.noise"].reshape(len(actions), 1, *actions.shape[1:])
    with torch.no_grad():
        return (
            (algorithm.next_chunk(algorithm.policy.encode({"state": golden["batch.obs"]}), noise) - actions)
            .square()
            .mean()
        )


def losses(golden: Golden, algorithm: QChunking) -> Numbers:
    """Yield losses and gradients at the initial weights."""
    for name, value in backward(algorithm, golden).items():
        yield f"loss.{name}", value
    for name, entries in networks(algorithm):
        yield from gradients(entries, f"grad.{name}")


def qc(golden: Golden) -> Numbers:
    """Yield the numbers of best-of-N."""
    yield from chunk_window(golden)
    algorithm = best_of_n(golden)
    yield from critic(golden, algorithm)
    yield from losses(golden, algorithm)
    batch = chunk_batch(golden)
    prefix, x0, t = algorithm.policy.encode(batch.obs), golden["draw.bc.x0"], golden["draw.bc.t"]
    x_t = interpolate(x0.reshape(batch.actions.shape)[:, None], batch.actions[:, None], t)
    yield "bc.xt", x_t.flatten(1)
    with torch.no_grad():
        yield "bc.pred", algorithm.policy.velocity(prefix, x_t, t).flatten(1)
    yield (
        "loss.critic.critic_loss.q_agg_min",
        backward(best_of_n(golden, aggregation="min"), golden)["critic.critic_loss"],
    )
    with drawn(golden["draw.act.noise"]):
        yield "act.action", algorithm.act(prefix).flatten(1)
    yield from updates(golden, algorithm)


def qc_fql(golden: Golden) -> Numbers:
    """Yield the numbers of QC-FQL."""
    yield from chunk_window(golden)
    yield from fql(golden)


def fql(golden: Golden) -> Numbers:
    """Yield the numbers of a one-step policy; those of FQL alone where the file has their draws."""
    algorithm, batch = one_step(golden), chunk_batch(golden)
    yield from critic(golden, algorithm)
    prefix = algorithm.policy.encode(batch.obs)
    noise = golden["draw.distill.noise"].reshape(len(batch), 1, *batch.actions.shape[1:])
    with torch.no_grad():
        chunk = algorithm.one_step(prefix.features, noise[:, 0])
        yield "distill.action", chunk.flatten(1)
        yield "distill.clipped_share", (chunk.abs() > 1).double().mean()
        yield "distill.target", propose(algorithm.policy, prefix, 1, noise=noise).flatten(1)
        yield "distill.q_each", algorithm.values(prefix, chunk)
    yield from losses(golden, algorithm)
    if "draw.mse.noise" in golden:
        yield "loss.actor.mse", mse(golden, algorithm, "draw")
        smallest = backward(one_step(golden, aggregation="min"), golden)
        yield "loss.critic.critic_loss.q_agg_min", smallest["critic.critic_loss"]
        yield "loss.actor.q_loss.q_agg_min", smallest["actor.q_loss"]
        normalized = one_step(golden, normalize_q_loss=True)
        named = backward(normalized, golden)
        yield "loss.actor.q_loss.normalized", named["actor.q_loss"]
        yield "loss.actor.actor_loss.normalized", named["actor.actor_loss"]
        yield from gradients(dense(normalized.one_step.mlp.layers), "grad.normalized.onestep")
    yield from updates(golden, algorithm)
