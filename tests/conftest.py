"""The order of the tests, and what several files of trainer tests need."""

import gc
import multiprocessing
import os
import uuid

import pytest
import torch
from datasets import arrow_dataset
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


@pytest.fixture(scope="session", autouse=True)
def _no_hash_of_each_episode():
    """LeRobot makes each episode a `datasets.Dataset`, which hashes itself to name a cache that nobody reads here: a
    third of the time in which an episode is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow_dataset, "generate_fingerprint", lambda dataset: uuid.uuid4().hex)
        yield


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


def pytest_runtest_teardown():
    """Undo what libraries do to the whole process: LeRobot's commands switch TF32 on; SVT-AV1, which LeRobot calls, as
    root puts its thread ahead of all others of the machine."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    if hasattr(os, "sched_setscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The tests of a file run in one worker, so that what they share is made once; those that name a group are with
    their group instead. Files and groups with a slow test come first: else a minute's file that comes last keeps one
    worker busy while the others have nothing left."""
    slow = set()
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        if item.get_closest_marker("slow") is not None:
            slow.add(group_of(item))
    items.sort(key=lambda item: group_of(item) not in slow)


def group_of(item):
    (name,) = item.get_closest_marker("xdist_group").args
    return name
