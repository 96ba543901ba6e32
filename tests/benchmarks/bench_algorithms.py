"""What an update of each algorithm costs over the matrix products that it makes, and how long one state waits for its
chunk. `make bench` runs it after `bench_update.py`.

    python tests/benchmarks/bench_algorithms.py [qc dsrl ...] [--quick] [--threads 1]

Every algorithm has its authors' options, and the flow policy and the batch of the paper's size. The floor is the time
that the update's own matrix products take alone, each shape as often as it is multiplied there, and then the bytes of
its optimizer steps at the rate of a copy. "At the peak" is the floor of `bench_update.py`, FLOPs at the rate of the
fastest large float32 product, which narrow products do not reach, or those bytes, whichever takes longer. Products and
FLOPs are counted while an update runs, not derived. On one CPU thread times are those of the processor, which change
less with other work on the machine.
"""

import math
import time
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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from poco_vla import ChunkBatch, GlobalBatchRNG
from poco_vla.algorithms import available_algorithms, load_algorithm
from poco_vla.algorithms.contract import Phase
from poco_vla.algorithms.on_policy.contract import OnPolicy
from poco_vla.conformance.algorithm import rollout_of
from poco_vla.dense import _product, states_at_once
from poco_vla.learner.allocator import keep_freed_memory
from poco_vla.noise import micro_batches

PERIOD = 20
"""Updates that are counted: no algorithm's pattern of phases is longer (RLPD: one actor in 20 critic updates)."""
ADAM_PASSES = 10
"""Passes over a trained parameter in an update: read forward and backward, its gradient written and read, parameter and
two moments read and written."""


type Product = tuple[Any, ...]
"""An operator, and shape and strides of both factors."""
PRODUCTS: dict[str, tuple[int, Callable[..., Any]]] = {
    "aten::mm": (0, lambda a, b, out: torch.mm(a, b, out=out)),
    "aten::addmm": (1, lambda a, b, out: torch.mm(a, b, out=out)),
    "aten::bmm": (0, lambda a, b, out: torch.bmm(a, b, out=out)),
    "aten::baddbmm": (1, lambda a, b, out: torch.bmm(a, b, out=out)),
    "mkldnn::_linear_pointwise": (0, lambda a, b, _: _product(a, b)),
}
"""Operators that multiply matrices: where the first factor stands in their arguments, and the product alone."""


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
    keep_freed_memory()  # as training on a CPU does
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
        products = {product for one in made.values() for product in one.products}
        work |= {str(product): product_of(product, device) for product in products}
        clock = time.process_time if (device, args.threads) == ("cpu", 1) else time.perf_counter
        seconds = best_seconds(work, 1 if args.quick else 3, device, clock)
    rate = max(2 * math.prod(of) / seconds[name] for name, (of, dtype, _) in shapes.items() if dtype == torch.float32)
    per_byte = seconds["copy"] / (2 * copied)
    rows = []
    for name, one in made.items():
        flops, moved = counts[name]
        alone = sum(times * seconds[str(product)] for product, times in one.products.items())
        peak, took = max(flops / rate, moved * per_byte), one.mean_seconds(seconds)
        floor = alone + moved * per_byte
        row = {"algorithm": name, "GFLOP": flops / 1e9, "at the peak ms": peak * 1e3, "floor ms": floor * 1e3}
        row |= {"update ms": took * 1e3, "x peak": took / peak, "x floor": took / floor}
        rows.append(row | {"act ms": seconds[f"{name} act"] * 1e3})
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
            part = states_at_once(len(batch), self.algorithm.chunks_per_state(phase), self.device)
            for rows, noise, share in micro_batches(batch, self.algorithm.draw_noise(batch, phase), part):
                loss, _ = self.algorithm(rows, phase, noise)
                (loss * share).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.algorithm.after_step(phase)

    def whole_update(self) -> None:
        """Make the first update of a period, which of these is what most are."""
        self.work[" + ".join(next(iter(self.patterns)))]()

    def act(self) -> None:
        """Choose a chunk for one state that was not encoded yet."""
        with torch.no_grad():
            self.algorithm.act(self.algorithm.encode(self.state))

    def count(self) -> tuple[float, float]:
        """Return FLOPs and least bytes of an update, the mean over a period, and count its `products`."""
        flops = moved = 0.0
        self.products: dict[Product, float] = {}
        sizes = {group["name"]: sum(p.numel() for p in group["params"]) for group in self.algorithm.parameter_groups()}
        products = {torch.ops.mkldnn._linear_pointwise: _product_flops}
        for phases, share in self.patterns.items():
            with FlopCounterMode(display=False, custom_mapping=products) as counter, ProductRecorder() as recorder:
                self.work[" + ".join(phases)]()
            for product, times in recorder.products.items():
                self.products[product] = self.products.get(product, 0.0) + share * times
            flops += share * counter.get_total_flops()
            trained = sum(sizes[name] for phase in phases for name in self.algorithm.trained_groups(phase))
            moved += share * 4 * ADAM_PASSES * trained
        return flops, moved

    def mean_seconds(self, seconds: dict[str, float]) -> float:
        """Return the seconds of an update, the mean over a period."""
        return sum(share * seconds[f"{self.name} {' + '.join(phases)}"] for phases, share in self.patterns.items())


class ProductRecorder(TorchDispatchMode):
    """Count the matrix products that run, by operator, shapes and strides of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.products: dict[Product, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().split(".")[0]
        if name in PRODUCTS:
            first = PRODUCTS[name][0]
            key = (name, *((tuple(t.shape), t.stride()) for t in args[first : first + 2]))
            self.products[key] = self.products.get(key, 0) + 1
        return func(*args, **(kwargs or {}))


def product_of(product: Product, device: str) -> Callable[[], Any]:
    """Return one product on random factors as the update has them, into a result that lies ready."""
    name, *factors = product
    a, b = (_random(shape, stride, device) for shape, stride in factors)
    run, out = PRODUCTS[name][1], None
    out = run(a, b, out).clone()
    return lambda: run(a, b, out)


def _random(shape: Sequence[int], stride: Sequence[int], device: str) -> Tensor:
    """Return normal numbers of a shape and strides, which may be 0."""
    numbers = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    return torch.randn(numbers, device=device).as_strided(shape, stride)


def _product_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


if __name__ == "__main__":
    main()
