"""A learner as a robot sees it: a real server, a policy that hardly moves, and a sink that keeps episodes on disk.

As a program, ``learner.py FOLDER PORT``, it can be killed; it serves once it reads a line.
"""

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from poco_vla.errors import DataError
from poco_vla.policy import ActionSpec
from poco_vla.robots.spool import decoded, encoded
from poco_vla.serving.feature import Feature
from poco_vla.serving.server import PolicyServer

STATE, ACTIONS = 28, 5
"""Of the simulated arm without views."""


class Twitch:
    """Chunks of 5 small actions; the version of the weights counts how often it was asked."""

    def __init__(self, horizon=5, actions=ACTIONS, pause=0.0):
        # All that a server reads of a policy.
        self.policy = SimpleNamespace(spec=ActionSpec(horizon, actions, actions, 5), names={})
        self.weights_version, self.pause, self.asked = 0, pause, []

    def chunks(self, obs, tasks):
        time.sleep(self.pause)
        self.weights_version += 1
        self.asked.append((dict(obs), list(tasks)))
        return np.full((len(tasks), self.policy.spec.horizon, self.policy.spec.action_dim), 0.01, dtype=np.float32)


class Sink:
    """Episodes in a folder, by key. `refuse` is why the next one is refused; `gate` holds taking back."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.act, self.done, self.refuse = True, False, ""
        self.asked, self.taken = [], []
        self.gate = threading.Event()
        self.gate.set()

    def status(self):
        return {"act": self.act, "done": self.done, "updates": 4310, "env_steps": 1200, "success": "25 %"}

    def take(self, episode, key):
        self.asked.append(key)
        assert self.gate.wait(60)
        if self.refuse:
            refuse, self.refuse = self.refuse, ""
            raise DataError(refuse)
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            path.write_bytes(encoded(episode))
            self.taken.append(key)

    def episodes(self):
        """On disk, the oldest first."""
        return [decoded(path) for path in sorted(self.folder.glob("*"), key=lambda path: path.stat().st_mtime_ns)]


def serve(sink, actor=None, port=0, **options):
    spec = options.pop("spec", {"observation.state": Feature((STATE,), "float32")})
    actor = actor or Twitch()
    bound = np.ones(actor.policy.spec.action_dim, dtype=np.float32)
    common = {"adapter": "twitch", "fps": 20.0, "task": "lift the cube", "action_bounds": (-bound, bound)}
    return PolicyServer(actor, spec, port=port, **(common | {"episodes": sink} | options))


if __name__ == "__main__":
    folder, port = sys.argv[1:]
    sys.stdin.readline()
    with serve(Sink(folder), Twitch(pause=0.005), port=int(port)):
        threading.Event().wait()
