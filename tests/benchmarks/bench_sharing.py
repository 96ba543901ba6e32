"""What runs of consecutive chunks do to learning: recipes/mlp_cube.py with `replay.consecutive` at equal steps.

    python tests/benchmarks/bench_sharing.py [--seeds 0 1] [--runs 1 8] [--quick]

An MLP has next to nothing to encode, so that nothing is saved here: what counts is success at the end, and how many
steps it took until so many of the last 60 training episodes had succeeded. Batches of runs are less varied; "needs"
says how many states a transition had to have encoded. Baseline: transitions drawn one by one.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench_interaction
import numpy as np
import tyro
from measure import HERE, Rows, device_name, keep_in, table_of
from rich.console import Console

from poco_vla.config import TrainConfig
from poco_vla.training import Trainer


@dataclass
class Args:
    """Measure learning with shared prefixes."""

    seeds: tuple[int, ...] = (0,)
    """Runs of each."""
    runs: tuple[int, ...] = (1, 8)
    """`replay.consecutive`; the first is the baseline."""
    success: float = 0.5
    """Share of the last training episodes that counts as learned."""
    steps: int = 20_000
    """Control steps of each run."""
    quick: bool = False
    """Every part, within a minute; nothing is kept."""


def main(argv: Sequence[str] | None = None) -> Rows:
    """Measure, print and keep."""
    args = tyro.cli(Args, args=argv)
    console = Console() if Console().is_terminal else Console(width=120)
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            found = [measured(configured(args, seed, run, Path(folder)), args.success) for run in args.runs]
            for row in found:
                if row["steps to success"] and found[0]["steps to success"]:
                    row["x one by one"] = row["steps to success"] / found[0]["steps to success"]
            rows += found
    console.print(table_of(f"recipes/mlp_cube.py; {device_name()}", rows))
    if not args.quick:
        console.print(f"kept in {keep_in(HERE / 'results', {'sharing': {'rows': rows}}).name}")
    return rows


def configured(args: Args, seed: int, run: int, folder: Path) -> TrainConfig:
    of_run = bench_interaction.Args(steps=args.steps, quick=args.quick)
    config = bench_interaction.configured(of_run, seed, "synchronous", folder)
    return replace(
        config, replay=replace(config.replay, consecutive=run), output_dir=folder / f"consecutive_{run}-{seed}"
    )


def measured(config: TrainConfig, success: float) -> dict[str, Any]:
    """A run, and what its log says."""
    trainer = Trainer(config)
    try:
        result = trainer.run()
        rng = np.random.default_rng(0)
        needs = [states_a_transition(trainer, rng) for _ in range(50)]
    finally:
        trainer.close()
    episodes = [json.loads(line) for line in (config.output_dir / "episodes.jsonl").read_text().splitlines()]
    last = episodes[-bench_interaction.EPISODES :]
    return {
        "consecutive": config.replay.consecutive,
        "seed": config.seed,
        "success after SFT": result.before.rate if result.before else float("nan"),
        "success at the end": result.after.rate if result.after else float("nan"),
        "training success at the end": sum(episode["success"] for episode in last) / len(last),
        "steps to success": bench_interaction.steps_to(episodes, success) or "",
        "needs": float(np.mean(needs)),
    }


def states_a_transition(trainer: Trainer, rng: np.random.Generator) -> float:
    """Distinct states in a batch of the run's own pool."""
    raw = trainer.replay.sample(trainer.config.optim.batch_size, rng, pictures=False)
    after = np.where(raw.discount == 0, raw.ids, raw.next_ids)
    return len(np.unique(np.concatenate([raw.ids, after]))) / len(raw.ids)


if __name__ == "__main__":
    main()
