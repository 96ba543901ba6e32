"""A script without a main guard is told so before its worker processes train too."""

import runpy

import pytest

from poco_vla import EnvSpec, TrainConfig
from poco_vla.config import DemonstrationConfig
from poco_vla.demonstrations.scripted import demonstrations_root
from poco_vla.errors import ConfigError

CALL = "from poco_vla.training.main_guard import check_main_guard as check\n"


def run(tmp_path, text, name="__main__", demonstrations=None, **env):
    path = tmp_path / "script.py"
    path.write_text(CALL + text)
    config = TrainConfig(env=EnvSpec(**env), demonstrations=demonstrations)
    runpy.run_path(str(path), {"config": config}, run_name=name)


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


def test_workers_that_make_the_demonstrations_of_an_environment_in_this_process_count(tmp_path):
    """Two of them are worth their start for eight episodes, one alone makes four here."""
    many, few = (DemonstrationConfig(workers=2, episodes=n, root=tmp_path / "made") for n in (8, 4))
    with pytest.raises(ConfigError, match="trains whenever it is imported"):
        run(tmp_path, "check(config)", demonstrations=many, in_process=True)
    run(tmp_path, "check(config)", demonstrations=few, in_process=True)
    info = demonstrations_root(EnvSpec(), many) / "meta" / "info.json"
    info.parent.mkdir(parents=True)
    info.touch()
    run(tmp_path, "check(config)", demonstrations=many, in_process=True)
