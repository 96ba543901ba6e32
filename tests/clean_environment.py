"""Environments as users have them: this repository's wheels, installed where nothing leads back to the checkout.

    bin = clean_environment()                                              # all distributions
    bin = clean_environment("poco-vla[ogbench]", "lerobot_policy_flow_mlp")
    run(bin / "poco-vla", "adapters", folder=tmp_path).stdout

Wheels and environments lie in build/clean/, in a folder named after what the sources hold: the processes of a test run
share them, and a second run with the same sources finds them there. Packages come with uv, hard-linked from its cache.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "clean"


def distributions() -> dict[str, Path]:
    """Folder of every distribution here, by name."""
    folders = [ROOT, *sorted(path.parent for path in ROOT.glob("adapters/*/pyproject.toml"))]
    return {project(folder)["project"]["name"]: folder for folder in folders}


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())


@cache
def sources() -> dict[str, bytes]:
    """What git keeps or would keep, so nothing that an earlier build or a run has left."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name: (ROOT / name).read_bytes() for name in sorted(set(listed)) if (ROOT / name).is_file()}


@cache
def built() -> Path:
    """A folder with wheels and sdists of all distributions (`dist`), and wheels made without the sdists (`direct`)."""
    if os.environ.get("POCO_VLA_OFFLINE") == "1":
        pytest.skip("POCO_VLA_OFFLINE=1: making and installing wheels needs a package index")
    digest = hashlib.sha256(sys.version.encode())
    for name, data in sources().items():
        digest.update(f"{name} {len(data)} ".encode() + data)
    folder = KEPT / digest.hexdigest()[:16]
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(KEPT / "lock"):
        if not (folder / "direct").is_dir():
            made = sorted(filter(Path.is_dir, KEPT.iterdir()), key=_age)
            for old in made[2:]:
                if _age(old) > 600:  # a younger one may be in use
                    shutil.rmtree(old)
            _build(folder)
    return folder


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _build(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as copy:
        for name, data in sources().items():
            (Path(copy) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(copy) / name).write_bytes(data)
        for kind, options in {"dist": [], "direct": ["--wheel"]}.items():
            made = Path(copy) / "made" / kind
            pins = ["--build-constraint", ROOT / ".ci/constraints.txt", "--python", sys.executable]
            uv("build", "--all-packages", *options, "--out-dir", made, *pins, "--directory", copy)
            shutil.copytree(made, folder / kind, dirs_exist_ok=True)


def wheel(distribution: str, kind: str = "dist") -> Path:
    (found,) = (built() / kind).glob(f"{distribution.replace('-', '_')}-*.whl")
    return found


@cache
def clean_environment(*wanted: str) -> Path:
    """The folder of the commands of a new environment.

    Args:
        wanted: what to install: distributions of this repository, by name (with extras: "poco-vla[serve]"), and any
            others; all of this repository when left out.
    """
    here, home = distributions(), built()
    requirements = []
    for requirement in wanted or here:
        name = requirement.partition("[")[0]
        requirements.append(f"{requirement} @ {wheel(name).as_uri()}" if name in here else requirement)
    environment = home / hashlib.sha256(repr(sorted(requirements)).encode()).hexdigest()[:8]
    with FileLock(home / "lock"):
        if not (environment / "complete").exists():
            pins = ["--constraint", ROOT / ".ci/constraints.txt", "--override", ROOT / ".ci/overrides.txt"]
            python = environment / "bin" / "python"
            uv("venv", "--clear", "--python", sys.executable, environment)
            uv("pip", "install", "--python", python, "--find-links", home / "dist", *pins, *requirements)
            _copy_compiled(environment)
            (environment / "complete").touch()
    return environment / "bin"


def _copy_compiled(environment: Path) -> None:
    """Copy the compiled files of packages that are here, too: compiling torch and LeRobot takes a minute. Python does
    not use one whose source has another date or size."""
    here = Path(sysconfig.get_path("purelib"))
    there = environment / here.relative_to(sys.prefix)
    for compiled in here.rglob("__pycache__"):
        place = there / compiled.relative_to(here)
        if place.parent.is_dir() and not place.exists():
            shutil.copytree(compiled, place)


def run(command: Path, *arguments, folder: Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
    """Runs a command of a clean environment in a folder of the user's."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{command.parent}{os.pathsep}{os.defpath}", "PYTHONNOUSERSITE": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MUJOCO_GL": "disable"} | variables
    done = subprocess.run(
        [command, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, (
        f"{command.name} {arguments}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    )
    return done


def uv(*arguments) -> None:
    done = subprocess.run(
        [_uv(), *map(str, arguments)], env=_uv_settings(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        hint = "with no package index in reach, POCO_VLA_OFFLINE=1 skips the tests that need one"
        pytest.fail(f"uv {' '.join(map(str, arguments))} failed ({hint}):\n{done.stderr[-4000:]}", pytrace=False)


@cache
def _uv() -> str:
    """The uv that .ci/setup takes."""
    places = [shutil.which("uv"), *(Path.home() / f"{place}/bin/uv" for place in (".local", ".cargo"))]
    for place in [*places, ROOT / ".ci/.venv/bin/uv"]:
        if place and Path(place).exists():
            known = subprocess.run([place, "pip", "install", "--help"], capture_output=True, text=True, check=False)
            if "--group" in known.stdout:
                return str(place)
    pytest.fail("no uv here: `make setup` brings one", pytrace=False)


def _uv_settings() -> dict[str, str]:
    """The environment's, with pip's index and certificates where uv has been told no others, as in .ci/setup."""
    given = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    defaults = {"UV_HTTP_TIMEOUT": "120", "UV_SYSTEM_CERTS": "true", "UV_NATIVE_TLS": "true"}
    if "PIP_INDEX_URL" in given and "UV_INDEX_URL" not in given:
        defaults["UV_DEFAULT_INDEX"] = given["PIP_INDEX_URL"]
    if "PIP_CERT" in given:
        defaults["SSL_CERT_FILE"] = given["PIP_CERT"]
    if build := version("torch").partition("+")[2]:  # the build of torch that is here: it is in uv's cache
        defaults["UV_TORCH_BACKEND"] = build
    return defaults | given
