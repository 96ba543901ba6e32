"""`poco-vla data make | ogbench | robomimic | consolidate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from poco_vla.config import DemonstrationConfig, EnvSpec
from poco_vla.terminal import SafeConsole


@dataclass
class MakeData:
    """Data of the simulator's own scripted expert."""

    env: EnvSpec = field(default_factory=EnvSpec)
    """The environment."""
    demonstrations: Annotated[DemonstrationConfig, tyro.conf.arg(name="")] = field(default_factory=DemonstrationConfig)


@dataclass
class OGBenchData:
    """An official OGBench set (.npz) with the rewards of one task."""

    task: str
    """Single task, such as cube-double-singletask-task2-v0."""
    root: Path
    """Folder of the LeRobot dataset."""
    path: Path | None = None
    """The .npz, or the folder that it or its parts lie in. Left out: it is downloaded."""
    kind: Literal["play", "noisy"] = "play"
    """Which of the task's sets to download, or to look for in a folder."""
    episodes: int | None = None
    """Trajectories to take, from the first; None is all."""
    downloads: Path = Path("runs/downloads")
    """Folder that keeps downloaded files."""


@dataclass
class RobomimicData:
    """An official RoboMimic low_dim set (.hdf5)."""

    task: str
    """Lift, Can or Square."""
    root: Path
    """Folder of the LeRobot dataset."""
    path: Path | None = None
    """The .hdf5. Left out: it is downloaded."""
    kind: Literal["ph", "mh", "mg"] = "mh"
    """Which set to download: one proficient human, six of mixed skill, a machine (Lift and Can)."""
    filter_key: str | None = None
    """One of the file's own splits, such as 20_percent."""
    episodes: int | None = None
    """Demonstrations to take, from the first; None is all."""
    downloads: Path = Path("runs/downloads")
    """Folder that keeps downloaded files."""


@dataclass
class ConsolidateData:
    """A run's online episodes, one file each, as a compact dataset for reading and uploading. The run may go on."""

    source: Annotated[Path, tyro.conf.Positional]
    """The run's folder, or its episodes/."""
    root: Path
    """Folder of the compact dataset; an older one there is replaced."""


@dataclass
class Data:
    """A LeRobot dataset from a simulator's expert, an official file, or a run's online episodes."""

    source: Annotated[
        Annotated[MakeData, tyro.conf.subcommand("make")]
        | Annotated[OGBenchData, tyro.conf.subcommand("ogbench")]
        | Annotated[RobomimicData, tyro.conf.subcommand("robomimic")]
        | Annotated[ConsolidateData, tyro.conf.subcommand("consolidate")],
        tyro.conf.arg(name=""),
    ]

    def execute(self) -> None:
        """Make the dataset, and print its folder."""
        SafeConsole().print(_make_data(self.source))


def _make_data(source: MakeData | OGBenchData | RobomimicData | ConsolidateData) -> Path:
    """The dataset's folder, made while a bar shows how far it is."""
    from poco_vla.demonstrations.download import download
    from poco_vla.demonstrations.official import refuse_existing
    from poco_vla.demonstrations.ogbench import import_ogbench, ogbench_file
    from poco_vla.demonstrations.robomimic import import_robomimic
    from poco_vla.demonstrations.scripted import ensure_demonstrations
    from poco_vla.progress import Display
    from poco_vla.recording.consolidate import consolidate
    from poco_vla.simulators import environment

    if isinstance(source, ConsolidateData):
        inner = source.source / "episodes"
        return consolidate(inner if inner.is_dir() else source.source, source.root)
    display = Display()
    if isinstance(source, MakeData):
        with display.stage("episodes", source.demonstrations.episodes) as bar:
            return ensure_demonstrations(source.env, source.demonstrations, bar.to)
    ogbench = isinstance(source, OGBenchData)
    # Before a download: the task exists, and the folder is free.
    environment(EnvSpec(type="ogbench" if ogbench else "robosuite", task=source.task))
    refuse_existing(source.root)
    path = source.path
    if path is None:
        name = ogbench_file(source.task, source.kind) if ogbench else f"{source.task.lower()}-{source.kind}"
        with display.stage(f"download {name}", 1) as bar:
            path = download("ogbench" if ogbench else "robomimic", name, source.downloads, on_bytes=bar.of)
    with display.stage("episodes", source.episodes or 0) as bar:
        if isinstance(source, OGBenchData):
            return import_ogbench(path, source.task, source.root, episodes=source.episodes, on_episode=bar.to)
        return import_robomimic(
            path,
            source.task,
            source.root,
            episodes=source.episodes,
            filter_key=source.filter_key,
            on_episode=bar.to,
        )
