"""A process that adds episodes and is killed. It reads lines "root first count operation".

For each line a child opens a recorder in `root`, rewinds to `first` when that is not negative, and adds `count`
episodes from the next index on. It writes a byte to ``<root>.acknowledged`` for each that `add` took. Right before its
`operation`-th renaming it ends as by SIGKILL (0: never). The answer: the child's process id, then its exit code.
"""

import os
import sys
from pathlib import Path

import numpy as np

from poco_vla.data import Episode

FPS = 10
KILLED = 9


def episode(index, length=3):
    """The index-th episode; each has a task and numbers of its own."""
    rng = np.random.default_rng(index)
    state, action = rng.normal(size=(2, length, 2)).astype(np.float32)
    last = np.arange(length) == length - 1
    version = np.full(length, index)
    return Episode({"observation.state": state}, action, state[:, 0], last, last, f"task {index}", None, version)


def die_before(operation):
    """End this process before the operation-th time from here that a file or folder takes its place."""
    done = 0

    def hook(event, args):
        nonlocal done
        if event == "os.rename":
            done += 1
            if done == operation:
                os._exit(KILLED)

    sys.addaudithook(hook)


def work(root, first, count, operation):
    from poco_vla.recording.recorder import EpisodeRecorder

    recorder = EpisodeRecorder(root, FPS, tell=lambda text: None)
    if first >= 0:
        recorder.rewind(first)
    begin = recorder.num_episodes
    acknowledged = os.open(f"{root}.acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if operation:
        die_before(operation)
    for index in range(begin, begin + count):
        # Run again after a rewind, an episode is another.
        recorder.add(episode(index if first < 0 else index + 100), key=f"k{index}")
        os.write(acknowledged, b".")


def main():
    # Once, for all children.
    import lerobot.datasets.lerobot_dataset  # noqa: F401

    import poco_vla.recording.recorder  # noqa: F401

    for line in sys.stdin:
        root, *numbers = line.split()
        child = os.fork()
        if not child:
            work(Path(root), *map(int, numbers))
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
