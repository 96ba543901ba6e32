"""LeRobot v3 datasets on disk, written with LeRobot alone: what a user brings."""

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

FPS = 10
STATE_ONLY = {
    "observation.state": {"dtype": "float32", "shape": (3,), "names": None},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
}
SIGNALS = {
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    "next.truncated": {"dtype": "bool", "shape": (1,), "names": None},
    "next.success": {"dtype": "bool", "shape": (1,), "names": None},
}


def random_columns(length, features, seed=0):
    """One episode's columns: normal floats, random images, signals all zero."""
    rng = np.random.default_rng(seed)
    columns = {}
    for name, feature in features.items():
        shape = (length, *feature["shape"])
        if feature["dtype"] in ("image", "video"):
            columns[name] = rng.integers(0, 256, shape).astype(np.uint8)
        elif name in SIGNALS:
            columns[name] = np.zeros(shape, dtype=feature["dtype"])
        else:
            columns[name] = rng.normal(size=shape).astype(feature["dtype"])
    return columns


def write(root, episodes, features, *, fps=FPS, tasks=None):
    """A dataset in `root` of these episodes, each a dict of columns; `tasks[i]` is the i-th one's instruction."""
    videos = any(feature["dtype"] == "video" for feature in features.values())
    dataset = LeRobotDataset.create("local/test", fps=fps, features=features, root=root, use_videos=videos)
    for i, columns in enumerate(episodes):
        for k in range(len(columns["action"] if "action" in columns else next(iter(columns.values())))):
            task = tasks[i] if tasks else "do it"
            dataset.add_frame({name: column[k] for name, column in columns.items()} | {"task": task})
        dataset.save_episode()
    dataset.finalize()
    return root
