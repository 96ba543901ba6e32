"""Updates in parts: what they take, what they change, and what is said where not even the smallest fits."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from pointmass_run import small

from poco_vla.config import DatasetConfig, OptimConfig, PocoConfig, PrefixConfig, num_bytes
from poco_vla.demonstrations.scripted import ensure_demonstrations
from poco_vla.dense import CPU_ROWS
from poco_vla.errors import ConfigError, NonFiniteError
from poco_vla.learner.finite_check import FiniteWatch
from poco_vla.learner.memory import Budget
from poco_vla.noise import UpdateNoise
from poco_vla.training import Trainer
from poco_vla.types import ChunkBatch

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def trainer(tmp_path, data):
    """Builds trainers of 256 states with 32 candidates of 5 steps: activations far beyond weights. Closes them."""
    template = small(tmp_path, data)
    root = ensure_demonstrations(template.env, template.demonstrations)
    usual = {
        "dataset": DatasetConfig(repo_id="local/pointmass", root=root),
        "poco": PocoConfig(num_candidates=32, critic_hidden=(16, 16), zeta=0.8),
        "optim": OptimConfig(batch_size=256),
        "env": None,
        "demonstrations": None,
        "online_steps": 0,
    }
    made = []

    def build(**changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        made.append(Trainer(small(tmp_path / f"run{len(made)}", data, **(usual | changes))))
        made[-1].display.console.quiet = True
        return made[-1]

    yield build
    for one in made:
        one.close()


def updated(trainer, stages=("sft", "warmup", "online", "online")):
    """Weights after some updates, and the largest part of each."""
    seen = []
    forward = trainer.updater.algorithm.forward
    trainer.updater.algorithm.forward = lambda batch, *rest: seen.append(len(batch)) or forward(batch, *rest)
    with trainer.display.stage("by hand", len(stages)) as bar:
        for stage in stages:
            trainer.updater.update(stage, bar)
    return [p.detach().clone() for p in trainer.updater.algorithm.parameters()], seen


def test_updates_in_parts_give_the_weights_of_updates_in_one(trainer):
    """To float32's rounding: 2e-6 after four Adam steps of up to 1e-3. What is drawn does not depend on the parts."""
    whole, one_go = updated(trainer(optim=OptimConfig(batch_size=256, micro_batch=256)))
    in_parts, sizes = updated(trainer(optim=OptimConfig(batch_size=256, micro_batch=50)))
    assert one_go == [256] * 4
    assert sizes == [42, 43, 43, 42, 43, 43] * 4
    torch.testing.assert_close(in_parts, whole, rtol=0, atol=2e-6)


def test_a_cpu_takes_parts_that_suit_its_caches_where_there_are_many_candidates(trainer):
    _, sizes = updated(trainer(), ("sft", "online"))
    assert sizes[0] == 256
    assert sum(sizes[1:]) == 256
    assert max(sizes[1:]) <= CPU_ROWS // 33 == 62


def fitting(budget, stage, memory):
    """Size of a micro-batch of 256 transitions in so much memory."""
    flags, numbers = torch.zeros(256, dtype=torch.bool), torch.zeros(256)
    chunks = torch.zeros(256, 1, 1), torch.ones(256, 1, dtype=torch.bool)
    batch = ChunkBatch({}, {}, *chunks, numbers, numbers, is_demo=flags, is_success=flags)
    return budget._fitting(batch, UpdateNoise(), stage, memory)


def budget_of(peak, held=1000):
    """A budget on a device where a micro-batch of n transitions takes `peak(n)` bytes beside `held`; what it says."""
    budget, said = Budget.__new__(Budget), []
    budget.config = SimpleNamespace(memory="what is given")
    budget.accelerator = SimpleNamespace(device=CPU, gather=lambda sizes: sizes)
    budget.say = said.append
    budget._held, budget._peak = lambda: held, lambda batch, noise, stage, size: peak(size)
    return budget, said


PEAKS = {
    "linear": lambda n: 100 * n,
    "fixed part": lambda n: 5000 + 70 * n,
    "largest of two": lambda n: max(4000 + 10 * n, 90 * n),
}


@pytest.mark.parametrize("share", [0.3, 0.4, 0.9])
@pytest.mark.parametrize("name", PEAKS)
def test_an_update_keeps_to_the_memory_it_is_given(name, share):
    """Below the memory, and above the half of it, so that none is wasted. tests/training/test_gpu.py measures a GPU."""
    peak = PEAKS[name]
    given = int(1000 + share * peak(256))
    size = fitting(budget_of(peak)[0], "online", given)
    assert 1 <= size < 256
    assert 0.5 * given < 1000 + peak(size) <= given


def test_the_part_that_fits_is_told():
    budget, said = budget_of(PEAKS["linear"])
    assert fitting(budget, "sft", 10**6) == 256
    assert said == ["sft: 256 of 256 transitions at once fit what is given"]


def test_all_processes_take_the_smallest_size():
    budget, _ = budget_of(PEAKS["linear"])
    budget.accelerator.gather = lambda sizes: torch.cat([sizes, torch.tensor([7])])
    assert fitting(budget, "sft", 10**6) == 7


def test_a_memory_that_holds_no_update_is_refused_with_what_takes_it():
    """1,000 bytes held and 100,000 of one transition: 101,000 / 0.95."""
    budget, _ = budget_of(lambda n: 100_000 * n)
    with pytest.raises(ConfigError, match=r"take 1KB and one transition 100KB .* \(at least 107KB\)"):
        fitting(budget, "sft", 50_000)


def test_what_is_held_is_weights_batch_moments_to_come_and_prefixes(monkeypatch):
    """10,000 bytes on the device, 2,000 of them of others; 2 moments of 50 floats; 300 bytes of prefixes."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10_000)
    module = torch.nn.ParameterList([torch.zeros(50), torch.nn.Parameter(torch.zeros(7), requires_grad=False)])
    budget = Budget.__new__(Budget)
    budget.algorithm, budget.optimizer = module, SimpleNamespace(state={})
    budget.accelerator = SimpleNamespace(device=CPU)
    budget.beside, budget.prefixes = lambda: 2000, lambda: 300
    assert budget._held() == 8000 + 2 * 50 * 4 + 300
    budget.optimizer.state[module[0]] = {}
    assert budget._held() == 8300


def test_prefixes_that_are_read_ahead_are_counted(trainer):
    """256 states and 256 next ones, of 4 numbers each."""
    found = {}
    for mode in ("off", "on"):
        made = trainer(prefixes=PrefixConfig(mode=mode))
        made.updater.batches.draw()
        found[mode] = made.updater.budget.prefixes()
    assert found == {"off": 0, "on": 512 * 4 * 4}


def test_memory_is_refused_on_a_cpu_and_beside_a_size(trainer):
    with pytest.raises(ConfigError, match="memory is 1GB, which is measured on a GPU, and this run is on cpu"):
        trainer(memory="1GB")
    with pytest.raises(ConfigError, match="give one of them"):
        trainer(memory="1GB", optim=OptimConfig(micro_batch=4))


@pytest.mark.parametrize(("text", "number"), [("24GB", 24e9), ("22.5 GiB", 22.5 * 2**30), ("500mb", 5e8)])
def test_amounts_of_memory(text, number):
    assert num_bytes(text) == number


@pytest.mark.parametrize("text", ["", "much", "24", "24G", "-1GB", "0GB", "1e9"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(ConfigError, match="is no amount of memory; write it like 24GB"):
        num_bytes(text)


# -- losses that are not finite, seen late ----------------------------------------------------------------------------


def steps(losses, *, late, processes=1):
    """A weight that Adam moves by 0.1 per step, and the watch over these losses, which are those of every process; the
    weight, and what was raised."""
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    watch = FiniteWatch(optimizer, lambda flag: processes * flag, late=late)
    values = []
    try:
        for i, loss in enumerate(losses):
            weight.grad = torch.full((), float("nan") if loss != loss else -1.0)
            watch.see(torch.tensor(loss), lambda i=i: NonFiniteError(f"update {i}"))
            optimizer.step()
            values.append(weight.item())
        watch.look()
    except NonFiniteError as error:
        return values, str(error)
    return values, None


@pytest.mark.parametrize("late", [False, True])
def test_finite_losses_pass(late):
    values, error = steps([1.0, 2.0, 3.0], late=late)
    assert values == pytest.approx([0.1, 0.2, 0.3], abs=1e-4)
    assert error is None


def test_a_loss_that_is_not_finite_stops_before_its_step():
    values, error = steps([1.0, float("nan"), 3.0], late=False)
    assert values == pytest.approx([0.1], abs=1e-4)
    assert error == "update 1"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_seen_late_it_still_changes_nothing_nor_does_the_update_after_it(bad, processes):
    """The update after it is under way when the host looks; the one that was not finite is the one that is told."""
    values, error = steps([1.0, bad, 3.0, 4.0], late=True, processes=processes)
    assert values == pytest.approx([0.1, 0.1], abs=1e-4)
    assert error == "update 1"


def test_the_last_loss_of_a_stage_is_looked_at_too():
    values, error = steps([1.0, float("nan")], late=True)
    assert values == pytest.approx([0.1, 0.1], abs=1e-4)
    assert error == "update 1"
