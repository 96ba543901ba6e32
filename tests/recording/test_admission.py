"""Which episodes training can bear, and what becomes of the others."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from lerobot_policy_flow_mlp.adapter import FlowMlp
from safetensors.numpy import load_file

from poco_vla.config import RewardConfig
from poco_vla.data import Episode
from poco_vla.data.episode import LONGEST_TASK
from poco_vla.errors import DataError
from poco_vla.recording.admission import Admission, SetAsideError
from poco_vla.recording.set_aside import SetAside

STATE = "observation.state"


def episode(steps=12, seed=0, **changes):
    """Numbers of order 1; dimension 5 of the state hardly moves: 0.5 and at most 1e-4 from it."""
    rng = np.random.default_rng(seed)
    state = rng.uniform(-1, 1, (steps, 6)).astype(np.float32)
    state[:, 5] = 0.5 + 1e-4 * state[:, 5]
    last = np.arange(steps) == steps - 1
    action = rng.uniform(-1, 1, (steps, 3)).astype(np.float32)
    return replace(Episode({STATE: state}, action, last.astype(np.float32), last, last, "go"), **changes)


def with_number(name, value, step=7):
    """An episode with one number of its own."""
    plain = episode(seed=1)
    column = {"action": plain.action, "reward": plain.reward, STATE: plain.obs[STATE]}[name].astype(np.float64)
    column[step if name == "reward" else (step, 1)] = value
    column = column.astype(np.float32)
    return replace(plain, obs={STATE: column}) if name == STATE else replace(plain, **{name: column})


def admission(policy=None, **options):
    return Admission(policy or FlowMlp.tiny(), [episode(seed=s) for s in range(3)], horizon=4, **options)


def test_an_episode_like_the_demonstrations_is_admitted(tmp_path):
    gate = admission(set_aside=SetAside(tmp_path / "aside"))
    assert gate.admits(episode(seed=5))
    assert gate.admits(episode(steps=1))
    assert gate.num_set_aside == 0
    assert not (tmp_path / "aside").exists()


def test_a_dimension_that_hardly_moved_in_the_demonstrations_may_move_online():
    """0.5 +- 1e-4 there: -3 is 35,000 of its own deviations away, and of the size of its neighbours."""
    state = episode().obs[STATE].copy()
    state[3, 5] = -3
    admission().check(episode(obs={STATE: state}))


@pytest.mark.parametrize("name", ["action", STATE])
@pytest.mark.parametrize(
    ("value", "said"), [(3e38, "squared"), (-1e6, "outlier"), (np.nan, "not finite"), (101, "out")]
)
def test_a_number_that_training_cannot_bear_is_found_by_column_and_step(name, value, said):
    with pytest.raises(DataError, match=rf'"{name}".*(step|frame) 7.*{said}' if said != "not finite" else name):
        admission().check(with_number(name, value))


def test_99_times_the_demonstrations_are_admitted_and_the_multiple_can_be_changed():
    far = with_number("action", 95)
    admission().check(far)
    with pytest.raises(DataError, match=r"more than 50 times.*--replay.outlier-multiple"):
        admission(outlier_multiple=50).check(far)
    admission(outlier_multiple=None).check(with_number("action", 1e4))


def test_what_is_not_bearable_after_normalisation_is_found_whatever_the_raw_numbers_are():
    """The policy's own statistics: an action of 1 is 1e-6 of their range, so that 1e4 is within no bound of it."""
    policy = FlowMlp.tiny()
    for step in policy.preprocess.steps:
        if hasattr(step, "_tensor_stats"):
            step._tensor_stats["action"] = {k: v * 1e-6 for k, v in step._tensor_stats["action"].items()}
    with pytest.raises(DataError, match=r'"action" reaches .* after normalisation'):
        admission(policy).check(episode())


def test_rewards_are_bounded_where_they_are_learned():
    """next.reward of 1e6 counts nothing where success is the reward; 3e38 is beyond every statistic."""
    far = with_number("reward", 1e6)
    admission().check(far)
    with pytest.raises(DataError, match=r'"next.reward" reaches 1e\+06'):
        admission(reward=RewardConfig(source="recorded")).check(far)
    with pytest.raises(DataError, match=r'"next.reward" reaches 3e\+38'):
        admission().check(with_number("reward", 3e38))


class Picky(FlowMlp):
    """Tokenises like a VLA: refuses empty instructions, and prompts, state included, of more than 9 words."""

    def preprocess_with_prompt(self, batch):

        length = [
            len(task.split()) + int(abs(s[0]) > 1.5) * 9 for task, s in zip(batch["task"], batch[STATE], strict=True)
        ]
        if not all(task.strip() for task in batch["task"]):
            raise DataError("row 0 of the batch has an empty instruction")
        if max(length) > 9:
            raise DataError("the prompt is too long")
        tokens = torch.round(batch[STATE] * 100).long()
        return self.plain(batch) | {"observation.language.tokens": tokens}


@pytest.fixture
def picky():
    policy = Picky.tiny()
    policy.plain, policy.preprocess = policy.preprocess, policy.preprocess_with_prompt
    return policy


@pytest.mark.parametrize(("task", "said"), [("", "empty instruction"), ("go " * 10, "too long"), ("g" * 5000, "5000")])
def test_an_instruction_that_the_policy_cannot_read_is_refused(picky, task, said):
    with pytest.raises(DataError, match=said):
        admission(picky).check(episode(task=task))
    admission(picky).check(episode())


def test_every_prompt_that_holds_the_state_is_looked_at(picky):
    """60 steps; the one state whose prompt is too long is neither the first nor an extreme of its dimension's rows."""
    state = episode(60, seed=2).obs[STATE].copy()
    state[:50, 0] = 2 * np.linspace(0, 0.7, 50)
    state[41, 0] = 1.6
    with pytest.raises(DataError, match="too long"):
        admission(picky).check(episode(60, obs={STATE: state}))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (episode(0), "no step"),
        (replace(episode(), action=episode().action[:, :2]), r'"action" has shape \[2\]'),
        (replace(episode(), obs={STATE: episode().obs[STATE][:, :5]}), r'"observation.state" has shape \[5\]'),
        (replace(episode(), obs={}), "observation.state"),
        (replace(episode(), reward=episode(5).reward), "one length"),
        (replace(episode(), task="x" * (LONGEST_TASK + 1)), "4097 characters"),
    ],
    ids=["no step", "action", "state", "no state", "length", "text"],
)
def test_an_episode_of_another_form_is_refused(bad, said):
    with pytest.raises(DataError, match=said):
        admission().check(bad)


def test_what_is_refused_lies_on_disk_with_its_reason_once_and_is_said(tmp_path):
    said = []
    gate = admission(set_aside=SetAside(tmp_path / "aside", tell=said.append))
    bad = with_number("action", 1e6)
    for _ in range(2):
        with pytest.raises(SetAsideError, match=r"set aside.*outlier"):
            gate.require(bad, "key\x1b[31m")
    assert gate.num_set_aside == len(said) == 1
    (file,) = (tmp_path / "aside").glob("*.safetensors")
    np.testing.assert_array_equal(load_file(file)["action"], bad.action)
    reason = file.with_suffix(".txt").read_text()
    assert "reason: " in reason
    assert "outlier" in reason
    assert "\x1b" not in reason
    (line,) = (tmp_path / "aside" / "episodes.jsonl").read_text().splitlines()
    assert json.loads(line)["steps"] == 12
    assert len(SetAside(tmp_path / "aside")) == 1, "another process goes on counting"


def test_of_very_many_only_the_first_keep_their_data_and_few_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr("poco_vla.recording.set_aside.MOST_KEPT", 3)
    said = []
    aside = SetAside(tmp_path, tell=said.append)
    for seed in range(40):
        aside.keep(episode(1, seed), "why")
    assert len(aside) == 40
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert len(said) == 12, "1 to 10, 16, 32"


def test_the_check_beside_a_learner_leaves_its_policy_alone():
    policy = FlowMlp.tiny()
    gate = admission(policy, copy_processors=True)
    assert gate.policy is not policy
    assert gate.policy.preprocess is not policy.preprocess
    own, theirs = list(policy.parameters()), list(gate.policy.parameters())
    assert all(a is b for a, b in zip(own, theirs, strict=True)), "weights are not copied"
    gate.check(episode())
