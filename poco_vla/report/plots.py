"""Learning curves and metrics as pictures: for a file, or as SVG whose colours follow the page's scheme."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from matplotlib.transforms import blended_transform_factory

from poco_vla.files import atomic_file
from poco_vla.report.curves import WINDOW, Curve, Floats, curve_of, points
from poco_vla.report.published import published
from poco_vla.report.runs import Group, RunRecord, group_runs

COLOURS = {
    "ink": "#1f2429",
    "muted": "#68717b",
    "grid": "#e4e7eb",
    "shade": "#f3f5f7",
    "paper": "#fefefe",
    "poco": "#0b64c0",
    "one": "#b4520e",
    "two": "#6a4c93",
    "three": "#1f7a5c",
    "rest": "#b9c0c8",
}
"""Name -> colour on white. The page declares each once more for the dark (page.css). Blue, orange, purple and green are
told apart with every common colour blindness; each line carries its name besides."""
NAMED = {"QC": "one", "RLPD-AC": "two", "RLPD": "three"}
"""Published methods with a name and a colour of their own; the others are thin grey lines, listed in the caption."""
METRICS = {
    "bc_loss": "imitation loss",
    "posterior_loss": "posterior loss, clipped",
    "clipped_fraction": "candidates clipped",
    "effective_sample_size": "effective candidates",
    "q": "value Q",
    "critic_loss": "critic loss",
}
"""Scalars of metrics.jsonl that the page draws, and their titles."""
PANEL, SMALL_PANEL = (7.2, 4.2), (5.4, 3.9)
"""Width and height of a panel alone, and of one of several, in inches."""
UNFINISHED = "unfinished seeds, training episodes"
"""What the dotted lines beside several seeds are."""
CAPTION = 78
"""Characters in a line above a panel: as many as do not reach into the next one."""
BINS = 120
"""Points per line of a metric, each an average: finer than a small picture shows."""


def draw_curves(runs: Sequence[Path], path: Path) -> Path:
    """Draw success against environment steps, one panel per task and setting: seeds, their mean, its 95 % interval.

    Args:
        runs: folders of runs.
        path: picture to write; its suffix says the format.
    """
    groups = group_runs(runs)
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    width, height = PANEL if len(groups) == 1 else SMALL_PANEL
    figure = Figure(figsize=(width * columns, height * rows))  # no pyplot: a notebook keeps its own backend
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, group in zip(panels, groups, strict=False):
        draw_group(axes, group, published(group.task))
        axes.set_title(_caption(group), loc="left", fontsize=9, color=COLOURS["ink"], parse_math=False)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    edge, axis, names = 0.6 / (height * rows), 0.6 / width, 1.45 / width
    # In every panel there is room for its axis and for the names at the lines' ends.
    gap = (axis + names) / (1 - axis - names)
    sides = {"left": axis / columns, "right": 1 - names / columns}
    figure.subplots_adjust(**sides, bottom=edge, top=1 - edge, hspace=0.35, wspace=gap)
    return write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> Path:
    """Write a figure, whole or not at all."""
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix.removeprefix(".").lower())
    return path


def _caption(group: Group) -> str:
    """Return task and setting, and a legend of band and lines."""
    curve, single = curve_of(group), len(group.runs) == 1
    band = f"band: {curve.label}; " if curve else ""
    thin = f"thin: training episodes, average of {WINDOW}" if single else "thin: single seeds"
    status = f" ({group.runs[0].status})" if single and group.unfinished else ""
    dotted = f"; dotted: {UNFINISHED}" if group.unfinished and not single else ""
    others = "; dashed: published" if published(group.task) else ""
    texts = (f"{group.task}, {group.name}{status}", f"{band}{thin}{dotted}{others}")
    return "\n".join(line for text in texts for line in wrap(text, CAPTION))


def curve_svg(group: Group, *, width: int, height: int) -> str:
    """Draw a group's learning curve beside the published ones, as SVG of that size in CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.subplots()
    draw_group(axes, group, published(group.task))
    right = 1 - (122 if width > 600 else 104) / width
    figure.subplots_adjust(left=46 / width, right=right, bottom=44 / height, top=1 - 10 / height)
    return to_svg(figure, f"curve-{width}-{group.task}-{group.name}")


def metric_svg(group: Group, name: str, *, width: int = 300, height: int = 170) -> str | None:
    """Draw one scalar of a group's runs, a line per seed, as SVG; None if no run has it."""
    lines = [line for run in group.runs if len(line := metric(run, name))]
    if not lines:
        return None
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.subplots()
    for line in lines:
        axes.plot(*line.T, color=COLOURS["poco"], linewidth=1.2, alpha=0.85 if len(lines) == 1 else 0.5)
    plain_axes(axes)
    _shade(axes, group)
    axes.set_xlim(0, max(float(line[-1, 0]) for line in lines) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    figure.subplots_adjust(left=40 / width, right=1 - 14 / width, bottom=24 / height, top=1 - 8 / height)
    return to_svg(figure, f"{name}-{group.task}-{group.name}")


def metric(run: RunRecord, name: str) -> Floats:
    """Return [P 2] a scalar of metrics.jsonl against environment steps (updates, for a run that never acted), in
    bins."""
    acted = run.result["env_steps"] > 0
    lines = run.metrics.loc[run.metrics["stage"] != "sft"] if acted else run.metrics
    if name not in lines:
        return np.zeros((0, 2))
    table = lines[["env_steps" if acted else "update", name]].to_numpy(float)
    table = table[np.isfinite(table).all(axis=1)]
    bins = np.array_split(table, min(BINS, len(table))) if len(table) else []
    return np.array([part.mean(axis=0) for part in bins], dtype=float).reshape(-1, 2)


def draw_group(axes: Axes, group: Group, others: Mapping[str, Curve]) -> None:
    """Draw seeds thin, their mean bold with its interval, published curves dashed and light; names at the lines'
    ends."""
    curve, end = curve_of(group), max(group.env_steps, 1)
    labels = _draw_published(axes, others, end)
    _draw_seeds(axes, group)
    if curve is not None:
        labels.append(_draw_mean(axes, curve, group.title))
    axes.set(xlim=(0, end * 1.005), ylim=(-0.02, 1.03))
    axes.set_xlabel("environment steps", color=COLOURS["muted"], fontsize=11)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    plain_axes(axes)
    _shade(axes, group)
    write_labels(axes, [(height, words, COLOURS[name]) for height, words, name in labels])


Label = tuple[float, str, str]
"""Height at the right edge (success in 0..1), words, and a colour or its name."""


def _draw_published(axes: Axes, others: Mapping[str, Curve], end: int) -> list[Label]:
    labels = []
    for method, curve in others.items():
        name = NAMED.get(method, "rest")
        width, alpha = (1.5, 0.8) if method in NAMED else (0.9, 1.0)
        style = (0, (5, 3)) if method in NAMED else (0, (2, 3))
        axes.plot(curve.steps, curve.mean, color=COLOURS[name], linewidth=width, linestyle=style, alpha=alpha, zorder=2)
        if method in NAMED:
            labels.append((curve.at(end), f"{method} {100 * curve.at(end):.0f} %", name))
    return labels


def _draw_seeds(axes: Axes, group: Group) -> None:
    """Draw each seed's evaluations, of an unfinished one the running average over its training episodes, too; of a
    single run that alone."""
    single = len(group.runs) == 1

    def draw(run: RunRecord, kind: str, style: str, alpha: float) -> None:
        table, look = points(run.path, kind), {"linestyle": style, "linewidth": 1.0, "alpha": alpha, "zorder": 3}
        axes.plot(table["env_steps"], table["success"], color=COLOURS["poco"], **look)

    for run in group.runs:
        draw(run, "training" if single else "evaluation", "-", 0.4)
    for run in () if single else group.unfinished:
        draw(run, "training", ":", 0.8)


def _draw_mean(axes: Axes, curve: Curve, title: str) -> Label:
    blue = COLOURS["poco"]
    if len(curve.steps) > 1:
        axes.fill_between(curve.steps, curve.low, curve.high, color=blue, alpha=0.14, linewidth=0, zorder=3)
    errors = [curve.mean - np.minimum(curve.low, curve.mean), np.maximum(curve.high, curve.mean) - curve.mean]
    axes.errorbar(
        curve.steps,
        curve.mean,
        yerr=errors if len(curve.steps) == 1 else None,
        fmt="o-",
        color=blue,
        linewidth=2.2,
        markersize=5 if len(curve.steps) <= 12 else 3.5,
        markeredgecolor=COLOURS["paper"],
        zorder=5,
        clip_on=False,
    )
    return float(curve.mean[-1]), f"{title} {100 * curve.mean[-1]:.0f} %", "poco"


def write_labels(axes: Axes, labels: Sequence[Label], *, gap: float = 0.068, size: float = 12) -> None:
    """Write names at the right edge, each at its line's end or as near as the others allow.

    Args:
        axes: the panel.
        labels: of the lines, each with the colour itself; POCO's is bold.
        gap: least distance of two names, in success.
        size: of the letters, in points.
    """
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    ordered = sorted(labels)
    heights = spread([label[0] for label in ordered], gap)
    for height, (_, words, colour) in zip(heights, ordered, strict=True):
        weight = "bold" if colour == COLOURS["poco"] else "normal"
        axes.text(1.015, height, words, transform=beside, color=colour, fontsize=size, va="center", fontweight=weight)


def spread(heights: Sequence[float], gap: float, top: float = 1.0) -> list[float]:
    """Return rising `heights`, moved as little as a `gap` between them needs (least squares), none above `top`."""
    blocks: list[list[float]] = []  # of heights - i * gap, which may stand level: isotonic regression
    for i, height in enumerate(heights):
        blocks.append([height - i * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    levels = [float(np.mean(block)) for block in blocks for _ in block]
    return [min(level + i * gap, top - (len(levels) - 1 - i) * gap) for i, level in enumerate(levels)]


def _shade(axes: Axes, group: Group) -> None:
    """Shade the critic's warm-up, while the actor is frozen."""
    if group.warmup_steps:
        axes.axvspan(0, group.warmup_steps, color=COLOURS["shade"], linewidth=0, zorder=0)


def plain_axes(axes: Axes) -> None:
    """Take frame, tick marks and vertical grid lines away from a panel."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["grid"])
    axes.grid(axis="y", color=COLOURS["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0)
    axes.tick_params(length=0, labelsize=11, labelcolor=COLOURS["muted"])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))


def short(number: float | int) -> str:
    """Return a count as an axis label: 500, 12k, 1.5M."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:g}{letter}"
    return f"{number:g}"


def to_svg(figure: Figure, name: str) -> str:
    """Return a figure as an <svg> element for an HTML page: text as text in the page's font, colours as the page's
    variables, every id its own, no reference to anything outside."""
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg role="img" \1>', svg, count=1)
    svg = re.sub(r' id="(?:figure|axes|patch|text|line2d|[xy]tick|matplotlib|\w*Collection)[\w.]*"', "", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg).replace("xlink:href", "href")
    for colour, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{colour})")
    return re.sub(r"\s*\n\s*", " ", svg).strip()
