"""The names that notebooks, tests and third parties rely on: what they are, take, and cost to import."""

import inspect
import subprocess
import sys

import pytest

import poco_vla

PUBLIC = [
    "ActionSpec",
    "ChunkBatch",
    "ChunkCritic",
    "DataError",
    "DatasetConfig",
    "DemonstrationConfig",
    "Draws",
    "EnvSpec",
    "EvalConfig",
    "FlowPolicy",
    "GuardConfig",
    "Lora",
    "Metrics",
    "OptimConfig",
    "Poco",
    "PocoConfig",
    "PocoError",
    "PolicyError",
    "Prefix",
    "ReplayConfig",
    "RewardConfig",
    "TrainConfig",
    "available_adapters",
    "check_policy",
    "clipped_distillation",
    "effective_sample_size",
    "flow_errors",
    "inject_lora",
    "integrate",
    "interpolate",
    "load_adapter",
    "merge_lora",
    "polyak_update",
    "posterior_weights",
    "propose",
    "target_velocity",
    "td_target",
    "whole_folder",
]


def test_the_public_names_are_these():
    """Adding one is a decision, dropping one breaks somebody: change this list on purpose."""
    assert poco_vla.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_exists_and_says_what_it_is(name):
    found = getattr(poco_vla, name)
    if name == "Metrics":  # a type alias cannot carry a docstring
        return
    doc = inspect.getdoc(found)
    assert doc
    assert not doc.startswith(f"{name}("), "a dataclass's made-up docstring says nothing"


def test_nothing_else_is_public_by_accident():
    others = {name for name, found in vars(poco_vla).items() if not (name.startswith("_") or inspect.ismodule(found))}
    assert others == set(PUBLIC)


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("interpolate", "noise, action, t"),
        ("target_velocity", "noise, action"),
        ("integrate", "policy, prefix, noise, steps"),
        ("propose", "policy, prefix, n, *, steps=None, generator=None, noise=None"),
        ("posterior_weights", "q, *, eta"),
        ("effective_sample_size", "w"),
        ("flow_errors", "policy, prefix, chunk, valid, *, noise=None, t=None, mean_over='valid'"),
        ("clipped_distillation", "errors, weights, *, zeta"),
        ("td_target", "returns, discount, next_q"),
        ("polyak_update", "target, online, tau"),
        ("load_adapter", "name"),
        ("available_adapters", ""),
        ("check_policy", "policy, obs=None, *, seed=0, atol=0.0001"),
        ("train.train", "config"),
        ("evaluate.evaluate", None),
    ],
)
def test_arguments_keep_their_names_and_order(name, signature):
    module, _, attribute = name.rpartition(".")
    home = __import__(f"poco_vla.{module}", fromlist=[attribute]) if module else poco_vla
    found = inspect.signature(inspect.unwrap(getattr(home, attribute)))
    if signature is None:
        assert list(found.parameters)[:2] == ["policy", "env"]
        assert all(found.parameters[option].kind is inspect.Parameter.KEYWORD_ONLY for option in ("episodes", "seed"))
        return
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    assert str(inspect.Signature(bare)) == f"({signature})"


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("encode", ["obs"]),
        ("velocity", ["prefix", "x", "t"]),
        ("sample_time", ["shape", "generator"]),
        ("native_sample", ["obs", "noise"]),
        ("save_pretrained", ["path"]),
        ("save_head", ["path"]),
        (
            "from_pretrained",
            ["repo_or_path", "horizon", "device", "features", "stats", "statistics", "dataset_meta", "options"],
        ),
        ("from_dataset", ["features", "stats", "horizon", "options"]),
        ("tiny", ["seed"]),
    ],
)
def test_the_contract_of_a_policy_is_this(method, arguments):
    parameters = list(inspect.signature(getattr(poco_vla.FlowPolicy, method)).parameters)
    assert [p for p in parameters if p not in ("self", "cls")] == arguments


def loaded_by(statement):
    program = f"{statement}\nimport sys; print('loaded:', ' '.join({{m.split('.')[0] for m in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return set(out.split("loaded:")[1].split())


def test_importing_the_library_loads_none_of_its_heavy_friends():
    """The mathematics is read and used without the rest."""
    loaded = loaded_by("import poco_vla")
    assert "torch" in loaded
    assert not loaded & {"lerobot", "accelerate", "gymnasium", "matplotlib", "mujoco", "tyro", "rich", "datasets"}


def test_the_command_line_answers_before_anything_heavy_is_loaded():
    """`poco-vla --help` and a mistyped option do not wait for LeRobot or a simulator."""
    loaded = loaded_by("import poco_vla.cli")
    assert not loaded & {"lerobot", "accelerate", "gymnasium", "matplotlib", "mujoco"}


def test_errors_that_users_can_mend_are_value_errors():
    """Who catches ValueError catches them all."""
    from poco_vla import errors

    kinds = [e for e in vars(errors).values() if inspect.isclass(e) and issubclass(e, Exception)]
    assert len(kinds) > 5
    assert all(issubclass(kind, poco_vla.PocoError) and issubclass(kind, ValueError) for kind in kinds)
