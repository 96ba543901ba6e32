"""Digests of episodes: the same in memory and after a dataset on disk, another for each thing that was edited."""

from dataclasses import replace

import numpy as np
import pytest

from poco_vla.data import Episode
from poco_vla.data.fingerprint import changes, content_hash, episode_hash, fingerprint
from poco_vla.recording.recorder import EpisodeRecorder

STATE, CAMERA = "observation.state", "observation.images.top"


def episode(length=5, seed=0, **changed):
    rng = np.random.default_rng(seed)
    last = np.arange(length) == length - 1
    columns = {
        "obs": {STATE: rng.normal(size=(length, 3)).astype(np.float32)},
        "action": rng.normal(size=(length, 2)).astype(np.float32),
        "reward": last.astype(np.float32),
        "success": last,
        "terminal": last,
        "task": "push",
    }
    return Episode(**columns | changed)


def seen(length=5, seed=0):
    one = episode(length, seed)
    pictures = np.random.default_rng(seed).integers(0, 255, (length, 32, 32, 3), dtype=np.uint8)
    return replace(one, obs={**one.obs, CAMERA: pictures})


def edited(one, name, value):
    column = getattr(one, name).copy()
    column[2] = value
    return replace(one, **{name: column})


@pytest.mark.parametrize("video", [False, True], ids=["png", "video"])
def test_an_episode_has_one_digest_in_memory_and_after_it_was_recorded(tmp_path, video):
    one = seen()
    recorder = EpisodeRecorder(tmp_path / "episodes", fps=10, video=video)
    recorder.add(one)
    (again,) = recorder.load((STATE, CAMERA))
    assert episode_hash(again) == episode_hash(one)


def test_numbers_count_as_they_are_recorded():
    """Environments may give float64, of which a dataset keeps float32."""
    one = episode()
    wide = replace(one, obs={STATE: one.obs[STATE].astype(np.float64) + 1e-12}, action=one.action.astype(np.float64))
    assert episode_hash(wide) == episode_hash(one)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: edited(e, "action", 9),
        lambda e: edited(e, "reward", 9),
        lambda e: edited(e, "success", True),
        lambda e: replace(e, task="pull"),
        lambda e: replace(e, step_tasks=("push",) * 4 + ("pull",)),
        lambda e: replace(e, obs={STATE: e.obs[STATE] + 1}),
        lambda e: replace(e, terminal=np.zeros(5, bool), success=np.zeros(5, bool)),
    ],
    ids=["action", "reward", "success", "task", "step task", "state", "end"],
)
def test_whatever_is_edited_changes_the_digest(change):
    assert episode_hash(change(episode())) != episode_hash(episode())


def test_two_episodes_that_changed_places_are_other_contents():
    a, b = episode(seed=0), episode(seed=1)
    assert content_hash([a, b]) != content_hash([b, a])


def test_the_same_demonstrations_have_not_changed():
    demos = [seen(seed=0), seen(seed=1)]
    stats = {STATE: {"mean": np.array([0.123456789, 2.0])}}
    nearly = {STATE: {"mean": np.array([0.123456788, 2.0])}}
    assert changes(fingerprint(demos, stats), fingerprint(list(demos), nearly)) == ([], [])


def test_more_demonstrations_are_told_by_both_numbers():
    (told, *_), doubtful = changes(fingerprint([episode()]), fingerprint([episode(), episode(seed=1)]))
    assert told == "1 episodes then, 2 now"
    assert doubtful == []


def test_edited_rows_are_other_demonstrations():
    (told,), _ = changes(fingerprint([episode()]), fingerprint([edited(episode(), "action", 9)]))
    assert "other states, actions" in told


def test_other_pictures_or_statistics_alone_are_only_told():
    demos = [seen()]
    other = [replace(demos[0], obs=demos[0].obs | {CAMERA: 255 - demos[0].obs[CAMERA]})]
    stats = {STATE: {"mean": np.zeros(3)}}
    different, told = changes(fingerprint(demos, stats), fingerprint(other, {STATE: {"mean": np.ones(3)}}))
    assert different == []
    assert ["pictures" in told[0], "statistics" in told[1]] == [True, True]


def test_what_an_older_fingerprint_does_not_know_is_not_compared():
    assert changes({"episodes": 1}, fingerprint([episode()])) == ([], [])
