"""The tables of growth.md: python recipes/guides/growth.py [--measure]

With `--measure` the recorder writes one episode of OGBench's cube three times, and says what a step takes on disk and
in time; `RECORDED` holds what that gave, and all else is arithmetic.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HZ, HORIZON, EPISODE = 15, 10, 300
"""Control steps per second, per chunk and per episode."""
PICTURE = 224 * 224 * 3
"""Bytes of one camera's picture as the robot sends it and the replay buffer keeps it."""
STATE = 4 * (14 + 7) + 4 * 4
"""Bytes of a step without pictures: state, action, reward, flags, version."""
RECORDED = {"state alone": (403, 0.16), "2 cameras, PNG": (27_400, 8.1), "2 cameras, video": (8_560, 4.6)}
"""Kind -> (bytes, milliseconds) per step on disk by this library's recorder, by `measure`."""
HOUR, DAY = 3600, 86_400


@dataclass(frozen=True)
class Model:
    """What grows with a model.

    Attributes:
        name: of it.
        prefix: bytes of one state's prefix that does not change while the head learns, in bfloat16.
        weights: bytes of what is trained, in float32.
        updates: per second that one accelerator is assumed to make, prefixes at hand.
        chunks: per second that one accelerator is assumed to give, one state at a time.
    """

    name: str
    prefix: int
    weights: int
    updates: float
    chunks: float


MODELS = (
    Model("MLP, 4 x 512", 4 * 14, 4 * 1_000_000, 100, 1000),
    # 18 layers, K and V, 256 numbers of 2 bytes for every valid token: 2 cameras of 256 and some 40 of text.
    Model("pi0.5, its head", 18 * 2 * 256 * 2 * (2 * 256 + 40), 4 * 430_000_000, 2.2, 17),
    Model("pi0.5, LoRA r 16", 18 * 2 * 256 * 2 * (2 * 256 + 40), 28_000_000, 2.2, 17),
    # 2048 numbers of 2 bytes for 203 tokens (2 views of 81, 41 of text). K and V depend on the head: they are not kept.
    Model("GR00T N1.6, its head", 2048 * 2 * 203, 4 * 1_419_000_000, 1.0, 10),
)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def size(count: float) -> str:
    """Bytes in words of three digits at most."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def per_episode() -> str:
    """An episode on its way, in the replay buffer, on disk."""
    rows = []
    for kind, (each, milliseconds) in RECORDED.items():
        raw = STATE + (2 * PICTURE if "cameras" in kind else 0)
        rows.append([kind, size(raw * EPISODE), size(each * EPISODE), size(each * HZ * HOUR), f"{milliseconds:g} ms"])
    head = ["", "sent, and in the replay buffer", "on disk", "on disk, an hour of a robot", "to record, a step"]
    return table(head, rows)


def per_model() -> str:
    rows = []
    for model in MODELS:
        states = HZ * HOUR // HORIZON
        rows.append(
            [model.name, size(model.prefix), size(model.prefix * states), size(model.weights), size(model.weights / 2)]
        )
    return table(["", "prefix of a state", "of an hour of a robot", "weights, float32", "bfloat16"], rows)


def per_robots() -> str:
    """What n robots that act all the time ask for."""
    rows = []
    for robots in (1, 10, 100, 1000):
        steps = robots * HZ
        ready = RECORDED["2 cameras, video"][1] / 1000
        rows.append(
            [
                f"{robots:,}",
                f"{steps:,}",
                size((STATE + 2 * PICTURE) * steps) + "/s",
                f"{ready * steps:,.3g}",
                f"{steps / HORIZON:,g}",
                f"{steps:,} / {steps / 10:,g}",
                *(f"{model.updates / steps:.2g}" for model in (MODELS[0], MODELS[1])),
            ]
        )
    asked = ["chunks/s", "updates/s at UTD 1 / 0.1", "UTD that an MLP keeps up with", "that pi0.5 does"]
    return table(["robots", "steps/s", "pictures, raw", "recorders", *asked], rows)


def measure() -> None:
    """One episode of OGBench's cube by random actions, recorded; a busy machine takes longer."""
    from poco_vla.config import EnvSpec
    from poco_vla.recording.recorder import EpisodeRecorder
    from poco_vla.rollout import EnvPool

    episodes = {}
    for kind in RECORDED:
        pictures = {"cameras": ("front", "wrist"), "image_size": 224} if "cameras" in kind else {}
        spec = EnvSpec(options={"episode_length": EPISODE} | pictures, num_envs=1, in_process=True)
        if bool(pictures) not in episodes:
            with EnvPool(spec, HORIZON) as pool:
                pool.reset(0)
                rng, ended = np.random.default_rng(0), []
                while not ended:
                    ended = pool.step(rng.uniform(-1, 1, (1, HORIZON, pool.action_dim)))[0]
            episodes[bool(pictures)] = ended[0]
        episode = episodes[bool(pictures)]
        with tempfile.TemporaryDirectory() as folder:
            recorder = EpisodeRecorder(Path(folder) / "episodes", HZ, video="video" in kind)
            recorder.add(episode)  # the first one also makes the dataset
            before, began = used(Path(folder)), time.perf_counter()
            recorder.add(episode)
            took = (time.perf_counter() - began) / len(episode)
            print(f"{kind}: {(used(Path(folder)) - before) / len(episode):,.0f} bytes, {1e3 * took:.2g} ms a step")


def used(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        measure()
    else:
        print("\n\n".join(part() for part in (per_episode, per_model, per_robots)))
