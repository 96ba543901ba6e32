"""Parts of `make gpu` that no other benchmark has, and its table.

    python tests/benchmarks/gpu_parts.py precision|attention|latency [--rehearse] [--json FILE]
    python tests/benchmarks/gpu_parts.py table FOLDER

- precision: float32 products in float32, TF32 and bfloat16: TFLOP/s, and the error beside float64.
- attention: which kernel torch takes and how long it takes, by the number of keys, with and without a mask.
- latency: of a chunk of pi0.5 alone and while updates run, in the actor's own stream and in the learner's.
- table: one table and one JSON file (FOLDER/gpu.json) of everything that the parts left in FOLDER.
"""

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import tyro
from rich.console import Console
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))

type Rows = list[dict[str, Any]]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "plain": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Args:
    """Measure a part, or put the table together."""

    part: Annotated[Literal["precision", "attention", "latency", "table"], tyro.conf.Positional]
    """Which."""
    folder: Annotated[Path | None, tyro.conf.Positional] = None
    """Of the results, for the table."""
    rehearse: bool = False
    """On a CPU, as small as can be: shows that everything runs, and nothing else."""
    json: Path | None = None
    """File for the figures."""


def seconds_of(work: Callable[[], Any], device: str, rounds: int = 5) -> float:
    """Return the median of several measurements, after two that do not count."""
    times = []
    for i in range(rounds + 2):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times += [time.perf_counter() - begin] * (i >= 2)
    return statistics.median(times)


def precision(device: str, *, small: bool) -> Rows:
    size, rows = 256 if small else 8192, []
    a, b = torch.randn(2, size, size, device=device)
    checked = min(size, 1024)
    exact = a[:checked].double() @ b.double()
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype, tf32 in (("fp32", None, False), ("tf32", None, True), ("bf16", torch.bfloat16, False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x, y = (a, b) if dtype is None else (a.to(dtype), b.to(dtype))
        seconds = seconds_of(lambda x=x, y=y: x @ y, device)
        error = ((x[:checked] @ y).double() - exact).abs().max() / exact.abs().max()
        rows.append({"what": f"{name}, {size} x {size}", "TFLOP/s": 2e-12 * size**3 / seconds, "error": error.item()})
    torch.backends.cuda.matmul.allow_tf32 = before
    return rows


def attention(device: str, *, small: bool) -> Rows:
    """pi0.5's VLM: 8 query heads on one key head of width 256."""
    states, rows = (2, []) if small else (64, [])
    dtype = torch.float32 if small else torch.bfloat16
    for keys in (40, 64) if small else (572, 576, 582, 640):
        q = torch.randn(states, 8, keys, 256, device=device, dtype=dtype)
        k = torch.randn(states, 8, keys, 256, device=device, dtype=dtype)
        mask = torch.ones(states, 1, keys, keys, device=device, dtype=torch.bool)
        for masked in (False, True):
            for name, backend in BACKENDS.items():
                row = {"what": f"{keys} keys, {'mask' if masked else 'no mask'}, {name}"}
                try:
                    with sdpa_kernel(backend):
                        given = mask if masked else None
                        work = lambda q=q, k=k, given=given: F.scaled_dot_product_attention(q, k, k, given)  # noqa: E731
                        row["ms"] = seconds_of(work, device) * 1e3
                except RuntimeError as error:
                    row["not"] = str(error).split("\n")[0][:60]
                rows.append(row)
    return rows


def latency(device: str, *, small: bool) -> Rows:
    """Milliseconds from the question to the chunk in RAM, of one state."""
    from bench_pi05 import Args as PiArgs
    from bench_pi05 import Case, Update

    from poco_vla.rollout import Actor
    from poco_vla.rollout import actor as acting

    args = PiArgs(device=device, tiny=True, states=2, depth=1, candidates=2) if small else PiArgs(device=device)
    case = Case.of(args)
    learner, weights, obs = Update(case, case.states), acting.WeightsVersion(), case.observations(1)
    learner.run(lambda: 0)
    rows, asked = [], 3 if small else 50
    with (
        patch.object(acting, "preprocess_obs", lambda policy, raw, tasks: obs),
        patch.object(acting, "require_pictures", lambda *_: None),
        patch.object(case.adapter, "postprocess", lambda chunk: chunk),
    ):
        for name, stream in (("own stream", acting._own_stream), ("the learner's stream", lambda device: None)):
            with patch.object(acting, "_own_stream", stream):
                copy = acting.ActingCopy(Actor(learner.poco, 0), weights, 1)
            copy.policy.postprocess = case.adapter.postprocess
            copy.chunks({}, [""])
            for busy in (False, True):
                times: list[float] = []

                def ask(copy: Any = copy, times: list[float] = times) -> None:
                    for _ in range(asked):
                        begin = time.perf_counter()
                        copy.chunks({}, [""])
                        times.append(time.perf_counter() - begin)
                        time.sleep(0.0 if small else 0.05)

                thread = threading.Thread(target=ask)
                thread.start()
                while thread.is_alive():
                    if busy:
                        with weights.change(weights.version + 1) if small else nullcontext():
                            learner.run(lambda: 0)
                    thread.join(0 if busy else 0.1)
                found = np.array(times) * 1e3
                what = f"{name}, {'while learning' if busy else 'alone'}"
                rows.append({"what": what, "ms, median": float(np.median(found)), "ms, most": float(found.max())})
    return rows


def table(folder: Path) -> dict[str, Any]:
    """Print the figures of all parts, and write them to one file."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (rehearsal)",
        "parts": {},
    }
    console = Console(width=140)
    for code in sorted(folder.glob("*.rc"), key=lambda path: path.stat().st_mtime):
        part, ended = code.stem, code.read_text().split()
        figures = next(iter([*folder.glob(f"{part}.json"), *folder.glob(f"{part}/*.json")]), folder / "none")
        seconds = float(ended[1])
        found["parts"][part] = {
            "exit_code": int(ended[0]),
            "seconds": seconds,
            "figures": json.loads(figures.read_text()) if figures.is_file() else None,
        }
        state = "done" if ended[0] == "0" else f"FAILED ({ended[0]}), see {folder / part}.log"
        console.print(f"\n{part}: {state}, {seconds:.0f} s", style="bold")
        for line in lines_of(found["parts"][part]["figures"]):
            console.print("  " + line, highlight=False, markup=False)
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def lines_of(figures: Any) -> list[str]:
    """Return the rows of all tables in a part's figures as text."""
    if isinstance(figures, dict):
        return [line for value in figures.values() for line in lines_of(value)]
    if not isinstance(figures, list):
        return []
    rows = [row for row in figures if isinstance(row, dict)]
    return [", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()) for row in rows]


def main(argv: Sequence[str] | None = None) -> Any:
    args = tyro.cli(Args, args=argv)
    if args.part == "table":
        assert args.folder is not None, "table needs the folder of the results"
        return table(args.folder)
    device = "cpu" if args.rehearse else "cuda"
    rows = {"precision": precision, "attention": attention, "latency": latency}[args.part](device, small=args.rehearse)
    for line in lines_of(rows):
        print(line, flush=True)
    if args.json:
        args.json.write_text(json.dumps({args.part: rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
