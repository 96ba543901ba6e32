"""Other names for the columns of a dataset, as LeRobot's `rename_map` gives them."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from poco_vla.errors import ConfigError, UnknownNameError


def rename_columns(dataset: Any, names: Mapping[str, str]) -> None:
    """Give columns of an open LeRobotDataset other names. Its files stay as they are.

    Its description keeps the names in the files as `names_in_files`, for readers of tables and paths of videos.

    Args:
        dataset: an open LeRobotDataset.
        names: name in the files -> name from now on.

    Raises:
        UnknownNameError: a column that the dataset does not have.
        ConfigError: two columns would have one name.
    """
    meta = dataset.meta
    for old in names:
        if old not in meta.features:
            raise UnknownNameError("column", old, meta.features)
    renamed = {old: names.get(old, old) for old in meta.features}
    twice = [name for name, times in Counter(renamed.values()).items() if times > 1]
    if twice:
        both = " and ".join(f'"{old}"' for old, new in renamed.items() if new == twice[0])
        raise ConfigError(
            f'rename_map gives the columns {both} one name, "{twice[0]}": name both, or give another new name'
        )
    table = dataset.hf_dataset
    meta.info.features = {renamed[old]: feature for old, feature in meta.features.items()}
    meta.stats = {names.get(old, old): kinds for old, kinds in (meta.stats or {}).items()}
    meta.names_in_files = {new: old for old, new in names.items()}
    dataset.reader.hf_dataset = table.rename_columns({old: renamed[old] for old in names if old in table.column_names})


def name_in_files(meta: Any, key: str) -> str:
    """Return the name that a column has in the files of the dataset that LeRobot's `meta` describes."""
    return getattr(meta, "names_in_files", {}).get(key, key)
