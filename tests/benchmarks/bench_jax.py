"""One POCO update of ours against the same in JAX, jitted whole, as the authors' and QC's released code is written; and
updates of QC, FQL and RLPD-AC against that code itself.

    pip install jax optax
    python tests/benchmarks/bench_jax.py [--quick]
    pip install flax distrax ml_collections
    git clone https://github.com/ColinQiyangLi/qc && python tests/benchmarks/bench_jax.py --official qc

The POCO update in JAX takes our weights, batch and random numbers, and has to give our loss before it is timed. Like
QC's code it feeds [state, chunk, t] to the first layer as one input, and stacks the critics. On one core, time is the
processor's, which changes less with other work on the machine.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from bench_algorithms import Measured
from measure import HERE, Rows, Size, Way, best_seconds, device_name, keep_in, mlp, random_batch, table_of, update_of
from rich.console import Console

from poco_vla import GlobalBatchRNG, Poco, PocoConfig
from poco_vla.dense import states_at_once

try:
    import jax
    import jax.numpy as jnp
    import optax
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install jax optax")

type Tree = Any


@dataclass
class Args:
    """Measure one update in both."""

    size: Size = field(default_factory=Size)
    """Sizes of the update."""
    quick: bool = False
    """A twentieth of the batch, once; nothing is kept."""
    official: Path | None = None
    """A clone of github.com/ColinQiyangLi/qc, whose updates are measured beside ours."""


def main(argv: Sequence[str] | None = None) -> Rows:
    """Measure, print and keep."""
    args = tyro.cli(Args, args=argv)
    size = replace(args.size, batch=max(4, args.size.batch // 20)) if args.quick else args.size
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    gap, theirs = jax_update(size)
    part = states_at_once(size.batch, 1 + size.candidates, device)
    work = {
        "JAX, jitted": theirs,
        "ours": update_of(size, Way("online", part), device),
        "ours, candidates in bfloat16": update_of(size, Way("online", part, "bfloat16"), device),
    }
    if args.official is not None:
        for name in OFFICIAL:
            work[f"{name}: JAX, official"] = official_update(name, size, args.official)
            work[f"{name}: ours"] = Measured(name, size, device).whole_update
    clock = time.process_time if os.cpu_count() == 1 or len(os.sched_getaffinity(0)) == 1 else time.perf_counter
    seconds = best_seconds(work, 1 if args.quick else 4, device, clock)
    peers = {what: what.replace("ours", "JAX, official") for what in seconds if ":" in what}
    rows = [
        {"what": what, "ms": took * 1e3, "updates/s": 1 / took, "x JAX": took / seconds[peers.get(what, "JAX, jitted")]}
        for what, took in seconds.items()
    ]
    console = Console() if Console().is_terminal else Console(width=120)
    title = f"A POCO update, {torch.get_num_threads()} threads, jax {jax.__version__}; losses differ by {gap:.1e}"
    console.print(table_of(title, rows))
    if not args.quick:
        figures = {"jax": {"rows": rows, "version": jax.__version__, "loss differs by": gap}}
        console.print(f"kept in {keep_in(HERE / 'results', figures).name} ({device_name()})")
    return rows


def jax_update(size: Size) -> tuple[float, Callable[[], Any]]:
    """The relative difference of JAX's loss from ours, and its update, ready to be timed."""
    config = PocoConfig(
        num_candidates=size.candidates,
        critic_hidden=(size.width,) * size.layers,
        critic_members=size.critics,
    )
    poco = Poco(mlp(size), config, GlobalBatchRNG(torch.Generator().manual_seed(0)))
    batch = random_batch(size, "cpu")
    plan = poco.draw_noise(batch, "online")
    actor = [{"w": array(layer.weight).T, "b": array(layer.bias)} for layer in poco.policy.head.layers]
    params = {"actor": actor, "critic": critic_of(poco.critic)}
    target = critic_of(poco.target_critic)
    state = {"params": params, "target": target, "optimizer": optax.adam(3e-4).init(params)}
    inputs = {
        "obs": batch.obs["observation.state"],
        "next_obs": batch.next_obs["observation.state"],
        "actions": batch.actions.flatten(1),
        "returns": batch.returns,
        "discount": batch.discount,
    }
    inputs = {name: array(value) for name, value in inputs.items()}
    step = jax.jit(partial(update, size=size, config=config), donate_argnums=0)
    given = {name: array(getattr(plan, name)).reshape(size.batch, -1, size.chunk) for name in NOISES}
    given["time"] = array(plan.flow_time)
    theirs = loss_of(params, target, inputs, given, size, config)
    ours = poco(batch, "online", plan)[0].item()
    holder = {"state": state, "key": jax.random.key(0)}

    def run() -> None:
        holder["key"], key = jax.random.split(holder["key"])
        holder["state"], loss = step(holder["state"], inputs, key)
        loss.block_until_ready()

    return abs(float(theirs) - ours) / abs(ours), run


NOISES = ("next_noise", "candidate_noise", "flow_noise")


def update(state: Tree, batch: Tree, key: Any, *, size: Size, config: PocoConfig) -> tuple[Tree, Any]:
    """Draws, loss, gradients, Adam and target of one update."""
    shapes = {"next_noise": 1, "candidate_noise": size.candidates, "flow_noise": 1 + size.candidates}
    keys = jax.random.split(key, 4)
    plan = {
        name: jax.random.normal(k, (size.batch, n, size.chunk))
        for (name, n), k in zip(shapes.items(), keys, strict=False)
    }
    plan["time"] = jax.random.uniform(keys[3], (size.batch, 1 + size.candidates))
    loss, grads = jax.value_and_grad(loss_of)(state["params"], state["target"], batch, plan, size, config)
    updates, optimizer = optax.adam(3e-4).update(grads, state["optimizer"])
    params = optax.apply_updates(state["params"], updates)
    target = jax.tree.map(lambda t, p: t + config.tau * (p - t), state["target"], params["critic"])
    return {"params": params, "target": target, "optimizer": optimizer}, loss


def loss_of(params: Tree, target: Tree, batch: Tree, plan: Tree, size: Size, config: PocoConfig) -> Any:
    """Eq. 14, 17 and 23 for transitions that are all valid."""
    actor, frozen = params["actor"], jax.lax.stop_gradient(params["actor"])
    following = sample(frozen, batch["next_obs"], plan["next_noise"], size.flow_steps)
    y = batch["returns"] + batch["discount"] * values(target, batch["next_obs"], following).mean(0)[:, 0]
    critic = jnp.square(values(params["critic"], batch["obs"], batch["actions"][:, None])[..., 0] - y).mean()
    x = sample(frozen, batch["obs"], plan["candidate_noise"], size.flow_steps)
    w = jax.nn.softmax(values(target, batch["obs"], x).mean(0) / config.eta)
    chunks = jnp.concatenate([batch["actions"][:, None], x], axis=1)
    t = plan["time"][..., None]
    v = velocity(actor, batch["obs"], (1 - t) * plan["flow_noise"] + t * chunks, plan["time"])
    errors = jnp.square(v - (chunks - plan["flow_noise"])).mean(-1)
    posterior = (w * jnp.minimum(errors[:, 1:], config.zeta)).sum(-1).mean()
    return critic + errors[:, 0].mean() + config.beta * posterior


def velocity(actor: Tree, obs: Any, x: Any, t: Any) -> Any:
    """Velocity of chunks [B, N, HA] at times [B, N]."""
    h = jnp.concatenate([jnp.broadcast_to(obs[:, None], (*x.shape[:2], obs.shape[-1])), x, t[..., None]], -1)
    for i, layer in enumerate(actor):
        h = h @ layer["w"] + layer["b"]
        h = jax.nn.silu(h) if i < len(actor) - 1 else h
    return h


def sample(actor: Tree, obs: Any, noise: Any, steps: int) -> Any:
    """Euler's method, clipped."""
    x = noise
    for k in range(steps):
        x = x + velocity(actor, obs, x, jnp.full(x.shape[:2], k / steps)) / steps
    return jnp.clip(x, -1, 1)


def values(critic: Tree, obs: Any, x: Any) -> Any:
    """[E, B, N] of the stacked critics."""
    h = jnp.concatenate([jnp.broadcast_to(obs[:, None], (*x.shape[:2], obs.shape[-1])), x], -1)
    h = jnp.broadcast_to(h.reshape(1, -1, h.shape[-1]), (critic["w"][0].shape[0], h.shape[0] * h.shape[1], h.shape[-1]))
    for i, (w, b) in enumerate(zip(critic["w"], critic["b"], strict=True)):
        h = h @ w + b
        if i < len(critic["gain"]):
            h = jax.nn.silu(h)
            mean, var = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
            h = (h - mean) / jnp.sqrt(var + 1e-5) * critic["gain"][i] + critic["shift"][i]
    return h.reshape(h.shape[0], *x.shape[:2])


def critic_of(critic: Any) -> Tree:
    """Our ensemble's weights."""
    groups = {"w": critic.weights, "b": critic.biases, "gain": critic.gains, "shift": critic.shifts}
    return {name: [array(p) for p in group] for name, group in groups.items()}


OFFICIAL = ("qc", "qc_fql", "fql", "rlpd_ac")
"""Algorithms of ours whose authors' code is in ColinQiyangLi/qc."""


def official_update(name: str, size: Size, folder: Path) -> Callable[[], Any]:
    """The update of QC's released code, jitted, on random numbers; at its own sizes but for those of `size`."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    module = import_module("agents.acrlpd" if name == "rlpd_ac" else "agents.acfql")
    horizon = 1 if name == "fql" else size.horizon
    config = module.get_config()
    config.horizon_length = horizon
    config.actor_hidden_dims = (size.width,) * size.layers
    if name == "qc":
        config.actor_type, config.actor_num_samples = "best-of-n", size.candidates
    kind = module.ACRLPDAgent if name == "rlpd_ac" else module.ACFQLAgent
    agent = kind.create(0, np.zeros(size.state_dim, np.float32), np.zeros(size.action_dim, np.float32), config)
    rng = np.random.default_rng(0)
    ones = np.ones((size.batch, horizon), np.float32)
    batch = {
        "observations": rng.standard_normal((size.batch, size.state_dim), np.float32),
        "next_observations": rng.standard_normal((size.batch, horizon, size.state_dim), np.float32),
        "actions": rng.uniform(-1, 1, (size.batch, horizon, size.action_dim)).astype(np.float32),
        "rewards": 0 * ones,
        "masks": ones,
        "valid": ones,
    }
    holder = {"agent": agent}

    def run() -> None:
        holder["agent"], _ = holder["agent"].update(batch)
        jax.block_until_ready(holder["agent"].network.params)

    return run


def array(tensor: Any) -> Any:
    return jnp.asarray(tensor.detach().numpy())


if __name__ == "__main__":
    rows = main()
    assert all(math.isfinite(row["ms"]) for row in rows)
