"""What a policy behind a websocket costs, against the same policy asked directly. On loopback, on the CPU.

    python tests/benchmarks/bench_serving.py [flow_mlp] [pi05] [--requests 200] [--clients 1 4] [--quick]

Per request: a state and, for pi0.5, two pictures of 224 x 224. "added" is the median latency of one client less the
median of a direct call, "x direct" their ratio. Several clients ask from threads, and their states share forwards;
they share the interpreter too, so that robots on machines of their own get more. "codec alone" has no model behind it,
only a reply of the same size: what the way costs.

The last row sends whole episodes to the server, into a sink that only looks at the clock: "x bare socket" is the time
of that against the same bytes through a TCP connection that does nothing else.
"""

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from measure import Rows, device_name, table_of
from rich.console import Console

from poco_vla import FlowPolicy, load_adapter
from poco_vla.data import Episode
from poco_vla.rollout import Actor
from poco_vla.serving.client import PolicyClient
from poco_vla.serving.feature import Feature
from poco_vla.serving.server import PolicyServer

type Name = Literal["flow_mlp", "pi05"]

PICTURE = Feature((224, 224, 3), "uint8")
TASK = "pick up the pen"
EPISODE_STEPS = 300
CAMERAS = dict.fromkeys(("observation.images.top", "observation.images.wrist"), Feature((128, 128, 3), "uint8"))


@dataclass(frozen=True)
class Args:
    """Measure requests/s and latency of a served policy, against direct inference."""

    adapters: Annotated[tuple[Name, ...], tyro.conf.Positional] = ("flow_mlp", "pi05")
    """Whose tiny policy to serve."""
    requests: int = 200
    """Per client."""
    clients: tuple[int, ...] = (1, 4)
    """How many ask at the same time."""
    quick: bool = False
    """Few requests."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = tyro.cli(Args, args=argv)
    torch.set_num_threads(1)
    console = Console() if Console().is_terminal else Console(width=120)
    count = 10 if args.quick else args.requests
    for name in args.adapters:
        rows = bench(load_adapter(name).tiny(), name, count, args.clients)
        console.print(table_of(f"{name} tiny, served on loopback, {count} requests per client; {device_name()}", rows))


def bench(policy: FlowPolicy, name: str, count: int, clients: Sequence[int]) -> Rows:
    spec = {key: PICTURE if "image" in key else Feature((6,), "float32") for key in policy.input_keys}
    obs = random_obs(spec)
    actor = Actor(policy, seed=0)
    rows = [row("codec alone, 1 client", *served(no_model(policy), spec, name, obs, count))]
    base = times(lambda: actor.chunks({key: column[None] for key, column in obs.items()}, [TASK]), count)
    rows.append(row("direct", base, 1 / statistics.mean(base)))
    for n in clients:
        for batch in sorted({1, n}):
            what = f"served, {n} client{'s' * (n > 1)}, at most {batch} a forward"
            rows.append(row(what, *served(actor, spec, name, obs, count, n, batch)))
    for one in rows[1:]:
        one["added ms"] = one["median ms"] - rows[1]["median ms"]
        one["x direct"] = one["median ms"] / rows[1]["median ms"]
    return [*rows, upload_row(policy, name, max(3, count // 10))]


def upload_row(policy: FlowPolicy, name: str, count: int) -> dict[str, Any]:
    spec = {"observation.state": Feature((6,), "float32"), **CAMERAS}
    episode = random_episode(spec, policy.spec.action_dim)
    data = b"".join(column.tobytes() for column in (*episode.obs.values(), episode.action))
    sink = SimpleNamespace(status=dict, take=lambda episode, key: None)
    serving = PolicyServer(no_model(policy), spec, adapter=name, fps=15.0, episodes=sink)
    with serving as server, PolicyClient(server.url) as client:
        seconds = times(lambda: client.record(episode, "key"), count)
    one = row(f"an episode up, {EPISODE_STEPS} steps, 2 pictures of 128 x 128", seconds, 1 / statistics.mean(seconds))
    bare = statistics.median(times(lambda: through_a_socket(data), count))
    median = statistics.median(seconds)
    return one | {"MB/s": len(data) / median / 1e6, "x bare socket": median / bare}


def random_episode(spec: dict[str, Feature], action_dim: int) -> Episode:
    states = [random_obs(spec, seed) for seed in range(EPISODE_STEPS)]
    columns = {key: np.stack([one[key] for one in states]) for key in spec}
    last = np.arange(EPISODE_STEPS) == EPISODE_STEPS - 1
    action = np.zeros((EPISODE_STEPS, action_dim), np.float32)
    return Episode(columns, action, last.astype(np.float32), last, last, task=TASK)


def through_a_socket(data: bytes) -> None:
    """To another thread, until all of it is there."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as thread:
        there = thread.submit(received, listening, len(data))
        with socket.create_connection(listening.getsockname()) as connection:
            connection.sendall(data)
            there.result()


def received(listening: socket.socket, size: int) -> None:
    buffer = bytearray(size)
    with listening.accept()[0] as connection:
        assert connection.recv_into(buffer, size, socket.MSG_WAITALL) == size


def row(what: str, seconds: Sequence[float], rate: float) -> dict[str, Any]:
    ordered = sorted(seconds)
    return {
        "what": what,
        "requests/s": rate,
        "median ms": statistics.median(ordered) * 1e3,
        "95 % ms": ordered[int(0.95 * len(ordered))] * 1e3,
    }


def random_obs(spec: dict[str, Feature], seed: int = 0) -> dict[str, np.ndarray]:
    """One state."""
    rng = np.random.default_rng(seed)
    return {
        key: rng.integers(0, 256, f.shape, np.uint8) if f.dtype == "uint8" else rng.normal(size=f.shape).astype(f.dtype)
        for key, f in spec.items()
    }


def no_model(policy: FlowPolicy) -> Any:
    """Answers at once, with zeros."""
    zeros = np.zeros((policy.spec.horizon, policy.spec.action_dim), np.float32)
    return SimpleNamespace(policy=policy, weights_version=0, chunks=lambda _, tasks: np.stack([zeros] * len(tasks)))


def times(work: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each call, after three that do not count."""
    seconds = []
    for _ in range(count + 3):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds[3:]


def served(
    actor: Any,
    spec: dict[str, Feature],
    name: str,
    obs: dict[str, np.ndarray],
    count: int,
    clients: int = 1,
    max_batch: int = 1,
) -> tuple[list[float], float]:
    """Latencies of all clients' requests, and requests per second of all together."""
    serving = PolicyServer(actor, spec, adapter=name, fps=15.0, max_batch=max_batch)
    with serving as server, ThreadPoolExecutor(clients) as threads:
        asking = [threads.submit(ask, server.url, obs, count) for _ in range(clients)]
        seconds = [asked.result() for asked in asking]
        return [one for each in seconds for one in each], sum(1 / statistics.mean(each) for each in seconds)


def ask(url: str, obs: dict[str, np.ndarray], count: int) -> list[float]:
    """A robot: its latencies."""
    with PolicyClient(url, timeout=60.0) as client:
        return times(lambda: client.chunk(obs, TASK), count)


if __name__ == "__main__":
    main()
