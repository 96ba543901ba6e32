"""Lets LeRobot's own commands load pi05 folders of other sizes, such as those of `--tiny` runs.

    lerobot-eval --policy.path=FOLDER --plugin.discover_packages_path=poco_vla_pi05.small ...

LeRobot 0.6.1 builds one size of pi0.5 and has no field for another. Importing this package makes
`PI05Policy.from_pretrained` read the sizes that lie beside the weights (``architecture.json``). Folders of the real
model have no such file and need none of this.
"""

from pathlib import Path
from typing import Any

from lerobot.policies.pi05.modeling_pi05 import PI05Policy

from poco_vla_pi05.architecture import Architecture, lerobot_builds

_load = PI05Policy.from_pretrained.__func__  # pyright: ignore[reportFunctionMemberAccess]


def _from_pretrained(cls: type[PI05Policy], pretrained_name_or_path: str | Path, **options: Any) -> PI05Policy:
    with lerobot_builds(Architecture.of_folder(Path(pretrained_name_or_path))):
        return _load(cls, pretrained_name_or_path, **options)


PI05Policy.from_pretrained = classmethod(_from_pretrained)  # pyright: ignore[reportAttributeAccessIssue]
