"""What a user waits for before anything is learned: imports, `--help`, and a dataset that is opened and read.

    python tests/benchmarks/bench_startup.py [start] [data] [video] [--quick] [--episodes 1000]

- start: new processes, against one that imports torch alone. Python runs as it does for a user who keeps bytecode.
- data: a state-only dataset, opened and read into the replay, against LeRobot's `dataset[i]` over a sample of frames,
  extrapolated to all of them, and against its files' columns read by pyarrow, which is the floor.
- video: episodes of two cameras decoded, against LeRobot's `dataset[i]` over a sample, extrapolated likewise.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from measure import HERE, Rows, keep_in, table_of
from rich.console import Console

from poco_vla.config import DatasetConfig
from poco_vla.data import Replay, open_dataset, read_episodes
from poco_vla.data.dataset import describe_dataset
from poco_vla.data.episode import Episode
from poco_vla.recording.recorder import write_dataset

type Section = Literal["start", "data", "video"]

STATE, FPS, HORIZON, WRITTEN = "observation.state", 10, 5, 10
BASELINE = "LeRobot, frame by frame (extrapolated), once it is open"
CAMERAS = ("observation.images.front", "observation.images.wrist")
PROGRAM = str(Path(sys.executable).with_name("poco-vla"))
STARTS = {
    "import torch": ("-c", "import torch"),
    "import poco_vla": ("-c", "import poco_vla"),
    "import torch; from poco_vla import Poco": ("-c", "import torch; from poco_vla import Poco"),
    "poco-vla --help": (PROGRAM, "--help"),
    "poco-vla train --help": (PROGRAM, "train", "--help"),
    "recipes/mlp_cube.py --help": ("recipes/mlp_cube.py", "--help"),
}


@dataclass(frozen=True)
class Args:
    """Measure imports, --help, and datasets that are opened and read."""

    sections: Annotated[tuple[Section, ...], tyro.conf.Positional] = ("start", "data", "video")
    """What to measure."""
    quick: bool = False
    """Few repetitions and small data; kept in a file of its own."""
    episodes: int = 1000
    """Of the state-only dataset, 200 steps each."""
    output: Path = HERE / "results"
    """Folder of the figures."""


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print, and keep the figures; the file's path."""
    args = tyro.cli(Args, args=argv)
    console = Console() if Console().is_terminal else Console(width=120)
    sections: dict[Section, tuple[str, Callable[[Args], Rows]]] = {
        "start": ("New processes, against one that imports torch", bench_start),
        "data": ("A state-only dataset, against LeRobot's frame by frame and pyarrow's columns", bench_data),
        "video": ("Two cameras, against LeRobot's frame by frame", bench_video),
    }
    figures: dict[str, Any] = {}
    for name in args.sections:
        title, bench = sections[name]
        rows = bench(args)
        console.print(table_of(title, rows))
        figures[f"startup {name}"] = {"rows": rows}
    path = keep_in(args.output, figures, "-quick" if args.quick else "")
    console.print(f"kept in {path.name}")
    return path


def taken[T](work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what it gives."""
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


# -- processes --------------------------------------------------------------------------------------------------------


def bench_start(args: Args) -> Rows:
    """Median of a few processes each, in turns, after one that does not count: it writes the bytecode."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    seconds: dict[str, list[float]] = {what: [] for what in STARTS}
    for _ in range(1 + (1 if args.quick else 5)):
        for what, words in STARTS.items():
            command = [sys.executable, *words]
            started = time.perf_counter()
            subprocess.run(command, cwd=HERE.parents[1], env=env, stdout=subprocess.DEVNULL, check=True)
            seconds[what].append(time.perf_counter() - started)
    median = {what: statistics.median(found[1:]) for what, found in seconds.items()}
    torch_alone = median["import torch"]
    return [{"what": what, "s": s, "x import torch": s / torch_alone} for what, s in median.items()]


# -- data -------------------------------------------------------------------------------------------------------------


def bench_data(args: Args) -> Rows:
    """Each step of opening and reading, as the trainer takes them."""
    count = 20 if args.quick else args.episodes
    with tempfile.TemporaryDirectory() as folder:
        root = write_dataset(
            (episode(seed) for seed in range(WRITTEN)), Path(folder) / "few", fps=FPS, repo_id="local/x"
        )
        repeat(root, count // WRITTEN)
        config = DatasetConfig(repo_id="local/x", root=root)
        replay = Replay(horizon=HORIZON, gamma=0.99)
        steps: dict[str, float] = {}
        steps["open_dataset"], dataset = taken(lambda: open_dataset(config))
        steps["describe_dataset"], _ = taken(lambda: describe_dataset(dataset))
        steps["read_episodes"], episodes = taken(lambda: read_episodes(dataset, config, (STATE,)))
        steps["Replay.extend"], _ = taken(lambda: replay.extend(episodes, is_demo=True))
        steps["open and read, all of it"] = sum(steps.values())
        files = sorted((root / "data").rglob("*.parquet"))
        steps["floor: the columns, by pyarrow"], _ = taken(lambda: [pq.read_table(file) for file in files])
        steps[BASELINE] = frame_by_frame(dataset)
    frames, whole = len(dataset), steps["open and read, all of it"]
    what = f" ({len(episodes)} episodes, {frames:,} frames)"
    return [
        {"what": name + (what if s is whole else ""), "s": s, "frames/s": frames / s, "x ours": s / whole}
        for name, s in steps.items()
    ]


def frame_by_frame(dataset: Any, sample: int = 200) -> float:
    """Seconds for all frames, from those for a sample of them."""
    dataset[0]
    chosen = np.linspace(0, len(dataset) - 1, min(sample, len(dataset))).astype(int).tolist()
    return taken(lambda: [dataset[i] for i in chosen])[0] / len(chosen) * len(dataset)


def episode(seed: int, length: int = 200, size: int | None = None) -> Episode:
    """Random states and actions; with `size`, moving pictures of two cameras, too."""
    rng, end = np.random.default_rng(seed), np.arange(length) == length - 1
    obs = {STATE: rng.standard_normal((length, 28), dtype=np.float32)}
    if size:
        ramp = np.add.outer(3 * np.arange(length), np.add.outer(np.arange(size), np.arange(size))).astype(np.uint8)
        obs |= {key: np.repeat(ramp[..., None], 3, axis=-1) for key in CAMERAS}
    action = rng.uniform(-1, 1, (length, 5)).astype(np.float32)
    return Episode(obs, action, end.astype(np.float32), end, end, task="push")


def repeat(root: Path, times: int) -> None:
    """A dataset in one data file, so many times over: LeRobot's writer takes half a second an episode."""
    (data,), (about,) = (list((root / part).rglob("*.parquet")) for part in ("data", "meta/episodes"))
    info = json.loads((root / "meta/info.json").read_text())
    frames, episodes = info["total_frames"], info["total_episodes"]
    shifts = {
        data: {"index": frames, "episode_index": episodes},
        about: {"episode_index": episodes, "dataset_from_index": frames, "dataset_to_index": frames},
    }
    for file, shift in shifts.items():
        table = pq.ParquetFile(file).read()
        copies = []
        for k in range(times):
            copy = table
            for name, step in shift.items():
                column = pa.array(table[name].to_numpy() + k * step, table.schema.field(name).type)
                copy = copy.set_column(copy.schema.get_field_index(name), table.schema.field(name), column)
            copies.append(copy)
        pq.write_table(pa.concat_tables(copies), file)
    info |= {"total_frames": frames * times, "total_episodes": episodes * times}
    info["splits"] = {"train": f"0:{episodes * times}"}
    (root / "meta/info.json").write_text(json.dumps(info))


# -- video ------------------------------------------------------------------------------------------------------------


def bench_video(args: Args) -> Rows:
    """Episodes of two small cameras: how fast their pictures are in memory."""
    count, length, size = (2, 20, 32) if args.quick else (20, 100, 96)
    with tempfile.TemporaryDirectory() as folder:
        films = (episode(seed, length, size) for seed in range(count))
        root = write_dataset(films, Path(folder) / "film", fps=FPS, repo_id="local/x", video=True)
        config = DatasetConfig(repo_id="local/x", root=root)
        dataset = open_dataset(config)
        read_episodes(dataset, config, CAMERAS)
        ours, _ = taken(lambda: read_episodes(dataset, config, CAMERAS))
        theirs = frame_by_frame(dataset, 10 if args.quick else 200)
    pictures = len(CAMERAS) * count * length
    found = {"read_episodes": ours, BASELINE: theirs}
    what = f" ({count} episodes of {length} steps, {len(CAMERAS)} x {size} x {size})"
    return [{"what": name + what, "s": s, "pictures/s": pictures / s, "x ours": s / ours} for name, s in found.items()]


if __name__ == "__main__":
    main()
