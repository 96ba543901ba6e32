"""From LeRobot datasets and episodes to :class:`poco_vla.types.ChunkBatch`."""

from poco_vla.data.batches import BatchSource, chunk_batch, network_obs
from poco_vla.data.dataset import DatasetInfo, open_dataset, read_episodes
from poco_vla.data.episode import Episode
from poco_vla.data.replay import Replay

__all__ = [
    "BatchSource",
    "DatasetInfo",
    "Episode",
    "Replay",
    "chunk_batch",
    "network_obs",
    "open_dataset",
    "read_episodes",
]
