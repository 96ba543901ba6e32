"""Options of an algorithm in POCO's place: sizes as the recipe's POCO has them, all else its authors'."""

import runpy
from dataclasses import fields, replace
from pathlib import Path

import pytest

from poco_vla.algorithms import available_algorithms, load_algorithm, options_of, with_algorithm
from poco_vla.cli.configuration import parse_config
from poco_vla.config import EnvSpec, OptimConfig, PocoConfig, TrainConfig

RECIPES = Path(__file__).parents[2] / "recipes"
OTHERS = [name for name in available_algorithms() if name != "poco"]


def recipe(name):
    return runpy.run_path(str(RECIPES / f"{name}.py"))


@pytest.mark.parametrize("name", OTHERS)
def test_every_network_that_an_algorithm_adds_has_the_size_of_the_recipes_critic(name):
    options = options_of(with_algorithm(recipe("mlp_cube")["config"](), name))
    widths = {one.name: getattr(options, one.name) for one in fields(options) if one.name.endswith("hidden")}
    assert set(widths.values()) <= {(128, 128, 128)}
    assert bool(widths) == (name != "bc")


@pytest.mark.parametrize("name", OTHERS)
def test_a_recipe_of_the_papers_size_leaves_the_authors_values(name):
    plain = TrainConfig(env=EnvSpec())
    chosen = with_algorithm(plain, name)
    assert chosen.algorithm_options == {}
    rates = load_algorithm(name).learning_rates
    assert (chosen.optim.actor_lr, chosen.optim.critic_lr) == (rates or (3e-4, 3e-4))


def test_candidates_are_divided_as_pocos_are_and_what_means_the_same_is_the_recipes():
    small = TrainConfig(
        env=EnvSpec(), poco=PocoConfig(num_candidates=8, gamma=0.9, tau=0.02, anchor="demos", aggregation="min")
    )
    options = {name: with_algorithm(small, name).algorithm_options for name in OTHERS}
    shared = {"gamma": 0.9, "tau": 0.02}
    of_pair = shared | {"aggregation": "min"}
    assert options["qc"] == of_pair | {"anchor": "demos", "num_candidates": 8}
    assert options["qc_fql"] == options["fql"] == of_pair | {"anchor": "demos"}
    assert options["dsrl"] == options["rlpd"] == of_pair
    assert options["expo"] == of_pair | {"num_candidates": 2}
    assert options["rlpd_ac"] == shared, "the mean of ten critics is no clipped pair"
    assert options["mpo"] == {"gamma": 0.9, "num_candidates": 5}, "its tau is of a step at every 100th update"
    assert options["bc"] == options["reinflow"] == options["dppo"] == options["vmpo"] == {}


def test_learning_rates_of_ppo_are_multiplied_as_pocos_are_and_sft_keeps_the_recipes():
    config = TrainConfig(
        env=EnvSpec(), optim=OptimConfig(actor_lr=6e-4, critic_lr=9e-4, actor_lr_end=3e-4, batch_size=64)
    )
    chosen = with_algorithm(config, "reinflow")
    assert chosen.algorithm_options == {"minibatch": 64}
    optim = chosen.optim
    assert (optim.actor_lr, optim.critic_lr) == pytest.approx((9e-5, 1.95e-3))
    assert (optim.actor_lr_end, optim.sft_lr) == pytest.approx((4.5e-5, 6e-4))
    assert with_algorithm(config, "qc").optim == config.optim


def test_authors_values_for_a_task_come_before_their_usual_ones():
    found = recipe("mlp_lift")
    chosen = parse_config(found["config"](), ["--algorithm", "qc"], authors=found["AUTHORS"])
    assert chosen.algorithm_options["num_candidates"] == 4
    chosen = parse_config(found["config"](), ["--algorithm", "qc_fql", "--qc-fql.tau", "0.5"], authors=found["AUTHORS"])
    assert (chosen.algorithm_options["alpha"], chosen.algorithm_options["tau"]) == (10_000.0, 0.5)


@pytest.mark.parametrize("name", OTHERS)
def test_authors_values_of_recipes_are_options_of_the_algorithms(name):
    for path in sorted(RECIPES.glob("mlp_*.py")):
        authors = recipe(path.stem).get("AUTHORS", {})
        assert set(authors) <= set(available_algorithms())
        options_of(with_algorithm(recipe(path.stem)["config"](), name, authors.get(name, {})))


def test_a_short_run_has_ten_rollouts_unless_their_length_is_given():
    config = TrainConfig(env=EnvSpec(num_envs=4), algorithm="reinflow", online_steps=4_000, horizon=5)
    kind = load_algorithm("reinflow")
    assert kind.fit(config).algorithm_options == {"rollout_steps": 20}
    assert kind.fit(replace(config, online_steps=200_000)).algorithm_options == {}
    given = replace(config, algorithm_options={"rollout_steps": 50})
    assert kind.fit(given).algorithm_options == {"rollout_steps": 50}


def test_help_shows_the_scaled_values(capsys):
    with pytest.raises(SystemExit):
        parse_config(recipe("mlp_cube")["config"](), ["--algorithm", "qc", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--qc.num-candidates" in shown
    assert "(default: 8)" in shown
