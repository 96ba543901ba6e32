"""Torch devices by name."""

import torch

from poco_vla.errors import ConfigError


def check_device(name: str) -> None:
    """Raise ConfigError for a device that torch cannot use on this machine."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them
        reason = str(error).strip().split("\n")[0].rstrip(".")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        raise ConfigError(f'the device "{name}" cannot be used here ({reason}); this machine has {here}') from None
