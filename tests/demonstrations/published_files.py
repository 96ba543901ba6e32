"""Small files in the formats of OGBench and RoboMimic, and a server that breaks off connections."""

import json
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import gymnasium as gym
import h5py
import numpy as np

STEPS = 60
"""Rows of a trajectory in these files (the published sets: 1,001)."""


def collect(family, trajectories=2, steps=STEPS, seed=0):
    """Columns as OGBench's generator saves them (data_gen_scripts/generate_manipspace.py): its data-collection mode,
    its plan oracles, the simulator's state before each action."""
    import ogbench.manipspace  # noqa: F401 (registers the environments)

    env = gym.make(
        f"{family}-v0",
        terminate_at_goal=False,
        mode="data_collection",
        max_episode_steps=steps,
        disable_env_checker=True,
    )
    oracles = plan_oracles(env, family)
    np.random.seed(seed)
    columns = defaultdict(list)
    for trajectory in range(trajectories):
        ob, info = env.reset(seed=seed + trajectory)
        oracle = oracles[info["privileged/target_task"]]
        oracle.reset(ob, info)
        done = False
        while not done:
            action = np.clip(oracle.select_action(ob, info), -1, 1)
            next_ob, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            if oracle.done:
                target_ob, target = env.unwrapped.set_new_target(p_stack=0.25)
                oracle = oracles[target["privileged/target_task"]]
                oracle.reset(target_ob, target)
            row = {"observations": ob, "actions": action, "terminals": done}
            row |= {"qpos": info["prev_qpos"], "qvel": info["prev_qvel"]}
            if "prev_button_states" in info:
                row["button_states"] = info["prev_button_states"]
            for name, value in row.items():
                columns[name].append(value)
            ob = next_ob
    kinds = {"terminals": bool, "button_states": np.int64}
    return {name: np.array(column, dtype=kinds.get(name, np.float32)) for name, column in columns.items()}


def plan_oracles(env, family):
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    return {
        "cube": CubePlanOracle(env=env, noise=0.1),
        "button": ButtonPlanOracle(env=env, noise=0.1, gripper_always_closed=family.startswith("puzzle")),
        "drawer": DrawerPlanOracle(env=env, noise=0.1),
        "window": WindowPlanOracle(env=env, noise=0.1),
    }


def save_npz(path, columns):
    """As OGBench saves."""
    np.savez_compressed(path, **columns)
    return path


def bounds(columns):
    """First row and end of each trajectory."""
    ends = np.flatnonzero(columns["terminals"]) + 1
    return list(zip([0, *ends[:-1]], ends, strict=True))


ROBOSUITE = {"Lift": ("Lift", 10), "Can": ("PickPlaceCan", 14), "Square": ("NutAssemblySquare", 14)}
WIDTHS = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "robot0_joint_pos": 7}


def demonstration(task, rewards, seed=0):
    """One demonstration in RoboMimic's columns, its numbers random."""
    rng = np.random.default_rng(seed)
    length = len(rewards)
    obs = {name: rng.normal(size=(length, width)) for name, width in (WIDTHS | {"object": ROBOSUITE[task][1]}).items()}
    rewards = np.array(rewards, dtype=np.float64)
    done = (rewards > 0) | (np.arange(length) == length - 1)  # RoboMimic's done mode 2
    actions = rng.uniform(-1, 1, (length, 7))
    states = rng.normal(size=(length, 32))
    return {"obs": obs, "actions": actions, "rewards": rewards, "dones": done.astype(np.int64), "states": states}


def save_hdf5(path, task, demos, masks=None):
    """As robomimic/scripts/dataset_states_to_obs.py writes: demos by number, splits by name."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        env = {"env_name": ROBOSUITE[task][0], "type": 1, "env_kwargs": {"control_freq": 20, "robots": ["Panda"]}}
        data.attrs["env_args"] = json.dumps(env)
        for number, demo in demos.items():
            group = data.create_group(f"demo_{number}")
            for name, column in demo.items():
                if name == "obs":
                    for key, values in column.items():
                        group.create_dataset(f"obs/{key}", data=values)
                else:
                    group.create_dataset(name, data=column)
        for key, numbers in (masks or {}).items():
            file.create_dataset(f"mask/{key}", data=np.array([f"demo_{n}".encode() for n in numbers]))
    return path


class Server:
    """What a server of files does, and how it fails.

    Attributes:
        files: path -> content; others are 404.
        breaks: number of bytes after which each of the next connections is cut.
        ranges: it can continue where a download broke off.
        asked: (path, Range header) of each request for content.
    """

    def __init__(self, files, breaks=(), *, ranges=True):
        self.files, self.breaks, self.ranges = files, list(breaks), ranges
        self.asked = []
        self.url = ""


@contextmanager
def serving(server):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(head=True)

        def do_GET(self):
            server.asked.append((self.path, self.headers["Range"]))
            self.answer(head=False)

        def answer(self, *, head):
            if self.path not in server.files:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            whole = server.files[self.path]
            asked = self.headers["Range"] if server.ranges else None
            begin = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
            if begin >= len(whole):
                self.send_error(416)
                return
            content = whole[begin:]
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Range", f"bytes {begin}-{len(whole) - 1}/{len(whole)}")
            self.send_header("ETag", '"1234"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if not head:
                self.wfile.write(content[: server.breaks.pop(0)] if server.breaks else content)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
