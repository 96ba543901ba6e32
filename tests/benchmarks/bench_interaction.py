"""Acting beside the learner against acting in step with it: wall time to the same success rate, on the demo task.

    python tests/benchmarks/bench_interaction.py [--seeds 0 1] [--success 0.5] [--quick]

Both run recipes/mlp_cube.py with one update per step; "to success" is the wall time of the online stage until so many
of the last 60 training episodes, plain samples all of them, have succeeded. "x in step" is over the synchronous run of
the same seed. Figures are of this machine: where learner and simulators share two cores, there is little to gain.
"""

import json
import runpy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from measure import HERE, RECIPE, Rows, device_name, keep_in, table_of
from rich.console import Console

from poco_vla.config import DemonstrationConfig, EvalConfig, TrainConfig
from poco_vla.training import train

EPISODES = 60

type Mode = Literal["synchronous", "asynchronous"]


@dataclass
class Args:
    """Measure wall time to a success rate."""

    seeds: tuple[int, ...] = (0,)
    """Runs of each mode."""
    success: float = 0.5
    """Share of the last episodes."""
    steps: int = 20_000
    """Control steps at most."""
    quick: bool = False
    """Every part, within a minute; nothing is kept."""


def main(argv: Sequence[str] | None = None) -> Rows:
    """Measure, print and keep."""
    args = tyro.cli(Args, args=argv)
    console = Console() if Console().is_terminal else Console(width=120)
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            modes: tuple[Mode, ...] = ("synchronous", "asynchronous")
            pair = [measured(configured(args, seed, mode, Path(folder)), args.success) for mode in modes]
            for row in pair:
                if row["s to success"] and pair[0]["s to success"]:
                    row["x in step"] = row["s to success"] / pair[0]["s to success"]
            rows += pair
    console.print(table_of(f"recipes/mlp_cube.py until {args.success:.0%} succeed; {device_name()}", rows))
    if not args.quick:
        console.print(f"kept in {keep_in(HERE / 'results', {'interaction': {'rows': rows}}).name}")
    return rows


def configured(args: Args, seed: int, mode: Mode, folder: Path) -> TrainConfig:
    recipe: TrainConfig = runpy.run_path(str(RECIPE))["config"]()
    sizes = {"sft_steps": 100, "warmup_steps": 10, "online_steps": 800, "updates_per_step": 0.2}
    return replace(
        recipe,
        demonstrations=DemonstrationConfig(episodes=2 if args.quick else 20, root=folder / "data"),
        interaction=replace(recipe.interaction, mode=mode),
        eval=EvalConfig(episodes=1 if args.quick else 100, videos=False),
        output_dir=folder / f"{mode}-{seed}",
        seed=seed,
        **(sizes if args.quick else {"online_steps": args.steps}),
    )


def measured(config: TrainConfig, success: float) -> dict[str, Any]:
    """A run, and what its log says."""
    result = train(config)
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    episodes = [json.loads(line) for line in (config.output_dir / "episodes.jsonl").read_text().splitlines()]
    online = [line for line in lines if line["stage"] != "sft"]
    began = next(line["seconds"] for line in reversed(lines) if line["stage"] == "sft")
    seconds = online[-1]["seconds"] - began
    reached = steps_to(episodes, success)
    return {
        "mode": config.interaction.mode,
        "seed": config.seed,
        "success at the end": result.after.rate if result.after else float("nan"),
        "steps/s": result.env_steps / seconds,
        "updates/s": (online[-1]["update"] - config.sft_steps) / seconds,
        "weight age": sum(line.get("weight_age", 0.0) for line in online) / len(online),
        "steps to success": reached or "",
        "s to success": seconds_at(online, reached) - began if reached else "",
    }


def steps_to(episodes: list[dict[str, Any]], success: float) -> int | None:
    """Control steps taken when so many of the last episodes had succeeded."""
    for i in range(EPISODES, len(episodes) + 1):
        if sum(e["success"] for e in episodes[i - EPISODES : i]) >= success * EPISODES:
            return episodes[i - 1]["env_steps"]
    return None


def seconds_at(lines: list[dict[str, Any]], steps: int) -> float:
    """Wall time of the first log line from these steps on."""
    return next((line["seconds"] for line in lines if line["env_steps"] >= steps), lines[-1]["seconds"])


if __name__ == "__main__":
    main()
