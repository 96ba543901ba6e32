"""Options by which a recipe of several runs chooses one of them."""

import pytest

from poco_vla.cli import run_recipe
from poco_vla.cli.choices import choose, described
from poco_vla.config import TrainConfig
from poco_vla.errors import ConfigError, UnknownNameError

CHOICES = {"task": ["lift", "square"], "setting": ["online", "offline"]}


def recipe(task="lift", setting="online"):
    return TrainConfig(policy=f"{task}-{setting}", online_steps=0)


@pytest.mark.parametrize(
    ("words", "policy", "rest"),
    [
        ([], "lift-online", []),
        (["--task", "square"], "square-online", []),
        (["--seeds", "1", "2", "--setting=offline", "--poco.eta", "1"], "lift-offline", "--seeds 1 2 --poco.eta 1"),
        (
            ["--task=square", "--env.task", "x", "--setting", "online", "--smoke"],
            "square-online",
            "--env.task x --smoke",
        ),
        (["--task", "square", "--task", "lift"], "lift-online", []),
    ],
)
def test_a_run_is_chosen_and_the_other_words_stay(words, policy, rest):
    config, left = choose(recipe, CHOICES, words)
    assert config.policy == policy
    assert left == (rest.split() if rest else [])


def test_a_recipe_of_one_run_keeps_its_words():
    config = TrainConfig(online_steps=0)
    assert choose(config, {}, ["--task", "square"]) == (config, ["--task", "square"])


def test_a_mistyped_or_missing_value_is_answered():
    with pytest.raises(UnknownNameError, match=r'no task named "squar".*Did you mean "square"'):
        choose(recipe, CHOICES, ["--task", "squar"])
    for words in (["--task"], ["--task", "--smoke"]):
        with pytest.raises(ConfigError, match="--task needs a value: one of lift, square"):
            choose(recipe, CHOICES, words)


def test_help_lists_the_runs(capsys):
    text = "--task is one of lift, square (default: lift); --setting is one of online, offline (default: online)"
    assert text in described(recipe, CHOICES)
    with pytest.raises(SystemExit):
        run_recipe(recipe, ["--help"], choices=CHOICES)
    assert "--setting is one of online, offline" in " ".join(capsys.readouterr().out.replace("│", " ").split())
