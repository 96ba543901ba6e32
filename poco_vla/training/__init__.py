"""The Accelerate loop: supervised fine-tuning, then online POCO, with evaluation, checkpoints and export.

One process or many (`accelerate launch`): every process draws the same global batch and trains on its share; only the
main process acts, evaluates and writes.

The state of a run is one list of named parts, each with `state()` and `load()`: :mod:`run` makes it (`parts` in
`_assemble`), and :mod:`checkpoints` alone walks it, to save the run and to resume it. What the next update depends on
has to be in a part; a new one is added to that list, and to `checkpoints.WITH_TENSORS` if its state holds tensors.
Files of checkpoints are written by `poco_vla.checkpointing`; demonstrations and online episodes are not in them, but
checked by their digests and read back from disk. What may differ on resume is said where the field is
(`poco_vla.roles`).

:mod:`trainer` is the loop, :mod:`updates` one update. What all parts share is in `poco_vla.run`, and how a run acts and
what it learns from in `poco_vla.experience`.
"""

from typing import TYPE_CHECKING

from poco_vla.lazy import load_on_demand

if TYPE_CHECKING:
    from poco_vla.training.trainer import Interrupted, Trainer, TrainResult, runs_of, train

__getattr__, __dir__ = load_on_demand(
    __name__, {"trainer": ["Interrupted", "TrainResult", "Trainer", "runs_of", "train"]}
)

__all__ = ["Interrupted", "TrainResult", "Trainer", "runs_of", "train"]
