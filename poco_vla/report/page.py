"""One HTML file about a set of runs: nothing in it refers to anything outside of it."""

import base64
import html
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from poco_vla.files import atomic_file
from poco_vla.report.commands import shown
from poco_vla.report.curves import WINDOW, curve_of, rate_of
from poco_vla.report.plots import COLOURS, METRICS, NAMED, UNFINISHED, curve_svg, metric_svg, short
from poco_vla.report.published import published, source
from poco_vla.report.runs import (
    Group,
    Run,
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
    "failure_after": "after POCO, a failure",
    "success_after": "after POCO, a success",
}
"""Names of a run's videos, and what they show."""
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
    text = _document(groups, title or _title(groups), _chosen_videos(groups, max_video_bytes))
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as partial:
        partial.write_text(text, encoding="utf-8")
    return output


def _title(groups: Sequence[Group]) -> str:
    tasks = list(dict.fromkeys(group.task for group in groups))
    return f"POCO on {tasks[0]}" if len(tasks) == 1 else f"POCO on {len(tasks)} tasks"


def _document(groups: Sequence[Group], title: str, videos: Videos) -> str:
    sections = "\n".join(_section(number, group, videos) for number, group in enumerate(groups, 1))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_esc(title)}</title>
<style>
:root {{ {"; ".join(f"--{name}: {value}" for name, value in COLOURS.items())} }}
{(Path(__file__).parent / "page.css").read_text()}</style>
</head>
<body>
<main>
{_header(groups, title)}
{_summary(groups)}
{sections}
{_footer(groups)}
</main>
</body>
</html>
"""


def _header(groups: Sequence[Group], title: str) -> str:
    runs = sum(len(group.runs) for group in groups)
    unfinished = sum(len(group.unfinished) for group in groups)
    counts = f"{_count(runs, 'run')} in {_count(len(groups), 'setting')}" + (
        f", {unfinished} of them unfinished" if unfinished else ""
    )
    return f"""<header>
<p class="kicker">poco_vla report</p>
<h1>{_esc(title)}</h1>
<p class="lede">A flow policy first imitates demonstrations (SFT), then practises with nothing but a success signal
(POCO: candidate action chunks, weighed by a critic, distilled back into the policy).
Below: how often it succeeded, before and after. {counts}, {datetime.now(UTC):%d %B %Y}.</p>
</header>"""


# -- summary --------------------------------------------------------------------------------------------------------


def _summary(groups: Sequence[Group]) -> str:
    rows = "\n".join(_summary_row(number, group) for number, group in enumerate(groups, 1))
    names = ("task and setting", "seeds", "SFT", "POCO", "gain", "0 to 100 %", "env steps", "wall time", "device")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f"""<section aria-label="Summary">
<table class="summary"><thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody></table>
<p class="note">Success in % [95 % interval]: bootstrap over seeds from three seeds on, else Wilson's of all their
episodes. Environment steps and wall time are means over seeds. Unfinished runs are in none of these figures. The bar:
{_dot("before")} SFT, {_dot("after")} POCO, each with its interval.</p>
</section>"""


def _summary_row(number: int, group: Group) -> str:
    before, after = rate_of(group, "before"), rate_of(group, "after")
    devices = ", ".join(sorted({str(run.result.get("device", "-")) for run in group.finished})) or "-"
    cells = {
        "seeds": _seeds(group),
        "SFT": _rate(before),
        "POCO": f"<strong>{_rate(after)}</strong>",
        "gain": _gain(before, after),
        "0 to 100 %": _dumbbell(before, after),
        "env steps": _mean_of(group, "env_steps", lambda steps: f"{steps:,.0f}"),
        "wall time": _mean_of(group, "seconds", _duration),
        "device": _esc(devices),
    }
    data = "".join(f'<td data-label="{name}"><span>{value}</span></td>' for name, value in cells.items())
    name = f'<a href="#g{number}">{_esc(group.task)}</a><br><span class="setting">{_esc(group.name)}</span>'
    name += "".join(f'<br><span class="status">{_status(run)}</span>' for run in group.unfinished)
    return f"""<tr><th scope="row">{name}</th>{data}</tr>
<tr class="fold"><td colspan="{len(cells) + 1}">{_per_seed(group)}</td></tr>"""


def _seeds(group: Group) -> str:
    """How many finished seeds; how many runs, too, where one seed ran twice."""
    seeds, runs = len({run.result["seed"] for run in group.finished}), len(group.finished)
    return str(seeds) if seeds == runs else f"{seeds} ({_count(runs, 'run')})"


def _mean_of(group: Group, name: str, shown_as: Callable[[float], str]) -> str:
    """A figure's mean over finished runs."""
    values = [run.result[name] for run in group.finished]
    return shown_as(sum(values) / len(values)) if values else "-"


def _status(run: Run) -> str:
    """How far an unfinished run is, and what it brought until then."""
    figures, seed = run.latest, _esc(run.result["seed"])
    brought = f"{_rate(_rate_in(figures))} % at {figures['env_steps']:,}" if figures else "not evaluated yet"
    return f"Seed {seed}: {_esc(run.status)}; {brought}"


def _per_seed(group: Group) -> str:
    best = any(run.result.get("best") for run in group.runs)
    rows = "\n".join(
        _row(
            _esc(run.result["seed"]),
            _rate(_rate_in(run.result["before"])),
            _rate(_rate_in(run.result["after"])) if run.finished else '<span class="status">unfinished</span>',
            _gain(_rate_in(run.result["before"]), _rate_in(run.result["after"])),
            *([_best(run)] if best else []),
            f"{run.result['env_steps']:,}",
            f"{run.result['updates']:,}",
            _duration(run.result["seconds"]),
            f"<code>{_esc(run.path)}</code>",
        )
        for run in group.runs
    )
    more = ("best evaluation",) if best else ()
    head = ("seed", "SFT", "POCO", "gain", *more, "env steps", "updates", "wall time", "folder")
    summary = "each seed" if len(group.runs) > 1 else "the run"
    return f"""<details><summary>{summary}</summary><div class="wide"><table class="plain seeds">
<thead><tr>{"".join(f"<th>{name}</th>" for name in head)}</tr></thead><tbody>
{rows}
</tbody></table></div></details>"""


def _best(run: Run) -> str:
    """The highest of its evaluations, whose policy is kept: picked after the fact, so above what it will do again."""
    best = run.result.get("best")
    return f"{_rate(_rate_in(best))} at {short(best['env_steps'])}" if best else "-"


def _rate_in(figures: Mapping[str, Any] | None) -> Rate | None:
    """The rate of an evaluation."""
    return (figures["success_rate"], *figures["interval_95"]) if figures else None


def _dot(name: str) -> str:
    return (
        f'<svg class="dot" viewBox="0 0 12 12" aria-hidden="true"><circle cx="6" cy="6" r="4.5" class="{name}"/></svg>'
    )


def _dumbbell(before: Rate | None, after: Rate | None) -> str:
    """SFT and POCO with their intervals on one axis from 0 to 100 %."""
    if before is None or after is None:
        return "-"

    def mark(rate: Rate, y: int, radius: float, name: str) -> str:
        mean, low, high = (6 + 108 * value for value in rate)
        line = f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" class="{name}"/>'
        return f'{line}<circle cx="{mean:.1f}" cy="{y}" r="{radius}" class="{name}"/>'

    said = f"from {_percent(before[0])} to {_percent(after[0])} %"
    return f"""<svg class="dumbbell" viewBox="0 0 120 24" role="img" aria-label="{said}">
<line x1="6" x2="114" y1="12" y2="12" class="axis"/>
{mark(before, 7, 3.5, "before")}{mark(after, 17, 4.0, "after")}</svg>"""


# -- one section per group ------------------------------------------------------------------------------------------


def _section(number: int, group: Group, videos: Videos) -> str:
    return f"""<section id="g{number}" class="group">
<h2>{_esc(group.task)}</h2>
<p class="setting">{_esc(group.name)}</p>
{_tiles(group)}
{_curve(group)}
{_metrics(group)}
{_videos(group, videos)}
{_settings(group)}
{_commands(group)}
</section>"""


def _tiles(group: Group) -> str:
    before, after = rate_of(group, "before"), rate_of(group, "after")
    if not group.finished:
        return "".join(f'<p class="status">{_status(run)}</p>' for run in group.runs)
    if before is None or after is None:
        return '<p class="note">No evaluations: this run only imitated, or had no environment to act in.</p>'
    demonstrations = (group.runs[0].result.get("demonstrations") or {}).get("steps")
    tiles = {
        "after SFT" if _imitated(group) else "untrained": f"{_percent(before[0])}<small> %</small>",
        "after POCO": f"{_percent(after[0])}<small> %</small>",
        "gain": f"{_gain(before, after)}<small> points</small>",
        "environment steps": short(round(group.env_steps, -2 if group.env_steps > 1000 else 0)),
        **({"steps of offline data": f"{demonstrations:,}"} if isinstance(demonstrations, int) else {}),
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items())
    return f'<dl class="tiles">{items}</dl>'


def _curve(group: Group) -> str:
    if curve_of(group) is None:
        return ""
    return f"""<figure><h3>Success rate against environment steps</h3>
<div class="on-wide" aria-label="learning curve">{curve_svg(group, width=1016, height=400)}</div>
<div class="on-narrow" aria-label="learning curve">{curve_svg(group, width=364, height=300)}</div>
<figcaption>{_key(group)}</figcaption></figure>
{_published(group)}"""


def _key(group: Group) -> str:
    """What the lines of the learning curve are."""
    curve, others = curve_of(group), published(group.task)
    assert curve is not None
    single = len(group.runs) == 1
    said = [
        _swatch("poco", f"POCO{'' if single else ', mean over seeds'}; band: {curve.label}"),
        _swatch("thin", f"training episodes, average of {WINDOW}" if single else "single seeds"),
    ]
    if group.unfinished and not single:
        said.append(_swatch("thin dotted", UNFINISHED))
    if group.warmup_steps:
        said.append(_swatch("shade", f"critic warm-up, actor frozen ({group.warmup_steps:,} steps)"))
    said += [_swatch(f"dashed {NAMED[method]}", f"{method}, published") for method in others if method in NAMED]
    if rest := [method for method in others if method not in NAMED]:
        said.append(_swatch("dashed rest", f"{', '.join(rest)}, published"))
    return "".join(said)


def _swatch(kind: str, words: str) -> str:
    return f'<span class="key"><i class="{kind}"></i>{_esc(words)}</span>'


def _published(group: Group) -> str:
    others = published(group.task)
    if not others:
        return ""
    last = next(iter(others.values())).steps[-1]
    end = min(group.env_steps, last)
    rows = "\n".join(
        _row(
            _esc(method),
            *(f"{_percent(curve.at(step))}" for step in (0, end)),
            _rate((float(curve.mean[-1]), float(curve.low[-1]), float(curve.high[-1]))),
        )
        for method, curve in others.items()
    )
    task = next(iter(others.values())).label
    ours = "Ours begins where imitation (SFT) ended." if _imitated(group) else "Ours begins as those two do."
    head = "".join(
        f"<th>{name}</th>" for name in ("method", "at 0", f"at {short(round(end, -2))}", f"at {short(last)} [95 %]")
    )
    return f"""<p class="note published"><strong>The settings differ; compare shapes, not winners.</strong>
Published runs are of <code>{_esc(task)}</code>. All but RLPD and RLPD-AC were trained offline for 1M steps before
step 0; those two start from nothing, with the offline data in their replay. {ours}
Data, rewards, episode limits and networks may differ, too.
Published points lie 100k steps apart.</p>
<details><summary>published figures</summary><table class="plain figures"><thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody></table></details>"""


def _imitated(group: Group) -> bool:
    """Whether the policies had learned from demonstrations before they acted."""
    config = group.runs[0].config
    return bool(config.get("sft_steps", 1)) or config.get("policy") is not None


def _metrics(group: Group) -> str:
    drawn = {title: svg for name, title in METRICS.items() if (svg := metric_svg(group, name))}
    if not drawn:
        return ""
    axis = "environment steps" if group.env_steps else "updates"
    small = "\n".join(f"<figure><h4>{title}</h4>{svg}</figure>" for title, svg in drawn.items())
    return f"""<h3>While it trained</h3>
<p class="note">Against {axis}, one line per seed, each point an average over a 120th of the run at most.</p>
<div class="metrics">
{small}
</div>"""


# -- videos ---------------------------------------------------------------------------------------------------------


def _chosen_videos(groups: Sequence[Group], budget: int) -> Videos:
    """The videos there are, read as long as `budget` bytes last: every group's first seed comes before any second."""
    tiers = zip_longest(*(group.runs for group in groups))
    runs = [run for tier in tiers for run in tier if run is not None]
    chosen: dict[Path, bytes | None] = {}
    for path in (run.path / f"{name}.mp4" for run in runs for name in VIDEOS):
        if path.is_file():
            size = path.stat().st_size
            chosen[path] = path.read_bytes() if size <= budget else None
            budget -= size if size <= budget else 0
    return chosen


def _videos(group: Group, videos: Videos) -> str:
    shown_runs = [_run_videos(run, videos) for run in group.runs]
    shown_runs = [text for text in shown_runs if text]
    if not shown_runs:
        return ""
    first, rest = shown_runs[0], shown_runs[1:]
    more = f"<details><summary>videos of the other seeds</summary>{''.join(rest)}</details>" if rest else ""
    return f"<h3>Episodes</h3>\n{first}\n{more}"


def _run_videos(run: Run, videos: Videos) -> str:
    """A run's videos; empty where it has none."""
    paths = {run.path / f"{name}.mp4": words for name, words in VIDEOS.items()}
    seed = run.result["seed"]
    here = {path: words for path, words in paths.items() if path in videos}
    if not here:
        return ""
    figures = "".join(_video(data, f"Seed {seed}: {words}") for p, words in here.items() if (data := videos[p]))
    left = [words for path, words in here.items() if videos[path] is None]
    lacking = [words for path, words in paths.items() if path not in here]
    notes = [
        *([f"Left out to keep this page small: {'; '.join(left)} ({_esc(run.path)})."] if left else []),
        *([f"Seed {_esc(seed)} has no video of: {'; '.join(lacking)}."] if lacking else []),
    ]
    note = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
    return f'<div class="videos">{figures}</div>{note}'


def _video(data: bytes, caption: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f"""<figure><video controls muted loop playsinline preload="metadata" aria-label="{_esc(caption)}"
src="data:video/mp4;base64,{encoded}"></video><figcaption>{_esc(caption)}</figcaption></figure>"""


# -- settings and commands ------------------------------------------------------------------------------------------


def _settings(group: Group) -> str:
    run, usual = group.runs[0], defaults()
    if not run.config:
        return '<h3>Settings</h3><p class="note">The run has no config.json.</p>'
    own = {"seed", "output_dir", "resume"}
    rows = "\n".join(
        _row(_name(n), _value(v), _value(usual[n]) if n in usual else "-")
        for n, v in run.differences.items()
        if n not in own
    )
    every = "\n".join(_row(_name(name), _value(value)) for name, value in run.config.items())
    return f"""<h3>Settings</h3>
<div class="wide"><table class="plain"><thead><tr><th>not the default</th><th>value</th><th>default</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>
<details><summary>all settings{"" if len(group.runs) == 1 else f" (seed {_esc(run.result['seed'])})"}</summary>
<div class="wide"><table class="plain"><tbody>
{every}
</tbody></table></div></details>"""


def _name(name: str) -> str:
    """A setting's dotted name, which may break after a dot or an underscore on a narrow screen."""
    return f"<code>{_esc(name).replace('.', '.<wbr>').replace('_', '_<wbr>')}</code>"


def _value(value: object) -> str:
    return f"<code>{_esc(shown(value))}</code>"


def _commands(group: Group) -> str:
    run = group.runs[0]
    command = train_command(run)
    again = _folded(command) if command else _train_snippet(run)
    parts = [f"<p>Train again (seed {_esc(run.result['seed'])}):</p>{_code(again)}"]
    if run.result["after"] and (command := eval_command(run.path)):
        parts.append(f"<p>Evaluate its policy with LeRobot:</p>{_code(_folded(command))}")
    return f"<h3>Commands</h3>\n{''.join(parts)}"


def _folded(command: str) -> str:
    """A command line with each option on a line of its own, as a shell takes it."""
    words = [shlex.quote(word) for word in shlex.split(command)]
    return " ".join(f"\\\n  {word}" if word.startswith("--") else word for word in words)


def _train_snippet(run: Run) -> str:
    """For a run that does not tell which recipe began it: its config.json does."""
    return f"""import json
from dataclasses import replace
from pathlib import Path
from poco_vla.config import TrainConfig, from_json
from poco_vla.training import train

config = from_json(TrainConfig, json.loads(Path({str(run.path / "config.json")!r}).read_text()))
train(replace(config, output_dir=Path("runs/again")))"""


def _code(text: str) -> str:
    return f'<pre tabindex="0"><code>{_esc(text)}</code></pre>'


def _footer(groups: Iterable[Group]) -> str:
    credit = f"<p>Published curves: {_esc(source())}</p>" if any(published(group.task) for group in groups) else ""
    return f"""<footer>
<p>Written by poco_vla, POCO for vision-language-action policies (arXiv 2604.01860). Seeds are brought onto one grid by
straight lines between their own evaluations and never beyond the shortest run. Bootstrap: 10,000 draws, fixed seed.</p>
{credit}
</footer>"""


# -- small parts ----------------------------------------------------------------------------------------------------


def _esc(value: object) -> str:
    return html.escape(str(value))


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f}"


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return "-"
    mean, low, high = (_percent(value) for value in rate)
    return f'{mean} <span class="interval">[{low}, {high}]</span>'


def _gain(before: Rate | None, after: Rate | None) -> str:
    return "-" if before is None or after is None else f"{100 * (after[0] - before[0]):+.0f}"


def _duration(seconds: float | int) -> str:
    """5:36, or 1:02:03 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
