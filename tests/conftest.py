"""The order of the tests, and what several files of trainer tests need."""

import gc
import multiprocessing

import pytest
from shape_checks import check_again

SIMULATORS = (
    "lerobot.envs.configs",
    "poco_vla.simulators.ogbench_gym",
    "ogbench.manipspace.envs.manipspace_env",
    "poco_vla.simulators.robosuite_gym",
)
"""Imported once by each worker's fork server, which the first test that needs one starts, for all that come after."""


@pytest.fixture(scope="session", autouse=True)
def _one_fork_server_for_all_simulators():
    preload = multiprocessing.set_forkserver_preload
    multiprocessing.set_forkserver_preload = lambda names: preload(list(dict.fromkeys([*names, *SIMULATORS])))
    yield
    multiprocessing.set_forkserver_preload = preload


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder of the point mass's scripted demonstrations, made once by each worker."""
    return tmp_path_factory.mktemp("demonstrations")


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one mixed precision per process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports make a million objects that live as long as the process: no collection looks at them, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup():
    check_again()


def pytest_collection_modifyitems(items):
    """Slow ones first, and of these the groups that one worker runs alone: else a minute's test that comes last keeps
    one worker busy while the others have nothing left. Where there is no difference, files stay in their order."""

    def rank(item):
        slow = item.get_closest_marker("slow") is not None
        return 0 if slow and item.get_closest_marker("xdist_group") else 1 if slow else 2

    items.sort(key=rank)
