"""One HTML file about a set of runs: nothing in it refers to anything outside of it."""

import base64
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from poco_vla.files import atomic_file
from poco_vla.report.commands import shown
from poco_vla.report.curves import WINDOW, curve_of, rate_of, tasks_of
from poco_vla.report.plots import COLOURS, METRICS, NAMED, UNFINISHED, curve_svg, metric_svg, short
from poco_vla.report.published import published, source
from poco_vla.report.runs import (
    Group,
    RunRecord,
    defaults,
    eval_command,
    group_runs,
    train_command,
)

MAX_VIDEO_BYTES = 20_000_000
"""Most bytes of .mp4 files that a page takes in; in the page they take a third more."""
VIDEOS = {
    "failure_before": "after SFT, a failure",
    "success_before": "after SFT, a success",
    "failure_after": "after {title}, a failure",
    "success_after": "after {title}, a success",
}
"""Names of a run's videos, and what they show; {title} is its algorithm's."""
Rate = tuple[float, float, float]
"""Mean, lower and upper end, in 0..1."""
Videos = Mapping[Path, bytes | None]
"""Video file -> its bytes; None for one that the budget left out."""


def write_page(
    runs: Sequence[Path], output: Path, title: str | None = None, *, max_video_bytes: int = MAX_VIDEO_BYTES
) -> Path:
    """Write one self-contained HTML page: summary, learning curves, metrics, settings, videos and commands.

    Args:
        runs: folders of runs; those of one task and setting become one section. Unfinished ones are marked.
        output: file to write, whole or not at all.
        title: heading; the task's name, or how many there are, when None.
        max_video_bytes: most bytes of video files to take in; the page says which were left out.

    Raises:
        DataError: a folder without a run, or with a damaged one.
    """
    groups = group_runs(runs)
    videos = _chosen_videos(groups, max_video_bytes)
    text = template("page.html.j2").render(
        title=title or _title(groups),
        colours=COLOURS,
        style=style(),
        today=f"{datetime.now(UTC):%d %B %Y}",
        sections=[_section(group, videos) for group in groups],
        credit=source() if any(published(group.task) for group in groups) else None,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as partial:
        partial.write_text(text, encoding="utf-8")
    return output


def style() -> str:
    """Return the style sheet of all pages."""
    return (Path(__file__).parent / "page.css").read_text()


@cache
def template(name: str) -> Template:
    """Return a page's template, which escapes all that it does not mark as safe."""
    environment = Environment(
        loader=PackageLoader("poco_vla.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": lambda rate: f"{100 * rate:.0f}",
        "grouped": lambda number: f"{number:,}",
        "counted": lambda number, noun: f"{number} {noun}{'' if number == 1 else 's'}",
        "interval": _interval,
        "duration": _duration,
        "short": short,
        # A dotted name may break after a dot or an underscore on a narrow screen.
        "breakable": lambda name: re.split(r"(?<=[._])", name),
    }
    return environment.get_template(name)


def _title(groups: Sequence[Group]) -> str:
    tasks = list(dict.fromkeys(group.task for group in groups))
    titles = ", ".join(dict.fromkeys(group.title for group in groups))
    return f"{titles} on {tasks[0]}" if len(tasks) == 1 else f"{titles} on {len(tasks)} tasks"


def _section(group: Group, videos: Videos) -> dict[str, Any]:
    """Return what the template shows of a group."""
    first, finished = group.runs[0], group.finished
    seeds = len({run.result["seed"] for run in finished})
    steps = (first.result.get("demonstrations") or {}).get("steps")
    command = train_command(first)
    evaluate = eval_command(first.path) if first.result["after"] else None
    return {
        "group": group,
        "num_runs": len(group.runs),
        "num_unfinished": len(group.unfinished),
        "before": rate_of(group, "before"),
        "after": rate_of(group, "after"),
        # Where one seed ran twice, the number of runs, too.
        "seeds": seeds if seeds == len(finished) else f"{seeds} ({len(finished)} runs)",
        "env_steps": _mean_of(group, "env_steps", lambda steps: f"{steps:,.0f}"),
        "seconds": _mean_of(group, "seconds", _duration),
        "devices": ", ".join(sorted({str(run.result.get("device", "-")) for run in finished})) or "-",
        "has_best": any(run.result.get("best") for run in group.runs),
        "imitated": _imitated(group),
        "rounded_env_steps": round(group.env_steps, -2 if group.env_steps > 1000 else 0) if finished else 0,
        "demonstration_steps": steps if isinstance(steps, int) else None,
        "curves": _curves(group),
        "published": _published(group),
        "tasks": [(task, rate_of(group, "before", task), rate_of(group, "after", task)) for task in tasks_of(group)],
        "metrics": {title: svg for name, title in METRICS.items() if (svg := metric_svg(group, name))},
        "videos": [found for run in group.runs if (found := _run_videos(run, videos))],
        "settings": [(name, shown(value)) for name, value in first.config.items()],
        "differences": _differences(first) if first.config else [],
        "train_command": _folded(command) if command else _train_snippet(first),
        "eval_command": _folded(evaluate) if evaluate else None,
    }


def _mean_of(group: Group, name: str, shown_as: Callable[[float], str]) -> str:
    """Return a figure's mean over finished runs."""
    values = [run.result[name] for run in group.finished]
    return shown_as(sum(values) / len(values)) if values else "-"


def _imitated(group: Group) -> bool:
    """Return True if the policies had learned from demonstrations before they acted."""
    config = group.runs[0].config
    return bool(config.get("sft_steps", 1)) or config.get("policy") is not None


# -- curves ---------------------------------------------------------------------------------------------------------


def _curves(group: Group) -> dict[str, Any] | None:
    """Return the learning curve in two sizes, with its key; None where no run was evaluated."""
    if curve_of(group) is None:
        return None
    return {
        "wide": curve_svg(group, width=1016, height=400),
        "narrow": curve_svg(group, width=364, height=300),
        "key": _key(group),
    }


def _key(group: Group) -> list[tuple[str, str]]:
    """Return the lines of the learning curve: class of the mark, and words."""
    curve, others = curve_of(group), published(group.task)
    assert curve is not None
    single = len(group.runs) == 1
    said = [
        ("poco", f"{group.title}{'' if single else ', mean over seeds'}; band: {curve.label}"),
        ("thin", f"training episodes, average of {WINDOW}" if single else "single seeds"),
    ]
    if group.unfinished and not single:
        said.append(("thin dotted", UNFINISHED))
    if group.warmup_steps:
        said.append(("shade", f"critic warm-up, actor frozen ({group.warmup_steps:,} steps)"))
    said += [(f"dashed {NAMED[method]}", f"{method}, published") for method in others if method in NAMED]
    if rest := [method for method in others if method not in NAMED]:
        said.append(("dashed rest", f"{', '.join(rest)}, published"))
    return said


def _published(group: Group) -> dict[str, Any] | None:
    """Return the published figures of a group's task at the group's last step; None where there are none."""
    others = published(group.task)
    if not others:
        return None
    one = next(iter(others.values()))
    end = min(group.env_steps, one.steps[-1])
    rows = [
        (method, curve.at(0), curve.at(end), (float(curve.mean[-1]), float(curve.low[-1]), float(curve.high[-1])))
        for method, curve in others.items()
    ]
    return {"task": one.label, "end": round(end, -2), "last": one.steps[-1], "rows": rows}


# -- videos ---------------------------------------------------------------------------------------------------------


def _chosen_videos(groups: Sequence[Group], budget: int) -> Videos:
    """Read the videos as long as `budget` bytes last: every group's first seed comes before any second."""
    tiers = zip_longest(*(group.runs for group in groups))
    runs = [run for tier in tiers for run in tier if run is not None]
    chosen: dict[Path, bytes | None] = {}
    for path in (run.path / f"{name}.mp4" for run in runs for name in VIDEOS):
        if path.is_file():
            size = path.stat().st_size
            chosen[path] = path.read_bytes() if size <= budget else None
            budget -= size if size <= budget else 0
    return chosen


def _run_videos(run: RunRecord, videos: Videos) -> dict[str, Any] | None:
    """Return a run's videos, and which are left out or lacking; None where it has none."""
    paths = {run.path / f"{name}.mp4": words.format(title=run.title) for name, words in VIDEOS.items()}
    here = {path: words for path, words in paths.items() if path in videos}
    if not here:
        return None
    return {
        "seed": run.result["seed"],
        "path": run.path,
        "shown": [(words, base64.b64encode(data).decode()) for p, words in here.items() if (data := videos[p])],
        "left_out": [words for path, words in here.items() if videos[path] is None],
        "lacking": [words for path, words in paths.items() if path not in here],
    }


# -- settings and commands ------------------------------------------------------------------------------------------


def _differences(run: RunRecord) -> list[tuple[str, str, str | None]]:
    """Return name, value and default of the settings that are not the default."""
    usual, own = defaults(), {"seed", "output_dir", "resume"}
    return [
        (name, shown(value), shown(usual[name]) if name in usual else None)
        for name, value in run.differences.items()
        if name not in own
    ]


def _folded(command: str) -> str:
    """Return a command line with each option on a line of its own, as a shell takes it."""
    words = [shlex.quote(word) for word in shlex.split(command)]
    return " ".join(f"\\\n  {word}" if word.startswith("--") else word for word in words)


def _train_snippet(run: RunRecord) -> str:
    """Return Python lines for a run that does not tell which recipe began it: its config.json does."""
    return f"""import json
from dataclasses import replace
from pathlib import Path
from poco_vla.config import TrainConfig, from_json
from poco_vla.training import train

config = from_json(TrainConfig, json.loads(Path({str(run.path / "config.json")!r}).read_text()))
train(replace(config, output_dir=Path("runs/again")))"""


# -- small parts ----------------------------------------------------------------------------------------------------


def _interval(figures: Mapping[str, Any] | None) -> Rate | None:
    """Return the success rate of an evaluation."""
    return (figures["success_rate"], *figures["interval_95"]) if figures else None


def _duration(seconds: float | int) -> str:
    """Return 5:36, or 1:02:03 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
