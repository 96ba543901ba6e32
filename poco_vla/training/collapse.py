"""Recovery from a collapse: the last good head, kept in memory and on disk, and put back."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from poco_vla.checkpointing import checkpoint
from poco_vla.learner.broadcast import shared
from poco_vla.run.context import RunContext
from poco_vla.training.guard import CollapseGuard
from poco_vla.training.updates import Updater


class CollapseRecovery:
    """Let a guard see every episode, keep good heads, and go back to the last one when the policy has collapsed. Every
    process sees the same episodes and decides alike.

    Args:
        context: of the run, which is stopped after too many collapses.
        guard: tells good heads from collapsed ones.
        updater: of the head.

    Attributes:
        good_head: parameters of the last good head by name, and those of the networks that acted beside the policy.
    """

    def __init__(self, context: RunContext, guard: CollapseGuard, updater: Updater) -> None:
        self.guard, self.updater = guard, updater
        self.config, self.accelerator, self.progress = context.config, context.accelerator, context.progress
        self.folder, self.display = context.folder, context.display
        self.good_head: dict[str, Tensor] = {}

    def take_reference(self) -> None:
        """Let the guard compare with the first evaluation, which all processes are told."""
        first = self.progress.evaluations[:1]
        mine = [first[0]["successes"], first[0]["episodes"]] if first else [0, 0]
        successes, episodes = (int(x) for x in shared(torch.tensor(mine, device=self.accelerator.device)))
        if episodes:
            self.guard.reference = (successes, episodes)

    def add(self, success: bool, task: str) -> None:
        """Take an online episode in."""
        if self.progress.stage_update <= self.config.warmup_steps:
            self._extend_reference(success)
        elif not self.progress.stopped:
            self.watch(success, task)

    def watch(self, success: bool, task: str = "") -> None:
        """Let the guard see an episode of the policy that learns, and do as it says."""
        verdict = self.guard.add(success, task)
        if verdict == "good":
            self.keep_head()
        elif verdict == "collapsed":
            recent, (successes, episodes) = self.guard.recent, self.guard.reference or (0, 1)
            go_on = self.guard.restored()
            self.restore_head()
            changed = self.updater.algorithm.weaken(self.config.guard.beta_factor) if go_on else ""
            self.progress.stopped = not go_on
            self.display.say(
                f"collapse: {sum(recent)} of the last {len(recent)} episodes succeeded; after SFT "
                f"{successes} of {episodes} did. The last good head is back; "
                + (f"going on with {changed}" if go_on else "the run ends here")
            )

    def keep_head(self) -> None:
        """Keep the present head and the networks that act beside the policy, should they collapse later; on disk too,
        for a resumed run."""
        if self.config.guard.action != "off" and self.config.online_steps:
            self.updater.gather()
            self.good_head = {name: p.detach().cpu().clone() for name, p in self.updater.acting_parameters().items()}
            if self.accelerator.is_main_process:
                save = partial(checkpoint.save_good_head, self.folder.path, self.good_head)
                self.folder.write("the head of the collapse guard", save)

    def restore_head(self) -> None:
        """Put the last good head back, and with it the networks that act beside the policy; their optimizer state
        begins anew."""
        self.updater.put_acting(self.good_head)

    def state(self) -> dict[str, Any]:
        """Return nothing: the head is a file in the run's folder, which a checkpoint links."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the good head of a checkpoint."""
        self.good_head = dict(state)

    def _extend_reference(self, success: bool) -> None:
        """Without an environment to evaluate in, compare with the episodes of the critic's warm-up."""
        if self.config.env is None:
            successes, episodes = self.guard.reference or (0, 0)
            self.guard.reference = (successes + success, episodes + 1)
