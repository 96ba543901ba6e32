"""What `bench_update.py` runs: updates, the training loop and the replay, each beside a baseline of the same run."""

import json
import math
import os
import platform
import re
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from lerobot_policy_flow_mlp.adapter import FlowMlp
from rich.console import Console
from rich.table import Table

from poco_vla import ChunkBatch, GlobalBatchRNG, Poco, PocoConfig
from poco_vla.config import DemonstrationConfig, ReplayConfig, TrainConfig
from poco_vla.data import Episode, Replay, chunk_batch
from poco_vla.dense import _product, states_at_once
from poco_vla.noise import micro_batches
from poco_vla.rollout import EnvPool
from poco_vla.training import Trainer

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "recipes" / "mlp_cube.py"

type Section = Literal["update", "loop", "replay"]
type Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Size:
    """Sizes of one update; the defaults are the paper's in simulation, on OGBench cube-single."""

    batch: int = 256
    width: int = 512
    layers: int = 4
    candidates: int = 32
    flow_steps: int = 10
    horizon: int = 5
    critics: int = 2
    action_dim: int = 5
    state_dim: int = 28

    @property
    def chunk(self) -> int:
        return self.horizon * self.action_dim

    def actor_flops(self, rows: int, states: int) -> int:
        """Matrix products of one pass of the vector field: the state's share of the first layer once per state."""
        per_row = (self.chunk + 1) * self.width + (self.layers - 1) * self.width**2 + self.width * self.chunk
        return 2 * (rows * per_row + states * self.state_dim * self.width)

    def critic_flops(self, rows: int, states: int) -> int:
        """The same for all critics."""
        per_row = self.chunk * self.width + (self.layers - 1) * self.width**2 + self.width
        return 2 * self.critics * (rows * per_row + states * self.state_dim * self.width)

    def flops(self, stage: str) -> int:
        """One update of a stage. A backward pass costs two forward passes."""
        b, n, k = self.batch, self.candidates, self.flow_steps
        critic_step = k * self.actor_flops(b, b) + self.critic_flops(b, b) + 3 * self.critic_flops(b, b)
        propose_and_weigh = k * self.actor_flops(b * n, b) + self.critic_flops(b * n, b)
        distill = 3 * self.actor_flops(b * (n + 1), b)
        return {
            "sft": 3 * self.actor_flops(b, b),
            "warmup": critic_step,
            "online": critic_step + propose_and_weigh + distill,
        }[stage]

    def bytes(self, stage: str) -> int:
        """What an update of a stage cannot but move through memory, everything in float32: each weight is read forward
        and backward, its gradient written and read, weight and two moments read and written; each target weight is
        read and written, its critic's read. Activations are not counted: they may stay in a cache."""
        actor, critic = self.actor_flops(1, 1) // 2, self.critic_flops(1, 1) // 2  # a product and a sum per weight
        trained = {"sft": actor, "warmup": critic, "online": actor + critic}[stage]
        sampled = {"sft": 0, "warmup": actor, "online": 0}[stage]
        return 4 * (trained * (2 + 2 + 6) + sampled + (0 if stage == "sft" else 3 * critic))

    def sampling_flops(self) -> int:
        """The E-step's share of an online update: what `sampling_dtype` is about."""
        return self.flow_steps * self.actor_flops(self.batch * self.candidates, self.batch)


@dataclass
class Args:
    """Measure updates, the training loop and the replay."""

    sections: Annotated[tuple[Section, ...], tyro.conf.Positional] = ("update", "loop", "replay")
    """What to measure."""
    quick: bool = False
    """Few repetitions; kept in a file of its own."""
    threads: tuple[str, ...] = ("1", "all")
    """CPU threads of the update: numbers, or "all"."""
    size: Size = field(default_factory=Size)
    """Sizes of the update."""
    compiled: bool = False
    """Measure the POCO update through torch.compile as well: a minute of compiling per setting."""
    replay_steps: tuple[int, ...] = (1_000_000, 10_000_000)
    """Control steps in the pool; each is measured."""
    output: Path = HERE / "results"
    """Folder of the figures."""


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print, and keep the figures; the file's path."""
    args = tyro.cli(Args, args=argv)
    console = Console() if Console().is_terminal else Console(width=120)
    sections: dict[Section, tuple[str, Callable[[Args], Rows]]] = {
        "update": ("One update, against matrix products of the same FLOPs", bench_updates),
        "loop": ("The loop of recipes/mlp_cube.py, against the slower of its halves", bench_loop),
        "replay": ("A batch, against a loop over samples", bench_replay),
    }
    figures: dict[str, Any] = {}
    for name in args.sections:
        title, bench = sections[name]
        started = time.perf_counter()
        rows = bench(args)
        console.print(table_of(title, rows))
        figures[name] = {"rows": rows, "seconds": round(time.perf_counter() - started, 1)}
    path = keep(args, figures)
    console.print(f"kept in {path.name}")
    return path


# -- one update -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How an update is computed.

    Attributes:
        stage: of the three.
        part: transitions at once; None is the batch.
        sampling: precision of the E-step's candidates.
        compiled: through torch.compile.
    """

    stage: Any
    part: int | None = None
    sampling: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False


def ways(args: Args, device: str) -> dict[str, Way]:
    """The plain path of each stage, and the fast ones of the online update."""
    part = states_at_once(args.size.batch, 1 + args.size.candidates, device)
    found = {
        "BC": Way("sft"),
        "critic (warm-up)": Way("warmup"),
        "POCO, batch at once": Way("online"),
        **({f"POCO, {part} at once": Way("online", part)} if device == "cpu" else {}),
        "POCO, candidates in bfloat16": Way("online", part, "bfloat16"),
    }
    if args.compiled:
        found["POCO, torch.compile"] = Way("online", part, compiled=True)
    return found


def bench_updates(args: Args) -> Rows:
    """Best of a few repetitions in turns, updates and what they stand against alike: what else runs here only adds
    time. The floor is the longer of the time that the FLOPs take at the rate of a large float32 product, torch.mm's or
    oneDNN's whichever is faster, and that which the bytes take at the rate of a copy."""
    rows = []
    for label, device, setting in settings(args.threads):
        with setting():
            found, size = ways(args, device), args.size
            work = {what: update_of(size, way, device) for what, way in found.items()}
            shapes = matmul_shapes(size, device, args.quick)
            work |= {name: matmul_of(*product, device) for name, product in shapes.items()}
            copied = 2**20 if args.quick else 2**26
            work["copy"] = copy_of(copied, device)
            seconds = best_seconds(work, 1 if args.quick else 3, device)
        flops = {name: 2 * math.prod(product[0]) for name, product in shapes.items()}
        mm, *others = (flops[name] / seconds[name] for name, (_, dtype, _) in shapes.items() if dtype == torch.float32)
        best, per_byte = max(mm, *others), 2 * copied / seconds["copy"]
        for what, way in found.items():
            count, moved = size.flops(way.stage), size.bytes(way.stage)
            floor = max(count / best, moved / per_byte)
            row = {"device": label, "what": what, "GFLOP": count / 1e9, "MB": moved / 1e6}
            row |= {"floor ms": floor * 1e3, "ms": seconds[what] * 1e3, "x floor": seconds[what] / floor}
            rows.append(row | {"x torch.mm": seconds[what] * mm / count})
        for name, count in flops.items():
            row = {"device": label, "what": name, "GFLOP": count / 1e9, "ms": seconds[name] * 1e3}
            rows.append(row | {"x floor": seconds[name] * best / count, "x torch.mm": seconds[name] * mm / count})
        rows.append({"device": label, "what": "copy", "MB": 2 * copied / 1e6, "ms": seconds["copy"] * 1e3})
    return rows


def settings(threads: Sequence[str]) -> list[tuple[str, str, Any]]:
    """(label, device, context) of everything that the update is measured on."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = dict.fromkeys(available if count == "all" else int(count) for count in threads)
    found: list[tuple[str, str, Any]] = [
        (f"CPU, {n} thread{'s' * (n > 1)}", "cpu", lambda n=n: thread_count(n)) for n in counts
    ]
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        found += [(f"{name}, {kind}", "cuda", lambda kind=kind: tf32(kind == "TF32")) for kind in ("float32", "TF32")]
    return found


@contextmanager
def thread_count(count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def tf32(allowed: bool) -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


type Product = tuple[tuple[int, int, int], torch.dtype, Literal["mm", "oneDNN"]]


def matmul_shapes(size: Size, device: str, quick: bool) -> dict[str, Product]:
    """Matrix products: a large square one, first torch.mm's, and a hidden layer over all candidates of a batch."""
    large = 8192 if device == "cuda" else 512 if quick else 2048
    rows = size.batch * size.candidates
    own = (rows, size.width, size.width)
    found: dict[str, Product] = {
        f"torch.mm, {large} x {large}": ((large,) * 3, torch.float32, "mm"),
        f"torch.mm, {rows} x {size.width}": (own, torch.float32, "mm"),
        f"torch.mm, {rows} x {size.width}, bfloat16": (own, torch.bfloat16, "mm"),
    }
    if device == "cpu":
        found[f"oneDNN, {large} x {large}"] = ((large,) * 3, torch.float32, "oneDNN")
        found[f"oneDNN, {rows} x {size.width}"] = (own, torch.float32, "oneDNN")
    return found


def matmul_of(
    shape: tuple[int, int, int], dtype: torch.dtype, by: Literal["mm", "oneDNN"], device: str
) -> Callable[[], Any]:
    m, k, n = shape
    a, b, out = (torch.randn(rows, columns, device=device).to(dtype) for rows, columns in ((m, k), (k, n), (m, n)))
    return (lambda: torch.mm(a, b, out=out)) if by == "mm" else (lambda: _product(a, b.T))


def copy_of(count: int, device: str) -> Callable[[], Any]:
    """A copy of so many bytes, which reads and writes them."""
    a, b = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: b.copy_(a)


def update_of(size: Size, way: Way, device: str) -> Callable[[], None]:
    """Plan, loss, backward, optimizer step and target of one update on a batch that lies ready."""
    policy = mlp(size, device)
    config = PocoConfig(
        num_candidates=size.candidates,
        critic_hidden=(size.width,) * size.layers,
        critic_members=size.critics,
        sampling_dtype=way.sampling,
    )
    poco = Poco(policy, config, GlobalBatchRNG(torch.Generator(device))).to(device)
    module = torch.compile(poco, mode="reduce-overhead", dynamic=False) if way.compiled else poco
    optimizer = torch.optim.Adam([p for p in poco.parameters() if p.requires_grad], lr=3e-4, fused=True)
    batch = random_batch(size, device)

    def update() -> None:
        plan = poco.draw_noise(batch, way.stage)
        for rows, its_plan, share in micro_batches(batch, plan, way.part or len(batch)):
            loss, _ = module(rows, way.stage, its_plan)
            (loss * share).backward()
        optimizer.step()
        optimizer.zero_grad()
        if way.stage != "sft":
            poco.after_step("online")

    return update


def mlp(size: Size, device: str = "cpu") -> FlowMlp:
    """The paper's MLP policy over states."""
    features = {
        "observation.state": {"dtype": "float32", "shape": (size.state_dim,), "names": None},
        "action": {"dtype": "float32", "shape": (size.action_dim,), "names": None},
    }
    stats = {
        "observation.state": {"mean": np.zeros(size.state_dim), "std": np.ones(size.state_dim)},
        "action": {"min": -np.ones(size.action_dim), "max": np.ones(size.action_dim)},
    }
    hidden = [size.width] * size.layers
    options = {"hidden_dims": hidden, "num_inference_steps": size.flow_steps, "device": device}
    return FlowMlp.from_dataset(features, stats, horizon=size.horizon, **options)


def random_batch(size: Size, device: str) -> ChunkBatch:
    b, h, a = size.batch, size.horizon, size.action_dim
    every = torch.ones(b, dtype=torch.bool)
    return ChunkBatch(
        obs={"observation.state": torch.randn(b, size.state_dim)},
        next_obs={"observation.state": torch.randn(b, size.state_dim)},
        actions=torch.rand(b, h, a) * 2 - 1,
        valid=torch.ones(b, h, dtype=torch.bool),
        returns=torch.zeros(b),
        discount=torch.full((b,), 0.95),
        is_demo=every,
        is_success=every,
    ).to(device)


def once_seconds(work: Callable[[], Any], device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    started = clock()
    work()
    wait()
    return clock() - started


def best_seconds(
    work: dict[str, Callable[[], Any]],
    rounds: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Least time of each by a clock, after one run that does not count. Short ones run ten times a round."""
    best = {}
    for _ in range(rounds + 1):
        for name, one in work.items():
            first = name not in best
            took = once_seconds(one, device, clock)
            if not first and took < 0.2:
                took = min(took, *(once_seconds(one, device, clock) for _ in range(9)))
            best[name] = math.inf if first else min(best[name], took)
    return best


def median_seconds(work: Callable[[], Any], repetitions: int) -> float:
    """Median wall time, after one run that does not count."""
    return statistics.median([once_seconds(work) for _ in range(repetitions + 1)][1:])


# -- the loop ---------------------------------------------------------------------------------------------------------


def bench_loop(args: Args) -> Rows:
    """Simulator alone, learner alone, and both interleaved by the real Trainer, at the recipe's own sizes."""
    recipe: TrainConfig = runpy.run_path(str(RECIPE))["config"]()
    steps, updates = (200, 20) if args.quick else (1000, 60)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            recipe,
            demonstrations=DemonstrationConfig(episodes=2 if args.quick else 10, root=Path(folder) / "data"),
            sft_steps=0,
            warmup_steps=0,
            online_steps=steps,
            output_dir=Path(folder) / "run",
        )
        trainer = Trainer(config)
        trainer.display.console.quiet = True
        try:
            assert config.env is not None
            env_seconds = simulator_seconds(config, steps)
            fill_pool(trainer)
            learner_seconds = updates_seconds(trainer, updates) / updates
            started, before = time.perf_counter(), trainer.progress.update
            trainer._learn_online()
            together = time.perf_counter() - started
            taken, learned = trainer.progress.env_steps, trainer.progress.update - before
            learner_seconds = min(learner_seconds, updates_seconds(trainer, updates) / updates)
        finally:
            trainer.close()
    alone = max(taken * env_seconds, learned * learner_seconds)
    return [
        {"what": f"simulator alone ({config.env.num_envs} workers)", "steps/s": 1 / env_seconds},
        {"what": "learner alone", "updates/s": 1 / learner_seconds},
        {
            "what": "both, by the Trainer",
            "steps/s": taken / together,
            "updates/s": learned / together,
            "x slower half alone": together / alone,
        },
    ]


def simulator_seconds(config: TrainConfig, steps: int) -> float:
    """Seconds per environment step of random chunks, nothing else running."""
    rng = np.random.default_rng(0)
    assert config.env is not None
    with EnvPool(config.env, config.horizon) as pool:
        pool.reset(0)
        shape = (pool.num_envs, pool.horizon, pool.action_dim)
        pool.step(rng.uniform(-1, 1, shape))
        started, taken = time.perf_counter(), 0
        while taken < steps:
            taken += pool.step(rng.uniform(-1, 1, shape))[1]
        return (time.perf_counter() - started) / taken


def fill_pool(trainer: Trainer) -> None:
    """Start the workers and play until the pool holds an online episode, from which on the learner has work."""
    interaction = trainer.collector.interaction = trainer.collector.acting.begin(0, 0)
    while trainer.replay.num_online_steps == 0:
        interaction.act(best_of_n=1, until=float("inf"))
        trainer.replay.extend(interaction.receive(wait=True).episodes, is_demo=False)


def updates_seconds(trainer: Trainer, updates: int) -> float:
    """Seconds of so many online updates, sampling included."""
    with trainer.display.stage("updates", updates) as bar:
        trainer.updater.update("online", bar)
        started = time.perf_counter()
        for _ in range(updates):
            trainer.updater.update("online", bar)
        return time.perf_counter() - started


# -- batches ----------------------------------------------------------------------------------------------------------


def bench_replay(args: Args) -> Rows:
    """Sampling out of large pools, and the way of a batch through LeRobot's processors."""
    policy = mlp(args.size)
    pools = [pool_rows(args, steps) for steps in args.replay_steps]
    replay = Replay(horizon=args.size.horizon, gamma=0.99)
    replay.extend(random_episodes(args.size, 2000), is_demo=False)
    raw = replay.sample(args.size.batch, np.random.default_rng(0))
    processed = median_seconds(lambda: chunk_batch(policy, raw), 5 if args.quick else 30)
    return [
        *(row for rows in pools for row in rows),
        {"what": "chunk_batch: LeRobot's processors", "ms": processed * 1e3},
    ]


def pool_rows(args: Args, steps: int) -> Rows:
    """A batch out of a full pool of `steps`, by the pool and one by one; the bytes are those of the pool's columns."""
    size, repetitions = args.size, 5 if args.quick else 100
    episodes = random_episodes(size, steps)
    replay = Replay(horizon=size.horizon, gamma=0.99, config=ReplayConfig(capacity=steps))
    replay.extend(episodes, is_demo=False)
    rng = np.random.default_rng(0)
    fast = median_seconds(lambda: replay.sample(size.batch, rng), repetitions)
    slow = median_seconds(lambda: sample_one_by_one(episodes, size, rng), repetitions)
    what = f"{size.batch} chunks (H {size.horizon}) of {steps:,} steps"
    return [
        {"what": f"{name}: {what}", "ms": seconds * 1e3, "us/chunk": seconds / size.batch * 1e6, **more}
        for name, seconds, more in (
            ("Replay.sample", fast, {"x loop over samples": fast / slow, "bytes": replay.num_bytes}),
            ("loop over samples", slow, {"x loop over samples": 1.0}),
        )
    ]


def random_episodes(size: Size, steps: int, length: int = 200) -> list[Episode]:
    rng = np.random.default_rng(0)
    last = np.arange(length) == length - 1
    return [
        Episode(
            obs={"observation.state": rng.standard_normal((length, size.state_dim), dtype=np.float32)},
            action=rng.uniform(-1, 1, (length, size.action_dim)).astype(np.float32),
            reward=last.astype(np.float32),
            success=last,
            terminal=last,
        )
        for _ in range(max(1, steps // length))
    ]


def sample_one_by_one(episodes: Sequence[Episode], size: Size, rng: np.random.Generator, gamma: float = 0.99) -> Any:
    """The baseline: what a dataset with __getitem__ and a collate function does."""
    samples = []
    for _ in range(size.batch):
        episode = episodes[rng.integers(len(episodes))]
        start = int(rng.integers(len(episode)))
        stop = min(start + size.horizon, len(episode))
        steps = np.minimum(np.arange(start, start + size.horizon), len(episode) - 1)
        discounts = gamma ** np.arange(stop - start)
        state = episode.obs["observation.state"]
        samples.append(
            (
                state[start],
                state[min(stop, len(episode) - 1)],
                episode.action[steps],
                np.arange(start, start + size.horizon) < len(episode),
                np.float32((episode.success[start:stop] * discounts).sum()),
                np.float32(0.0 if episode.terminal[start:stop].any() else gamma ** (stop - start)),
            )
        )
    return [np.stack(column) for column in zip(*samples, strict=True)]


# -- what is shown and kept -------------------------------------------------------------------------------------------


def table_of(title: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name, justify="left" if isinstance(rows[0].get(name), str) else "right")
    for row in rows:
        table.add_row(*(format_cell(row.get(name, "")) for name in names))
    return table


def format_cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def device_name() -> str:
    """The GPU, or the CPU's model and core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    model = found[1] if found else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def keep(args: Args, figures: dict[str, Any]) -> Path:
    """Put the measured sections into the device's file."""
    return keep_in(args.output, figures, "-quick" if args.quick else "")


def keep_in(folder: Path, figures: dict[str, Any], suffix: str = "") -> Path:
    """Put sections into the device's file; those measured earlier stay."""
    device = device_name()
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}{suffix}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    stamp = {"date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__}
    kept = {"device": device} | kept | {section: stamp | found for section, found in figures.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=2) + "\n")
    return path
