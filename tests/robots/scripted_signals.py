"""Signals of an episode that nobody has to press."""

from poco_vla.robots import Signals


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
