"""A script that calls `train` when it is imported would train again in each of its worker processes."""

import ast
import inspect
from pathlib import Path

from poco_vla.config import TrainConfig
from poco_vla.demonstrations.scripted import is_made, needs_processes
from poco_vla.errors import ConfigError


def check_main_guard(config: TrainConfig) -> None:
    """Raise ConfigError if a run that starts worker processes was called from the top level of the main script.

    Worker processes import that script. Python's own error for it comes from every worker, and is a long one.
    """
    if not _starts_processes(config):
        return
    for frame in inspect.stack(context=0):
        if frame.frame.f_globals.get("__name__") == "__main__" and frame.function == "<module>":
            script = Path(frame.filename)
            if script.is_file() and not _is_guarded(script, frame.lineno):
                raise ConfigError(
                    f"{script}, line {frame.lineno}, trains whenever it is imported, and worker processes import it: "
                    'put that line below `if __name__ == "__main__":`'
                )


def _starts_processes(config: TrainConfig) -> bool:
    """Return True if a run simulates in worker processes, or makes its demonstrations there."""
    if config.env is None or not config.env.in_process:
        return config.env is not None
    made = config.demonstrations
    return made is not None and needs_processes(config.env, made) and not is_made(config.env, made)


def _is_guarded(script: Path, line: int) -> bool:
    """Return True if a top-level `if` that asks for `__name__` holds a line, or if the file is no Python text."""
    try:
        tree = ast.parse(script.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return True
    for node in tree.body:
        if node.lineno <= line <= (node.end_lineno or node.lineno):
            test = ast.walk(node.test) if isinstance(node, ast.If) else ()
            return any(isinstance(part, ast.Name) and part.id == "__name__" for part in test)
    return True
