"""Acting through Ray, against the same environments in this process, and weights on their way to workers.

    python tests/benchmarks/bench_cluster.py [--workers 1 2 4] [--steps 4000] [--quick]

A Ray cluster on this machine. "acting": control steps per second of so many workers, each with its environments in its
own process, beside as many environments behind one `AsynchronousInteraction` (in worker processes of Gymnasium, one
forward for all) in the same run. "Ray, us/step" is what one worker takes per control step more than an `EnvPool` and an
actor that are called directly, the simulator in the same process in both: the price of the way. Episodes go to a
recorder that only counts. On 2 cores no speed-up is to be expected beyond 2 workers.

"weights": what the learner's `ray.put` and a worker's `ray.get` and copy of one version take, against one copy of the
same bytes in memory ("memcpy"), for the demo's MLP and for as many bytes as pi0.5's head has in bfloat16.
"""

import os
import runpy
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from measure import HERE, RECIPE, Rows, device_name, keep_in, table_of
from rich.console import Console

sys.path.insert(0, str(HERE.parent))
os.environ["PYTHONPATH"] = f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"  # for Ray's workers
from lerobot_policy_flow_mlp.adapter import FlowMlp
from pointmass import pointmass

from poco_vla.config import EnvSpec, InteractionConfig
from poco_vla.rollout import Actor, EnvPool, cluster_address, object_store
from poco_vla.rollout.actor import ActingCopy, WeightsVersion
from poco_vla.rollout.cluster import ClusterInteraction
from poco_vla.rollout.interaction import AsynchronousInteraction, Interaction

HORIZON = 5
PI05_HEAD = 430_000_000
"""Parameters of pi0.5's action expert."""


@dataclass
class Args:
    """Measure acting through Ray, and weights on their way."""

    workers: tuple[int, ...] = (1, 2, 4)
    """Ray workers; each count is measured."""
    num_envs: int = 4
    """Environments of each worker."""
    steps: int = 4000
    """Control steps per worker and measurement."""
    rounds: int = 5
    """Of each version of the weights."""
    quick: bool = False
    """The point mass alone, a small head, few steps; nothing is kept."""


class Counter:
    """A recorder that puts nothing on disk."""

    num_episodes = 0

    def add(self, episode: Any, key: str = "") -> None:
        self.num_episodes += 1


def main(argv: Sequence[str] | None = None) -> dict[str, Rows]:
    """Measure, print and keep."""
    args = tyro.cli(Args, args=argv)
    torch.set_num_threads(1)
    if args.quick:
        args = Args(workers=(1, 2), num_envs=args.num_envs, steps=200, rounds=2, quick=True)
    console = Console() if Console().is_terminal else Console(width=120)
    import ray

    settings = InteractionConfig(mode="ray", workers=max(args.workers) + 1)  # and one that receives weights
    ours = cluster_address.connect(settings)
    try:
        tables = {"acting": bench_acting(args), "weights": bench_weights(args)}
    finally:
        if ours:
            ray.shutdown()
    for name, rows in tables.items():
        console.print(table_of(f"Ray, {name}; {device_name()}", rows))
    if not args.quick:
        figures = {f"ray {name}": {"rows": rows} for name, rows in tables.items()}
        console.print(f"kept in {keep_in(HERE / 'results', figures).name}")
    return tables


# -- acting -----------------------------------------------------------------------------------------------------------


def bench_acting(args: Args) -> Rows:
    envs = {"point mass": pointmass(num_envs=args.num_envs)}
    if not args.quick:
        recipe = runpy.run_path(str(RECIPE))["config"]().env
        envs["OGBench cube"] = EnvSpec(recipe.type, recipe.task, recipe.options, args.num_envs, in_process=True)
    return [row for name, env in envs.items() for row in rows_of(name, env, args)]


def rows_of(name: str, env: EnvSpec, args: Args) -> Rows:
    actor = Actor(policy_for(env), 0)
    direct = seconds_per_step_called_directly(actor, env, args.steps)
    rows: Rows = [{"environment": name, "through": "called directly", "envs": env.num_envs, "steps/s": 1 / direct}]
    for count in args.workers:
        many = EnvSpec(env.type, env.task, env.options, env.num_envs * count)
        weights = WeightsVersion()
        pool = EnvPool(many, HORIZON)
        thread = AsynchronousInteraction(pool, ActingCopy(actor, weights, 1), Counter(), 0)  # type: ignore[arg-type]
        rows.append(
            {"environment": name, "through": "one thread", "envs": many.num_envs}
            | {"steps/s": steps_per_second(thread, args.steps * count)}
        )
        settings = InteractionConfig(mode="ray", workers=count)
        recorder: Any = Counter()
        through = ClusterInteraction(env, HORIZON, actor, weights, recorder, 0, settings=settings, seed=0, say=print)
        rate = steps_per_second(through, args.steps * count)
        rows.append({"environment": name, "through": f"Ray, {count} workers", "envs": many.num_envs, "steps/s": rate})
        rows[-1]["x one thread"] = rate / rows[-2]["steps/s"]
        if count == 1:
            rows[-1]["Ray, us/step"] = (1 / rate - direct) * 1e6
    return rows


def policy_for(env: EnvSpec) -> FlowMlp:
    """The demo's network, untrained."""
    with EnvPool(EnvSpec(env.type, env.task, env.options, 1, in_process=True), HORIZON) as pool:
        pool.reset(0)
        sizes = {key: column.shape[1] for key, column in pool.obs.items() if column.ndim == 2}
        sizes = {"observation.state": sizes["observation.state"], "action": pool.action_dim}
    features = {key: {"dtype": "float32", "shape": (n,), "names": None} for key, n in sizes.items()}
    numbers = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0}
    stats = {key: {name: np.full(n, value) for name, value in numbers.items()} for key, n in sizes.items()}
    return FlowMlp.from_dataset(
        features, stats, horizon=HORIZON, **runpy.run_path(str(RECIPE))["config"]().policy_options
    )


def seconds_per_step_called_directly(actor: Actor, env: EnvSpec, steps: int) -> float:
    with EnvPool(env, HORIZON) as pool:
        pool.reset(0)
        taken, began = 0, time.perf_counter()
        while taken < steps:
            taken += pool.step(actor.chunks(pool.obs, pool.tasks))[1]
        return (time.perf_counter() - began) / taken


def steps_per_second(interaction: Interaction, steps: int) -> float:
    """From the first tenth on: workers take seconds to start."""
    interaction.act(best_of_n=1, until=1e12)
    try:
        taken = 0
        while taken < steps / 10:
            taken += interaction.receive(wait=True).steps
        began, before = time.perf_counter(), taken
        while taken - before < steps:
            taken += interaction.receive(wait=True).steps
        return (taken - before) / (time.perf_counter() - began)
    finally:
        interaction.close()


# -- weights ----------------------------------------------------------------------------------------------------------


class Receiver:
    """Copies published weights into tensors of its own, as a worker does."""

    def __init__(self, kinds: list[tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.own = [torch.zeros(shape, dtype=dtype) for dtype, shape in kinds]

    def take(self, references: list[Any]) -> float:
        """Seconds."""
        import ray

        began = time.perf_counter()
        with object_store.read_only_tensors():
            for own, data in zip(self.own, ray.get(references[0]), strict=True):
                own.copy_(object_store.from_bytes(data, own.dtype, own.shape))
        return time.perf_counter() - began


def bench_weights(args: Args) -> Rows:
    mlp = [p.detach() for p in policy_for(pointmass()).parameters() if p.requires_grad]
    size = 32_000_000 if args.quick else PI05_HEAD
    head = [torch.ones(size // 40, dtype=torch.bfloat16) for _ in range(40)]
    heads = {"the demo's MLP, float32": mlp, f"{size / 1e6:.0f} M in bfloat16": head}
    return [row_of(name, tensors, args.rounds) for name, tensors in heads.items()]


def row_of(name: str, tensors: list[torch.Tensor], rounds: int) -> dict[str, Any]:
    import ray

    receiver = ray.remote(num_cpus=1)(Receiver).remote([(t.dtype, tuple(t.shape)) for t in tensors])
    copies = [torch.empty_like(tensor) for tensor in tensors]
    times: dict[str, list[float]] = {"put": [], "get": [], "memcpy": []}
    for _ in range(rounds + 1):  # the first one touches memory anew
        began = time.perf_counter()
        reference = ray.put([object_store.to_bytes(tensor) for tensor in tensors])
        put = time.perf_counter()
        get = ray.get(receiver.take.remote([reference]))
        again = time.perf_counter()
        for own, tensor in zip(copies, tensors, strict=True):
            own.copy_(tensor)
        memcpy = time.perf_counter() - again
        for key, value in zip(times, (put - began, get, memcpy), strict=True):
            times[key].append(value)
        del reference
    ray.kill(receiver)
    milliseconds = {key: 1e3 * statistics.median(values[1:]) for key, values in times.items()}
    return {
        "weights": name,
        "MB": sum(t.numel() * t.element_size() for t in tensors) / 1e6,
        **{f"{key}, ms": value for key, value in milliseconds.items()},
        "put + get, x memcpy": (milliseconds["put"] + milliseconds["get"]) / milliseconds["memcpy"],
    }


if __name__ == "__main__":
    main()
