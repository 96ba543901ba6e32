"""A tiny pi0.5 on pictures of noise, which several files train: a frozen backbone, by the trainer's own updates."""

import json

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from poco_vla_pi05.adapter import Pi05

from poco_vla.config import DatasetConfig, OptimConfig, PocoConfig, TrainConfig
from poco_vla.training import Trainer

STAGES = ("sft",) * 4 + ("online",) * 4


def prepare(folder):
    """A LeRobot dataset with two cameras, and the policy's folder."""
    cameras = {f"observation.images.{name}": (64, 64, 3) for name in ("front", "wrist")}
    names = ["height", "width", "channel"]
    features = {key: {"dtype": "image", "shape": shape, "names": names} for key, shape in cameras.items()}
    for key, size in (("observation.state", 6), ("action", 4)):
        features[key] = {"dtype": "float32", "shape": (size,), "names": [f"{key}{i}" for i in range(size)]}
    rng = np.random.default_rng(0)
    dataset = LeRobotDataset.create("local/pictures", fps=10, features=features, root=folder / "data", use_videos=False)
    for _ in range(3):
        for _ in range(12):
            frame = {key: rng.integers(0, 256, shape).astype(np.uint8) for key, shape in cameras.items()}
            frame |= {"observation.state": rng.normal(size=6).astype(np.float32)}
            dataset.add_frame(frame | {"action": rng.normal(size=4).astype(np.float32), "task": "pick up the pen"})
        dataset.save_episode()
    dataset.finalize()
    Pi05.tiny().save_pretrained(folder / "base")


def vla(folder, output_dir, **changes):
    """A run of what `prepare` made; `updates` makes its updates."""
    usual = {
        "adapter": "pi05",
        "policy": str(folder / "base"),
        "statistics": "dataset",
        "dataset": DatasetConfig(repo_id="local/pictures", root=folder / "data"),
        "horizon": 4,
        "poco": PocoConfig(num_candidates=3, critic_hidden=(16,)),
        "optim": OptimConfig(batch_size=8),
        "online_steps": 0,
        "log_every": 1,
        "num_threads": 1,
        "output_dir": output_dir,
    }
    return TrainConfig(**(usual | changes))


def updates(config, check=lambda trainer: None):
    """Make the updates of `STAGES` on demonstrations alone, then let `check` look at the trainer."""
    trainer = Trainer(config)
    try:
        with trainer.display.stage("updates", len(STAGES)) as bar:
            for stage in STAGES:
                trainer.updater.update(stage, bar)
        check(trainer)
    finally:
        trainer.close()


def assert_same_updates(run, expected):
    """What both logged, but for float32's rounding, which Adam makes larger with every step."""
    ours, theirs = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (run, expected)
    )
    assert [line["stage"] for line in ours] == list(STAGES)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert a["stage"] == b["stage"]
        for name in a.keys() - {"stage", "seconds"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
