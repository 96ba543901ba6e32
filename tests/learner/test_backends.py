"""The learner spread over processes, as its user starts it: `accelerate launch --config_file recipes/accelerate/*`."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from launched import copy_run
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from pointmass_run import small
from safetensors.torch import load_file
from vla_run import assert_same_updates, prepare, updates, vla

from poco_vla.config import InteractionConfig, PrefixConfig, to_json
from poco_vla.errors import ConfigError
from poco_vla.training import train

HERE = Path(__file__).parents[1]
SHIPPED = HERE.parent / "recipes" / "accelerate"
pytestmark = [pytest.mark.xdist_group("launched"), pytest.mark.usefixtures("fresh_accelerate")]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("backends")


def run_of(root, name, **changes):
    """All that a backend may do differently: clipping of each group, calibration, acting by the critic."""
    config = small(root / name, root / "data", checkpoint_every=16, checkpoint_keep_every=16, best_of_n=2)
    optim, poco = replace(config.optim, max_grad_norm=0.5), replace(config.poco, zeta="auto")
    return replace(config, optim=optim, poco=poco, **changes)


def each_of(root, name):
    """The same, with each process acting."""
    return run_of(root, name, interaction=InteractionConfig(ranks="each"))


def in_parts(config):
    """Eight rows of a batch of a process as 3, 3 and 2."""
    return replace(config, optim=replace(config.optim, micro_batch=3))


def write_jobs(root, *runs, vla_of):
    jobs = root / f"{runs[0][0].output_dir.name}.json"
    todo = [{"config": to_json(c), "since": since and str(since)} for c, since in runs]
    if vla_of is not None:
        todo.insert(0, {"config": to_json(vla(root / "vla", root / vla_of)), "updates": True})
    jobs.write_text(json.dumps(todo))
    return jobs


def start(root, kind, num_processes, *runs, vla_of=None, options=()):
    """`accelerate launch` with a configuration as shipped; `runs` are (configuration, run that it goes on from). Where
    `vla` has made its own updates, these processes make them as well."""
    jobs = write_jobs(root, *runs, vla_of=vla_of)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", SHIPPED / f"{kind}.yaml"]
    return subprocess.Popen(
        [str(word) for word in (*command, "--num_processes", num_processes, *options, HERE / "launched.py", jobs)],
        # Python's compiled files are kept: DeepSpeed imports some 1,500 of them.
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch(root, kind, num_processes, *runs, vla_of=None):
    """The same, to its end."""
    process = start(root, kind, num_processes, *runs, vla_of=vla_of)
    output, _ = process.communicate()
    assert process.returncode == 0, output


def meet(root, *runs, vla_of):
    """Two processes as the launcher starts them for ddp_cpu.yaml, without the seconds that three fresh interpreters
    take. `make test-all` launches them, and test_bugs.py two of its own."""
    jobs = write_jobs(root, *runs, vla_of=vla_of)
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "TORCHELASTIC_RUN_ID": "none"}
    processes = [
        forked.Popen(
            [sys.executable, HERE / "launched.py", jobs],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, output


def metrics_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_run(run, expected):
    """Every logged figure, the policies, the last checkpoint and the guard's head, but for the order of float32 sums.
    (Losses and norms differed by 3e-7 at most when this was written.)"""
    ours, theirs = metrics_of(run), metrics_of(expected)
    assert {line["stage"] for line in ours} == {"sft", "warmup", "online"}
    for one, two in zip(ours, theirs, strict=True):
        assert one.pop("stage") == two.pop("stage")
        assert one == pytest.approx(two, rel=1e-5)
    last = sorted((expected / "checkpoints").iterdir())[-1].name
    names = ("policy/model", "best/model", "good_head", f"checkpoints/{last}/weights", f"checkpoints/{last}/optimizer")
    for name in names:
        ours, theirs = load_file(run / f"{name}.safetensors"), load_file(expected / f"{name}.safetensors")
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-5, msg=f"{name} {key}")
    episodes = [(path / "episodes.jsonl").read_text() for path in (run, expected)]
    assert episodes[0] == episodes[1]


@pytest.fixture(scope="module")
def one(root):
    """The run in one process, without a launcher."""
    train(run_of(root, "one"))
    AcceleratorState._reset_state(reset_partial_state=True)
    return root / "one"


@pytest.fixture(scope="module")
def vla_one(root):
    """Updates of a VLA whose backbone is frozen, in this process."""
    (root / "vla").mkdir()
    prepare(root / "vla")
    updates(vla(root / "vla", root / "vla_one"))
    AcceleratorState._reset_state(reset_partial_state=True)
    return root / "vla_one"


@pytest.fixture(scope="module")
def exhaustive_only(request):
    """Return runs that only the exhaustive tests look at, none where no such test runs."""
    asked = any(item.get_closest_marker("exhaustive") for item in request.session.items)
    return lambda *runs: runs if asked else ()


@pytest.fixture(scope="module")
def ddp(root, one, vla_one, exhaustive_only):
    stored = PrefixConfig(mode="on", disk_bytes=10**7, folder=root / "prefixes")
    runs = (
        (in_parts(run_of(root, "ddp")), None),
        (run_of(root, "ddp_since_one"), one),
        *exhaustive_only(
            (in_parts(run_of(root, "ddp_stored", prefixes=stored)), None), (each_of(root, "ddp_each"), None)
        ),
    )
    if exhaustive_only(True):
        launch(root, "ddp_cpu", 2, *runs, vla_of="vla_ddp")
    else:
        meet(root, *runs, vla_of="vla_ddp")
    return root / "ddp"


@pytest.fixture(scope="module")
def fsdp(root, ddp, exhaustive_only):
    runs = (
        (in_parts(run_of(root, "fsdp")), None),
        (run_of(root, "fsdp_since_ddp"), ddp),
        *exhaustive_only((each_of(root, "fsdp_each"), None)),
    )
    launch(root, "fsdp2", 2, *runs, vla_of="vla_fsdp")
    return root / "fsdp"


@pytest.fixture(scope="module")
def zero(root, fsdp, exhaustive_only):
    pytest.importorskip("deepspeed")
    runs = (
        (in_parts(run_of(root, "zero")), None),
        (run_of(root, "zero_since_fsdp"), fsdp),
        *exhaustive_only((each_of(root, "zero_each"), None)),
    )
    launch(root, "zero2", 2, *runs, vla_of="vla_zero")
    return root / "zero"


@slow
@pytest.mark.parametrize("run", ["ddp", "ddp_since_one"])
def test_ddp_on_two_processes_is_the_run_of_one(run, root, one, ddp):
    assert_same_run(root / run, one)


@pytest.mark.exhaustive
@slow
def test_processes_with_a_store_each_make_the_run_without_bit_for_bit(root, ddp):
    stored = root / "ddp_stored"
    assert metrics_of(stored) == metrics_of(ddp)
    for name in ("episodes.jsonl", "policy/model.safetensors"):
        assert (stored / name).read_bytes() == (ddp / name).read_bytes()
    assert json.loads((stored / "result.json").read_text())["prefixes"]["hits"] > 0
    (folder,) = (root / "prefixes").iterdir()
    assert sorted(path.name for path in folder.glob("*.data")) == ["0.data", "1.data"]
    assert all(path.stat().st_size > 1000 for path in folder.glob("*.data"))


@pytest.mark.exhaustive
@slow
@pytest.mark.parametrize("run", ["fsdp", "fsdp_since_ddp"])
def test_fsdp_on_two_processes_is_the_run_of_one(run, root, one, fsdp):
    assert_same_run(root / run, one)


@pytest.mark.exhaustive
@slow
@pytest.mark.parametrize("run", ["zero", "zero_since_fsdp"])
def test_zero_on_two_processes_is_the_run_of_one(run, root, one, zero):
    assert_same_run(root / run, one)


@slow
@pytest.mark.parametrize(
    "backend", ["ddp", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("fsdp", "zero"))]
)
def test_a_vla_trains_its_head_as_in_one_process_and_its_backbone_stays(backend, root, vla_one, request):
    """The processes themselves looked at their weights; see launched.py."""
    request.getfixturevalue(backend)
    assert_same_updates(root / f"vla_{backend}", vla_one)


@pytest.mark.exhaustive
@slow
def test_one_process_goes_on_from_zero(root, one, zero):
    copy_run(zero, root / "one_since_zero", 40)
    train(replace(run_of(root, "one_since_zero"), resume=True))
    assert_same_run(root / "one_since_zero", one)


@pytest.mark.exhaustive
@slow
def test_ddp_on_four_processes_is_the_run_of_one(root, one, zero):
    launch(root, "ddp_cpu", 4, (run_of(root, "four"), None), (run_of(root, "four_since_zero"), zero))
    assert_same_run(root / "four", one)
    assert_same_run(root / "four_since_zero", one)


@pytest.mark.exhaustive
@slow
def test_ddp_on_two_machines_is_the_run_of_one(root, one):
    """Two launchers on this machine, as each would be on its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ("--main_process_ip", "127.0.0.1", "--main_process_port", port)
    runs = [(run_of(root, "machines"), None)]
    machines = [start(root, "ddp_machines", 2, *runs, options=(*place, "--machine_rank", i)) for i in range(2)]
    outputs = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    assert_same_run(root / "machines", one)


@pytest.mark.exhaustive
@slow
def test_the_configuration_of_one_process_is_one_process(root, one):
    launch(root, "one_process", 1, (run_of(root, "configured", online_steps=0), None))
    assert metrics_of(root / "configured") == [line for line in metrics_of(one) if line["stage"] == "sft"]


# -- who acts ---------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@slow
@pytest.mark.parametrize("backend", ["fsdp", "zero"])
def test_each_process_acts_under_a_sharded_learner_as_under_ddp(backend, root, zero):
    assert_same_run(root / f"{backend}_each", root / "ddp_each")


@pytest.mark.exhaustive
@slow
def test_each_process_acts_repeats_bit_for_bit_and_resumes(root):
    """Two processes with three environments each: all episodes are on disk, in the same order again, from seeds that
    are all different; beside the learner, too, none is lost."""
    each, beside = InteractionConfig(ranks="each"), InteractionConfig(ranks="each", mode="asynchronous", ahead=60)
    runs = [run_of(root, f"each_{i}", interaction=each, online_steps=900) for i in range(3)]
    asynchronous = run_of(root, "each_beside", interaction=beside, online_steps=900)
    launch(root, "ddp_cpu", 2, (runs[0], None), (runs[1], None), (runs[2], root / "each_0"), (asynchronous, None))
    for run in (root / "each_1", root / "each_2"):
        assert metrics_of(run) == metrics_of(root / "each_0")
        assert (run / "episodes.jsonl").read_text() == (root / "each_0" / "episodes.jsonl").read_text()
        policies = [(path / "policy/model.safetensors").read_bytes() for path in (run, root / "each_0")]
        assert policies[0] == policies[1]
    for run in (root / "each_0", root / "each_beside"):
        dataset = LeRobotDataset("local/episodes", root=run / "episodes")
        lines = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
        columns = dataset.hf_dataset.with_format("numpy")[:]
        assert np.bincount(columns["episode_index"]).tolist() == [line["length"] for line in lines]
        starts = columns["observation.state"][columns["frame_index"] == 0]
        assert len(np.unique(starts, axis=0)) == len(lines) > 6
        result = json.loads((run / "result.json").read_text())
        assert 900 <= result["env_steps"] < 900 + 6 * 2 * 60
        assert dataset.num_frames <= result["env_steps"]


# -- what is shipped and what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["FSDP", "DEEPSPEED"])
def test_a_backend_that_would_be_left_out_is_refused(what, tmp_path, monkeypatch):
    """Under ACCELERATE_USE_CPU, which drops it without a word, and in a process that no launcher started."""
    monkeypatch.setenv(f"ACCELERATE_USE_{what}", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match=r"asked for.*Unset that variable"):
        train(small(tmp_path / "run", tmp_path))


@pytest.mark.parametrize("path", sorted(SHIPPED.iterdir()), ids=lambda path: path.stem)
def test_a_shipped_configuration_is_read_and_says_what_it_is_for(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= config.num_machines >= 1
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("mode", ["remote", "ray"])
def test_robots_and_a_cluster_are_one_processs(mode):
    with pytest.raises(ConfigError, match=f'"each", but with mode "{mode}" one process deals with all that act'):
        InteractionConfig(mode=mode, ranks="each")
