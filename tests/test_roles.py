"""A field's role decides what may change at a resume, what makes another setting in a report, what the Hub is told."""

import json
from dataclasses import dataclass, replace

import pytest

from poco_vla.checkpointing import checkpoint
from poco_vla.config import EnvSpec, PrefixConfig, TrainConfig, to_json
from poco_vla.errors import CheckpointError
from poco_vla.hub.artifact import _anywhere
from poco_vla.report import group_runs
from poco_vla.roles import machine, method, role_of, roles_of

DEFAULT = TrainConfig(env=EnvSpec())


def changed(**changes):
    return replace(DEFAULT, **changes)


MACHINE = [
    {"memory": "24GB"},
    {"prefixes": PrefixConfig(ram_bytes=10**9)},
    {"prefixes": PrefixConfig(mode="off")},
    {"optim": replace(DEFAULT.optim, micro_batch=8)},
    {"interaction": replace(DEFAULT.interaction, workers=5)},
    {"env": EnvSpec(in_process=True)},
    {"replay": replace(DEFAULT.replay, images="mapped")},
]
REPORTING = [{"checkpoint_keep_every": 5000}, {"log_every": 7}, {"trackers": ("wandb",)}]
METHOD = [{"horizon": 7}, {"poco": replace(DEFAULT.poco, eta=0.5)}, {"env": EnvSpec(num_envs=7)}]


def test_every_field_states_its_role():
    assert [name for name, role in roles_of(TrainConfig).items() if role is None] == []


def test_a_field_without_a_role_is_found_and_one_in_a_record_may_take_the_records():
    @dataclass(frozen=True)
    class Inner:
        rate: float = 1.0
        path: str = machine("a")

    @dataclass(frozen=True)
    class Outer:
        forgotten: int = 0
        inner: Inner = method(Inner())

    roles = roles_of(Outer)
    assert {name: role and role.name for name, role in roles.items()} == {
        "forgotten": None,
        "inner.rate": "method",
        "inner.path": "machine",
    }


def test_a_name_in_an_open_mapping_has_the_mappings_role_and_an_unknown_name_counts_as_the_method():
    assert role_of(TrainConfig, "env.options.step_timeout").name == "method"
    assert role_of(TrainConfig, "a_field_of_another_version").name == "method"
    assert role_of(TrainConfig, "env.step_timeout").name == "machine"


@pytest.mark.parametrize("change", MACHINE + REPORTING, ids=str)
def test_a_resumed_run_may_change_what_is_not_the_method(change, tmp_path):
    checkpoint.load(saved(tmp_path), changed(**change))


@pytest.mark.parametrize("change", [*METHOD, {"seed": 1}], ids=str)
def test_a_resumed_run_keeps_its_method_and_seed(change, tmp_path):
    with pytest.raises(CheckpointError, match="belongs to a run of another configuration"):
        checkpoint.load(saved(tmp_path), changed(**change))


def test_the_demonstrations_may_lie_elsewhere_where_the_checkpoint_knows_them_by_content(tmp_path):
    moved = changed(dataset=replace(DEFAULT.dataset, repo_id="you/moved"))
    checkpoint.load(saved(tmp_path / "known", data={"digest": 1}), moved)
    with pytest.raises(CheckpointError, match=r"dataset\.repo_id"):
        checkpoint.load(saved(tmp_path / "unknown"), moved)


def saved(folder, **state):
    nothing = {"state": {}, "param_groups": []}
    return checkpoint.save(folder, 1, weights={}, optimizer=nothing, tensors={}, state=state, config=DEFAULT)


@pytest.mark.parametrize("change", [*MACHINE, *REPORTING, {"seed": 1}], ids=str)
def test_runs_that_differ_in_machine_reporting_or_seed_are_one_curve(change, tmp_path):
    assert len(group_runs(two_runs(tmp_path, change))) == 1


@pytest.mark.parametrize("change", METHOD, ids=str)
def test_runs_that_differ_in_method_are_two_curves(change, tmp_path):
    assert len(group_runs(two_runs(tmp_path, change))) == 2


def two_runs(folder, change):
    evaluation = {"env_steps": 0, "success_rate": 0.5, "episodes": 2, "interval_95": [0.1, 0.9]}
    result = {"env": {"type": "ogbench", "task": "t", "options": {}}, "before": evaluation, "after": evaluation}
    result |= {"seed": 0, "evaluations": [evaluation], "updates": 1, "env_steps": 1, "seconds": 1, "policy": "policy"}
    for name, config in (("a", DEFAULT), ("b", changed(**change))):
        (folder / name).mkdir()
        (folder / name / "result.json").write_text(json.dumps(result))
        (folder / name / "config.json").write_text(json.dumps(to_json(config)))
    return [folder / "a", folder / "b"]


def test_the_hub_is_told_the_method_and_the_reporting_and_nothing_of_the_machine():
    published = _anywhere(to_json(TrainConfig(env=EnvSpec(options={"fps": 5}))))
    assert published["poco"]["eta"] == 0.1
    assert published["env"]["options"] == {"fps": 5}
    assert published["checkpoint_every"] == 10_000
    assert not published.keys() & {"output_dir", "resume", "policy", "memory", "num_threads"}
    assert published["prefixes"].keys() == {"dtype"}
    assert not published["env"].keys() & {"in_process", "step_timeout", "reset_timeout", "max_failures"}
    assert "root" not in published["dataset"]
