"""The Accelerate loop: supervised fine-tuning, then online POCO, with evaluation, checkpoints and export.

One process or many (`accelerate launch`): every process draws the same global batch and trains on its share; only the
main process acts, evaluates and writes.
"""

from typing import TYPE_CHECKING

from poco_vla.lazy import load_on_demand

if TYPE_CHECKING:
    from poco_vla.training.trainer import Interrupted, Trainer, TrainResult, runs_of, train

__getattr__, __dir__ = load_on_demand(
    __name__, {"trainer": ["Interrupted", "TrainResult", "Trainer", "runs_of", "train"]}
)

__all__ = ["Interrupted", "TrainResult", "Trainer", "runs_of", "train"]
