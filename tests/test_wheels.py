"""What is published works for who has nothing else: wheels, installed into environments that know no checkout."""

import hashlib
import json
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from clean_environment import ROOT, built, clean_environment, distributions, project, run, sources, wheel
from packaging.requirements import Requirement

# One worker runs them all: the others would only wait for the wheels.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.xdist_group("wheels")]
DISTRIBUTIONS = distributions()
PLUGINS = [name for name in DISTRIBUTIONS if name.startswith("lerobot_policy_")]
ADAPTERS = {
    name: set(project(folder)["project"]["entry-points"]["poco_vla.adapters"])
    for name, folder in DISTRIBUTIONS.items()
    if folder != ROOT
}
EXTRAS = {"deepspeed", "websockets", "msgpack", "mujoco", "ogbench", "robosuite", "h5py"}
"""Modules that an extra of poco-vla brings."""


@pytest.fixture(scope="module")
def bin():
    return clean_environment()


def package_of(name):
    (package,) = project(DISTRIBUTIONS[name])["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    return package


def contents(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(name):
    """(fields, description) of a wheel's metadata."""
    (text,) = [data.decode() for file, data in contents(wheel(name)).items() if file.endswith("/METADATA")]
    message = message_from_string(text)
    return message, message.get_payload()


def required(name):
    """Distributions that must be there without any extra."""
    found = [Requirement(line) for line in metadata(name)[0].get_all("Requires-Dist")]
    return {r.name.replace("-", "_") for r in found if r.marker is None or r.marker.evaluate({"extra": ""})}


# What is in them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_wheel_holds_its_package_whole_and_nothing_else(name):
    """So no test, no cache; every module and data file, and the mark that its types may be read."""
    package, base = package_of(name), DISTRIBUTIONS[name].relative_to(ROOT)
    wanted = {str(Path(file).relative_to(base)) for file in sources() if Path(file).is_relative_to(base / package)}
    held = {file for file in contents(wheel(name)) if ".dist-info/" not in file}
    assert held == wanted
    assert {f"{package}/py.typed", f"{package}/__init__.py"} <= held
    assert not [file for file in held if "__pycache__" in file or "test_" in file]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_wheel_names_no_place_of_the_machine_that_built_it(name):
    places = [str(place).encode() for place in (ROOT, Path.home()) if len(place.parts) > 2] + [b"file://"]
    assert not [(file, place) for file, data in contents(wheel(name)).items() for place in places if place in data]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_metadata_say_what_an_index_shows(name):
    fields, description = metadata(name)
    assert fields["Name"] == name
    assert fields["Requires-Python"] == ">=3.12"
    assert fields["License-Expression"] == "Apache-2.0"
    assert len(fields["Summary"]) > 30
    assert fields["Description-Content-Type"] == "text/markdown"
    assert description.strip() == (DISTRIBUTIONS[name] / "README.md").read_text().strip()
    (terms,) = [data for file, data in contents(wheel(name)).items() if file.endswith("/licenses/LICENSE")]
    assert terms == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_source_distribution_makes_the_same_wheel(name):
    def of(kind):
        return {file: hashlib.sha256(data).hexdigest() for file, data in contents(wheel(name, kind)).items()}

    assert of("dist") == of("direct")
    (packed,) = (built() / "dist").glob(f"{name.replace('-', '_')}-*.tar.gz")
    with tarfile.open(packed) as archive:
        top = {member.name.split("/")[1] for member in archive.getmembers()}
    assert top == {package_of(name), "pyproject.toml", "README.md", "LICENSE", ".gitignore", "PKG-INFO"}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_lerobot_policy_does_not_require_this_library(name):
    assert "poco_vla" not in required(name)
    assert "lerobot" in required(name)


def test_every_adapter_is_an_extra_of_the_library():
    extras = project(ROOT)["project"]["optional-dependencies"].values()
    assert {name for name in DISTRIBUTIONS if [name] in extras} == set(ADAPTERS)


# What they do --------------------------------------------------------------------------------------------------------


def test_commands_answer_and_know_all_adapters(bin, tmp_path):
    where = run(bin / "python", "-c", "import poco_vla; print(poco_vla.__file__)", folder=tmp_path).stdout.strip()
    assert Path(where).is_relative_to(bin.parent)
    assert "usage: poco-vla" in run(bin / "poco-vla", "--help", folder=tmp_path).stdout
    listed = run(bin / "poco-vla", "adapters", folder=tmp_path).stdout.splitlines()
    assert {line.split()[0] for line in listed} == set().union(*ADAPTERS.values())


def test_modules_need_nothing_that_is_not_required(bin, tmp_path):
    """Each is imported where no extra is installed; what an extra brings may be missing, nothing else."""
    program = (
        "import importlib, pkgutil\n"
        f"for package in {[package_of(name) for name in DISTRIBUTIONS]}:\n"
        "    root = importlib.import_module(package)\n"
        "    for module in pkgutil.walk_packages(root.__path__, package + '.', onerror=lambda name: None):\n"
        "        try:\n"
        "            importlib.import_module(module.name)\n"
        "        except ModuleNotFoundError as error:\n"
        f"            assert error.name in {EXTRAS}, (module.name, error)\n"
    )
    run(bin / "python", "-c", program, folder=tmp_path)


def test_every_adapter_passes_the_conformance_kit(bin, tmp_path):
    program = "from poco_vla import *\nfor name in available_adapters(): check_policy(load_adapter(name).tiny())"
    run(bin / "python", "-c", program, folder=tmp_path)


def test_a_recipe_of_the_users_trains_a_policy_that_lerobot_evaluates(bin, tmp_path):
    """Demonstrations, every stage and the export, on an environment that is the user's own package."""
    (tmp_path / "pointmass").mkdir()
    (tmp_path / "pointmass" / "__init__.py").write_text((ROOT / "tests/pointmass.py").read_text())
    (tmp_path / "recipe.py").write_text((ROOT / "tests/pointmass_run.py").read_text())
    run(bin / "accelerate", "launch", "--num_processes", 1, "recipe.py", "--online-steps", 60, folder=tmp_path)
    policy = tmp_path / "runs/pointmass/policy"
    assert json.loads((policy / "config.json").read_text())["type"] == "flow_mlp"
    arguments = [f"--policy.path={policy}", "--policy.device=cpu", "--eval.n_episodes=1", "--eval.batch_size=1"]
    arguments += ["--env.type=pointmass", "--env.discover_packages_path=pointmass", "--output_dir=eval"]
    run(bin / "lerobot-eval", *arguments, folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert "pc_success" in (tmp_path / "eval/eval_info.json").read_text()


def test_lerobot_finds_and_trains_the_policies_where_this_library_is_not(tmp_path):
    """An environment with LeRobot's own training and the policies' distributions alone."""
    bin = clean_environment("lerobot[training]", *PLUGINS)
    types = [name.removeprefix("lerobot_policy_") for name in PLUGINS]
    program = (
        "import importlib.util\n"
        "from lerobot.utils.import_utils import register_third_party_plugins\n"
        "from lerobot.configs.policies import PreTrainedConfig\n"
        "assert importlib.util.find_spec('poco_vla') is None\n"
        "register_third_party_plugins()\n"
        f"assert set({types}) <= set(PreTrainedConfig.get_known_choices())\n"
    )
    run(bin / "python", "-c", program + DATASET, folder=tmp_path)
    arguments = ["--policy.type=flow_mlp", "--policy.device=cpu", "--policy.push_to_hub=false", "--steps=2"]
    arguments += ["--dataset.repo_id=local/data", "--dataset.root=data", "--batch_size=4", "--num_workers=0"]
    run(bin / "lerobot-train", *arguments, "--output_dir=train", folder=tmp_path)
    assert (tmp_path / "train/checkpoints/last/pretrained_model/model.safetensors").exists()


DATASET = """
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
features = {name: {"dtype": "float32", "shape": (3,), "names": None} for name in ("observation.state", "action")}
dataset = LeRobotDataset.create("local/data", fps=10, features=features, root="data", use_videos=False)
for _ in range(12):
    dataset.add_frame({name: np.random.randn(3).astype(np.float32) for name in features} | {"task": "wave"})
dataset.save_episode()
dataset.finalize()
"""
