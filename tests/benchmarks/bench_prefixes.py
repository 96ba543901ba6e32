"""What a prefix cache saves, and what it costs: pi0.5 at real widths, through the trainer's own way from pool to loss.

    python tests/benchmarks/bench_prefixes.py [update] [bytes] [fp8] [sharing] [--depth 2] [--states 2] [--quick]

- update: gradients of an update on a batch of transitions: without a store, with one that finds nothing, and with one
  that has the whole pool in RAM or on disk. Baseline: the same on prefixes that lie ready, which no store can beat.
- bytes: what a state takes, and how fast it is loaded. Baseline: a plain copy in memory, and a plain read of a file, of
  as many bytes, from the system's memory and from the disk itself.
- fp8: what 8-bit keys and values change of an update's losses, beside what other noise changes of them.
- sharing: distinct states of a batch, drawn one by one and in runs of consecutive chunks.

Every stack has the real widths and `--depth` layers of pi0.5's 18. Sizes are those of the depth that was run, unless a
row says that it is computed from shapes. Weights are random.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import bench_pi05
import numpy as np
import torch
import tyro
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from lerobot_policy_groot_n1d6.model import GrootSizes
from measure import HERE, Rows, device_name, keep_in, table_of, thread_count
from poco_vla_pi05 import processors
from poco_vla_pi05.adapter import Pi05
from poco_vla_pi05.architecture import TINY, Architecture
from poco_vla_pi05.tokenizer import byte_tokenizer
from rich.console import Console

from poco_vla import GlobalBatchRNG, Poco, PocoConfig
from poco_vla.config import PrefixConfig, ReplayConfig
from poco_vla.data import BatchSource, Episode, Replay
from poco_vla.prefix_cache.entries import Entry
from poco_vla.prefix_cache.entry_files import to_blob
from poco_vla.prefix_cache.source import PrefixSource
from poco_vla.prefix_cache.store import PrefixStore

type Section = Literal["update", "bytes", "fp8", "sharing"]

CPU = torch.device("cpu")
LARGE = 64 * 1024**3


@dataclass(frozen=True)
class Args:
    """Measure a prefix cache."""

    sections: Annotated[tuple[Section, ...], tyro.conf.Positional] = ("update", "bytes", "fp8", "sharing")
    """What to measure."""
    depth: int = 2
    """Layers of every stack."""
    states: int = 2
    """B, transitions in a batch."""
    candidates: int = 16
    """N."""
    horizon: int = 10
    """H."""
    cameras: int = 2
    """Pictures of a state."""
    rounds: int = 3
    """Measurements of each variant, in turns, after one that does not count; the least time is kept."""
    threads: int = 2
    """CPU threads."""
    quick: bool = False
    """A model of 0.3 million parameters, one round: shows that everything runs; nothing is kept."""


def main(argv: Sequence[str] | None = None) -> dict[str, Rows]:
    """Measure, print and keep."""
    args = tyro.cli(Args, args=argv)
    args = replace(args, rounds=1, candidates=2) if args.quick else args
    console = Console() if Console().is_terminal else Console(width=120)
    benches: dict[Section, tuple[str, Callable[[Case], Rows]]] = {
        "update": ("Gradients of one update", bench_update),
        "bytes": ("Keeping and loading a state", bench_bytes),
        "fp8": ("Losses under 8-bit keys and values, relative to exact ones", bench_fp8),
        "sharing": ("Distinct states in a batch", bench_sharing),
    }
    figures: dict[str, Rows] = {}
    with thread_count(args.threads), tempfile.TemporaryDirectory() as folder:
        case = Case.of(args, Path(folder))
        console.print(case.description)
        for name in args.sections:
            title, bench = benches[name]
            figures[name] = bench(case)
            console.print(table_of(title, figures[name]))
    if not args.quick:
        kept = {f"prefixes, {name}": {"rows": rows, "case": case.description} for name, rows in figures.items()}
        console.print(f"kept in {keep_in(HERE / 'results', kept).name}")
    return figures


@dataclass(frozen=True)
class Case:
    """A policy and a pool.

    Attributes:
        args: what is measured.
        policy: pi0.5.
        replay: two demonstrations.
        folder: for the store's files.
        description: of all this, for people.
    """

    args: Args
    policy: Pi05
    replay: Replay
    folder: Path
    description: str

    @classmethod
    def of(cls, args: Args, folder: Path) -> "Case":
        sizes = TINY if args.quick else replace(Architecture(), vocab=1024).with_depth(args.depth)
        of_model = bench_pi05.Args(cameras=args.cameras, horizon=args.horizon, tiny=args.quick)
        bare = bench_pi05.random_adapter(of_model, sizes)
        bounds = {"q01": -3.0, "q99": 3.0}
        widths = {OBS_STATE: bench_pi05.STATE_DIM, ACTION: bench_pi05.ACTION_DIM}
        stats = {key: {name: torch.full((n,), value) for name, value in bounds.items()} for key, n in widths.items()}
        pipelines = processors.build(bare.policy.config, stats, byte_tokenizer())
        policy = Pi05(bare.policy, pipelines, architecture=sizes).eval()
        replay = Replay(horizon=args.horizon, gamma=0.99)
        replay.extend([episode(policy, 12, seed) for seed in range(2)], is_demo=True)
        description = (
            f"{device_name()}, {torch.get_num_threads()} threads; torch {torch.__version__}; float32, "
            f"{sizes.vlm.depth} layers of 18, widths {sizes.vlm.width} and {sizes.expert.width}; B {args.states}, "
            f"N {args.candidates}, H {args.horizon}, K {policy.spec.flow_steps}, {args.cameras} cameras"
        )
        return cls(args, policy, replay, folder, description)

    def source(self, store: PrefixStore | None, dtype: Literal["exact", "fp8"] = "exact") -> BatchSource:
        """Batches in one order, their prefixes out of `store`; None leaves them to the update."""
        prefixes = PrefixSource(self.policy, self.replay, store, dtype=dtype) if store is not None else None
        return BatchSource(self.replay, self.policy, self.args.states, seed=0, prefixes=prefixes)

    def poco(self) -> Poco:
        return Poco(self.policy, PocoConfig(num_candidates=self.args.candidates))

    def store(self, name: str, **options: Any) -> PrefixStore:
        config = PrefixConfig(mode="on", **options)
        return PrefixStore(config, CPU, self.folder / name if config.disk_bytes else None)


def episode(policy: Pi05, length: int, seed: int) -> Episode:
    """Noise, seen by all cameras."""
    rng, config = np.random.default_rng(seed), policy.policy.config
    side = config.image_resolution[0]
    cameras = [key for key in config.image_features if key.startswith(OBS_IMAGES)]
    ends = np.arange(length) == length - 1
    return Episode(
        obs={key: rng.integers(0, 256, (length, side, side, 3)).astype(np.uint8) for key in cameras}
        | {OBS_STATE: rng.normal(size=(length, bench_pi05.STATE_DIM)).astype(np.float32)},
        action=rng.normal(size=(length, bench_pi05.ACTION_DIM)).astype(np.float32),
        reward=ends.astype(np.float32),
        success=ends,
        terminal=ends,
        task="pick up the pen",
    )


# -- an update --------------------------------------------------------------------------------------------------------


def bench_update(case: Case) -> Rows:
    """Drawing and gradients, the trainer's way."""
    poco = case.poco()
    stores = {
        "cold: nothing is found": case.store("none", ram_bytes=0),
        "warm, RAM": case.store("none", ram_bytes=LARGE),
        "warm, disk": case.store("disk", ram_bytes=0, disk_bytes=LARGE),
    }
    entries = PrefixSource(case.policy, case.replay, None)._encode(range(case.replay.num_demo_steps))
    for store in stores.values():
        store.put(entries)
    sources = {name: case.source(store) for name, store in stores.items()}
    for source in sources.values():
        settle(source)
    batch = sources["warm, RAM"].draw()

    def drawn(source: BatchSource) -> Callable[[], None]:
        return lambda: gradients(poco, source.draw())

    work = {
        "prefixes lie ready": lambda: gradients(poco, batch),
        "no store": drawn(case.source(None)),
        **{name: drawn(source) for name, source in sources.items()},
    }
    seconds = best_of(work, case.args.rounds)
    floor, plain = seconds["prefixes lie ready"], seconds["no store"]
    for source in sources.values():
        assert source.prefixes is not None
        source.prefixes.close()
    return [
        {"what": name, "ms": took * 1e3, "x ready": took / floor, "x no store": took / plain}
        for name, took in seconds.items()
    ]


def gradients(poco: Poco, batch: Any) -> None:
    poco(batch, "online")[0].backward()
    poco.zero_grad()


def settle(source: BatchSource) -> None:
    """Draw as often as a source looks at the clock."""
    for _ in range(5):
        source.draw()


def best_of(work: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Least wall time of each, in turns, after one run that does not count."""
    best = dict.fromkeys(work, float("inf"))
    for number in range(rounds + 1):
        for name, one in work.items():
            began = time.perf_counter()
            one()
            if number:
                best[name] = min(best[name], time.perf_counter() - began)
    return best


# -- bytes ------------------------------------------------------------------------------------------------------------


def bench_bytes(case: Case) -> Rows:
    """A store's rates over all its tiers, beside a plain copy or read of as many bytes."""
    source = PrefixSource(case.policy, case.replay, None)
    keys = list(range(8))
    began = time.perf_counter()
    entries = source._encode(keys)
    encode = (time.perf_counter() - began) / len(keys)
    rows: Rows = [
        {"what": "encode, processors included", "MB a state": entries[0].num_bytes / 1e6, "ms a state": encode * 1e3}
    ]
    blob = b"".join(to_blob(entry) for entry in entries.values())
    plain = np.frombuffer(blob, np.uint8)
    file = case.folder / "plain"
    file.write_bytes(blob)
    cold = case.folder / "plain_cold"
    cold.write_bytes(blob)
    ram = case.store("none", ram_bytes=LARGE)
    disk = case.store("bytes", ram_bytes=0, disk_bytes=LARGE)
    for store in (ram, disk):
        store.put(entries)
    fp8 = {key: Entry.of(entry.tensors(), dtype="fp8") for key, entry in entries.items()}
    small = case.store("none", ram_bytes=LARGE)
    small.put(fp8)
    copied = np.empty_like(plain)

    def joined(store: PrefixStore) -> None:
        case.policy.unpack([entry.tensors() for entry in store.fetch(keys).values()])

    from_memory: dict[str, Callable[[], Any]] = {
        "plain copy in memory": lambda: np.copyto(copied, plain),
        "RAM: fetch and join": lambda: joined(ram),
        "RAM, fp8: fetch, restore and join": lambda: joined(small),
        "plain read of a file that the system holds": file.read_bytes,
        "disk, which the system holds: fetch and join": lambda: joined(disk),
    }
    seconds = best_of(from_memory, case.args.rounds)
    persistent = next((case.folder / "bytes").glob("*.data"))
    drop_from_memory(cold, persistent)
    began = time.perf_counter()
    cold.read_bytes()
    seconds["plain read of a file that the system does not hold"] = time.perf_counter() - began
    began = time.perf_counter()
    joined(disk)
    seconds["disk, which the system does not hold: fetch and join"] = time.perf_counter() - began
    floors = {"RAM": "plain copy in memory", "disk, which the system h": "plain read of a file that the system holds"}
    floors["disk, which the system does"] = "plain read of a file that the system does not hold"
    for name, took in seconds.items():
        size = fp8[0].num_bytes if "fp8" in name else entries[0].num_bytes
        row = {"what": name, "MB a state": size / 1e6, "ms a state": took / len(keys) * 1e3}
        row["GB/s"] = size * len(keys) / took / 1e9
        floor = next((seconds[its] for start, its in floors.items() if name.startswith(start)), None)
        rows.append(row | ({} if floor is None else {"x plain": took / floor}))
    for store in (ram, disk, small):
        store.close()
    return rows + list(computed_sizes(case.args.cameras))


def drop_from_memory(*files: Path) -> None:
    """Ask the system to keep no pages of these files; where it cannot, they stay."""
    for path in files:
        with path.open("rb") as opened:
            os.fsync(opened.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def computed_sizes(cameras: int) -> Iterator[dict[str, Any]]:
    """Bytes of a state at full size, in bfloat16, from shapes alone."""
    sizes, words = Architecture(), 60
    tokens = cameras * (sizes.image_size // sizes.vision.patch) ** 2 + words
    kv = sizes.vlm.depth * 2 * tokens * sizes.vlm.head_dim
    yield {"what": f"pi0.5, {tokens} tokens (from shapes)", "MB a state": (2 * kv + 4 * sizes.vlm.width) / 1e6}
    yield {
        "what": f"pi0.5, {tokens} tokens, fp8 (from shapes)",
        "MB a state": (kv * (1 + 2 / sizes.vlm.head_dim) + 4 * sizes.vlm.width) / 1e6,
    }
    groot = GrootSizes()
    tokens = cameras * 81 + 30  # a square picture's, and an instruction's
    numbers = tokens * groot.language.width
    vectors = 4 * (groot.language.width + groot.head.state_dim)
    yield {"what": f"GR00T N1.6, {tokens} tokens (from shapes)", "MB a state": (2 * numbers + vectors) / 1e6}
    yield {
        "what": f"GR00T N1.6, {tokens} tokens, fp8 (from shapes)",
        "MB a state": (numbers * (1 + 2 / groot.language.width) + vectors) / 1e6,
    }


# -- 8-bit floats, shared prefixes ------------------------------------------------------------------------------------


def bench_fp8(case: Case) -> Rows:
    """Each loss of an update, from the same draws: exact, 8-bit, and exact from other draws. Keys and values are those
    of random weights."""
    poco, stores = case.poco(), {dtype: case.store("none", ram_bytes=LARGE) for dtype in ("exact", "fp8")}
    sources = {"exact": case.source(stores["exact"]), "fp8": case.source(stores["fp8"], "fp8")}
    found: dict[str, list[dict[str, float]]] = {"exact": [], "fp8": [], "other draws": []}
    for number in range(2 if case.args.quick else 6):
        batches = {name: source.draw() for name, source in sources.items()}
        for name, batch, seed in (
            ("exact", batches["exact"], number),
            ("fp8", batches["fp8"], number),
            ("other draws", batches["exact"], 1000 + number),
        ):
            poco.rng = GlobalBatchRNG(torch.Generator().manual_seed(seed))
            with torch.no_grad():
                metrics = poco(batch, "online")[1]
            found[name].append({key: value.item() for key, value in metrics.items()})
    for source in sources.values():
        assert source.prefixes is not None
        source.prefixes.close()
    rows = []
    for key in ("bc_loss", "candidate_loss", "critic_loss", "candidate_q"):
        exact = np.array([one[key] for one in found["exact"]])
        scale = np.abs(exact).mean()
        row: dict[str, Any] = {"what": key, "exact": float(exact.mean())}
        for name in ("fp8", "other draws"):
            others = np.array([one[key] for one in found[name]])
            row |= {f"{name}, mean change": float(np.abs(others - exact).mean() / scale)}
        rows.append(row | {"fp8, bias": float((np.array([o[key] for o in found["fp8"]]) - exact).mean() / scale)})
    return rows


def bench_sharing(case: Case) -> Rows:
    """States that 64 transitions need, of 20 episodes of 200 steps; 128 where none is shared."""
    horizon, rows = case.args.horizon, []
    columns = {"observation.state": np.zeros((200, 1), np.float32)}
    ends = np.arange(200) == 199
    one = Episode(columns, np.zeros((200, 1), np.float32), ends.astype(np.float32), ends, ends, "task")
    for run in (1, 2, 4, 8, 16):
        replay = Replay(horizon=horizon, gamma=0.99, config=ReplayConfig(consecutive=run))
        replay.extend([one] * 20, is_demo=True)
        rng, counts = np.random.default_rng(0), []
        for _ in range(200):
            raw = replay.sample(64, rng, pictures=False)
            after = np.where(raw.discount == 0, raw.ids, raw.next_ids)
            counts.append(len(np.unique(np.concatenate([raw.ids, after]))))
        mean = float(np.mean(counts))
        rows.append({"consecutive": str(run), "states": mean, "states a transition": mean / 64})
    return [row | {"x one by one": row["states"] / rows[0]["states"]} for row in rows]


if __name__ == "__main__":
    main()
