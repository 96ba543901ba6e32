"""The Accelerate loop: supervised fine-tuning, then online POCO, with evaluation, checkpoints and export.

One process or many (`accelerate launch`): every process draws the same global batch and trains on its share; only the
main process acts, evaluates and writes.
"""

from poco_vla.train.trainer import Interrupted, Trainer, TrainResult, runs_of, train

__all__ = ["Interrupted", "TrainResult", "Trainer", "runs_of", "train"]
