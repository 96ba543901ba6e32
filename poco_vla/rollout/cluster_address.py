"""Where a Ray cluster is, and the connection of this process to it."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from poco_vla.config import InteractionConfig
from poco_vla.errors import ConfigError

PATIENCE = 10.0
"""Seconds that an address may take to answer."""


def check_cluster(settings: InteractionConfig) -> None:
    """Find out what would keep `connect` from its cluster, before anything is trained.

    Raises:
        ConfigError: nobody listens at the address, or this machine has not the GPUs for a cluster of its own.
    """
    address, gpus = _address(settings), settings.workers * settings.worker_gpus
    if address is None and gpus > torch.cuda.device_count():
        raise ConfigError(_too_few_gpus(settings, float(torch.cuda.device_count())))
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
        except OSError as error:  # Ray itself would try for a quarter of an hour
            raise ConfigError(_no_cluster(address, error)) from error


def connect(settings: InteractionConfig) -> bool:
    """Connect this process to the cluster of `settings`; return True if it was not connected before.

    Raises:
        ConfigError: no cluster answers there, or this machine has not the GPUs for one.
    """
    address = _address(settings)
    if address is None:
        # Read when Ray is imported: node and workers listen on this machine alone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    with _keep_sigterm_handler():
        if address is not None:
            quiet.pop("include_dashboard")
            try:
                ray.init(address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(_no_cluster(address, error)) from error
            return True
        ray.init("local", num_cpus=int(np.ceil(settings.workers * settings.worker_cpus)), **quiet)
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if gpus < settings.workers * settings.worker_gpus:
        ray.shutdown()
        raise ConfigError(_too_few_gpus(settings, gpus))
    return True


def _address(settings: InteractionConfig) -> str | None:
    return settings.address or os.environ.get("RAY_ADDRESS")


def _no_cluster(address: str | None, error: Exception) -> str:
    return (
        f"no Ray cluster at {address}: {error}. The learner's machine has to belong to it: "
        "ray start --address=HEAD:6379 (on the head: ray start --head)"
    )


def _too_few_gpus(settings: InteractionConfig, found: float) -> str:
    wanted = settings.workers * settings.worker_gpus
    return (
        f"{settings.workers} workers with worker_gpus {settings.worker_gpus} need {wanted:g} GPUs, and there are "
        f"{found:g} on this machine"
    )


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Keep our handler of SIGTERM: Ray installs its own, which would end a run without saving it."""
    own = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if own is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own)
