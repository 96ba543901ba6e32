"""The model card of what is pushed: what it is, how it was trained, what it reached, how to load it, on what terms."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from poco_vla.hub.artifact import CRITIC, LOCAL_PATH, OWN_FOLDERS, PLOT, Artifact

PAPER = "https://arxiv.org/abs/2604.01860"
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Licence:
    """On what terms the weights may be used.

    Attributes:
        id: the Hub's name of the licence; "other" goes with the next two.
        name: what it is called.
        link: where it stands.
        terms: what must be said beside it.
        texts: files in the repository with the base's own text of it.
    """

    id: str | None
    name: str | None = None
    link: str | None = None
    terms: str | None = None
    texts: tuple[str, ...] = ()


def model_card(artifact: Artifact, repo_id: str, licence: Licence) -> str:
    """README.md, with the Hub's table of metadata at its head."""
    sections = (_title, _success, _use, _training, _files, _terms)
    text = "\n\n".join("\n".join(section(artifact, repo_id, licence)) for section in sections)
    return f"---\n{_metadata(artifact, repo_id, licence)}\n---\n\n{text}\n"


def _metadata(artifact: Artifact, repo_id: str, licence: Licence) -> str:
    about = artifact.about
    figures, results = _figures(about), about["results"]
    evaluated = None
    if figures and results["env"]:
        evaluated = [
            EvalResult(
                task_type="robotics",
                task_name=_task(results["env"]),
                dataset_type=results["env"]["type"],
                dataset_name=_task(results["env"]),
                metric_type="success_rate",
                metric_name=f"success rate of {figures['episodes']} episodes",
                metric_value=round(figures["success_rate"], 4),
                metric_args={"interval_95": figures["interval_95"], "seed": results["seed"]},
            )
        ]
    data = ModelCardData(
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        library_name="lerobot" if artifact.form != "head" else "poco-vla",
        pipeline_tag="robotics",
        base_model=artifact.base,
        base_model_relation={"head": "adapter", "peft": "adapter", "policy": "finetune"}[artifact.form]
        if artifact.base
        else None,
        datasets=[name for name in about["datasets"] if _on_hub(name)] or None,
        tags=["robotics", "lerobot", "poco", "reinforcement-learning", "flow-matching", about["adapter"]],
        model_name=repo_id.split("/")[-1] if evaluated else None,
        eval_results=evaluated,
    )
    return data.to_yaml().strip()


def _title(artifact: Artifact, repo_id: str, licence: Licence) -> Iterator[str]:
    about = artifact.about
    base = about["base"]
    yield f"# {repo_id.split('/')[-1]}"
    yield ""
    what = {
        "head": "The trained flow action head",
        "peft": "The trained flow action head, in peft's form,",
        "policy": "A whole LeRobot policy",
    }[artifact.form]
    if about["weights"].get("lora"):
        what = f"A LoRA of rank {about['weights']['lora']['rank']} on the flow action head"
    what += f" of `{about['adapter']}`"
    imitated = bool(about["training"]["sft_steps"])
    if about["results"]["env_steps"]:
        stages = "it imitated demonstrations, then practised" if imitated else "it practised, without imitation before"
        title = title_of(about)
        how = f"trained by {f'[{title}]({PAPER})' if title == 'POCO' else title} with poco_vla: {stages}."
    elif imitated:
        how = "trained on demonstrations with poco_vla; it has not practised."
    else:
        how = "as it was loaded: poco_vla has trained it neither on demonstrations nor by practice."
    if base is None and artifact.derived:
        yield f"{what}, {how} It derives from a base model that is not at the Hub."
    elif base is None and about.get("started_from") == "policy":
        yield f"{what}, {how} Training began with another policy's weights, whose origin is unknown here."
    elif base is None:
        yield f"{what}, {how} It has no base model: training began with random weights."
    elif artifact.form == "policy":
        yield f"{what}, {how} It derives from [{base['id']}]({HUB}/{base['id']})."
    else:
        yield (
            f"{what}, {how} It belongs on [{base['id']}]({HUB}/{base['id']}) at commit `{base['revision']}`, which is "
            "not in this repository and is fetched from its own."
        )


def _success(artifact: Artifact, repo_id: str, licence: Licence) -> Iterator[str]:
    results = artifact.about["results"]
    yield "## Success"
    yield ""
    if not results["before"]:
        yield "Not measured: the run had no environment to evaluate in."
        return
    env = results["env"]
    yield f"Task: `{_task(env)}` (environment type `{env['type']}`)." if env else "Task: unknown."
    yield ""
    yield "| Policy | success | 95 % interval | episodes | environment steps |"
    yield "|---|---|---|---|---|"
    practised, title = bool(results["env_steps"]), title_of(artifact.about)
    first = "supervised fine-tuning" if artifact.about["training"]["sft_steps"] else "weights as they were loaded"
    yield _row(f"before: {first}" if practised else first, results["before"])
    if practised and results["which"] == "best":
        yield _row(f"after: {title}, best evaluation", results["best"])
    elif practised:
        yield _row(f"after: {title}", results["after"])
    yield ""
    yield from _task_rows(results["before"], _figures(artifact.about))
    from poco_vla.report.commands import acting_note  # its package loads pandas

    note = acting_note(artifact.about)
    samples = f"Before: plain samples; after: as {title} acts" if note else "Plain samples"
    yield f"{samples}, chunks executed open loop, Wilson's intervals; one training run, seed {results['seed']}."
    if note:
        yield note
    if results["which"] == "best":
        yield (
            f"This is the best of {results['evaluations']} evaluations, picked after the fact: expect somewhat less."
        )
    if (artifact.folder / PLOT).exists():
        yield ""
        yield f"![Success against environment steps]({PLOT})"


def _task_rows(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a table of a suite's tasks; nothing for a single task."""
    if not before.get("tasks"):
        return
    yield "The figures above are means over the suite's tasks:"
    yield ""
    yield "| Task | before | 95 % interval | after | 95 % interval |"
    yield "|---|---|---|---|---|"
    for name, one in before["tasks"].items():
        cells = []
        for figures in (one, (after or {}).get("tasks", {}).get(name)):
            low, high = figures["interval_95"] if figures else (0, 0)
            cells += [f"{figures['success_rate']:.0%}", f"{low:.0%} to {high:.0%}"] if figures else ["-", "-"]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def _row(name: str, figures: Mapping[str, Any]) -> str:
    low, high = figures["interval_95"]
    return (
        f"| {name} | {figures['success_rate']:.0%} | {low:.0%} to {high:.0%} | {figures['successes']} of "
        f"{figures['episodes']} | {figures['env_steps']:,} |"
    )


def _use(artifact: Artifact, repo_id: str, licence: Licence) -> Iterator[str]:
    from poco_vla.report.commands import lerobot_eval  # its package loads pandas

    about = artifact.about
    distribution = about["adapter_distribution"] or {"name": about["adapter"]}
    yield "## Use"
    yield ""
    yield f"With `poco-vla` and `{distribution['name']}` installed:"
    yield ""
    yield "```python"
    yield "from poco_vla import load_head, propose"
    yield ""
    yield f'policy = load_head("{repo_id}")'
    yield "prefix = policy.encode(policy.example_obs(1))  # yours: policy.encode(policy.preprocess(observation))"
    yield "chunk = policy.postprocess(propose(policy, prefix, 1)[:, 0, :, : policy.spec.action_dim])"
    yield "```"
    yield ""
    peft = " --form peft" if artifact.form == "peft" else ""
    export, path = f"`poco-vla export {repo_id} FOLDER{peft}`", "FOLDER"
    own = [name for name in OWN_FOLDERS if (artifact.folder / name).is_dir()]
    if artifact.form == "head":
        yield f"LeRobot's commands take a whole policy, which {export} makes of this head and its base:"
    elif own:
        yield (
            f"LeRobot's commands look for the {' and the '.join(own)} in this repository by a path on their machine, "
            f"which {export} writes:"
        )
    else:
        yield "LeRobot's commands take it as it is:"
        path = repo_id
    yield ""
    results = about["results"]
    if results["env"] is None:
        yield "The run had no environment: which one suits it is unknown. `lerobot-eval` takes it with"
        yield f"`--policy.path={path}` and the `--env.*` arguments of yours."
    else:
        figures = _figures(about) or results["before"] or {"episodes": 50}
        arguments, episodes = results["lerobot_arguments"], figures["episodes"] // max(1, len(figures.get("tasks", ())))
        command = lerobot_eval(path, results["env"], arguments=arguments, episodes=episodes)
        if command is None:
            yield "The run's own script registered its environment type, which LeRobot's commands do not find."
        else:
            yield from ("```bash", command, "```")
        if local := [name for name, value in results["env"]["options"].items() if value == LOCAL_PATH]:
            yield ""
            yield f"In the place of `{LOCAL_PATH}` ({', '.join(local)}) goes a path of your machine."
    if artifact.form == "peft":
        yield ""
        yield (
            f"LeRobot 0.6.1 takes the base's newest commit where `load_head` takes `{about['base']['revision'][:12]}`, "
            "and notices no difference."
        )


def _training(artifact: Artifact, repo_id: str, licence: Licence) -> Iterator[str]:
    about = artifact.about
    training, algorithm, results = about["training"], about["algorithm"], about["results"]
    datasets = ", ".join(f"[{n}]({HUB}/datasets/{n})" for n in about["datasets"] if _on_hub(n))
    steps = results["demonstration_steps"]
    optim = training["optim"]
    rows = {
        "demonstrations": (datasets or _data(about)) + (f", {steps:,} steps" if steps else ""),
        "supervised fine-tuning": f"{training['sft_steps']:,} updates",
        "critic warm-up": f"{training['warmup_steps']:,} updates",
        "online": f"{results['env_steps']:,} environment steps, {results['updates']:,} updates in all",
        **_options(algorithm, about["horizon"]),
        "batch, learning rates": f"{optim['batch_size']}, actor {optim['actor_lr']:g}, critic {optim['critic_lr']:g}",
        "device, time": f"{results['device']}, {results['seconds'] / 60:,.0f} min",
    }
    if about["versions"]:
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    yield "## Training"
    yield ""
    yield "| | |"
    yield "|---|---|"
    for name, value in rows.items():
        yield f"| {name} | {value} |"
    yield ""
    yield "`poco.json` holds every setting, the statistics of the data, and these figures for programs."


def _files(artifact: Artifact, repo_id: str, licence: Licence) -> Iterator[str]:
    weights = artifact.about["weights"]
    yield "## Files"
    yield ""
    yield f"- `{weights['file']}`, SHA-256 `{weights['sha256']}`, checked by `load_head`."
    yield "- `config.json`, `policy_preprocessor*`, `policy_postprocessor*`: LeRobot's configuration and processors."
    if (artifact.folder / CRITIC).exists():
        yield f"- `{CRITIC}`: the chunk critic and its target (`load_critic`), for those who go on training."


def _terms(artifact: Artifact, repo_id: str, licence: Licence) -> Iterator[str]:
    yield "## Licence"
    yield ""
    called = f"{licence.name or licence.id}" if licence.id else None
    if artifact.base is None:
        yield f"{called}." if called else "None was stated: ask whoever trained it."
        if licence.terms:
            yield licence.terms
        return
    link = f"[{called}]({licence.link})" if licence.link else called
    yield f"Inherited from the base model [{artifact.base}]({HUB}/{artifact.base}): {link}."
    if licence.texts:
        yield f"Its text: {', '.join(f'[{name}]({name})' for name in licence.texts)}."
    if licence.terms:
        yield licence.terms


def _data(about: Mapping[str, Any]) -> str:
    """Return what is known of demonstrations that have no page at the Hub."""
    told = about.get("demonstrations") or {"origin": "unknown", "name": None}
    made = about["training"]["demonstrations"]
    if told["origin"] == "script" and made:
        return f"{made['episodes']} episodes of the simulator's script ({made['kind']})"
    if told["origin"] in ("folder", "hub"):
        named = f' that its user calls "{told["name"]}"' if told["name"] else ""
        return f"a dataset{named}, of unknown origin"
    return "unknown"


def _task(env: Mapping[str, Any]) -> str:
    """Return the task's name; its environment type's where it has none."""
    return str(env["task"] or env["type"])


def title_of(about: Mapping[str, Any]) -> str:
    """Return the name of the algorithm that trained what a poco.json tells of."""
    name = about["algorithm"]["name"]
    return about.get("title") or ("POCO" if name == "poco" else name)


def _figures(about: Mapping[str, Any]) -> Mapping[str, Any] | None:
    results = about["results"]
    return results["best"] if results["which"] == "best" else results["after"]


def _options(algorithm: Mapping[str, Any], horizon: int) -> dict[str, str]:
    """Return the rows about what trained the policy: POCO's in the paper's symbols, another one's options by name."""
    if "eta" not in algorithm:
        options = ", ".join(f"{name} {value}" for name, value in algorithm.items() if name != "name")
        return {"algorithm": f"{algorithm['name']}{f' ({options})' if options else ''}", "chunk H": str(horizon)}
    return {
        "chunk H, candidates N": f"{horizon}, {algorithm['num_candidates']}",
        "eta, beta, zeta, gamma": ", ".join(_short(algorithm[name]) for name in ("eta", "beta", "zeta", "gamma")),
    }


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _on_hub(name: str | None) -> bool:
    """Return True if a dataset's id is one of the Hub; datasets made on the spot are called "local/..."."""
    return bool(name) and name.count("/") == 1 and not name.startswith("local/")
