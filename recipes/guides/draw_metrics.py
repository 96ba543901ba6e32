"""The metrics of a run that show whether it learns or collapses, as one picture: python draw_metrics.py RUN PICTURE"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from poco_vla.report import read_curve

SMOOTH = 5
"""Lines of metrics.jsonl in an average."""


def draw(run: Path, picture: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    online = [line for line in lines if line["stage"] != "sft"]
    if not online:
        sys.exit(f"{run} has not begun to learn online")
    begin = max((line["env_steps"] for line in online if line["stage"] == "warmup"), default=0)

    def plot(axes: Axes, *names: str, level: float | None = None, called: str = "") -> None:
        for name in names:
            steps, values = np.array([(r["env_steps"], r[name]) for r in online if name in r]).reshape(-1, 2).T
            average = pd.Series(values).rolling(SMOOTH, min_periods=1).mean()
            axes.plot(steps, average, linewidth=1.4, label=name)
        if level is not None:
            axes.axhline(level, color="black", linewidth=1, linestyle=":", label=called)

    poco, figure = config["poco"], Figure(figsize=(10.5, 5.2), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    success, spread, size, clip, errors, values = panels
    table = read_curve(run)
    for kind, look in (("training", "-"), ("evaluation", "o--")):
        points = table[table["kind"] == kind]
        success.plot(
            points["env_steps"], points["success"], look, linewidth=1.4, markersize=4, label=f"success, {kind}"
        )
    success.set_ylim(-0.02, 1.02)
    plot(spread, "candidate_q_std", level=poco["eta"], called=f"eta {poco['eta']:g}")
    plot(size, "effective_sample_size", level=poco["num_candidates"], called=f"N {poco['num_candidates']}")
    size.set_ylim(0, None)
    plot(clip, "surviving_weight", "clipped_fraction")
    clip.set_ylim(-0.02, 1.02)
    plot(errors, "bc_loss", "posterior_loss")
    errors.set_ylim(0, None)
    plot(values, "q", "target", "candidate_q")
    for axes in panels:
        axes.axvspan(0, begin, color="0.95", linewidth=0)
        axes.set_xlim(0, online[-1]["env_steps"])
        axes.legend(fontsize=8, frameon=False)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[3:]:
        axes.set_xlabel("environment steps", fontsize=8)
    settings = f"beta {poco['beta']:g}, zeta {poco['zeta']}, eta {poco['eta']:g}"
    figure.suptitle(f"{run.name}: {settings}   (grey: the critic's warm-up)", fontsize=10)
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
