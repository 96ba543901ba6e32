"""Command lines: `poco-vla VERB`, and the entries of recipes."""

from typing import TYPE_CHECKING

from poco_vla.lazy import load_on_demand

if TYPE_CHECKING:
    from poco_vla.cli.program import main
    from poco_vla.cli.recipes import run_recipe, run_sweep

__getattr__, __dir__ = load_on_demand(__name__, {"program": ["main"], "recipes": ["run_recipe", "run_sweep"]})

__all__ = ["main", "run_recipe", "run_sweep"]
