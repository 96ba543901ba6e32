"""Updates in parts: what they take, what they change, and what is said where not even the smallest fits."""

import pytest
import torch
from accelerate.state import AcceleratorState
from pointmass_run import small

from poco_vla.algorithms import STAGES
from poco_vla.config import DatasetConfig, OptimConfig, PocoConfig, PrefixConfig, num_bytes
from poco_vla.demonstrations.scripted import ensure_demonstrations
from poco_vla.errors import ConfigError, NonFiniteError
from poco_vla.learner.finite_check import FiniteWatch
from poco_vla.learner.memory import CPU_ROWS, peak_bytes
from poco_vla.training import Trainer

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


@pytest.mark.parametrize("stage", STAGES)
def test_an_update_keeps_to_the_memory_it_is_given(stage, trainer, monkeypatch):
    """Measured again, weights and moments added: below the budget, and above the half of it, so that none is wasted."""
    free = trainer(memory="1GB")
    budget = free.updater.budget
    batch = free.updater.batches.draw()
    plan = free.updater.algorithm.draw_noise(batch, stage)
    assert budget.part(batch, plan, stage) == 256
    most = peak_bytes(lambda: free.updater.learner.measure(batch, stage, plan), CPU)
    held = budget._held(batch, plan)

    given = held + 0.4 * most
    bound = trainer(memory=f"{given / 1e6:.6f}MB")
    size = bound.updater.budget.part(batch, plan, stage)
    assert 1 <= size < 256
    monkeypatch.setattr(bound.updater.algorithm, "draw_noise", lambda *_: plan)
    took = held + peak_bytes(lambda: bound.updater.learner.gradients(batch, stage, bound.updater.budget.part), CPU)
    assert 0.5 * given < took <= given


def test_prefixes_that_are_read_ahead_are_counted(trainer):
    """256 states and 256 next ones, of 4 numbers each; as many again for the next batch."""
    held = {}
    for mode in ("off", "on"):
        made = trainer(memory="1GB", prefixes=PrefixConfig(mode=mode))
        batch = made.updater.batches.draw()
        held[mode] = made.updater.budget._held(batch, made.updater.algorithm.draw_noise(batch, "online"))
        observed = sum(x.nbytes for x in (*batch.obs.values(), *batch.next_obs.values()) if isinstance(x, torch.Tensor))
        held[mode] -= observed
    assert held["on"] - held["off"] == 2 * 512 * 4 * 4


def test_the_part_that_fits_is_told(trainer, capfd):
    made = trainer(memory="1GB")
    made.display.console.quiet = False
    updated(made, ("sft",))
    told = capfd.readouterr()
    assert "sft: 256 of 256 transitions at once fit 1GB" in told.out
    assert "Profiler" not in told.err
    with pytest.raises(ConfigError, match="give one of them"):
        trainer(memory="1GB", optim=OptimConfig(micro_batch=4))


def test_a_memory_that_holds_no_update_is_refused_with_what_takes_it(trainer):
    with pytest.raises(
        ConfigError, match=r"memory is 10KB, but weights, .* take \d+KB and one.* \(at least [\d.]+[KM]B\)"
    ):
        updated(trainer(memory="10KB"), ("sft",))


@pytest.mark.parametrize(("text", "number"), [("24GB", 24e9), ("22.5 GiB", 22.5 * 2**30), ("500mb", 5e8)])
def test_amounts_of_memory(text, number):
    assert num_bytes(text) == number


@pytest.mark.parametrize("text", ["", "much", "24", "24G", "-1GB", "0GB", "1e9"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(ConfigError, match="is no amount of memory; write it like 24GB"):
        num_bytes(text)


def test_peak_of_tensors_by_hand():
    """Two tensors of 4,000 bytes at once, then one of 8,000: the most is 8,000, and what was there before is not
    counted."""
    before = torch.ones(10_000)

    def work():
        one = before[:1000] + 1
        two = one * 2
        del one, two
        return before[:2000] * 3

    assert peak_bytes(work, CPU) == pytest.approx(8000, abs=256)


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
