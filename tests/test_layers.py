"""Who may import whom. The mathematics needs only torch; LeRobot, Accelerate and the rest stay where they belong."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "poco_vla"

EQUATIONS = {
    *("critic", "dense", "distill", "dual", "errors", "flow", "gae", "gaussian", "mlp", "noise", "policy", "posterior"),
    *("raw", "types"),
}
"""Pure tensors."""

DOORS = {
    "errors": set(),
    "types": set(),
    "lazy": set(),
    "deprecated": set(),
    "bugs": {"errors"},
    "raw": {"errors"},
    "flow": set(),
    "posterior": set(),
    "dense": set(),
    "critic": {"dense", "types"},
    "gaussian": {"critic", "dense"},
    "dual": set(),
    "gae": {"types"},
    "mlp": {"critic", "dense"},
    "policy": {"dense", "errors", "flow", "raw", "types"},
    "distill": {"flow", "types"},
    "roles": set(),
    "hints": set(),
    "config": {"errors", "hints", "roles"},
    "noise": {"types"},
    "algorithms": {
        *{"config", "critic", "distill", "dual", "errors", "gaussian", "lazy", "mlp", "noise", "policy"},
        *{"posterior", "types"},
    },
    "algorithms.on_policy": {
        *{"algorithms", "config", "critic", "dual", "errors", "gae", "gaussian", "mlp", "noise", "policy", "types"},
    },
    "devices": {"errors"},
    "files": {"errors"},
    "locks": {"errors", "files"},
    "terminal": {"errors"},
    "progress": {"terminal"},
    "joint_names": {"errors"},
    "registry": {"errors", "policy"},
    "pretrained": {"errors", "files"},
    "adapting": {"errors", "files", "joint_names", "policy", "pretrained", "types"},
    "conformance": {
        "algorithms",
        "algorithms.on_policy",
        "bugs",
        "distill",
        "errors",
        "flow",
        "noise",
        "policy",
        "types",
    },
    "data": {"config", "errors", "lazy", "policy", "types"},
    "prefix_cache": {"config", "data", "policy"},
    "recording": {"config", "data", "errors", "files", "policy"},
    "rendering": set(),
    "simulators": {"config", "data", "errors", "rendering"},
    "rollout": {
        *{"algorithms", "algorithms.on_policy", "bugs", "config", "data", "errors", "lazy", "policy", "recording"},
        "simulators",
    },
    "demonstrations": {"config", "data", "errors", "recording", "rollout", "simulators"},
    "serving": {"bugs", "data", "errors", "policy", "recording", "rollout"},
    "robots": {"data", "errors", "files", "joint_names", "recording", "rendering", "serving", "simulators", "terminal"},
    "evaluation": {"algorithms", "config", "data", "errors", "policy", "rollout"},
    "report": {"config", "errors", "evaluation", "files", "roles"},
    "learner": {"algorithms", "bugs", "config", "data", "dense", "errors", "files", "locks", "noise", "types"},
    "checkpointing": {
        *{"adapting", "algorithms", "config", "data", "errors", "files", "locks", "policy", "roles", "types"},
    },
    "run": {
        *{"algorithms", "checkpointing", "config", "data", "errors", "evaluation", "files", "learner", "progress"},
    },
    "experience": {
        *{"algorithms", "algorithms.on_policy", "checkpointing", "config", "data", "demonstrations", "errors"},
        *{"learner", "policy", "prefix_cache", "progress", "recording", "registry", "report", "rollout", "run"},
        *{"serving", "simulators", "types"},
    },
    "training": {
        *{"algorithms", "checkpointing", "config", "data", "demonstrations", "errors", "evaluation", "experience"},
        *{"hub", "joint_names", "lazy", "learner", "noise", "policy", "prefix_cache", "progress", "recording"},
        *{"registry", "report", "rollout", "run", "types"},
    },
    "hub": {
        *{"algorithms", "checkpointing", "config", "critic", "errors", "files", "policy", "pretrained"},
        *{"registry", "report", "roles"},
    },
    "comparison": {"checkpointing", "errors", "files", "learner", "terminal"},
    "lerobot_rl": {"algorithms", "checkpointing", "config", "data", "errors", "noise", "policy", "types"},
    "cli": {
        *{"algorithms", "bugs", "checkpointing", "comparison", "config", "demonstrations", "devices", "errors"},
        *{
            "evaluation",
            "files",
            "hints",
            "hub",
            "lazy",
            "locks",
            "pretrained",
            "progress",
            "recording",
            "registry",
            "report",
            "robots",
            "roles",
        },
        *{"roles", "rollout", "serving", "simulators", "terminal", "training"},
    },
    "__init__": {
        *{"algorithms", "config", "conformance", "critic", "dense", "deprecated", "distill", "errors", "evaluation"},
        *{"files", "flow", "hub", "lazy", "noise", "policy", "posterior", "pretrained", "registry", "training"},
        "types",
    },
}
"""Room of poco_vla -> rooms that it may import. Each of them is imported: an unused door is shut."""

PURE = {"torch", "jaxtyping"}
NUMBERS = PURE | {"numpy"}
THIRD_PARTY = {
    **dict.fromkeys(
        {*EQUATIONS, "algorithms", "algorithms.on_policy", "config", "roles", "conformance", "registry", "__init__"},
        PURE,
    ),
    "lazy": set(),
    "deprecated": set(),
    "bugs": set(),
    "hints": set(),
    "devices": {"torch"},
    "files": set(),
    "locks": {"filelock"},
    "terminal": {"rich"},
    "progress": {"rich"},
    "joint_names": set(),
    "pretrained": {"torch", "safetensors", "huggingface_hub", "peft"},
    "adapting": {"torch", "safetensors", "lerobot"},
    "checkpointing": NUMBERS | {"safetensors"},
    "data": NUMBERS | {"lerobot", "filelock", "pyarrow"},  # of a dataset's files what LeRobot does not read
    "prefix_cache": NUMBERS | {"filelock"},
    "recording": NUMBERS | {"lerobot", "pyarrow", "datasets", "av", "safetensors", "filelock"},
    "rendering": {"jaxtyping", "numpy", "gymnasium", "mujoco", "OpenGL"},
    "simulators": {"jaxtyping", "numpy", "lerobot", "gymnasium", "mujoco", "ogbench", "robosuite", "torch"},
    "rollout": NUMBERS | {"lerobot", "gymnasium", "ray", "av"},
    "demonstrations": {"numpy", "lerobot", "gymnasium", "h5py", "huggingface_hub", "filelock"},
    "serving": NUMBERS | {"lerobot", "websockets", "msgpack"},
    "robots": NUMBERS | {"lerobot", "draccus", "rich", "gymnasium", "safetensors", "filelock"},
    "evaluation": NUMBERS | {"rich"},
    "report": {"numpy", "pandas", "matplotlib", "jinja2", "rich"},
    "learner": NUMBERS | {"accelerate", "deepspeed"},
    "run": NUMBERS | {"accelerate"},
    "experience": NUMBERS | {"accelerate"},
    "training": NUMBERS | {"accelerate"},
    "comparison": {"rich"},
    "hub": PURE | {"safetensors", "huggingface_hub", "httpx", "peft"},
    "lerobot_rl": NUMBERS | {"lerobot"},
    "cli": {"tyro", "rich", "docstring_parser", "transformers"},  # --tiny makes an image encoder
}
"""Room of poco_vla -> packages beside the standard library."""

CYCLES = {
    frozenset({"simulators.ogbench_expert", "simulators.ogbench_gym", "simulators.ogbench_play"}),
    frozenset({"simulators.robosuite_expert", "simulators.robosuite_gym"}),
}
"""Files that import each other, and none beside these."""


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
    return room_of(".".join(path.relative_to(LIBRARY).with_suffix("").parts))


def room_of(name):
    """The room of a dotted name below poco_vla: the innermost that has a door of its own."""
    parts = name.split(".")
    return next((inner for n in (2, 1) if (inner := ".".join(parts[:n])) in DOORS), parts[0])


def own_rooms(path):
    """Rooms that a file imports; the package itself counts as "__init__", since importing from it runs all of that."""
    rooms = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "poco_vla":
            inside = parts[1] if len(parts) > 1 else ""
            known = inside and ((LIBRARY / inside).is_dir() or (LIBRARY / f"{inside}.py").is_file())
            rooms.add(room_of(".".join(parts[1:])) if known else "__init__")
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


def test_no_door_is_unused():
    used = {room(path): set() for path in LIBRARY_FILES}
    for path in LIBRARY_FILES:
        used[room(path)] |= own_rooms(path) - {room(path)}
    shut = {name: sorted(doors - used[name]) for name, doors in DOORS.items() if doors - used[name]}
    assert not shut, f"shut these doors: {shut}"


def test_files_import_each_other_in_no_circles():
    """By every import in them, those for type checkers and those in functions too."""
    names = {".".join(path.relative_to(LIBRARY).with_suffix("").parts): path for path in LIBRARY_FILES}
    edges = {}
    for name, path in names.items():
        tails = {found.removeprefix("poco_vla.") for found in imports(path)}
        edges[name] = {tail if tail in names else tail.rpartition(".")[0] for tail in tails} & names.keys() - {name}

    def reached(start):
        seen, waiting = set(), [start]
        while waiting:
            new = edges[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {name: reached(name) for name in names}
    circles = {frozenset(o for o in reach[name] if name in reach[o]) for name in names if name in reach[name]}
    assert circles == CYCLES


def test_accelerate_and_lerobot_are_imported_where_they_belong_and_nowhere_else():
    """Stated once more without the table: the rule that people rely on."""
    users = {
        package: {room(p) for p in LIBRARY_FILES if package in third_party(p)} for package in ("lerobot", "accelerate")
    }
    assert users["accelerate"] == {"learner", "run", "experience", "training"}
    above = {
        "adapting",
        "data",
        "recording",
        "simulators",
        "rollout",
        "demonstrations",
        "serving",
        "robots",
        "training",
        "lerobot_rl",
    }
    assert users["lerobot"] <= above


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
def test_a_plugins_package_never_imports_poco_vla_but_in_its_adapter_files(folder):
    """LeRobot imports lerobot_policy_* distributions by itself: they must work without poco_vla."""
    for path in folder.rglob("*.py"):
        if not path.name.startswith("adapter") and "tests" not in path.parts:
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
    assert not [path for path in reached if path.name.startswith("adapter")]


def test_importing_an_adapters_package_loads_neither_poco_vla_nor_its_adapter():
    """In one process: nothing of them may be there after all packages are."""
    packages = {next(p for p in folder.rglob("__init__.py")).parent.name for folder in distributions()}
    program = f"import sys, {', '.join(packages)}; print('loaded:', *sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    loaded = set(out.split("loaded:")[1].split())
    assert packages <= loaded
    assert not loaded & {"poco_vla", *(f"{package}.adapter" for package in packages)}


@pytest.mark.parametrize("path", named(ADAPTER_FILES))
def test_adapters_use_poco_vlas_public_names_only(path):
    import poco_vla

    for name in imports(path):
        if name.split(".")[0] == "poco_vla":
            modules = {"raw", "adapting", "pretrained"}
            public = {*poco_vla.__all__, *modules}
            inside = name.removeprefix("poco_vla.")
            assert name == "poco_vla" or inside in public or inside.split(".")[0] in modules, f"{name} is not public"


@pytest.mark.parametrize("path", named(RECIPES))
def test_recipes_use_the_library_through_its_configuration_and_command_line(path):
    assert own_rooms(path) <= {"cli", "config", "training", "__init__"}
    assert third_party(path) == set()
    most = 100 if path.name == "simulations.py" else 60  # the table of eleven runs
    assert len(path.read_text().splitlines()) <= most, "a recipe is read top to bottom in a minute"


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
