"""The guard against collapse: it acts on a significant fall only, and training goes on from a good head."""

import json

import numpy as np
import pytest
import torch
from pointmass_run import small

from poco_vla.config import GuardConfig
from poco_vla.errors import ConfigError
from poco_vla.evaluation import wilson_interval
from poco_vla.training import Trainer
from poco_vla.training.guard import CollapseGuard, Z


def fed(outcomes, reference=(35, 50), **config):
    """A guard and its verdicts on a row of episodes, 1 a success."""
    guard = CollapseGuard(GuardConfig(**config), reference)
    return guard, [guard.add(bool(outcome)) for outcome in outcomes]


def test_a_significant_fall_is_a_collapse_and_a_dip_is_not():
    """Of 35 of 50 the 99.9 % interval begins at 47 %; that of 2 of 20 ends at 42 %, that of 3 of 20 at 48 %."""
    assert wilson_interval(2, 20, Z)[1] < wilson_interval(35, 50, Z)[0] < wilson_interval(3, 20, Z)[1]
    assert fed([1] * 2 + [0] * 18)[1][-1] == "collapsed"
    assert fed([1] * 3 + [0] * 17)[1][-1] == "keep on"


def test_a_policy_that_stays_as_it_was_is_hardly_ever_taken_for_a_collapse():
    """A thousand episodes at the rate of the evaluation after SFT, 200 times: false alarms in at most 1 % of them."""
    rng = np.random.default_rng(0)
    alarms = sum("collapsed" in fed(rng.random(1000) < 0.7)[1] for _ in range(200))
    assert alarms <= 2


def test_a_policy_that_falls_to_nothing_is_found_within_a_window():
    """From 40 % of 200 to 0: 50 good episodes, then failures alone."""
    rng = np.random.default_rng(0)
    verdicts = fed([*(rng.random(50) < 0.4), *[0] * 50], reference=(80, 200))[1]
    assert "collapsed" in verdicts[50:]
    assert "collapsed" not in verdicts[:50]


def test_nothing_is_said_of_few_episodes_or_without_a_reference():
    assert set(fed([0] * 19)[1]) == {"keep on"}
    assert set(fed([0] * 40, reference=None)[1]) == {"keep on"}
    assert set(fed([0] * 40, action="off")[1]) == {"keep on"}


def test_a_policy_that_never_succeeded_cannot_collapse():
    """As in runs that begin untrained."""
    assert "collapsed" not in fed([0] * 200, reference=(0, 50))[1]


def test_a_head_is_kept_once_a_window_and_only_while_success_is_no_lower_than_after_sft():
    """35 of 50 is 70 %: 14 of 20."""
    verdicts = fed([1] * 60, window=20)[1]
    assert [i + 1 for i, verdict in enumerate(verdicts) if verdict == "good"] == [20, 40, 60]
    assert "good" not in fed([1] * 13 + [0] * 7, window=20)[1]
    assert fed([1] * 14 + [0] * 6, window=20)[1][-1] == "good"


def test_after_a_restoration_it_looks_at_new_episodes_alone_and_gives_up_in_the_end():
    guard, verdicts = fed([0] * 20, max_restores=2)
    assert verdicts[-1] == "collapsed"
    assert guard.restored()
    assert [guard.add(False) for _ in range(20)].index("collapsed") == 19
    assert guard.restored()
    assert not guard.restored(), "the third is one too many"
    assert not fed([0] * 20, action="stop")[0].restored()


def test_of_a_suite_the_mean_over_tasks_counts_and_not_the_task_with_the_most_episodes():
    """15 episodes of a task that succeeds and 5 of one that never does: 75 % of the episodes, 50 % over tasks, which
    is below the 70 % after SFT: no head is kept."""
    guard = CollapseGuard(GuardConfig(window=20), (35, 50))
    verdicts = [guard.add(task == "easy", task) for task in ["easy", "easy", "hard", "easy"] * 5]
    assert "good" not in verdicts
    assert "good" in [guard.add(success=True, task=task) for task in ["easy", "hard"] * 10]


def test_a_state_of_an_older_version_knows_of_one_task():
    guard = CollapseGuard(GuardConfig(window=20))
    guard.load({"reference": [35, 50], "recent": [True] * 19, "since_good": 19, "restores": 0})
    assert guard.add(success=True) == "good"


def test_its_state_goes_through_json():
    guard, _ = fed([1, 0, 1] * 9)
    other = CollapseGuard(GuardConfig())
    other.load(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state()
    assert other.reference == guard.reference


@pytest.mark.parametrize(
    "values", [{"least": 4}, {"window": 19}, {"beta_factor": 0.0}, {"beta_factor": 2.0}, {"max_restores": -1}]
)
def test_values_that_make_no_sense_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        GuardConfig(**values)


@pytest.fixture
def trainer(tmp_path, data):
    made = Trainer(small(tmp_path / "run", data, guard=GuardConfig(window=8, least=8, max_restores=1)))
    yield made
    made.close()


def head_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.updater.actor_parameters])


def test_a_collapse_brings_the_good_head_back_with_a_smaller_beta_and_a_second_one_ends_the_run(trainer):
    trainer.recovery.guard.reference = (50, 50)
    trainer.recovery.keep_head()
    good, beta = head_of(trainer).clone(), trainer.updater.algorithm.beta.item()
    with torch.no_grad():
        for p in trainer.updater.actor_parameters:
            p.add_(1.0)
    for _ in range(8):
        trainer.recovery.watch(False)
    torch.testing.assert_close(head_of(trainer), good, rtol=0, atol=0)
    assert trainer.updater.algorithm.beta.item() == 0.5 * beta
    assert not trainer.progress.stopped
    assert all(not trainer.updater.optimizer.state.get(p) for p in trainer.updater.actor_parameters)
    for _ in range(8):
        trainer.recovery.watch(False)
    assert trainer.progress.stopped


def test_a_run_that_collapses_ends_with_the_head_it_was_restored_to(tmp_path, data):
    """Its reference is made one that nothing can meet: two windows of failures, and the policy is that after SFT."""
    config = small(tmp_path / "run", data, guard=GuardConfig(window=8, least=8, max_restores=1), online_steps=6000)
    trainer = Trainer(config)
    evaluate = trainer._evaluate

    def flattering(label, **options):
        evaluate(label, **options)
        trainer.progress.evaluations[0] |= {"successes": 200, "episodes": 200}

    trainer._evaluate = flattering
    try:
        trainer.run()
    finally:
        trainer.close()
    result = json.loads((config.output_dir / "result.json").read_text())
    assert result["stopped_early"]
    assert result["restored_heads"] == 2
    assert result["env_steps"] < 6000
    kept = torch.cat([p.flatten() for p in trainer.recovery.good_head.values()])
    np.testing.assert_array_equal(head_of(trainer).numpy(), kept.numpy())
