"""The picture of a comparison: a mean curve with a band over seeds for each algorithm, and published curves beside."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from poco_vla.files import atomic_file
from poco_vla.report.comparison import Entry
from poco_vla.report.curves import Curve
from poco_vla.report.plots import COLOURS, Label, plain_axes, to_svg, write_labels

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
type Published = Mapping[str, Mapping[str, Curve]]
"""Whose runs -> method there -> its curve."""
OTHERS = ("#444444", "#777777", "#aaaaaa")
"""Colours of algorithms that are not the library's own."""
MARKERS = "osD^vPX<>hd*p"
SIZE = (9.6, 5.2)
"""Width and height in inches."""


def draw_comparison(entries: Sequence[Entry], sft: float | None, path: Path, published: Published) -> Path:
    """Draw success against environment steps, a curve for each algorithm.

    Args:
        entries: the algorithms.
        sft: success of the SFT policy that they share; None if there is none.
        path: picture to write; its suffix says the format.
        published: published curves by whose they are, and by method; drawn of algorithms that are compared.
    """
    figure = comparison_figure(entries, sft, published)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix.removeprefix(".").lower())
    return path


def comparison_svg(entries: Sequence[Entry], sft: float | None, published: Published) -> str:
    """Draw the same as SVG for a page."""
    return to_svg(comparison_figure(entries, sft, published), "comparison")


def comparison_figure(entries: Sequence[Entry], sft: float | None, published: Published) -> Figure:
    """Return the figure, to be written or shown."""
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    drawn = [entry for entry in entries if entry.curve is not None]
    end = max((entry.curve.steps[-1] for entry in drawn if entry.curve is not None), default=1.0)
    labels = [label for i, entry in enumerate(drawn) for label in _draw(axes, entry, i)]
    names = {entry.name for entry in drawn}
    dashed = [
        (PUBLISHED[who][method], f"{method} ({who})", curve)
        for who, curves in published.items()
        for method, curve in curves.items()
        if PUBLISHED.get(who, {}).get(method) in names and curve.steps[0] < end
    ]
    for name, words, curve in dashed:
        axes.plot(curve.steps, curve.mean, color=colour_of(name), linewidth=1.1, linestyle=(0, (5, 3)), zorder=2)
        labels.append((curve.at(end), f"{words} {100 * curve.at(end):.0f} %", colour_of(name)))
    if sft is not None:
        axes.axhline(sft, color=COLOURS["ink"], linewidth=1.0, linestyle=(0, (1, 2)), zorder=2)
        labels.append((sft, f"SFT {100 * sft:.0f} %", COLOURS["ink"]))
    axes.set(xlim=(0, end * 1.005), ylim=(-0.02, 1.03))
    axes.set_xlabel("environment steps", color=COLOURS["muted"], fontsize=11)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    plain_axes(axes)
    write_labels(axes, labels, gap=0.052, size=10.5)
    figure.subplots_adjust(left=0.065, right=0.83, bottom=0.105, top=0.9)
    seeds = sorted({len(entry.seeds) for entry in drawn})
    band = f"band: 95 % bootstrap over {'/'.join(map(str, seeds))} seeds" if seeds and seeds[-1] > 1 else "one seed"
    others = f"; dashed: published by the authors of {' and '.join(published)}, other settings" if dashed else ""
    task = entries[0].group.task
    axes.set_title(f"{task}\nsuccess of evaluations; {band}{others}", loc="left", fontsize=9.5, color=COLOURS["ink"])
    return figure


def colour_of(name: str, place: int = 0) -> str:
    """Return an algorithm's colour; of one that is not the library's by its place."""
    return PALETTE.get(name, OTHERS[place % len(OTHERS)])


def _draw(axes: Axes, entry: Entry, place: int) -> list[Label]:
    curve, colour, main = entry.curve, colour_of(entry.name, place), entry.name == "poco"
    assert curve is not None
    if len(curve.steps) > 1:
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.12, linewidth=0, zorder=3)
    axes.plot(
        curve.steps,
        curve.mean,
        color=colour,
        linewidth=2.6 if main else 1.6,
        marker=MARKERS[place % len(MARKERS)],
        markersize=5.5,
        markeredgecolor=COLOURS["paper"],
        zorder=6 if main else 5,
        clip_on=False,
    )
    title = entry.title + (" (H = 1)" if entry.horizon == 1 else "")
    return [(float(curve.mean[-1]), f"{title} {100 * curve.mean[-1]:.0f} %", colour)]
