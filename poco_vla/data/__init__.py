"""From LeRobot datasets and episodes to :class:`poco_vla.types.ChunkBatch`."""

from typing import TYPE_CHECKING

from poco_vla.lazy import load_on_demand

if TYPE_CHECKING:
    from poco_vla.data.batches import BatchSource, chunk_batch, preprocess_obs
    from poco_vla.data.dataset import DatasetInfo, open_dataset, read_episodes
    from poco_vla.data.episode import Episode
    from poco_vla.data.replay import Replay

__getattr__, __dir__ = load_on_demand(
    __name__,
    {
        "batches": ["BatchSource", "chunk_batch", "preprocess_obs"],
        "dataset": ["DatasetInfo", "open_dataset", "read_episodes"],
        "episode": ["Episode"],
        "replay": ["Replay"],
    },
)

__all__ = [
    "BatchSource",
    "DatasetInfo",
    "Episode",
    "Replay",
    "chunk_batch",
    "open_dataset",
    "preprocess_obs",
    "read_episodes",
]
