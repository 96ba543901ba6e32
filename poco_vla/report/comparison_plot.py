"""The picture of a comparison: a mean curve with a band over seeds for each algorithm, and published curves beside."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from poco_vla.report.curves import Curve
from poco_vla.report.plots import COLOURS, Label, plain_axes, to_svg, write_figure, write_labels

PALETTE = {
    "poco": "#0b64c0",
    "qc": "#b4520e",
    "qc_fql": "#d99000",
    "fql": "#8a6d3b",
    "rlpd_ac": "#6a4c93",
    "rlpd": "#a98bd0",
    "dsrl": "#1f7a5c",
    "reinflow": "#c0357a",
    "dppo": "#e07fb0",
    "bc": "#5b6570",
    "expo": "#4aa3a2",
    "mpo": "#7a9a2b",
    "vmpo": "#3f4fa8",
}
"""Algorithm -> colour, the same in every picture; related ones have related colours."""
PUBLISHED = {
    "QC": {"QC": "qc", "QC-FQL": "qc_fql", "FQL": "fql", "RLPD": "rlpd", "RLPD-AC": "rlpd_ac"},
    "QAM": {"DSRL": "dsrl", "FEdit": "expo", "FQL": "qc_fql", "RLPD": "rlpd_ac"},
}
"""Whose runs -> method there -> algorithm here. The chunks of QAM's runs have five steps, those of its FQL and RLPD
too; its FEdit is like EXPO."""
type Figures = Mapping[str, Any]
"""Figures of a comparison, or of one of its algorithms, as comparison.json has them."""
type Published = Mapping[str, Mapping[str, Curve]]
"""Whose runs -> method there -> its curve."""
OTHERS = ("#444444", "#777777", "#aaaaaa")
"""Colours of algorithms that are not the library's own."""
MARKERS = "osD^vPX<>hd*p"
SIZE, PANEL = (9.6, 5.2), (6.4, 3.9)
"""Width and height of a picture of one comparison, and of each panel of several, in inches."""


def draw_comparison(figures: Figures, path: Path, published: Published) -> Path:
    """Draw success against environment steps, a curve for each algorithm.

    Args:
        figures: of the comparison, as comparison.json has them.
        path: picture to write; its suffix says the format.
        published: published curves by whose they are, and by method; drawn of algorithms that are compared.
    """
    return write_figure(comparison_figure(figures, published), path)


def comparison_svg(figures: Figures, published: Published) -> str:
    """Draw the same as SVG for a page."""
    return to_svg(comparison_figure(figures, published), "comparison")


def comparison_figure(figures: Figures, published: Published) -> Figure:
    """Return the figure, to be written or shown."""
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    dashed = draw_task(axes, figures, published)
    figure.subplots_adjust(left=0.065, right=0.83, bottom=0.105, top=0.9)
    seeds = sorted({len(one["seeds"]) for one in figures["algorithms"].values()})
    band = f"band: 95 % bootstrap over {'/'.join(map(str, seeds))} seeds" if seeds and seeds[-1] > 1 else "one seed"
    others = f"; dashed: published by the authors of {' and '.join(published)}, other settings" if dashed else ""
    task = figures["task"]
    axes.set_title(f"{task}\nsuccess of evaluations; {band}{others}", loc="left", fontsize=9.5, color=COLOURS["ink"])
    return figure


def draw_comparisons(tasks: Mapping[str, Figures], path: Path) -> Path:
    """Draw several comparisons, a panel for each.

    Args:
        tasks: name of each comparison -> its figures, as comparison.json has them.
        path: picture to write; its suffix says the format.
    """
    return write_figure(comparisons_figure(tasks), path)


def comparisons_svg(tasks: Mapping[str, Figures]) -> str:
    """Draw the same as SVG for a page."""
    return to_svg(comparisons_figure(tasks), "comparisons")


def comparisons_figure(tasks: Mapping[str, Figures]) -> Figure:
    """Return the figure of several comparisons, at most two panels in a row: names stand beside each."""
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    width, height = PANEL
    figure = Figure(figsize=(width * columns, height * rows))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, figures) in zip(panels, tasks.items(), strict=False):
        draw_task(axes, figures, {}, size=9.5, gap=0.066)
        title = name if name == figures["task"] else f"{name}: {figures['task']}"
        axes.set_title(title, loc="left", fontsize=10, color=COLOURS["ink"])
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    left, right = 0.65 / width, 1.35 / width
    figure.subplots_adjust(
        left=left / columns,
        right=1 - right / columns,
        bottom=0.55 / (height * rows),
        top=1 - 0.4 / (height * rows),
        hspace=0.3,
        wspace=(left + right) / (1 - left - right),
    )
    return figure


def draw_task(axes: Axes, figures: Figures, published: Published, *, size: float = 10.5, gap: float = 0.052) -> bool:
    """Draw the curves of a comparison, their names beside; return True if published ones are among them.

    Args:
        axes: the panel.
        figures: of the comparison.
        published: as :func:`draw_comparison` takes them.
        size: of the names' letters, in points.
        gap: least distance of two names, in success.
    """
    drawn = figures["algorithms"]
    end = max((one["curve"]["steps"][-1] for one in drawn.values()), default=1.0)
    labels = [_draw(axes, name, one, i) for i, (name, one) in enumerate(drawn.items())]
    dashed = [
        (PUBLISHED[who][method], f"{method} ({who})", curve)
        for who, curves in published.items()
        for method, curve in curves.items()
        if PUBLISHED.get(who, {}).get(method) in drawn and curve.steps[0] < end
    ]
    for name, words, curve in dashed:
        axes.plot(curve.steps, curve.mean, color=colour_of(name), linewidth=1.1, linestyle=(0, (5, 3)), zorder=2)
        labels.append((curve.at(end), f"{words} {100 * curve.at(end):.0f} %", colour_of(name)))
    if (sft := figures["sft"]) is not None:
        axes.axhline(sft, color=COLOURS["ink"], linewidth=1.0, linestyle=(0, (1, 2)), zorder=2)
        labels.append((sft, f"SFT {100 * sft:.0f} %", COLOURS["ink"]))
    axes.set(xlim=(0, end * 1.005), ylim=(-0.02, 1.03))
    axes.set_xlabel("environment steps", color=COLOURS["muted"], fontsize=size + 0.5)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    plain_axes(axes)
    write_labels(axes, labels, gap=gap, size=size)
    return bool(dashed)


def colour_of(name: str, place: int = 0) -> str:
    """Return an algorithm's colour; of one that is not the library's by its place."""
    return PALETTE.get(name, OTHERS[place % len(OTHERS)])


def _draw(axes: Axes, name: str, algorithm: Figures, place: int) -> Label:
    curve, colour, main = algorithm["curve"], colour_of(name, place), name == "poco"
    if len(curve["steps"]) > 1:
        axes.fill_between(curve["steps"], curve["low"], curve["high"], color=colour, alpha=0.12, linewidth=0, zorder=3)
    axes.plot(
        curve["steps"],
        curve["mean"],
        color=colour,
        linewidth=2.6 if main else 1.6,
        marker=MARKERS[place % len(MARKERS)],
        markersize=5.5,
        markeredgecolor=COLOURS["paper"],
        zorder=6 if main else 5,
        clip_on=False,
    )
    title = algorithm["title"] + (" (H = 1)" if algorithm["horizon"] == 1 else "")
    return (curve["mean"][-1], f"{title} {100 * curve['mean'][-1]:.0f} %", colour)
