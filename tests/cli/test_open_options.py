"""Options of a command line: whatever --help lists can be set, in every form; names that do not exist are answered."""

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from pointmass_run import small

from poco_vla.cli import main, run_recipe
from poco_vla.cli.configuration import parse_config
from poco_vla.cli.option_values import read_options
from poco_vla.cli.options import Option
from poco_vla.cli.program import _command
from poco_vla.config import DemonstrationConfig, EnvSpec, TrainConfig, to_json
from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.hints import fits, kind_of, metavar_of
from poco_vla.registry import check_options, load_adapter

RECIPES = Path(__file__).parents[2] / "recipes"
ONE_PER_ADAPTER = ["mlp_cube", "pi05_pick_pen", "smolvla_pick_pen", "groot_pick_pen"]
MAPPING = {"STATE": "IDENTITY", "ACTION": "MIN_MAX"}
VALID = {
    "adapter": "flow_mlp",
    "algorithm": "bc",
    "optim.micro-batch": "None",
    "demonstrations.kind": "expert",
    "env.num-envs": "7",
    "env.type": "robosuite",
    "guard.window": "60",
    "guard.least": "6",
    "interaction.mode": "asynchronous",
    "memory": "24GB",
    "poco.zeta": "auto",
    "prefixes.folder": "None",
    "policy-options.normalization-mapping": '{"STATE":"MEAN_STD"}',
}
"""Values of options for which the one made from its kind would be refused, or say nothing."""
BY_KIND = {"INT": "7", "FLOAT": "0.25", "STR": "word", "PATH": "a/folder", "JSON": '{"name":"x"}'}


def config_of(name):
    return runpy.run_path(str(RECIPES / f"{name}.py"))["config"]()


def parsed(config, *words):
    return parse_config(config, words)


def listed(ask, capsys, monkeypatch):
    """Flags that a --help lists, with the kind of value that stands beside each."""
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit):
        ask()
    text = capsys.readouterr().out
    found = re.findall(
        r"^\W{2,3}(--[a-z][\w.-]+)(?:, (--[\w.-]+))?(?: (\S.*?))?(?: {2}.*| │)?$", text, flags=re.MULTILINE
    )
    return [(flag, negative, kind) for flag, negative, kind in found if flag != "--help"]


def value_for(flag, kind, config):
    """Words that are valid for an option, by the kind that --help shows; a number's default is valid in any case."""
    name = flag.removeprefix("--")
    default = put(config, flag)
    if name not in VALID and kind.removeprefix("{None}|") in ("INT", "FLOAT") and default is not None:
        return [str(default + 1 if "INT" in kind else default)]
    if name in VALID:
        return [VALID[name]]
    if choices := re.search(r"\{(\w+(?:,\w+)+)\}", kind):
        return [choices[1].split(",")[0]]
    if several := re.search(r"(\w+) \[\1 \.\.\.\]|\[(\w+) \[", kind):
        return [BY_KIND[several[1] or several[2]]] * 2
    return [BY_KIND[re.sub(r"\{None\}\|", "", kind).split("|")[0]]]


def put(config, flag):
    """The value of a configuration at the place that a flag names."""
    values = config if isinstance(config, dict) else to_json(config)
    for name in flag.removeprefix("--").lower().split("."):
        values = {key.replace("_", "-").lower(): value for key, value in (values or {}).items()}.get(name)
    return values


def agrees(value, words):
    """True if a value is what the words say; a mapping keeps names that they leave out."""
    if isinstance(value, dict):
        return json.loads(words[0]).items() <= value.items()
    found = [str(item) for item in (value if isinstance(value, list) else [value])]
    return found == words or [word.lower() for word in found] == words


@pytest.mark.parametrize("recipe", ONE_PER_ADAPTER)
def test_every_option_that_a_recipe_lists_can_be_set(recipe, capsys, monkeypatch):
    """All at once through the parser that the recipe runs; what comes out is what was given."""
    config = config_of(recipe)
    flags = listed(lambda: run_recipe(config, ["--help-all"]), capsys, monkeypatch)
    assert len(flags) > 90
    open_fields = {"policy-options": config.policy_options, "env.options": config.env.options if config.env else {}}
    own = {f"--{prefix}.{name}".replace("_", "-") for prefix, options in open_fields.items() for name in options}
    assert own <= {flag for flag, _, _ in flags}
    given = {flag: value_for(flag, kind, config) for flag, negative, kind in flags if not negative}
    switches = {flag: negative for flag, negative, _ in flags if negative}
    for chosen in apart(given):
        more = () if "--algorithm" in chosen else switches  # some are of the algorithm that the recipe has
        found = parsed(config, *(word for flag, words in chosen.items() for word in (flag, *words)), *more)
        for flag, words in chosen.items():
            assert agrees(put(found, flag), words), flag
    assert [flag for flag in switches if put(found, flag) is not True] == []
    assert [flag for flag in switches if put(parsed(config, *switches.values()), flag) is not False] == []


def apart(given):
    """Options of adapter and environment, the algorithm, and the others: another one of these has other options."""
    own = {
        flag: words
        for flag, words in given.items()
        if flag.startswith(("--policy-options.", "--bc.", "--env.options."))
    }
    others = {flag: words for flag, words in given.items() if flag not in own}
    algorithm = {flag: others.pop(flag) for flag in ("--algorithm",) if flag in others}
    return [own, algorithm, others]


@pytest.mark.parametrize("verb", [["train"], ["data", "make"]])
def test_every_option_that_a_verb_lists_can_be_set(verb, capsys, monkeypatch):
    flags = listed(lambda: main([*verb, "--help-all"]), capsys, monkeypatch)
    default = _command(verb)
    default = default.config if verb == ["train"] else default.source.demonstrations
    given = {flag: value_for(flag, kind, default) for flag, negative, kind in flags if not negative}
    for chosen in apart(given):
        command = _command([*verb, *(word for flag, words in chosen.items() for word in (flag, *words))])
        found = to_json(command.config if verb == ["train"] else command.source)
        found |= found.get("demonstrations") or {} if verb != ["train"] else {}
        for flag, words in chosen.items():
            assert agrees(put(found, flag), words), flag


@pytest.mark.parametrize("recipe", ONE_PER_ADAPTER)
def test_open_options_may_be_written_in_every_form(recipe):
    """Dotted, =, underscores, upper case, JSON of one option and JSON of all."""
    config = config_of(recipe)
    for prefix, options in (("policy-options", config.policy_options), ("env.options", config.env.options)):
        for name, value in options.items():
            text, dashed = json.dumps(value), name.replace("_", "-")
            forms = [
                [f"--{prefix}.{dashed}", text],
                [f"--{prefix}.{dashed}={text}"],
                [f"--{prefix.replace('-', '_')}.{name}", text],
                [f"--{prefix}.{dashed.upper()}", text],
                [f"--{prefix}.{dashed}", *map(str, value)] if isinstance(value, list) else [],
                [f"--{prefix}", json.dumps({name: value})],
                [f"--{prefix}", json.dumps({dashed.upper(): value})],
            ]
            for form in forms:
                assert parsed(config, *form) == config, form


@pytest.mark.parametrize(
    ("words", "mapping"),
    [
        (["--policy-options.normalization-mapping.STATE", "MEAN_STD"], MAPPING | {"STATE": "MEAN_STD"}),
        (["--policy-options.normalization-mapping.state=mean_std"], MAPPING | {"STATE": "MEAN_STD"}),
        (["--policy_options.normalization_mapping.ENV", "MIN_MAX"], MAPPING | {"ENV": "MIN_MAX"}),
        (["--policy-options.normalization-mapping", '{"STATE": "MEAN_STD"}'], MAPPING | {"STATE": "MEAN_STD"}),
        (["--policy-options", '{"normalization_mapping": {"env": "min_max"}}'], MAPPING | {"ENV": "MIN_MAX"}),
    ],
)
def test_a_name_within_an_option_is_put_there_and_its_neighbours_stay(words, mapping):
    found = parsed(config_of("mlp_cube"), *words)
    assert found.policy_options["normalization_mapping"] == mapping
    assert set(found.policy_options) == {"hidden_dims", "num_inference_steps", "normalization_mapping"}


def test_a_mapping_that_a_recipe_does_not_have_is_made():
    found = parsed(config_of("pi05_pick_pen"), "--policy-options.normalization-mapping.ACTION", "mean_std")
    assert found.policy_options == {"dtype": "bfloat16", "normalization_mapping": {"ACTION": "MEAN_STD"}}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy-options.clip"], "--policy-options.clip needs a value"),
        (["--policy-options.hidden-dims", "wide"], "takes a list, each item a whole number, such as [128, 128, 128]"),
        (["--policy-options.hidden-dims.x", "3"], "which has no names in it"),
        (["--policy-options.num-inference-steps", "2.5"], "takes a whole number, such as 5, not 2.5"),
        (["--policy-options.normalization-mapping", "MEAN_STD"], 'takes a JSON object, such as {"STATE"'),
        (["--policy-options.activation", "tanh"], 'takes one of silu, gelu, such as "silu", not tanh'),
        (["--policy-options", "MEAN_STD"], "one option alone is --policy-options.NAME VALUE"),
    ],
)
def test_a_value_of_another_kind_is_refused(words, said):
    with pytest.raises(ConfigError) as error:
        parsed(config_of("mlp_cube"), *words)
    assert said in str(error.value)


def test_values_keep_their_kind():
    """A text stays a text; true, null and numbers are read where no default says otherwise; a flag alone is true."""
    found, rest = read_options(
        ["--x.name", "12", "--x.on", "--x.rate", "-1", "--x.new", "null", "--x.no-off", "--seed", "3"],
        "x",
        {"name": "a", "on": False, "off": True, "rate": 0.5},
    )
    assert (found, rest) == ({"name": "12", "on": True, "off": False, "rate": -1, "new": None}, ["--seed", "3"])


def test_names_in_a_json_object_that_no_default_has_stay_as_they_are():
    """Have options under an option, as the groot adapter's `embodiment` does."""
    table = {"front-cam": [1, {"A-b": 2}], "Front_Cam": None, "x.y": {"state-0": 1}}
    found, _ = read_options(["--x.table", json.dumps(table)], "x", {})
    assert found == {"table": table}


def test_the_type_of_an_option_is_what_its_declaration_says():
    """Words are read by it: one word for a list is a list, a number for a text stays as it is written."""
    declared = {
        "names": Option(list[str] | None),
        "rate": Option(float),
        "tag": Option(str | None),
        "slots": Option(dict[str, int]),
        "mode": Option(Literal["a", "b"], "a"),
        "on": Option(bool),
    }
    words = ["--x.names", "front", "--x.tag", "12", "--x.slots.front-cam", "3", "--x.mode=b", "--x.on", "--x.rate", "2"]
    found, _ = read_options(words, "x", {}, lambda: declared)
    assert found == {"names": ["front"], "tag": "12", "slots": {"front_cam": 3}, "mode": "b", "on": True, "rate": 2}
    assert read_options(["--x.tag", "null"], "x", {}, lambda: declared)[0] == {"tag": None}
    for name, word, said in (
        ("slots.front", "wide", "takes a JSON object, not wide"),
        ("mode", "c", "takes one of a, b, such as"),
        ("rate", "true", "takes a number, not true"),
        ("on", "2", "takes true or false, not 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_options([f"--x.{name}", word], "x", {}, lambda: declared)
    with pytest.raises(UnknownNameError, match=r'no option named "rat".*Did you mean "rate"'):
        read_options(["--x.rat", "1"], "x", {}, lambda: declared)


def test_a_type_is_shown_and_said_in_words():
    assert metavar_of(list[int] | None) == "INT [INT ...]|null"
    assert kind_of(Path | str) == "a text"
    assert fits(tuple[float, ...], [1, 0.5])
    assert not fits(list[int], [1, True])


@pytest.mark.parametrize(
    ("given", "policy_options", "env", "seed"),
    [
        (["--policy-options.lora", "16"], {"dtype": "bfloat16", "lora": 16}, None, 0),
        (['--policy-options.lora={"rank": 4}'], {"dtype": "bfloat16", "lora": {"rank": 4}}, None, 0),
        (["--policy-options.lora.rank", "4"], {"dtype": "bfloat16", "lora": {"rank": 4}}, None, 0),
        (["--policy_options.tokenizer_max_length", "9"], {"dtype": "bfloat16", "tokenizer_max_length": 9}, None, 0),
        (["--policy-options.dtype", "float32"], {"dtype": "float32"}, None, 0),
        (["--policy-options", "null"], {}, None, 0),
        (["--adapter=flow_mlp", "--seed", "3"], {}, None, 3),
        (["--policy", "you/base"], {}, None, 0),
        (
            ["--env.type", "pusht", "--env.options.fps", "5"],
            {"dtype": "bfloat16"},
            EnvSpec(type="pusht", task="PushT-v0", options={"fps": 5}),
            0,
        ),
    ],
)
def test_another_adapter_policy_or_environment_begins_without_options(given, policy_options, env, seed):
    config = TrainConfig(adapter="pi05", policy_options={"dtype": "bfloat16"}, env=EnvSpec(options={"image_size": 64}))
    found = parsed(config, *given)
    assert (found.policy_options, found.env, found.seed) == (policy_options, env or config.env, seed)


def test_options_of_an_algorithm_are_typed_and_go_with_it():
    found = parsed(TrainConfig(env=EnvSpec()), "--algorithm", "bc", "--bc.anchor", "demos")
    assert (found.algorithm, found.algorithm_options) == ("bc", {"anchor": "demos"})
    assert parsed(found, "--algorithm", "poco").algorithm_options == {}
    with pytest.raises(UnknownNameError, match='Did you mean "anchor"'):
        parsed(found, "--bc.ancor", "demos")
    with pytest.raises(ConfigError, match='option of algorithm "bc": choose it with --algorithm bc'):
        parsed(TrainConfig(env=EnvSpec()), "--bc.anchor", "demos")
    with pytest.raises(ConfigError, match='option of algorithm "poco", but this run is of "bc"'):
        parsed(found, "--poco.eta", "1")


def test_the_task_is_the_environment_types_own_unless_it_is_given():
    """ogbench's task is none of pusht's."""
    config = config_of("mlp_cube")
    assert parsed(config, "--env.type", "pusht").env == EnvSpec(type="pusht", task="PushT-v0")
    assert parsed(config, "--env.type=pusht", "--env.task", "PushT-v1").env.task == "PushT-v1"
    assert parsed(config, "--env.type", "ogbench").env == config.env
    assert parsed(replace(config, env=None, demonstrations=None, online_steps=0), "--env.type", "robosuite").env == (
        EnvSpec(type="robosuite", task="Lift")
    )
    assert _command(["train", "--env.type", "robosuite"]).config.env.task == "Lift"
    assert _command(["data", "make", "--env.type", "robosuite"]).source.env.task == "Lift"
    with pytest.raises(UnknownNameError, match=r'no environment type named "pushd".*Did you mean "pusht"'):
        parsed(config, "--env.type", "pushd")


def test_an_environment_of_python_has_its_types_own_task():
    from poco_vla.simulators import environment

    assert environment(EnvSpec(type="pusht")).task == "PushT-v0"
    assert environment(EnvSpec()).task == "cube-single-singletask-task1-v0"


def test_demonstrations_can_be_asked_for_where_a_recipe_has_none():
    found = parsed(config_of("pi05_pick_pen"), "--demonstrations.episodes", "5")
    assert found.demonstrations == DemonstrationConfig(episodes=5)


@pytest.mark.parametrize("adapter", ["flow_mlp", "pi05", "smolvla", "groot_n1d6"])
def test_a_mistyped_option_of_an_adapter_is_answered_with_the_right_one(adapter):
    loaded = load_adapter(adapter)
    name = "hidden_dims" if adapter == "flow_mlp" else "normalization_mapping"
    with pytest.raises(UnknownNameError, match=f'option of this adapter .*"{name[:-1]}".*Did you mean "{name}"'):
        check_options(loaded, {name[:-1]: 1}, pretrained=adapter != "flow_mlp")
    with pytest.raises(UnknownNameError, match=r'no kind of feature .*"STAT".*Did you mean "STATE"'):
        check_options(loaded, {"normalization_mapping": {"STAT": "MEAN_STD"}}, pretrained=adapter != "flow_mlp")
    with pytest.raises(UnknownNameError, match=r'normalization of STATE named "MEAN".*Did you mean'):
        check_options(loaded, {"normalization_mapping": {"STATE": "MEAN"}}, pretrained=adapter != "flow_mlp")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--poco.etta", "3"], 'ConfigError: no option named "--poco.etta". Did you mean "--poco.eta"?'),
        (["--sed", "3"], 'no option named "--sed". Did you mean "--seed"?'),
        (["--help-al"], 'Did you mean "--help-all"?'),
        (["--policy-options.hiden-dims", "[8]"], 'Did you mean "hidden_dims"?'),
        (["--env.options.epsiode-length", "8"], 'Did you mean "episode_length"?'),
    ],
)
def test_a_mistyped_option_is_told_before_any_data_are_made(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_recipe(small(tmp_path / "run", tmp_path / "data"), words)
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert len(shown.strip().splitlines()) == 1
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ([], 0),
        (["--interaction.mode", "asynchronous"], 0),
        (["--interaction.mode", "remote"], 200_000),
        (["--interaction.mode", "remote", "--online_steps", "7"], 7),
    ],
)
def test_no_env_leaves_sft_alone_unless_robots_act(words, steps):
    config = parse_config(TrainConfig(env=EnvSpec(), demonstrations=DemonstrationConfig()), ["--no-env", *words])
    assert (config.env, config.demonstrations, config.online_steps) == (None, None, steps)


def test_online_steps_without_anything_to_act_in_are_refused():
    with pytest.raises(ConfigError, match=r"online_steps is 5 but there is no env to act in"):
        parse_config(TrainConfig(env=EnvSpec()), ["--no-env", "--online-steps=5"])
