"""Note beside a policy, in poco.json: the control rate that it was trained for, and how the run acts."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poco_vla.errors import ConfigError, PocoError
from poco_vla.files import read_json, write_json
from poco_vla.hub.fetch import located
from poco_vla.pretrained.heads import ABOUT, read_about

FPS = "fps"
"""Name of the rate in poco.json and result.json, in control steps per second."""


NOTED = (FPS, "title", "acts_with")
"""Names in poco.json of what a run notes: the rate, the algorithm's title, and the networks beside the policy that it
acts with, where plain samples of the policy are not how it acts."""


def note_run(folder: Path, noted: Mapping[str, Any]) -> None:
    """Put some of `NOTED` into the poco.json of a policy that was just saved; a policy without that file is left as it
    is."""
    if about := read_about(folder):
        write_json(folder / ABOUT, {**about, **noted})


def noted_in(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a policy's run has noted in its poco.json."""
    return {name: about[name] for name in NOTED if name in about}


def rate_of(policy: str, revision: str | None = None) -> float:
    """Return the control steps per second that a policy was trained for: as its poco.json says, or its run.

    Args:
        policy: folder or Hub id of a policy or a head, or a run's folder.
        revision: Hub commit, tag or branch.

    Raises:
        ConfigError: neither says.
    """
    folder = located(policy, revision).folder
    found = [read_about(folder).get(FPS)]
    for run in (Path(policy), folder, folder.parent):
        # An older run did not note it, but its online episodes were recorded at that rate.
        found += [_fps_in(run / "result.json"), _fps_in(run / "episodes" / "meta" / "info.json")]
    for fps in found:
        if isinstance(fps, int | float) and not isinstance(fps, bool) and math.isfinite(fps) and fps > 0:
            return float(fps)
    raise ConfigError(
        f"{policy} does not say at how many control steps per second it was trained, and robots keep the rate that the "
        "server announces: give --fps, the rate of the data that it was trained on"
    )


def _fps_in(path: Path) -> Any:
    """Return the rate in a JSON object; None where there is none, or a damaged file."""
    try:
        values = read_json(path)
    except PocoError:
        return None
    return values.get(FPS) if isinstance(values, dict) else None
