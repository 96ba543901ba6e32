"""The names that notebooks, tests and third parties rely on: what they are, take, and cost to import."""

import ast
import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points

import pytest

import poco_vla

PUBLIC = [
    "ActionSpec",
    "Algorithm",
    "AlgorithmError",
    "ChunkBatch",
    "ChunkCritic",
    "DataError",
    "DatasetConfig",
    "DemonstrationConfig",
    "EnvSpec",
    "EvalConfig",
    "FlowPolicy",
    "GlobalBatchRNG",
    "GuardConfig",
    "InteractionConfig",
    "Lora",
    "Metrics",
    "OptimConfig",
    "Poco",
    "PocoConfig",
    "PocoError",
    "PolicyError",
    "Prefix",
    "PrefixConfig",
    "ReplayConfig",
    "RewardConfig",
    "TrainConfig",
    "atomic_folder",
    "available_adapters",
    "available_algorithms",
    "check_algorithm",
    "check_policy",
    "clipped_distillation",
    "effective_sample_size",
    "evaluate",
    "export_policy",
    "flow_errors",
    "inject_lora",
    "integrate",
    "interpolate",
    "linear",
    "load_adapter",
    "load_algorithm",
    "load_critic",
    "load_head",
    "merge_lora",
    "polyak_update",
    "posterior_weights",
    "propose",
    "push_head",
    "target_velocity",
    "td_target",
    "train",
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
    """Beside the names that are loaded on demand: the two that make them so, and modules that somebody imported."""
    held = {name for name, found in vars(poco_vla).items() if not (name.startswith("_") or inspect.ismodule(found))}
    assert held <= {"TYPE_CHECKING", "load_on_demand"}
    assert dir(poco_vla) == PUBLIC


PACKAGES = ["poco_vla", "poco_vla.algorithms", "poco_vla.data", "poco_vla.rollout"]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_loaded_on_demand_is_what_type_checkers_see(package):
    """The names stand in a package three times: for type checkers, for those who ask, and in `__all__`."""
    module = import_module(package)
    statements = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.ImportFrom)]
    seen = {alias.name: n.module for n in statements for alias in n.names if n.module.startswith(f"{package}.")}
    for name in ("load_on_demand", "install"):
        seen.pop(name, None)
    assert sorted(seen) == sorted(module.__all__) == dir(module)
    for name, home in seen.items():
        assert getattr(module, name) is getattr(import_module(home), name)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_hides_a_module_of_its_package(package):
    """`import poco_vla.data` binds the module as an attribute: a function of that name would come and go with it."""
    module = import_module(package)
    inside = {found.name for found in pkgutil.iter_modules(module.__path__)}
    assert inside
    assert not inside & set(module.__all__)
    assert all(inspect.ismodule(found) for name, found in vars(module).items() if name in inside)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_that_is_not_there_is_an_attribute_error_and_a_module_can_still_be_imported(package):
    module = import_module(package)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'pocos'"):
        _ = module.pocos
    with pytest.raises(ImportError, match="pocos"):
        exec(f"from {package} import pocos")


def test_modules_are_imported_from_a_package_as_ever():
    out = "import poco_vla.training as train; import poco_vla.data as d; from poco_vla.rollout import actor; print("
    out += "train.train.__name__, actor.Actor.__name__, d.Episode.__name__)"
    done = subprocess.run([sys.executable, "-c", out], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["train", "Actor", "Episode"]


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
        (
            "push_head",
            "run, repo_id, *, form='head', which='last', dtype='float32', critic=False, base=None, license=None, "
            "private=True, update=False, dry_run=False, token=None",
        ),
        ("load_head", "repo_or_path, *, revision=None, adapter=None, base=None, device='cpu', **options"),
        ("load_critic", "repo_or_path, *, revision=None, target=False"),
        ("export_policy", "source, path, *, form='policy', revision=None, base=None"),
        ("available_adapters", ""),
        ("check_policy", "policy, obs=None, *, seed=0, atol=0.0001"),
        ("train", "config"),
        ("evaluate", None),
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


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("locate", "repo_or_path, revision=None"),
        ("base_of", "head, moved=None"),
        ("chosen_lora", "wanted, head"),
        ("read_head", "folder, adapter"),
        ("read_about", "folder"),
        ("head_folder", "path"),
        ("write_head", "folder, module, source, *, adapter, horizon, lora=None, options=None, peft=None, names=None"),
        ("write_about", "folder, *, adapter, options=None, names=None"),
        ("read_tensors", "file"),
        ("check_tensors", "wanted, found, file"),
        ("fingerprint", "module"),
        ("PeftLayout", "modules, idle, shape=(0, 0)"),
    ],
)
def test_what_adapters_write_and_read_heads_with_keeps_its_arguments(name, signature):
    from poco_vla.pretrained import heads

    found = inspect.signature(inspect.unwrap(getattr(heads, name)))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    assert str(inspect.Signature(bare)) == f"({signature})"


def loaded_by(statement):
    program = f"{statement}\nimport sys; print('loaded:', ' '.join({{m.split('.')[0] for m in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return set(out.split("loaded:")[1].split())


ADAPTERS = {point.value.split(".")[0] for point in entry_points(group="poco_vla.adapters")}
HEAVY = {
    *{"lerobot", "accelerate", "transformers", "gymnasium", "matplotlib", "mujoco", "datasets", "pandas"},
}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_of_what_it_may_need(package):
    assert not loaded_by(f"import {package}") & {*HEAVY, "torch", "jaxtyping", "tyro", "rich"}


def test_the_mathematics_loads_torch_and_none_of_the_librarys_heavy_friends():
    """It is read and used without the rest, the Hub's client too."""
    hub, runs = {"export_policy", "load_critic", "load_head", "push_head"}, {"evaluate", "train"}
    loaded = loaded_by(f"from poco_vla import {', '.join(name for name in PUBLIC if name not in hub | runs)}")
    assert "torch" in loaded
    assert not loaded & {*HEAVY, "tyro", "rich", "huggingface_hub"}
    assert not loaded_by(f"from poco_vla import {', '.join(hub)}") & {*HEAVY, "tyro"}


@pytest.mark.parametrize("module", ["poco_vla.serving.client", "poco_vla.data.episode"])
def test_a_robots_pc_needs_neither_torch_nor_the_model(module):
    loaded = loaded_by(f"import {module}")
    assert "numpy" in loaded
    assert not loaded & {*HEAVY, "torch", "jaxtyping", "tyro", "rich"}


def test_a_recipe_describes_a_run_before_torch_is_there():
    assert "torch" not in loaded_by("from poco_vla import TrainConfig, PocoConfig")


def test_the_command_line_answers_before_anything_heavy_is_loaded():
    """`poco-vla train --help` and a mistyped option do not wait for torch, LeRobot, a simulator or an adapter."""
    asked = (
        'import contextlib, poco_vla.cli\nwith contextlib.suppress(SystemExit): poco_vla.cli.main(["train", "--help"])'
    )
    loaded = loaded_by(asked)
    assert "tyro" in loaded
    assert not loaded & {*HEAVY, "torch", "jaxtyping", *ADAPTERS}


def test_errors_that_users_can_mend_are_value_errors():
    """Who catches ValueError catches them all."""
    from poco_vla import errors

    kinds = [e for e in vars(errors).values() if inspect.isclass(e) and issubclass(e, Exception)]
    assert len(kinds) > 5
    assert all(issubclass(kind, poco_vla.PocoError) and issubclass(kind, ValueError) for kind in kinds)


MOVED = {
    "poco_vla.rollout.serving.client": "poco_vla.serving.client",
    "poco_vla.heads": "poco_vla.pretrained.heads",
    "poco_vla.rollout.environments.ogbench": "poco_vla.simulators.ogbench",
    "poco_vla.rollout.environments": "poco_vla.simulators",
    "poco_vla.train": "poco_vla.training",
}


def test_an_old_name_is_the_moved_module_and_says_so():
    code = (
        "import warnings; from importlib import import_module\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        f"    found = {{old: import_module(old) for old in {list(MOVED)}}}\n"
        "    said = ' '.join(str(one.message) for one in told)\n"
        f"for old, new in {MOVED}.items():\n"
        "    assert found[old] is import_module(new) and found[old].__spec__.name == new, old\n"
        "    assert f'{old} is {new} now' in said, said\n"
        "import poco_vla; assert callable(poco_vla.train) and callable(poco_vla.evaluate)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lerobot_finds_the_environments_by_their_old_name():
    code = (
        "from lerobot.configs.parser import load_plugin; load_plugin('poco_vla.rollout.environments')\n"
        "from lerobot.envs.configs import EnvConfig; assert 'ogbench' in EnvConfig.get_known_choices()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_renamed_function_is_importable_by_its_old_name_with_a_warning():
    with pytest.warns(FutureWarning, match="poco_vla.whole_folder is atomic_folder now"):
        from poco_vla import whole_folder
    assert whole_folder is poco_vla.atomic_folder
    assert "whole_folder" not in dir(poco_vla)


def test_an_adapter_that_overrides_shrink_images_still_resizes_with_a_warning():
    with pytest.warns(FutureWarning, match="shrink_images is resize_images now"):

        class Policy(poco_vla.FlowPolicy):
            def shrink_images(self, images):
                return images[:, ::2, ::2]

    assert Policy.resize_images is Policy.shrink_images
