"""A script without a main guard is told so before its worker processes train too."""

import runpy

import pytest

from poco_vla import EnvSpec, TrainConfig
from poco_vla.errors import ConfigError

CALL = "from poco_vla.training.main_guard import check_main_guard as check\n"


def run(tmp_path, text, name="__main__", **env):
    path = tmp_path / "script.py"
    path.write_text(CALL + text)
    runpy.run_path(str(path), {"config": TrainConfig(env=EnvSpec(**env))}, run_name=name)


@pytest.mark.parametrize(
    "text", ["check(config)", "def f():\n    check(config)\n\nf()", "if config:\n    check(config)"]
)
def test_a_call_at_the_top_level_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match=r"script.py, line \d, trains whenever it is imported.*if __name__ =="):
        run(tmp_path, text)


def test_what_workers_do_not_run_again_is_not_refused(tmp_path):
    """Below the guard; in a module; without workers."""
    run(tmp_path, 'if __name__ == "__main__":\n    check(config)')
    run(tmp_path, "check(config)", name="module")
    run(tmp_path, "check(config)", in_process=True)
