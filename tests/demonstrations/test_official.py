"""Official data sets become LeRobot datasets: rewards of the state after the action, whole, or an error that helps."""

import sys
from functools import cache

import numpy as np
import pytest
from published_files import STEPS, Server, bounds, collect, demonstration, save_hdf5, save_npz, serving

from poco_vla.config import DatasetConfig
from poco_vla.data import Replay, open_dataset, read_episodes
from poco_vla.demonstrations import download as downloads
from poco_vla.demonstrations.download import ATTEMPTS, download
from poco_vla.demonstrations.ogbench import OGBENCH_WIDTHS, import_ogbench, ogbench_file
from poco_vla.demonstrations.robomimic import ROBOMIMIC_FILES, ROBOMIMIC_REPO, import_robomimic
from poco_vla.errors import ConfigError, DataError, UnknownNameError
from poco_vla.simulators.ogbench_play import Trajectory, relabelled

CUBE, SCENE, PUZZLE = "cube-double-singletask-task4-v0", "scene-singletask-task3-v0", "puzzle-3x3-singletask-task2-v0"
TASKS = [CUBE, SCENE, PUZZLE]


def family_of(task):
    return task.split("-singletask")[0]


played = cache(collect)
"""One collection per scene serves all tests; none changes it."""


@cache
def simulator(task):
    """The task itself, success as of the state after the step."""
    import gymnasium as gym
    import ogbench.manipspace  # noqa: F401 (registers the tasks)

    env = gym.make(task, success_timing="post", disable_env_checker=True).unwrapped
    env.reset(seed=0)
    return env


def put(env, columns, row):
    buttons = [columns["button_states"][row]] if "button_states" in columns else []
    env.set_state(columns["qpos"][row].astype(float), columns["qvel"][row].astype(float), *buttons)


def verdict(task, columns, row):
    """Reward and success of one state, by the simulator in task mode, its state set to it."""
    env = simulator(task)
    put(env, columns, row)
    env.pre_step()
    env.post_step()
    return env.compute_reward(), env._success


def with_subgoals_met(task, columns, seed=0):
    """The same columns, but in the second half of each trajectory each subgoal is met at random, often all of them."""
    env, rng = simulator(task), np.random.default_rng(seed)
    columns = {name: column.copy() for name, column in columns.items()}
    for begin, end in bounds(columns):
        for row in range((begin + end) // 2, end):
            put(env, columns, row)
            for i, mocap in enumerate(getattr(env, "_cube_target_mocap_ids", ())):
                if rng.random() < 0.8:
                    env.data.joint(f"object_joint_{i}").qpos[:3] = env.data.mocap_pos[mocap] + rng.uniform(
                        -0.02, 0.02, 3
                    )
            for joint, goal in (("drawer_slide", "_target_drawer_pos"), ("window_slide", "_target_window_pos")):
                if hasattr(env, goal) and rng.random() < 0.8:
                    env.data.joint(joint).qpos[0] = getattr(env, goal) + rng.uniform(-0.03, 0.03)
            columns["qpos"][row] = env.data.qpos
            if "button_states" in columns:
                met = rng.random(len(env._target_button_states)) < 0.95
                columns["button_states"][row] = np.where(met, env._target_button_states, 1 - env._target_button_states)
    return columns


def read(root):
    config = DatasetConfig(repo_id="local/data", root=root)
    return read_episodes(open_dataset(config), config, ["observation.state"], fps=20)


@pytest.mark.parametrize("task", TASKS)
def test_a_row_holds_what_the_simulator_says_of_the_next_state(task, tmp_path):
    """OGBench's relabel says what holds in the state itself: one step earlier than here."""
    columns = with_subgoals_met(task, played(family_of(task)))
    root = import_ogbench(save_npz(tmp_path / "file.npz", columns), task, tmp_path / "data")
    episodes = read(root)
    assert len(episodes) == len(bounds(columns)) == 2
    for episode, (begin, end) in zip(episodes, bounds(columns), strict=True):
        expected = [verdict(task, columns, row) for row in range(begin + 1, end)]
        assert {success for _, success in expected} == {True, False}
        assert len({reward for reward, _ in expected}) > 2
        np.testing.assert_array_equal(episode.reward[:-1], [reward for reward, _ in expected])
        np.testing.assert_array_equal(episode.success[:-1], [success for _, success in expected])
        np.testing.assert_array_equal(episode.terminal, episode.success)
        assert episode.reward[-1] == verdict(task, columns, end - 1)[0]
        assert not episode.success[-1]


def test_offline_rewards_are_those_that_the_environment_gave_online():
    """Two cubes fall onto their targets, one after the other: what step k returned is in row k."""
    env = simulator(CUBE)
    env.reset(seed=0)
    for i, height in enumerate((0.1, 0.2)):
        env.data.joint(f"object_joint_{i}").qpos[:3] = env.data.mocap_pos[env._cube_target_mocap_ids[i]] + [
            0,
            0,
            height,
        ]
    rows = []
    for _ in range(12):
        ob, reward, terminated, _, info = env.step(np.zeros(5, np.float32))
        rows.append((ob, info["prev_qpos"], reward, info["success"], terminated))
    ob, qpos, reward, success, terminated = (np.array(column) for column in zip(*rows, strict=True))
    assert 2 <= success.argmax() <= 8
    assert set(reward) == {-2, -1, 0}
    episode = relabelled(CUBE, Trajectory(ob.astype(np.float32), np.zeros((12, 5), np.float32), qpos))
    np.testing.assert_array_equal(episode.reward[:-1], reward[:-1])
    np.testing.assert_array_equal(episode.success[:-1], success[:-1])
    np.testing.assert_array_equal(episode.terminal[:-1], terminated[:-1])


def test_the_pool_starts_no_transition_at_the_last_row():
    """Its next state is not on disk."""
    columns = {name: column[:STEPS] for name, column in played("puzzle-3x3").items()}
    episode = relabelled(PUZZLE, trajectory(columns))
    replay = Replay(horizon=3, gamma=0.9)
    replay.add(episode, is_demo=True)
    sample = replay.sample(2000, np.random.default_rng(0))
    states = {state.tobytes() for state in sample.obs["observation.state"]}
    assert states == {state.tobytes() for state in episode.obs["observation.state"][:-1]}


def trajectory(columns):
    return Trajectory(*(columns.get(name) for name in ("observations", "actions", "qpos", "button_states")))


def test_a_task_without_a_number_is_ogbenchs_default():
    columns = with_subgoals_met(SCENE, played("scene"))
    rewards = {
        number: relabelled(f"scene-singletask{number}-v0", trajectory(columns)).reward.tolist()
        for number in ("", "-task2", "-task3")
    }
    assert rewards[""] == rewards["-task2"] != rewards["-task3"]


def test_what_was_in_the_file_is_read_back(tmp_path):
    columns = played("scene")
    told = []
    path = save_npz(tmp_path / "scene-play-v0.npz", columns)
    root = import_ogbench(path, SCENE, tmp_path / "data", on_episode=told.append)
    assert told == [1, 2]
    for episode, (begin, end) in zip(read(root), bounds(columns), strict=True):
        np.testing.assert_array_equal(episode.obs["observation.state"], columns["observations"][begin:end])
        np.testing.assert_array_equal(episode.action, columns["actions"][begin:end])
        assert episode.task == "bring the scene into the goal configuration"
        assert len(episode) == STEPS


def state_of(episode):
    return episode.obs["observation.state"][0].tolist()


def test_a_folder_may_hold_the_official_file_or_parts(tmp_path):
    """Parts come in the order of their names; validation files and other data sets stay out."""
    columns = played("puzzle-3x3")
    parts = [{name: column[begin:end] for name, column in columns.items()} for begin, end in bounds(columns)]
    for name, part in (("b-001", parts[1]), ("a-000", parts[0]), ("a-000-val", parts[1])):
        save_npz(tmp_path / f"{name}.npz", part)
    episodes = read(import_ogbench(tmp_path, PUZZLE, tmp_path / "parts"))
    assert [state_of(e) for e in episodes] == [part["observations"][0].tolist() for part in parts]
    save_npz(tmp_path / "puzzle-3x3-noisy-v0.npz", parts[1])
    (only,) = read(import_ogbench(tmp_path, PUZZLE, tmp_path / "official", kind="noisy"))
    assert state_of(only) == parts[1]["observations"][0].tolist()
    assert len(read(import_ogbench(tmp_path, PUZZLE, tmp_path / "play"))) == 2, "the noisy set is no part of another"


def test_the_first_episodes_can_be_taken_but_no_more_than_there_are(tmp_path):
    path = save_npz(tmp_path / "file.npz", played("puzzle-3x3"))
    assert len(read(import_ogbench(path, PUZZLE, tmp_path / "one", episodes=1))) == 1
    with pytest.raises(DataError, match=r"file\.npz holds 2 episodes, 3 are asked for"):
        import_ogbench(path, PUZZLE, tmp_path / "three", episodes=3)
    with pytest.raises(DataError, match="0 episodes are asked for; at least 1"):
        import_ogbench(path, PUZZLE, tmp_path / "none", episodes=0)
    assert not (tmp_path / "three").exists()
    assert not (tmp_path / "none").exists()


def test_rows_after_the_last_mark_are_a_trajectory(tmp_path):
    columns = {name: column[:100] for name, column in played("puzzle-3x3").items()}
    path = save_npz(tmp_path / "file.npz", columns)
    assert [len(e) for e in read(import_ogbench(path, PUZZLE, tmp_path / "data"))] == [60, 40]


def test_which_data_set_belongs_to_a_task():
    assert ogbench_file(CUBE) == "cube-double-play-v0"
    assert ogbench_file("puzzle-3x3-singletask-v0", "noisy") == "puzzle-3x3-noisy-v0"


@pytest.mark.parametrize("task", TASKS)
def test_the_table_of_widths_is_the_simulators(task):
    env = simulator(task)
    assert OGBENCH_WIDTHS[family_of(task)] == (env.observation_space.shape[0], env.model.nq)


def damaged(path, how):
    content = save_npz(path, played("puzzle-3x3")).read_bytes()
    middle = len(content) // 2
    if how == "truncated":
        path.write_bytes(content[:middle])
    elif how == "flipped":
        path.write_bytes(
            content[:middle] + bytes(b ^ 255 for b in content[middle : middle + 64]) + content[middle + 64 :]
        )
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a web page":
        path.write_bytes(b"<html>404 not found</html>")
    elif how == "pickled":
        np.savez(path, **played("puzzle-3x3") | {"qpos": np.array([{"a": 1}], dtype=object)})
    elif how == "one array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    return path


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "a web page", "pickled", "one array"])
def test_a_damaged_file_is_said_to_be_one(how, tmp_path):
    path = damaged(tmp_path / "puzzle-3x3-play-v0.npz", how)
    with pytest.raises(DataError, match=r"puzzle-3x3-play-v0\.npz cannot be read \(\w+: .*Download it again"):
        import_ogbench(path, PUZZLE, tmp_path / "data")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def without(columns, *names):
    return {name: column for name, column in columns.items() if name not in names}


def changed(columns, name, change):
    columns = columns | {name: columns[name].copy()}
    return columns | {name: change(columns[name])}


def with_nan(column):
    column[7, 1] = np.nan
    return column


BAD_COLUMNS = {
    "no qpos": (
        lambda c: without(c, "qpos"),
        r"holds no qpos\. Its arrays: observations, actions, .*Without the simulator's qpos no task's reward",
    ),
    "several missing": (
        lambda c: without(c, "actions", "button_states"),
        r"holds no actions, button_states\. Its arrays: observations, terminals, qpos, qvel\.$",
    ),
    "lengths": (
        lambda c: changed(c, "actions", lambda a: a[:-5]),
        r"differ in length \(observations 120, actions 115, qpos 120, button_states 120, terminals 120\)",
    ),
    "nan": (lambda c: changed(c, "observations", with_nan), r"observations is not finite in row 7; 1 of 120 rows"),
    "nan in qpos": (lambda c: changed(c, "qpos", with_nan), r"qpos is not finite in row 7"),
    "no ends": (
        lambda c: changed(c, "terminals", np.zeros_like),
        r"terminals marks no row of 120; it must mark the last one of each trajectory",
    ),
    "pictures": (
        lambda c: c | {"observations": np.zeros((120, 8, 8, 3), np.uint8)},
        r"observations \[8, 8, 3\] instead of \[55\]\. No state-based OGBench manipulation task has these",
    ),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_arrays_that_do_not_fit_are_named(case, tmp_path):
    change, message = BAD_COLUMNS[case]
    path = save_npz(tmp_path / "file.npz", change(played("puzzle-3x3")))
    with pytest.raises(DataError, match=message):
        import_ogbench(path, PUZZLE, tmp_path / "data")
    assert [p.name for p in tmp_path.iterdir()] == ["file.npz"]


def test_another_environments_file_is_told_by_its_widths(tmp_path):
    """A state of 55 numbers may be a puzzle's or that of four cubes: qpos decides."""
    path = save_npz(tmp_path / "file.npz", played("puzzle-3x3"))
    with pytest.raises(
        DataError, match=r"not of cube-double.*observations \[55\] instead of \[37\].*OGBench's puzzle-3x3 has these"
    ):
        import_ogbench(path, CUBE, tmp_path / "data")
    save_npz(path, without(played("puzzle-3x3"), "qpos"))
    with pytest.raises(DataError, match="OGBench's cube-quadruple or puzzle-3x3 has these"):
        import_ogbench(path, CUBE, tmp_path / "data")


def test_a_source_that_is_not_there_says_what_was_expected(tmp_path):
    with pytest.raises(
        DataError, match=r"nowhere does not exist; expected cube-double-play-v0\.npz \(from https://rail"
    ):
        import_ogbench(tmp_path / "nowhere", CUBE, tmp_path / "data")
    with pytest.raises(DataError, match=r"holds no \.npz; expected cube-double-play-v0\.npz"):
        import_ogbench(tmp_path, CUBE, tmp_path / "data")


def test_an_unknown_task_lists_the_known_ones(tmp_path):
    path = save_npz(tmp_path / "file.npz", played("puzzle-3x3"))
    with pytest.raises(UnknownNameError, match="Did you mean"):
        import_ogbench(path, "puzzle-3x3-singletask-task9-v0", tmp_path / "data")


def test_what_lies_at_the_root_is_not_touched(tmp_path):
    (tmp_path / "data").mkdir()
    for imported, task in ((import_ogbench, CUBE), (import_robomimic, "Lift")):
        with pytest.raises(DataError, match="data exists already; remove it, or choose another folder"):
            imported(tmp_path / "file", task, tmp_path / "data")


# RoboMimic


def lift_file(path, **options):
    """Four demonstrations, of lengths 5 to 8; the last two steps of each are a success."""
    demos = {n: demonstration("Lift", [0] * (3 + i) + [1, 1], seed=n) for i, n in enumerate((0, 1, 2, 10))}
    return save_hdf5(path, "Lift", demos, masks={"train": [10, 0, 2], "20_percent": [1]}, **options), demos


def test_a_demonstration_is_read_back_with_robomimics_state_and_rewards(tmp_path):
    """The state is eef position, quaternion, gripper, object; rewards stay in their rows; every row is kept, as in
    Q-chunking's code, and the rows after the first success end by themselves."""
    path, demos = lift_file(tmp_path / "low_dim_v15.hdf5")
    told = []
    episodes = read(import_robomimic(path, "lift", tmp_path / "data", on_episode=told.append))
    assert told == [1, 2, 3, 4]
    for episode, demo in zip(episodes, demos.values(), strict=True):
        names = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
        state = np.concatenate([demo["obs"][name] for name in names], axis=1)
        assert state.shape[1] == 19
        np.testing.assert_array_equal(episode.obs["observation.state"], state.astype(np.float32))
        np.testing.assert_array_equal(episode.action, demo["actions"].astype(np.float32))
        np.testing.assert_array_equal(episode.reward, demo["rewards"])
        np.testing.assert_array_equal(episode.success, demo["rewards"] > 0)
        np.testing.assert_array_equal(episode.terminal, demo["dones"].astype(bool))
        assert episode.task == "lift the red cube"


def test_a_demonstration_without_success_is_cut_off(tmp_path):
    path = save_hdf5(tmp_path / "file.hdf5", "Can", {0: demonstration("Can", [0, 0, 0])})
    (episode,) = read(import_robomimic(path, "Can", tmp_path / "data"))
    assert episode.obs["observation.state"].shape == (3, 23)
    assert not episode.terminal.any()


def test_demonstrations_come_by_number_not_by_name(tmp_path):
    """The file lists demo_10 before demo_2."""
    path, _ = lift_file(tmp_path / "file.hdf5")
    assert [len(e) for e in read(import_robomimic(path, "Lift", tmp_path / "all"))] == [5, 6, 7, 8]
    train = import_robomimic(path, "Lift", tmp_path / "train", filter_key="train")
    assert [len(e) for e in read(train)] == [5, 7, 8]
    two = import_robomimic(path, "Lift", tmp_path / "two", filter_key="train", episodes=2)
    assert [len(e) for e in read(two)] == [5, 7]


def test_other_observations_can_make_up_the_state(tmp_path):
    path, demos = lift_file(tmp_path / "file.hdf5")
    keys = ("robot0_joint_pos", "object")
    episode = read(import_robomimic(path, "Lift", tmp_path / "data", keys=keys))[0]
    expected = np.concatenate([demos[0]["obs"][key] for key in keys], axis=1).astype(np.float32)
    np.testing.assert_array_equal(episode.obs["observation.state"], expected)


def bad_demo(change):
    demo = demonstration("Lift", [0, 0, 1])
    change(demo)
    return demo


def keep_only_pictures(demo):
    demo["obs"] = {"agentview_image": np.zeros((3, 8, 8, 3), np.uint8)}


BAD_DEMOS = {
    "pictures": (
        keep_only_pictures,
        r"demo_1 has no observation robot0_eef_pos, .*, object; it has agentview_image\. Take the low_dim file",
    ),
    "raw": (lambda d: d.pop("obs"), r"demo_1 has no observation .*; it has none\. Take the low_dim file"),
    "shaped": (
        lambda d: d.update(rewards=np.array([0.1, 0.4, 1])),
        r"demo_1: the rewards are not only 0 and 1 but also 0\.1; .*low_dim_sparse",
    ),
    "object": (
        lambda d: d["obs"].update(object=np.zeros((3, 14))),
        r'demo_1: "object" has \[14\] numbers per step, Lift has \[10\]',
    ),
    "actions": (
        lambda d: d.update(actions=np.zeros((3, 14))),
        r'demo_1: "actions" has \[14\] numbers per step, Lift has \[7\]',
    ),
    "lengths": (lambda d: d.update(rewards=np.zeros(2)), r"demo_1: the columns' lengths do not fit \(.*rewards 2\)"),
    "nan": (
        lambda d: d["obs"]["object"].__setitem__((1, 3), np.nan),
        r'demo_1: "observation.state" is not finite at frame 1',
    ),
    "no rewards": (lambda d: d.pop("rewards"), r"file\.hdf5 cannot be read \(KeyError: .*Download it again"),
}


@pytest.mark.parametrize("case", BAD_DEMOS)
def test_a_bad_demonstration_is_named(case, tmp_path):
    change, message = BAD_DEMOS[case]
    path = save_hdf5(tmp_path / "file.hdf5", "Lift", {0: demonstration("Lift", [0, 1]), 1: bad_demo(change)})
    with pytest.raises(DataError, match=message):
        import_robomimic(path, "Lift", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_another_tasks_file_is_refused(tmp_path):
    path, _ = lift_file(tmp_path / "file.hdf5")
    with pytest.raises(DataError, match=r"file\.hdf5 was recorded in Lift; Square is NutAssemblySquare"):
        import_robomimic(path, "square", tmp_path / "data")


def test_an_unknown_filter_key_lists_the_files_own(tmp_path):
    path, _ = lift_file(tmp_path / "file.hdf5")
    with pytest.raises(DataError, match=r'no filter key "30_percent"; its keys: 20_percent, train'):
        import_robomimic(path, "Lift", tmp_path / "data", filter_key="30_percent")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", "truncated"])
def test_a_damaged_hdf5_is_said_to_be_one(content, tmp_path):
    path, _ = lift_file(tmp_path / "file.hdf5")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(DataError, match=r"file\.hdf5 cannot be read \(OSError: .*Download it again"):
        import_robomimic(path, "Lift", tmp_path / "data")
    with pytest.raises(DataError, match=r"nowhere is no file; expected a RoboMimic low_dim \.hdf5"):
        import_robomimic(tmp_path / "nowhere", "Lift", tmp_path / "data")


def test_an_hdf5_of_something_else_is_refused(tmp_path):
    import h5py

    with h5py.File(tmp_path / "file.hdf5", "w") as file:
        file["weights"] = np.zeros(3)
    with pytest.raises(DataError, match="was recorded in no environment that it names; Lift is Lift"):
        import_robomimic(tmp_path / "file.hdf5", "Lift", tmp_path / "data")


def test_without_h5py_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r'h5py is not installed: pip install "poco-vla\[robomimic\]"'):
        import_robomimic(tmp_path / "file.hdf5", "Lift", tmp_path / "data")


# Downloads

CONTENT = np.random.default_rng(0).bytes(300_000)
NPZ = "/cube-double-play-v0.npz"


def fetched(server, folder, **options):
    return download("ogbench", "cube-double-play-v0", folder, host=server.url, **options)


def test_a_download_is_whole_told_of_and_done_once(tmp_path):
    told = []
    with serving(Server({NPZ: CONTENT})) as server:
        for _ in range(2):
            path = fetched(server, tmp_path / "data", on_bytes=lambda *numbers: told.append(numbers))
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["cube-double-play-v0.npz"]
    assert told[-1] == (300_000, 300_000)
    assert server.asked == [(NPZ, None)]


def test_a_connection_that_breaks_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "DOWNLOAD_BLOCK", 1000)
    told = []
    with serving(Server({NPZ: CONTENT}, breaks=[100_000, 50_000])) as server:
        path = fetched(server, tmp_path, on_bytes=lambda *numbers: told.append(numbers))
    assert path.read_bytes() == CONTENT
    assert server.asked == [(NPZ, None), (NPZ, "bytes=100000-"), (NPZ, "bytes=150000-")]
    assert told == sorted(told)
    assert {total for _, total in told} == {300_000}


def test_a_server_that_cannot_continue_begins_anew(tmp_path):
    with serving(Server({NPZ: CONTENT}, breaks=[100_000], ranges=False)) as server:
        assert fetched(server, tmp_path).read_bytes() == CONTENT


def test_a_download_that_keeps_breaking_tells_and_the_next_call_goes_on(tmp_path):
    with serving(Server({NPZ: CONTENT}, breaks=[1000] * ATTEMPTS)) as server:
        with pytest.raises(DataError, match=rf"{server.url}{NPZ} cannot be fetched.*5000 of 300000 bytes.*give --path"):
            fetched(server, tmp_path)
        assert not (tmp_path / NPZ[1:]).exists()
        assert fetched(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == (NPZ, "bytes=5000-")


def test_remains_of_something_longer_are_thrown_away(tmp_path):
    (tmp_path / f".{NPZ[1:]}.partial").write_bytes(bytes(400_000))
    with serving(Server({NPZ: CONTENT})) as server:
        assert fetched(server, tmp_path).read_bytes() == CONTENT


def test_a_file_that_the_server_has_not_is_asked_for_once(tmp_path):
    with serving(Server({})) as server, pytest.raises(DataError, match=r"HTTPError: HTTP Error 404.*give --path"):
        fetched(server, tmp_path)
    assert len(server.asked) == 1


def test_a_server_that_is_not_there(tmp_path):
    with serving(Server({})) as server:
        pass
    with pytest.raises(DataError, match=r"cannot be fetched \(URLError: .*give --path"):
        fetched(server, tmp_path)


def test_robomimics_files_come_from_the_hub(tmp_path):
    where = ROBOMIMIC_FILES["can-mh"]
    told = []
    with serving(Server({f"/datasets/{ROBOMIMIC_REPO}/resolve/main/{where}": CONTENT})) as server:
        for _ in range(2):
            path = download("robomimic", "can-mh", tmp_path, host=server.url, on_bytes=lambda *n: told.append(n))
        with pytest.raises(DataError, match=r"resolve/main/v1\.5/lift/ph/low_dim_v15\.hdf5 cannot be fetched \(.*404"):
            download("robomimic", "lift-ph", tmp_path, host=server.url)
    assert path == tmp_path / "v1.5/can/mh/low_dim_v15.hdf5"
    assert path.read_bytes() == CONTENT
    assert told[-1] == (300_000, 300_000)
    assert len(server.asked) == 1


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(UnknownNameError, match=r'no RoboMimic data set named "can-mx"\. Known: can-mg, .*Did you mean'):
        download("robomimic", "can-mx", tmp_path)
    with pytest.raises(UnknownNameError, match=r"Known: ogbench, robomimic"):
        download("d4rl", "x", tmp_path)
