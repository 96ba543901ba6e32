"""What is lost when the robot's program, or training, is killed again and again.

    python tests/benchmarks/bench_soak.py [robot] [learner] [--episodes 1000] [--kills 20] [--quick]

Training serves the demo's policy; `poco-vla robot` drives the simulated arm, state only and as fast as it goes, in
episodes of at most 20 steps. One of the two is killed (SIGKILL) at random instants and started again, training with
`--resume`. Counted at the end: episodes that the robot's side was told are on disk but are not, episodes that are there
twice, those that still wait in the spool, and steps in which the pool differs from what is on disk.
"""

import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow.parquet as pq
import tyro
from measure import HERE, RECIPE, Rows, device_name, keep_in, table_of
from rich.console import Console

from poco_vla.config import (
    DemonstrationConfig,
    EvalConfig,
    GuardConfig,
    InteractionConfig,
    TrainConfig,
    to_json,
)
from poco_vla.files import write_json
from poco_vla.recording.recorder import EpisodeRecorder
from poco_vla.training import Trainer

FPS, LENGTH = 20, 20
"""Of the arm; most control steps of an episode."""
STATE = "observation.state"
LEARNER = """
import json, pathlib, sys
from poco_vla.cli import run_recipe
from poco_vla.config import TrainConfig, from_json
run_recipe(from_json(TrainConfig, json.loads(pathlib.Path(sys.argv[1]).read_text())), sys.argv[2:])
"""
"""Training by its configuration."""

type Side = Literal["robot", "learner"]


@dataclass
class Args:
    """Kill one side at random instants, and count what is lost."""

    sides: Annotated[tuple[Side, ...], tyro.conf.Positional] = ("robot", "learner")
    """Which one is killed."""
    episodes: int = 1000
    """In all."""
    kills: int = 20
    """At random instants."""
    seed: int = 0
    """Of the instants."""
    quick: bool = False
    """A few episodes and two kills; nothing is kept."""


def main(argv: Sequence[str] | None = None) -> Rows:
    """Run, count, print and keep."""
    args = tyro.cli(Args, args=argv)
    if args.quick:
        args = replace(args, episodes=40, kills=2)
    console = Console() if Console().is_terminal else Console(width=120)
    rows: Rows = []
    for side in args.sides:
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"killed": side, "kills": args.kills} | Soak(args, side, Path(folder)).run())
    console.print(table_of(f"{args.episodes} episodes; {device_name()}", rows))
    if not args.quick:
        console.print(f"kept in {keep_in(HERE / 'results', {'soak': {'rows': rows}}).name}")
    return rows


class Soak:
    """One run with one side killed. For the robot's kills training is this process, so that its pool is at hand."""

    def __init__(self, args: Args, side: Side, folder: Path) -> None:
        self.args, self.side, self.folder = args, side, folder
        rng = random.Random(args.seed)
        self.instants = sorted(rng.sample(range(2, args.episodes - 5), args.kills))
        self.pauses = [rng.uniform(0, 0.5) for _ in self.instants]
        # Where training is killed, it is stopped by hand in the end, before it is through: its pool is to be seen.
        steps = LENGTH * args.episodes * (1 if side == "robot" else 2)
        self.config = config_of(folder, rng.randint(20_000, 40_000), steps)
        self.episodes = self.config.output_dir / "episodes"

    def run(self) -> dict[str, Any]:
        """Until so many episodes are there; the counts."""
        started = time.perf_counter()
        trainer = self.kill_robots() if self.side == "robot" else self.kill_learners()
        try:
            return self.counts(trainer) | {"s": time.perf_counter() - started}
        finally:
            trainer.close()

    def kill_robots(self) -> Trainer:
        trainer = Trainer(self.config)
        trainer.display.console.quiet = True
        killer = threading.Thread(target=self.kill_at_instants, args=(self.robot,), daemon=True)
        killer.start()
        trainer.run()
        killer.join()
        return trainer

    def kill_learners(self) -> Trainer:
        robot = self.robot()
        learner = self.kill_at_instants(self.learner)
        self.wait_for(self.args.episodes)
        for process in (learner, robot):
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)
        trainer = Trainer(replace(self.config, resume=True))
        trainer.display.console.quiet = True
        return trainer

    def kill_at_instants(self, start: Callable[[], subprocess.Popen]) -> subprocess.Popen:
        """Kill and start again; the last one that was started."""
        process = start()
        for instant, pause in zip(self.instants, self.pauses, strict=True):
            self.wait_for(instant)
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = start()
        return process

    def wait_for(self, episodes: int) -> None:
        """Until so many are on disk."""
        deadline = time.monotonic() + 3600
        while len(list((self.episodes / "meta" / "episodes").rglob("*.parquet"))) < episodes:
            assert time.monotonic() < deadline, "see the logs"
            time.sleep(0.02)

    def learner(self) -> subprocess.Popen:
        """Training; begun anew only once."""
        begun = (self.config.output_dir / "config.json").exists()
        write_json(self.folder / "config.json", to_json(self.config))
        words = [sys.executable, "-c", LEARNER, str(self.folder / "config.json"), *(["--resume"] if begun else [])]
        return self.start("learner", words)

    def robot(self) -> subprocess.Popen:
        options = {
            "--url": f"ws://127.0.0.1:{self.config.interaction.port}",
            "--robot.type": "simulated_arm",
            "--robot.views": "[]",
            "--robot.realtime": "false",
            "--rewards": "robot",
            "--fps": 0,
            "--max-steps": LENGTH,
            "--spool": self.folder / "spool",
        }
        words = [str(word) for pair in options.items() for word in pair]
        return self.start("robot", [str(Path(sys.executable).parent / "poco-vla"), "robot", *words])

    def start(self, name: str, words: list[str]) -> subprocess.Popen:
        with (self.folder / f"{name}.log").open("a") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)

    def counts(self, trainer: Trainer) -> dict[str, Any]:
        paths = (self.episodes / "meta" / "episodes").rglob("*.parquet")
        keys = [key for path in paths for key in pq.read_table(path, columns=["poco/key"])["poco/key"].to_pylist()]
        told = len(re.findall(r"\brecorded\b", (self.folder / "robot.log").read_text()))
        return {
            "on disk": len(keys),
            "told": told,
            "lost": max(0, told - len(set(keys))),
            "twice": len(keys) - len(set(keys)),
            "in the spool": len(list((self.folder / "spool").glob("*.safetensors"))),
            "set aside": len(list(self.episodes.parent.glob("episodes.set_aside/*"))),
            "steps unlike": self.unlike(trainer),
        }

    def unlike(self, trainer: Trainer) -> int:
        """Steps of the pool that are not those on disk, and those that only one of them has."""
        episodes = EpisodeRecorder(self.episodes, FPS).load([STATE])[: trainer.progress.episodes]
        ring, steps = trainer.replay._online, sum(map(len, episodes))
        same = np.ones(steps, dtype=bool)
        for name, columns in {STATE: [e.obs[STATE] for e in episodes], "action": [e.action for e in episodes]}.items():
            same &= (ring[name][:steps] == np.concatenate(columns)).all(axis=1)
        return int((~same).sum()) + abs(trainer.replay.num_online_steps - steps)


def config_of(folder: Path, port: int, steps: int) -> TrainConfig:
    """The demo's, its policy small and hardly trained."""
    recipe: TrainConfig = runpy.run_path(str(RECIPE))["config"]()
    return replace(
        recipe,
        policy_options=recipe.policy_options | {"hidden_dims": [32, 32]},
        poco=replace(recipe.poco, critic_hidden=(32, 32)),
        demonstrations=DemonstrationConfig(episodes=3, root=folder / "data"),
        interaction=InteractionConfig(mode="remote", port=port, ahead=2000),
        eval=EvalConfig(episodes=1, videos=False),
        guard=GuardConfig(action="off"),
        sft_steps=100,
        warmup_steps=200,
        online_steps=steps,
        updates_per_step=0.05,
        checkpoint_every=100,
        output_dir=folder / "run",
    )


if __name__ == "__main__":
    main()
