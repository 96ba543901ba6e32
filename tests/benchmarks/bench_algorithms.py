"""What an update of each algorithm costs over the matrix products that it makes, and how long one state waits for its
chunk. `make bench` runs it after `bench_update.py`.

    python tests/benchmarks/bench_algorithms.py [qc dsrl ...] [--quick] [--threads 1]

Every algorithm has its authors' options, and the flow policy and the batch of the paper's size. The floor is that of
`bench_update.py`: FLOPs at the rate of the fastest large float32 product, or bytes at the rate of a copy, whichever
takes longer. FLOPs are counted while an update runs (torch's FlopCounterMode), not derived.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from measure import (
    HERE,
    Rows,
    Size,
    best_seconds,
    copy_of,
    device_name,
    keep_in,
    matmul_of,
    matmul_shapes,
    mlp,
    random_batch,
    table_of,
    thread_count,
)
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from poco_vla import ChunkBatch, GlobalBatchRNG
from poco_vla.algorithms import available_algorithms, load_algorithm
from poco_vla.algorithms.contract import Phase
from poco_vla.algorithms.on_policy.contract import OnPolicy
from poco_vla.conformance.algorithm import rollout_of
from poco_vla.dense import CPU_ROWS
from poco_vla.noise import micro_batches

PERIOD = 20
"""Updates that are counted: no algorithm's pattern of phases is longer (RLPD: one actor in 20 critic updates)."""
ADAM_PASSES = 10
"""Passes over a trained parameter in an update: read forward and backward, its gradient written and read, parameter and
two moments read and written."""


@dataclass
class Args:
    """Measure an update of each algorithm, and acting."""

    algorithms: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names; all when none is given."""
    quick: bool = False
    """A batch of 8 and small networks, once; nothing is kept."""
    threads: int = 1
    """CPU threads."""
    size: Size = field(default_factory=Size)
    """Sizes of policy and batch."""
    output: Path = HERE / "results"
    """Folder of the figures."""


def main(argv: Sequence[str] | None = None) -> Rows:
    """Measure, print and keep."""
    args = tyro.cli(Args, args=argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = replace(args.size, batch=8, width=32, layers=2) if args.quick else args.size
    shapes = matmul_shapes(size, device, args.quick)
    copied = 2**20 if args.quick else 2**26
    with thread_count(args.threads):
        names = args.algorithms or available_algorithms()
        made = {name: Measured(name, size, device, tiny=args.quick) for name in names}
        counts = {name: one.count() for name, one in made.items()}
        work: dict[str, Callable[[], Any]] = {
            f"{name} {what}": run for name, one in made.items() for what, run in one.work.items()
        }
        work |= {name: matmul_of(*product, device) for name, product in shapes.items()}
        work["copy"] = copy_of(copied, device)
        seconds = best_seconds(work, 1 if args.quick else 3, device)
    rate = max(2 * math.prod(of) / seconds[name] for name, (of, dtype, _) in shapes.items() if dtype == torch.float32)
    per_byte = seconds["copy"] / (2 * copied)
    rows = []
    for name, one in made.items():
        flops, moved = counts[name]
        floor, took = max(flops / rate, moved * per_byte), one.mean_seconds(seconds)
        row = {"algorithm": name, "GFLOP": flops / 1e9, "floor ms": floor * 1e3, "update ms": took * 1e3}
        rows.append(row | {"x floor": took / floor, "act ms": seconds[f"{name} act"] * 1e3})
    console = Console() if Console().is_terminal else Console(width=120)
    console.print(table_of(f"One update of batch {size.batch}, {args.threads} CPU threads; acting for one state", rows))
    if not args.quick:
        figures = {"algorithms": {"rows": rows, "threads": args.threads}}
        console.print(f"kept in {keep_in(args.output, figures).name} ({device_name()})")
    return rows


class Measured:
    """An algorithm at its authors' options, each pattern of phases ready to be timed.

    Args:
        name: of the algorithm.
        size: of policy and batch.
        device: of both.
        tiny: take the algorithm's own tiny options.
    """

    def __init__(self, name: str, size: Size, device: str, *, tiny: bool = False) -> None:
        kind = load_algorithm(name)
        horizon = 1 if name == "fql" else size.horizon  # FQL is QC-FQL with chunks of one step
        size = replace(size, horizon=horizon)
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in kind.tiny_options.items()} if tiny else {}
        rng = GlobalBatchRNG(torch.Generator(device).manual_seed(0))
        self.name, self.device = name, device
        self.algorithm = kind(mlp(size, device), kind.config_class(**options), rng).to(device)
        self.optimizer = torch.optim.Adam([dict(group) for group in self.algorithm.parameter_groups()], fused=True)
        self.batch = random_batch(size, device)
        self.state = self.batch.rows(slice(0, 1))
        learned = self.batch
        if isinstance(self.algorithm, OnPolicy):
            with torch.no_grad():
                learned = rollout_of(self.algorithm, self.batch, torch.Generator(device).manual_seed(0))
        patterns = [self.algorithm.phases("online", update) for update in range(PERIOD)]
        self.patterns = {phases: patterns.count(phases) / PERIOD for phases in dict.fromkeys(patterns)}
        self.work: dict[str, Callable[[], Any]] = {
            " + ".join(phases): lambda phases=phases: self.update(learned, phases) for phases in self.patterns
        }
        self.work["act"] = self.act

    def update(self, batch: ChunkBatch, phases: Sequence[Phase]) -> None:
        """Plan, loss, backward, optimizer step and what follows it of each phase."""
        for phase in phases:
            chunks = self.algorithm.chunks_per_state(phase)
            part = max(1, CPU_ROWS // chunks) if chunks and self.device == "cpu" else len(batch)
            for rows, noise, share in micro_batches(batch, self.algorithm.draw_noise(batch, phase), part):
                loss, _ = self.algorithm(rows, phase, noise)
                (loss * share).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.algorithm.after_step(phase)

    def act(self) -> None:
        """Choose a chunk for one state that was not encoded yet."""
        with torch.no_grad():
            self.algorithm.act(self.algorithm.encode(self.state))

    def count(self) -> tuple[float, float]:
        """Return FLOPs and least bytes of an update, the mean over a period."""
        flops = moved = 0.0
        sizes = {group["name"]: sum(p.numel() for p in group["params"]) for group in self.algorithm.parameter_groups()}
        products = {torch.ops.mkldnn._linear_pointwise: _product_flops}
        for phases, share in self.patterns.items():
            with FlopCounterMode(display=False, custom_mapping=products) as counter:
                self.work[" + ".join(phases)]()
            flops += share * counter.get_total_flops()
            trained = sum(sizes[name] for phase in phases for name in self.algorithm.trained_groups(phase))
            moved += share * 4 * ADAM_PASSES * trained
        return flops, moved

    def mean_seconds(self, seconds: dict[str, float]) -> float:
        """Return the seconds of an update, the mean over a period."""
        return sum(share * seconds[f"{self.name} {' + '.join(phases)}"] for phases, share in self.patterns.items())


def _product_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


if __name__ == "__main__":
    main()
