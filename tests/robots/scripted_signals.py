"""Signals of an episode: a script's, which nobody has to press, and keys whose reading is counted."""

from poco_vla.robots import KeySignals, Signals


class ScriptedSignals(Signals):
    """Signals at given control steps, the same in every episode.

    Args:
        steps: control step (0 is the first observation of the episode) -> signal that is given then.
    """

    def __init__(self, steps):
        self.steps = dict(steps)
        self.begin()

    def begin(self):
        self._step = -1
        self._given = -1

    def observe(self, obs):
        self._step += 1

    def poll(self):
        if self._given == self._step:
            return None
        self._given = self._step
        return self.steps.get(self._step)


class CountedKeys(KeySignals):
    """Counts how often it has read the terminal."""

    reads = 0

    def _read(self):
        super()._read()
        self.reads += 1
