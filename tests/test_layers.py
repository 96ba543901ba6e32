"""Who may import whom. The mathematics needs only torch; LeRobot, Accelerate and the rest stay where they belong."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "poco_vla"

MATHS = {"flow", "posterior", "distill", "dense", "critic", "policy"}
BASE = {"errors", "types"}
ALGORITHM = MATHS | BASE | {"config", "algorithm"}
ACTING = MATHS | BASE | {"config", "data", "rollout", "lazy"}

DOORS = {
    "errors": set(),
    "types": set(),
    "terminal": {"errors"},  # what a person sees: control characters of foreign names are shown, not obeyed
    **dict.fromkeys(MATHS, BASE | {"flow"}),
    "raw": {"errors"},
    "policy": BASE | {"flow", "raw"},
    "interface": {"policy"},
    "critic": {"dense"},
    "config": {"errors"},
    "algorithm": ALGORITHM,
    "registry": {"policy", *BASE},
    "testing": MATHS | BASE | {"interface"},  # it probes the contract with the flow's own equations
    "data": {"policy", "config", "lazy", *BASE},
    "rollout": ACTING | {"files", "joint_names", "terminal"},
    "files": {"errors"},
    "devices": {"errors"},
    "lazy": set(),
    "lora": {"errors"},
    "sources": {"errors"},
    "heads": {"errors", "files", "lora", "sources"},
    "normalization": {"errors", "heads"},
    "policy_config": {"errors", "sources"},
    "processors": {"errors", "heads", "normalization", "sources"},
    "joint_names": {"errors"},
    "naming": {"errors", "heads", "joint_names"},
    "camera_names": {"errors", "heads", "joint_names"},
    "weights": {"errors", "heads", "normalization", "sources"},
    "checkpoint": ALGORITHM | {"registry", "files", "locks"},
    "locks": {"errors", "files"},
    "hub": ALGORITHM | {"registry", "checkpoint", "report", "files", "heads", "sources", "policy_config"},
    "lerobot_rl": ALGORITHM | {"data", "checkpoint"},
    "progress": {"terminal"},
    "evaluate": ACTING,
    "report": ACTING | {"evaluate", "files"},
    "guard": {"config", "evaluate"},
    # Deviation from the house plan: the loop shows a bar, evaluates between updates and draws its report at the end.
    "train": ALGORITHM
    | ACTING
    | {"registry", "checkpoint", "files", "locks", "hub", "progress", "evaluate", "report", "guard", "normalization"}
    | {"joint_names"},
    "tiny": {"config", "registry"},
    "open_options": {"config", "errors", "rollout"},  # an environment type's own task
    "cli": {
        *{"train", "tiny", "evaluate", "report", "hub", "registry", "checkpoint", "config", "errors"},
        "open_options",
        "files",  # what a full disk is, and a damaged config.json
        "heads",  # which adapter a folder or a repository is of
        "devices",
        *{"rollout", "progress", "terminal"},  # `poco-vla data` makes datasets and shows how far it is
    },
    "__init__": ALGORITHM | {"registry", "testing", "files", "lora", "lazy", "hub"},
}
"""Room of poco_vla -> rooms that it may import."""

PURE = {"torch", "jaxtyping"}
THIRD_PARTY = {
    **dict.fromkeys(BASE | MATHS | {"config", "algorithm", "registry", "testing", "__init__", "raw"}, PURE),
    "interface": set(),
    "data": PURE | {"numpy", "lerobot", "filelock", "pyarrow"},  # of a dataset's files what LeRobot does not read
    "rollout": PURE
    | {
        *{"numpy", "lerobot", "gymnasium", "mujoco", "OpenGL", "ogbench", "robosuite"},
        *{"pyarrow", "datasets", "av"},  # a growing dataset's own tables and videos, as LeRobot writes them
        *{"h5py", "huggingface_hub", "filelock"},
        *{"websockets", "msgpack"},
        "ray",
        *{"safetensors", "draccus", "rich"},  # a robot's session: its spool, LeRobot's options, what a person sees
    },
    "checkpoint": PURE | {"numpy", "safetensors", "huggingface_hub", "peft"},
    "sources": {"huggingface_hub"},
    "heads": {"torch", "safetensors"},
    "normalization": {"torch"},
    "policy_config": set(),
    "processors": {"torch"},
    "naming": {"torch"},
    "joint_names": set(),
    "camera_names": set(),
    "weights": {"torch", "safetensors"},
    "hub": PURE | {"safetensors", "huggingface_hub", "httpx", "peft"},
    "lerobot_rl": PURE | {"numpy", "lerobot"},
    "progress": {"rich"},
    "terminal": {"rich"},
    "guard": set(),
    "files": set(),
    "locks": {"filelock"},
    "devices": {"torch"},
    "lazy": set(),
    "lora": {"torch", "peft"},
    "tiny": set(),
    "open_options": set(),
    "evaluate": PURE | {"numpy", "rich"},
    "report": {"numpy", "pandas", "matplotlib", "rich"},
    "train": PURE | {"numpy", "accelerate"},
    "cli": {"tyro", "rich"},
}
"""Room of poco_vla -> packages beside the standard library."""


def imports(path):
    """Dotted names that a file imports, wherever in it: statements, and import_module("...") with a literal."""
    found = set()
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
                if node.level
                else [node.module]
            )
            found |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def third_party(path):
    tops = {name.split(".")[0] for name in imports(path)}
    return tops - set(sys.stdlib_module_names) - {"poco_vla"}


def room(path):
    """The room that a file of the library is in: its folder or its own name below poco_vla/."""
    return path.relative_to(LIBRARY).with_suffix("").parts[0]


def own_rooms(path):
    """Rooms that a file imports; the package itself counts as "__init__", since importing from it runs all of that."""
    rooms = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "poco_vla":
            inside = parts[1] if len(parts) > 1 else ""
            known = inside and ((LIBRARY / inside).is_dir() or (LIBRARY / f"{inside}.py").is_file())
            rooms.add(inside if known else "__init__")
    return rooms


LIBRARY_FILES = sorted(LIBRARY.rglob("*.py"))
ADAPTER_FILES = sorted(p for p in (ROOT / "adapters").rglob("*.py") if "tests" not in p.parts)
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def named(paths):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


@pytest.mark.parametrize("path", named(LIBRARY_FILES))
def test_a_file_imports_only_the_rooms_behind_its_door(path):
    assert room(path) in DOORS, f"{path.name} is in no room: say in DOORS what it may import"
    beyond = own_rooms(path) - DOORS[room(path)] - {room(path)}
    assert not beyond, f"{path.relative_to(ROOT)} must not import {sorted(beyond)}"


@pytest.mark.parametrize("path", named(LIBRARY_FILES))
def test_a_file_imports_only_the_packages_of_its_room(path):
    beyond = third_party(path) - THIRD_PARTY[room(path)]
    assert not beyond, f"{path.relative_to(ROOT)} must not import {sorted(beyond)}"


def test_the_doors_lead_nowhere_in_circles():
    """No room reaches itself through others, by what the files import."""
    edges = {}
    for path in LIBRARY_FILES:
        edges.setdefault(room(path), set()).update(own_rooms(path) - {room(path)})

    def reach(start, seen):
        for other in edges.get(start, set()) - seen:
            reach(other, seen | {start})
        assert not edges.get(start, set()) & (seen | {start}), f"{start} imports one of {sorted(seen | {start})}"

    for start in edges:
        reach(start, set())


def test_lerobot_and_accelerate_are_imported_where_they_belong_and_nowhere_else():
    """Stated once more without the table: the rule that people rely on."""
    users = {
        package: {room(p) for p in LIBRARY_FILES if package in third_party(p)} for package in ("lerobot", "accelerate")
    }
    assert users["accelerate"] == {"train"}
    assert {"data", "rollout"} <= users["lerobot"] <= {"data", "rollout", "lerobot_rl"}


def test_the_library_imports_no_adapter_and_names_no_model_in_its_code():
    """A variant is an adapter or a typed record. Defaults and texts may name one; branches may not."""
    adapters = {p.parent.name for p in ADAPTER_FILES if p.name == "__init__.py"}
    assert adapters
    for path in LIBRARY_FILES:
        assert not third_party(path) & adapters, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.MatchValue):
                words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                models = {w for w in words if re.search(r"flow_mlp|pi0|groot", w, re.IGNORECASE)}
                assert not models, f"{path.relative_to(ROOT)}:{node.lineno} branches on {sorted(models)}"


def test_the_adapters_folder_is_no_package():
    """The index has a package of that name."""
    assert not (ROOT / "adapters" / "__init__.py").exists()


def distributions():
    return [p for p in sorted((ROOT / "adapters").iterdir()) if (p / "pyproject.toml").is_file()]


def plugins():
    """Distributions that LeRobot finds by their name and imports by itself; the others depend on poco_vla."""
    return [p for p in distributions() if list(p.glob("lerobot_policy_*/__init__.py"))]


def test_both_kinds_of_adapters_are_here():
    """A rule for an empty list proves nothing."""
    assert plugins()
    assert len(plugins()) < len(distributions())


@pytest.mark.parametrize("folder", named(plugins()))
def test_a_plugins_package_never_imports_poco_vla_but_in_its_adapter_file(folder):
    """LeRobot imports lerobot_policy_* distributions by itself: they must work without poco_vla."""
    for path in folder.rglob("*.py"):
        if path.name != "adapter.py" and "tests" not in path.parts:
            assert not own_rooms(path), path
    package = next(p for p in folder.rglob("__init__.py")).parent
    reached, waiting = set(), [package / "__init__.py"]
    while waiting:
        path = waiting.pop()
        reached.add(path)
        for name in imports(path):
            parts = name.split(".")
            inner = package / f"{parts[1]}.py" if parts[0] == package.name and len(parts) > 1 else None
            if inner and inner.is_file() and inner not in reached:
                waiting.append(inner)
    assert package / "adapter.py" not in reached


@pytest.mark.parametrize("folder", named(distributions()))
def test_importing_an_adapters_package_loads_neither_poco_vla_nor_its_adapter(folder):
    package = next(p for p in folder.rglob("__init__.py")).parent.name
    program = f"import sys, {package}; print('loaded:', *sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    loaded = set(out.split("loaded:")[1].split())
    assert package in loaded
    assert not loaded & {"poco_vla", f"{package}.adapter"}


@pytest.mark.parametrize("path", named(ADAPTER_FILES))
def test_adapters_use_poco_vlas_public_names_only(path):
    import poco_vla

    for name in imports(path):
        if name.split(".")[0] == "poco_vla":
            modules = {
                "camera_names",
                "heads",
                "naming",
                "normalization",
                "policy_config",
                "processors",
                "raw",
                "weights",
            }
            public = {*poco_vla.__all__, *modules}
            assert name == "poco_vla" or name.removeprefix("poco_vla.") in public, f"{name} is not public"


@pytest.mark.parametrize("path", named(RECIPES))
def test_recipes_use_the_library_through_its_configuration_and_command_line(path):
    assert own_rooms(path) <= {"cli", "config", "train", "__init__"}
    assert third_party(path) == set()
    assert len(path.read_text().splitlines()) <= 60, "a recipe is read top to bottom in a minute"


HOSTS = [
    r"\b(py\x70i|pythonh\x6fsted|npm\x6as|anac\x6fnda)[.](org|com)\b",  # escapes, so that this file names none
    r"https?://[^\s\"']*/simple\b",
    r"artifactory|nexus3|devpi",
]
HOMES = [r"/home/[a-z]", r"/Users/[A-Za-z]", r"/[r]oot/", r"[A-Z]:\\Users"]


def text_files():
    tops = ["poco_vla", "adapters", "recipes", "tests", ".ci"]
    files = [p for top in tops for p in (ROOT / top).rglob("*") if p.is_file()]
    files += [
        ROOT / name for name in ("pyproject.toml", "Makefile", "README.md", ".gitignore") if (ROOT / name).exists()
    ]
    skipped = {"__pycache__", ".venv", "dist", "build", "results"}
    kinds = {".py", ".md", ".toml", ".txt", ".json", ".yaml", ".yml", ""}
    return [p for p in files if not skipped & set(p.parts) and p.suffix in kinds and p != Path(__file__)]


@pytest.mark.parametrize("pattern", HOSTS + HOMES)
def test_no_file_names_a_package_registry_or_somebodys_home(pattern):
    """Where packages come from is the user's setting; a home path works on one machine."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, "\n".join(found)


def test_this_files_patterns_find_what_they_are_for():
    """A rule that matches nothing proves nothing."""
    bad = [
        "https://" + "py" + "pi.org/x",
        "files.python" + "hosted.org",
        "/home/me/x",
        "/ro" + "ot/x",
        "https://a.b/simple",
        "/Users/Me",
    ]
    assert all(any(re.search(pattern, text) for pattern in HOSTS + HOMES) for text in bad)
    assert len(text_files()) > 30


def test_imports_are_found_wherever_they_stand(tmp_path, monkeypatch):
    """At the top, in a function, under TYPE_CHECKING, relative, and by import_module."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "pkg" / "sub" / "file.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b\n"
        "from c import d\n"
        "from . import e\n"
        "from ..f import g\n"
        "def run():\n    from h import i\n    import_module('j.k')\n"
        "if TYPE_CHECKING:\n    import l\n"
    )
    assert imports(path) == {"a.b", "c.d", "pkg.sub.e", "pkg.f.g", "h.i", "j.k", "l"}
