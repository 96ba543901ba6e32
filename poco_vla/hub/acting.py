"""A finished run's algorithm, to act as the run did: its policy, and the networks beside it out of a checkpoint."""

from pathlib import Path

import torch

from poco_vla.algorithms import Algorithm, load_algorithm, options_of
from poco_vla.checkpointing import checkpoint
from poco_vla.config import TrainConfig, from_json
from poco_vla.errors import CheckpointError, HubError
from poco_vla.hub.places import RESULT
from poco_vla.policy import FlowPolicy
from poco_vla.pretrained.sources import read_object
from poco_vla.pretrained.tensor_files import check_finite, read_tensors


def load_acting(run: Path, policy: FlowPolicy) -> tuple[Algorithm, bool]:
    """Return a finished run's algorithm over its policy, with the networks that it acts with from its newest
    checkpoint, and True if it was trained beyond warm-up (else it acts by `act_untrained`).

    Args:
        run: the run's folder.
        policy: its last policy, loaded.

    Raises:
        HubError: the run's networks are gone, or do not fit its configuration.
        UnknownNameError: its algorithm is not installed.
    """
    config, result = from_json(TrainConfig, read_object(run / "config.json")), read_object(run / RESULT)
    trained = result["updates"] > result["sft_steps"] + config.warmup_steps
    device = next(policy.parameters()).device
    with torch.random.fork_rng(devices=[]):
        algorithm = load_algorithm(config.algorithm)(policy, options_of(config)).to(device)
    beside = {
        f"{module}.{name}": tensor
        for module in algorithm.acts_with(1)
        for name, tensor in algorithm.get_submodule(module).state_dict(keep_vars=True).items()
    }
    if not beside:
        return algorithm, trained
    title = f"{algorithm.title} acts with networks beside the policy ({', '.join(algorithm.acts_with(1))})"
    try:
        file = checkpoint.latest(run / "checkpoints") / "weights.safetensors"
    except CheckpointError as error:
        raise HubError(
            f"{title}, and {run} holds no checkpoint with them any more: give {run / 'policy'} for plain samples of "
            "its policy"
        ) from error
    weights = read_tensors(file)
    check_finite({name: weights[name] for name in beside.keys() & weights.keys()}, file)
    wrong = [name for name, own in beside.items() if name not in weights or weights[name].shape != own.shape]
    if wrong:
        raise HubError(f"{title}, and those in {file} do not fit the run's configuration: {', '.join(wrong[:4])}")
    with torch.no_grad():
        for name, own in beside.items():
            own.copy_(weights[name])
    return algorithm, trained
