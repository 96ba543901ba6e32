"""Open the prefix cache of a run, from its configuration."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from accelerate import Accelerator
from accelerate.utils import DistributedType

from poco_vla.config import PrefixConfig, TrainConfig
from poco_vla.data import Episode, Replay
from poco_vla.errors import ConfigError
from poco_vla.policy import FlowPolicy
from poco_vla.prefix_cache.actor_buffer import ActorPrefixBuffer
from poco_vla.prefix_cache.identity import cache_folder, identity
from poco_vla.prefix_cache.source import Demand, PrefixSource
from poco_vla.prefix_cache.store import PrefixStore

FOLDER = "prefixes"
"""Of a run's folder."""
ACTED = 8
"""Which part of the RAM is for what acting has encoded, until the episodes end that it belongs to."""


def open_prefixes(
    config: TrainConfig,
    policy: FlowPolicy,
    replay: Replay,
    demos: Sequence[Episode],
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> PrefixSource | None:
    """Return what gives a run's batches their prefixes; None where the policy encodes each batch as it comes.

    Raises:
        ConfigError: a store is asked for that cannot be.
    """
    settings, shares = config.prefixes, config.replay.consecutive > 1
    off = settings.mode == "off" or (settings.mode == "auto" and config.interaction.mode == "synchronous")
    if off and not shares:
        return None
    if reason := _unfit(policy, accelerator):
        if settings.mode == "on":
            raise ConfigError(f'prefixes.mode is "on", but {reason}. Leave it at "auto", or set it to "off".')
        return None
    if settings.mode != "on" and all(p.requires_grad for p in policy.parameters()):
        return None  # nothing is frozen: what encodes is next to nothing
    store, acted, demand = None, None, None
    if not off:
        folder = None
        if settings.disk_bytes:
            settled = {
                "dtype": settings.dtype,
                "mixed_precision": config.mixed_precision,
                "device": accelerator.device.type,
            }
            about = identity(policy, demos, **settled)
            root = settings.folder or config.output_dir / FOLDER
            try:
                folder = cache_folder(root, about)
            except OSError as error:
                raise ConfigError(f"prefixes cannot be kept in {root} (prefixes.folder): {error.strerror}") from error
        # Acting is never under autocast: with it, learning would be given something else.
        beside = config.interaction.mode in ("asynchronous", "remote") and accelerator.mixed_precision == "no"
        apart = settings.ram_bytes // ACTED if beside else 0
        settings = replace(settings, ram_bytes=settings.ram_bytes - apart)
        store = PrefixStore(settings, accelerator.device, folder, beside=apart)
        if beside:
            acted = ActorPrefixBuffer(policy, store.to_ram, apart, settings.dtype)
        if folder is not None and store.num_kept:
            say(f"prefix cache: {store.num_kept:,} prefixes of earlier runs in {folder}")
    if settings.mode == "auto" and not off:
        demand = _demand(config, settings, replay, accelerator)
    return PrefixSource(
        policy,
        replay,
        store,
        actor_buffer=acted,
        demand=demand,
        shares=shares,
        dtype=settings.dtype,
        autocast=lambda: accelerator.autocast(),
        say=say,
    )


def _unfit(policy: FlowPolicy, accelerator: Accelerator) -> str:
    """Say why there can be no cache; empty where there can."""
    if not policy.can_pack:
        return f"{type(policy).__name__} has no `pack` and `unpack`, or augments its pictures"
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return "under FSDP and DeepSpeed it would be unpacked with a copy of the head that is older than what learns"
    return ""


def _demand(config: TrainConfig, settings: PrefixConfig, replay: Replay, accelerator: Accelerator) -> Demand:
    """Return what one process asks for. Each of them sees every state sooner or later."""
    rows = config.optim.batch_size // accelerator.num_processes
    online = int(config.online_steps * config.updates_per_step)
    on_gpu = accelerator.device.type == "cuda"
    return Demand(
        states=replay.num_demo_steps + min(config.online_steps, config.replay.capacity),
        num_sampled=rows * (config.sft_steps + 2 * online),
        memory=settings.ram_bytes + (settings.device_bytes if on_gpu else 0),
        disk=settings.disk_bytes,
    )
