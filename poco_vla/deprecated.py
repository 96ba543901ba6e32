"""Old names, each with a warning, for one release."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "algorithm": "algorithms.poco",
    "camera_names": "adapting.camera_names",
    "checkpoint": "checkpointing.checkpoint",
    "evaluate": "evaluation",
    "heads": "pretrained.heads",
    "lora": "pretrained.lora",
    "naming": "adapting.naming",
    "normalization": "adapting.normalization",
    "policy_config": "pretrained.policy_config",
    "processors": "adapting.processors",
    "rollout.environments": "simulators",
    "rollout.recorder": "recording.recorder",
    "rollout.robots": "robots",
    "rollout.serving": "serving",
    "sources": "pretrained.sources",
    "testing": "conformance.kit",
    "train": "training",
    "weights": "adapting.weights",
}
"""Module of version 0.1 -> where it is now, both below `poco_vla`."""
RENAMED = {"Draws": "GlobalBatchRNG", "whole_folder": "atomic_folder"}
"""Public name of version 0.1 -> its name now."""


class MovedModules:
    """Import an old name as the module that it has become (a finder of `sys.meta_path`)."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """Return a spec whose loader gives the moved module, None for any other name."""
        if not name.startswith("poco_vla."):
            return None
        inside = name.removeprefix("poco_vla.")
        for old, new in MOVED.items():
            if inside == old or inside.startswith(f"{old}."):
                return ModuleSpec(name, _Loader(f"poco_vla.{new}{inside.removeprefix(old)}"))
        return None


class _Loader(Loader):
    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is {self.new} now; the old name goes with the next release", FutureWarning, 2)
        module = import_module(self.new)
        self.spec, self.loader = module.__spec__, module.__loader__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import machinery has just replaced by that of its old name."""
        module.__spec__, module.__loader__ = self.spec, self.loader


class _Package(ModuleType):
    """The package `poco_vla`, whose functions are not hidden by modules that once had their names."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in ("train", "evaluate") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> object:
        """Return a renamed object by its old name; called only if the module has no attribute of that name."""
        if name not in RENAMED:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        new = RENAMED[name]
        warnings.warn(f"{self.__name__}.{name} is {new} now; the old name goes with the next release", FutureWarning, 2)
        return getattr(self, new)


def install() -> None:
    """Let old names be imported."""
    sys.modules["poco_vla"].__class__ = _Package
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())  # type: ignore[arg-type]
