"""The lerobot-eval lines that a run and a model card print: LeRobot's own parser takes them as they stand."""

import importlib.util
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lerobot.configs import parser
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.envs.factory import make_env
from pointmass import pointmass
from run_folders import write_run

from poco_vla import EnvSpec, TrainConfig, load_adapter
from poco_vla.config import to_json
from poco_vla.files import write_json
from poco_vla.hub.artifact import stage
from poco_vla.hub.card import Licence, model_card
from poco_vla.report import eval_command, read_result
from poco_vla.simulators import environment

OURS = ["--env.discover_packages_path=poco_vla.simulators"]
ENVIRONMENTS = {
    "pusht": (EnvSpec(type="pusht", options={"episode_length": 40, "obs_type": "state"}), []),
    "ogbench": (EnvSpec(options={"episode_length": 120, "cameras": ["front", "wrist"], "image_size": 64}), OURS),
    "third party": (pointmass(options={"episode_length": 9}), ["--env.discover_packages_path=pointmass"]),
}


@pytest.fixture(params=ENVIRONMENTS)
def made(request, tmp_path):
    """A run in an environment, and the environment."""
    env, arguments = ENVIRONMENTS[request.param]
    run = write_run(tmp_path / "run", load_adapter("flow_mlp").tiny(), "flow_mlp")
    write_json(run / "result.json", read_result(run) | {"env": to_json(env), "lerobot_arguments": arguments})
    return run, env


def read_by_lerobot(line, monkeypatch, path=None):
    """Return lerobot-eval's reading of a command line."""
    program, *words = shlex.split(line)
    if program == "python":  # a module that is no package, which LeRobot does not import by itself
        option, code, *words = words
        assert (option, code.split(";")[0]) == ("-c", "import pointmass")
    assert program in ("python", "lerobot-eval")
    words = [f"--policy.path={path}" if path and word.startswith("--policy.path=") else word for word in words]
    monkeypatch.setattr(sys, "argv", [program, *words])
    return _wrapped()


@parser.wrap()
def _wrapped(cfg: EvalPipelineConfig):
    return cfg


def check(found, env):
    """The environment is the run's, options and all; what its package alone registers is not left to workers."""
    wanted = environment(env)
    assert type(found.env) is type(wanted)
    assert found.env.task == wanted.task
    assert {name: getattr(found.env, name) for name in env.options} == {
        name: getattr(wanted, name) for name in env.options
    }
    assert found.eval.n_episodes == 40
    assert found.eval.use_async_envs == (env.type == "ogbench")
    assert found.policy.type == "flow_mlp"


def test_the_line_that_a_run_prints_is_read_by_lerobot_as_it_stands(made, monkeypatch):
    run, env = made
    found = read_by_lerobot(eval_command(run), monkeypatch)
    check(found, env)
    if env.type == "ogbench" or not importlib.util.find_spec(environment(env).package_name):
        return
    (((_, envs),),) = (suite.items() for suite in make_env(found.env, 2, found.eval.use_async_envs).values())
    envs.reset(seed=0)
    envs.close()


def test_the_line_on_a_model_card_is_read_by_lerobot_as_it_stands(made, tmp_path, monkeypatch):
    run, env = made
    (tmp_path / "staged").mkdir()
    card = model_card(stage(run, tmp_path / "staged"), "someone/cube", Licence("mit"))
    line = re.search(r"```bash\n(.*?)\n```", card, flags=re.DOTALL)[1]
    assert "--policy.path=someone/cube" in line
    check(read_by_lerobot(line, monkeypatch, tmp_path / "staged"), env)


def test_a_type_that_the_runs_own_script_registered_has_no_line(made):
    run, env = made
    told = {"env": to_json(env), "lerobot_arguments": ["--env.discover_packages_path=__main__"]}
    write_json(run / "result.json", read_result(run) | told)
    assert eval_command(run) is None


def test_an_environment_without_a_task_leaves_it_to_its_type(made):
    run, env = made
    write_json(run / "result.json", read_result(run) | {"env": to_json(replace(env, type="pusht", task=""))})
    assert "--env.task" not in eval_command(run)


# -- what a card says of where things came from ----------------------------------------------------------------------


def card_of(folder, config):
    run = write_run(folder / "run", load_adapter("flow_mlp").tiny(), "flow_mlp")
    write_json(run / "config.json", to_json(config))
    (folder / "staged").mkdir()
    return model_card(stage(run, folder / "staged"), "someone/cube", Licence("mit"))


def recipe(**changes):
    from poco_vla import DatasetConfig, DemonstrationConfig, PocoConfig

    dataset = DatasetConfig(**changes.pop("dataset", {}))
    return TrainConfig(
        env=EnvSpec(),
        dataset=dataset,
        demonstrations=DemonstrationConfig(episodes=20),
        poco=PocoConfig(critic_hidden=(8, 8)),
        **changes,
    )


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ({}, "| demonstrations | 20 episodes of the simulator's script (expert), 1,234 steps |"),
        ({"root": Path("mine")}, "| demonstrations | a dataset, of unknown origin, 1,234 steps |"),
        (
            {"root": Path("mine"), "repo_id": "me/pen"},
            '| demonstrations | a dataset that its user calls "me/pen", of unknown origin, 1,234 steps |',
        ),
        ({"repo_id": "local/pen"}, '| demonstrations | a dataset that its user calls "local/pen", of unknown origin'),
        ({"repo_id": "me/pen"}, "| demonstrations | [me/pen](https://huggingface.co/datasets/me/pen), 1,234 steps |"),
    ],
)
def test_a_card_tells_of_demonstrations_what_is_known(dataset, said, tmp_path):
    card = card_of(tmp_path, recipe(dataset=dataset))
    assert said in card
    assert ("datasets/" in card) == (dataset == {"repo_id": "me/pen"})
    assert ("simulator's script" in card) == (not dataset)


def test_a_card_does_not_invent_imitation_or_random_weights(tmp_path):
    card = card_of(tmp_path, recipe(sft_steps=0, policy="runs/other/policy"))
    assert "it practised, without imitation before" in card
    assert "before: weights as they were loaded" in card
    assert "another policy's weights, whose origin is unknown here" in card
    assert "random weights" not in card


def test_a_whole_policy_is_not_said_to_need_an_export(tmp_path):
    card = card_of(tmp_path, recipe())
    assert "LeRobot's commands take it as it is" in card
    assert "poco-vla export" not in card
