"""The guides of a whole task: every command runs, in the page's order and in one folder, in small.

A page's command is read as the shell reads it. `PAGES` says for each what takes the place of hardware, sizes and
addresses; all other words stay as they are, so that an option that was renamed breaks the test, and a command that has
no entry here, too. (What every page promises, these included, is in test_pages.py.) Arms and cameras are `poco-vla`'s
simulated arm, the leader arm a plug-in (guide_parts/guide_hand), the Hub is on this machine, base models are tiny ones
under the real names. What a page says to an SO-101 goes through LeRobot's own parser as well: its options exist, though
no driver is installed here that could connect one.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import groot_folders
import lerobot_on_disk
import numpy as np
import pytest
from hub_server import USER, HubServer
from pages import GUIDES, ROOT, RUN_WHOLE, blocks, commands

from poco_vla import load_adapter

HERE = Path(__file__).parent
PATIENCE = 400
"""Seconds that one command may take on a busy machine."""
ARM = {
    "--robot.type": "simulated_arm",
    "--robot.port": None,
    "--robot.cameras": None,
    "--robot.disable_torque_on_disconnect": None,
}
LEADER = {"--teleop.type": "guide_hand", "--teleop.port": None}
ARM_WORDS = "--robot.image_size=64 --robot.realtime=false"
LEADER_WORDS = "--teleop.discover_packages_path=guide_hand"
LEROBOT_ARM = f"{ARM_WORDS} --robot.discover_packages_path=poco_vla.robots"
ON_A_CPU = "--policy.device=cpu --return_to_initial_position=false --play_sounds=false"
SMALL = (
    "--poco.num-candidates 2 --poco.critic-hidden 16 --optim.batch-size 4 --warmup-steps 2 --log-every 1 "
    "--interaction.ahead 200"
)
LEARN = "--updates-per-step 0.05 --online-steps 120"


@dataclass(frozen=True)
class Step:
    """How a command of a page is run in small.

    Attributes:
        begins: what the page's command begins with.
        change: option -> what takes its value's place; None leaves an option of hardware out.
        add: further words.
        beside: it goes on beside the next command, and ends by itself ("ends") or by Ctrl-C ("stopped").
        keys: what a person types at the terminal, in order: (what is seen, key).
        shows: patterns of what it prints.
        texts: text -> what takes its place, in a command that is run as it stands.
    """

    begins: str
    change: Mapping[str, str | None] = field(default_factory=dict)
    add: str = ""
    beside: str = ""
    keys: tuple[tuple[str, str], ...] = ()
    shows: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """Attributes:
    steps: one for each command, in order.
    prepare: lays out what a reader has: (folder, hub).
    """

    steps: tuple[Step, ...]
    prepare: Callable[[Path, HubServer], None] = lambda folder, hub: None


def pi05_at_the_hub(folder, hub):
    load_adapter("pi05").tiny().save_pretrained(folder / "base")
    hub.add_repo("lerobot/pi05_base", folder / "base")


def groot_at_the_hub(folder, hub):
    """And demonstrations on the simulated arm."""
    hub.add_repo("nvidia/GR00T-N1.6-3B", groot_folders.nvidia_folder(folder / "base"))
    hub.commit("nvidia/GR00T-N1.6-3B", {"README.md": b"---\nlicense: other\nlicense_name: nvidia-license\n---\n"})
    write_demonstrations(folder / "demonstrations")
    hub.add_repo(f"{USER}/hang_keychain", folder / "demonstrations", kind="dataset")
    hub.repos["dataset", f"{USER}/hang_keychain"].tags["v3.0"] = hub.revisions(f"{USER}/hang_keychain", kind="dataset")[
        0
    ]


def write_demonstrations(root, state=19, cameras=("front", "wrist"), fps=30, more=()):
    pictures = {f"observation.images.{name}": (64, 64, 3) for name in cameras}
    axes = ["height", "width", "channels"]
    features = {key: {"dtype": "image", "shape": shape, "names": axes} for key, shape in pictures.items()}
    sizes = {"observation.state": state, "action": 5}
    features |= {key: {"dtype": "float32", "shape": (n,), "names": None} for key, n in sizes.items()}
    features |= dict(more)
    episodes = [lerobot_on_disk.random_columns(14, features, seed) for seed in range(2)]
    for episode in episodes:
        episode["action"] = np.clip(episode["action"], -1, 1)
    lerobot_on_disk.write(root, episodes, features, fps=fps, tasks=["hang the keychain on the hook"] * 2)


def hil_serl_data(folder, hub):
    """Recorded as `gym_manipulator` does: reward, done, a penalty. And a learner's pool that does not name axes."""
    signals = {name: lerobot_on_disk.SIGNALS[name] for name in ("next.reward", "next.done")}
    signals["complementary_info.discrete_penalty"] = signals["next.reward"]
    write_demonstrations(folder / "data" / "cube", state=28, cameras=(), more=signals)
    meta = folder / "OUTPUT" / "dataset" / "meta"
    meta.mkdir(parents=True)
    feature = {"dtype": "video", "shape": [3, 64, 64], "names": None}
    (meta / "info.json").write_text(json.dumps({"features": {"observation.images.front": feature}}))


QUICK = (
    "--demonstrations.episodes 1 --demonstrations.workers 1 --sft-steps 60 --warmup-steps 40 --online-steps 700 "
    "--updates-per-step 0.2 --log-every 5 --eval.episodes 2 --eval.no-videos --env.in-process"
)
PAGES = {
    "hil_serl": Page(
        prepare=hil_serl_data,
        steps=(
            Step(
                "python push_cube.py",
                add=f"{SMALL} {LEARN} --sft-steps 20 --interaction.port {{port}}",
                beside="ends",
                shows=("zeta = auto", "robots are served", "figures .*result.json"),
            ),
            Step(
                "poco-vla robot",
                change=ARM | LEADER | {"--episode-seconds": "2"},
                add=f"--robot.views=[] --robot.realtime=false {LEADER_WORDS} --url ws://127.0.0.1:{{port}}",
                keys=(("episode 1  step", "t"), ("you drive", "s")),
                shows=("episode 1: success, .* by hand", "training is over"),
            ),
        ),
    ),
    "reading_curves": Page(
        steps=(
            Step("python recipes/mlp_cube.py", add=QUICK, shows=("success after POCO", "learns/policy")),
            Step("python recipes/mlp_cube.py", add=QUICK, shows=("collapses/policy",)),
            Step("python recipes/guides/draw_metrics.py"),
            Step("python recipes/guides/draw_metrics.py"),
        ),
    ),
    "growth": Page(
        steps=(
            Step("python recipes/guides/growth.py", shows=("prefix of a state",)),
            Step(
                "python recipes/mlp_cube.py",
                change={"--interaction.workers": "1"},
                add=QUICK,
                shows=("success after POCO", "figures .*result.json"),
            ),
        ),
    ),
    "pi05_so101": Page(
        prepare=pi05_at_the_hub,
        steps=(
            Step(
                "lerobot-record",
                change=ARM
                | LEADER
                | {"--dataset.num_episodes": "2", "--dataset.episode_time_s": "3", "--dataset.reset_time_s": "0.1"},
                add=f"{LEROBOT_ARM} {LEADER_WORDS} --play_sounds=false",
            ),
            Step("export POCO_VLA_TOKEN"),
            Step(
                "accelerate launch recipes/pi05_pick_pen.py",
                # The tiny base has statistics of its own. The arm's gripper touches nothing: its contact never varies.
                add=f"{SMALL} {LEARN} --sft-steps 3 --interaction.port {{port}} --statistics dataset "
                '--policy-options.normalization-mapping \'{"STATE": "IDENTITY"}\'',
                beside="ends",
                shows=("zeta = auto", "robots are served", "figures .*result.json"),
            ),
            Step("export POCO_VLA_TOKEN"),
            Step(
                "poco-vla robot",
                change=ARM | LEADER | {"--url": "ws://127.0.0.1:{port}", "--episode-seconds": "4"},
                add=f"{ARM_WORDS} {LEADER_WORDS}",
                keys=(
                    ("episode 1  step", "t"),
                    ("you drive", "s"),
                    ("episode 2  step", "d"),
                    ("episode 3  step", "f"),
                ),
                shows=(
                    "asked 3 ahead",
                    "episode 1: success, .* by hand, .*recorded",
                    "episode 2: discarded",
                    "episode 3: failure",
                    "training is over",
                ),
            ),
            Step("poco-vla report", shows=("pick_pen",)),
            Step(
                "accelerate launch recipes/pi05_pick_pen.py",
                add=f"{SMALL} --interaction.port {{port}} --interaction.ahead 1000",
                beside="stopped",
                shows=("robots are served", "interrupted; saved in"),
            ),
            Step(
                "poco-vla robot",
                change=ARM | {"--url": "ws://127.0.0.1:{port}", "--episode-seconds": "2", "--episodes": "2"},
                add=ARM_WORDS,
                keys=(("episode 1  step", "s"), ("episode 2  step", "f")),
                shows=("episode 2: .*success of the last 2: 50 %",),
            ),
            Step("poco-vla push", shows=(f"pushed to {USER}/pick_pen_poco .private.",)),
            Step("poco-vla export", shows=("exported",)),
            Step(
                "lerobot-rollout",
                change=ARM | {"--duration": "1"},
                add=f"{LEROBOT_ARM} {ON_A_CPU} --plugin.discover_packages_path=poco_vla_pi05.small",
                shows=("Policy loaded: type=pi05", "Duration limit reached"),
            ),
        ),
    ),
    "groot_embodiment": Page(
        prepare=groot_at_the_hub,
        steps=(
            Step("cat > arm.json", texts={"[0, 5]": "[0, 4]", "[5, 6]": "[4, 5]"}),
            Step(
                "accelerate launch recipes/groot_hang_keychain.py",
                # What the tiny checkpoint's own configuration cannot say.
                add=f"{SMALL} --sft-steps 2 --policy-options.tokenizer bytes --policy-options.compute float32 "
                f"--policy-options.sizes {shlex.quote(json.dumps(groot_folders.OPTIONS['sizes']))}",
                shows=("groot_n1d6: [0-9,]+ trained parameters", "policy  "),
            ),
            Step(
                "accelerate launch recipes/groot_hang_keychain.py",
                add=f"{SMALL} {LEARN} --interaction.port {{port}}",
                beside="ends",
                shows=("robots are served", "figures .*result.json"),
            ),
            Step(
                "poco-vla robot",
                change=ARM | LEADER | {"--episode-seconds": "2"},
                add=f"{ARM_WORDS} {LEADER_WORDS} --url ws://127.0.0.1:{{port}}",
                keys=(("episode 1  step", "s"),),
                shows=("episode 1: success", "training is over"),
            ),
            Step("poco-vla push", shows=("nothing was uploaded", "non-commercial", "license: other")),
            Step("poco-vla push", shows=(f"pushed to {USER}/keychain_poco .private.",)),
        ),
    ),
}


# -- reading a page ---------------------------------------------------------------------------------------------------


def text_of(name):
    return (GUIDES / f"{name}.md").read_text()


def parts(text):
    """(language, code) of every block that is to be run: a command each of bash, a whole block of python."""
    found = [(line, language, code) for language in ("bash", "python") for line, code in blocks(text, language)]
    for _, language, code in sorted(found):
        yield from ((language, one) for one in (commands(code) if language == "bash" else [code]))


def in_small(command, step, **values):
    """A page's command with what takes the place of hardware, sizes and addresses.

    Raises:
        AssertionError: the step is not that command's, changes what it does not say, or leaves out what is ours.
    """
    assert command.startswith(step.begins), f"the page has {command[:60]!r} where the test expects {step.begins!r}"
    if step.texts:
        missing = [old for old in step.texts if old not in command]
        assert not missing, f"{missing} is not in {command!r}"
        for old, new in step.texts.items():
            command = command.replace(old, new)
        return command
    change = step.change
    words, out, left = iter(shlex.split(command, comments=True)), [], set(change)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in change and flag.startswith("--"):
            left.discard(flag)
            value = value if equals else next(words)
            if change[flag] is None:
                assert flag.startswith(("--robot.", "--teleop.")), f"{flag} is ours: it has to be run"
                continue
            out += [f"{flag}={change[flag]}"] if equals else [flag, change[flag]]
        else:
            out.append(word)
    left -= {flag for flag in left if flag in ARM and change[flag] is None}  # not every program is told of the torque
    assert not left, f"the page's command no longer says {sorted(left)}: {command}"
    small = " ".join([*map(quoted, out), *filter(None, [step.add])])
    for name, value in values.items():
        small = small.replace(f"{{{name}}}", str(value))
    return small.replace("you/", f"{USER}/")


def quoted(word):
    """As the shell is to see it; what another command gives stays for the shell to ask."""
    return f'"{word}"' if word.startswith("$(") else shlex.quote(word)


# -- running it -------------------------------------------------------------------------------------------------------


class Running:
    """A command in a shell, at a terminal of its own; what it shows, without colours and cursor movements."""

    def __init__(self, command, folder, environment):
        self.command = command
        self.person, program = os.openpty()
        self.process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=folder,
            env=environment,
            stdin=program,
            stdout=program,
            stderr=program,
            start_new_session=True,
        )
        os.close(program)
        self._shown = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while True:
            try:
                self._shown += os.read(self.person, 65536)
            except OSError:  # the last process at this terminal is gone
                return

    @property
    def shown(self):
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._shown.decode(errors="replace"))

    @property
    def over(self):
        return self.process.poll() is not None and not self._reader.is_alive()

    def go_on(self, keys=(), beside=None):
        """Until it is over: press each key once what it waits for is seen. One beside it that fails ends the wait."""
        end, at, keys = time.monotonic() + PATIENCE, 0, list(keys)
        while not self.over:
            assert time.monotonic() < end, f"{self.command}\n took too long:\n{self.shown[-3000:]}"
            failed = beside and beside.over and beside.process.returncode
            assert not failed, f"{beside.command}\n ended with {failed}:\n{beside.shown[-3000:]}"
            if keys and (found := re.compile(keys[0][0]).search(self.shown, at)):
                at = found.end()
                os.write(self.person, keys.pop(0)[1].encode())
            time.sleep(0.02)
        return self

    def end(self):
        """No process of it is left."""
        if not self.over:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
        self._reader.join(10)
        os.close(self.person)


def environment(hub):
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(HERE / "guide_parts")}
    own |= {"OMP_NUM_THREADS": "1", "MUJOCO_GL": "disable", "TERM": "xterm", "COLUMNS": "400"}
    return os.environ | hub.environment() | own


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def check(running, step, statuses=(0,)):
    told = f"{running.command}\n ended with {running.process.returncode}:\n{running.shown[-4000:]}"
    assert running.process.returncode in statuses, told
    for pattern in step.shows:
        assert re.search(pattern, running.shown), f"no {pattern!r} in what it showed\n{told}"
    print(f"$ {running.command[:200]}\n{running.shown[-1500:]}")


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in PAGES])
def test_every_command_of_a_page_runs_in_its_order(name, tmp_path):
    """In one folder, with one Hub: a command leans on what those before it have left."""
    pytest.importorskip("ogbench")
    page, steps, beside = PAGES[name], list(PAGES[name].steps), []
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    with HubServer() as hub, ExitStack() as stack:
        environ, port = environment(hub), free_port()
        page.prepare(tmp_path, hub)

        def start(command):
            running = Running(command, tmp_path, environ)
            stack.callback(running.end)
            return running

        for language, code in parts(text_of(name)):
            if language == "python":
                run_python(code, tmp_path, start)
                continue
            assert steps, f"{name}.md has a command that PAGES does not know: {code}"
            step = steps.pop(0)
            command = in_small(code, step, port=port)
            if command.startswith("export "):
                variable, _, value = shlex.split(command)[1].partition("=")
                environ[variable] = value
                continue
            running = start(command)
            if step.beside:
                beside.append((running, step))
                continue
            check(running.go_on(step.keys, beside[-1][0] if beside else None), step)
            for other, its in beside:
                if its.beside == "stopped":
                    os.killpg(other.process.pid, signal.SIGINT)
                check(other.go_on(), its, statuses=(0,) if its.beside == "ends" else (1, 130, -signal.SIGINT))
            beside.clear()
    assert not steps, f"{name}.md no longer has {[step.begins for step in steps]}"
    assert not beside


def run_python(code, folder, start):
    """A block that begins with a file's name is that file, for a command to run; another one runs as it stands."""
    code = code.replace("you/", f"{USER}/")
    if named := re.match(r"# (\w+\.py)\b", code):
        (folder / named[1]).write_text(code)
        return
    (folder / "block.py").write_text(code)
    check(start("python block.py").go_on(), Step(""))


def test_the_growth_pages_tables_are_what_its_script_prints():
    printed = subprocess.run([sys.executable, GUIDES / "growth.py"], capture_output=True, text=True, check=True).stdout
    tables = printed.strip().split("\n\n")
    assert len(tables) == 3
    for table in tables:
        assert table in text_of("growth")


@pytest.fixture
def judged_arm(monkeypatch):
    monkeypatch.syspath_prepend(GUIDES)
    return pytest.importorskip("judged_arm")


def test_the_judged_arm_is_an_so101_with_two_more_options(judged_arm):
    """Up to its driver, which is not installed here."""
    from lerobot.robots import RobotConfig

    from poco_vla.robots import devices

    words = [
        "--robot.type=judged_arm",
        "--robot.port=/dev/ttyACM0",
        "--robot.classifier=me/it",
        "--robot.labels=me/set",
    ]
    config = devices._config(RobotConfig, "robot", words)
    assert (config.type, config.port, config.classifier, config.labels) == (
        "judged_arm",
        *(w.split("=")[1] for w in words[1:]),
    )
    assert judged_arm.JudgedArm.config_class is type(config)


def test_the_judged_arm_tells_success_once(judged_arm):
    """Ten observations: looks at the fifth and at the tenth, which agree."""
    from poco_vla.robots import RewardModelSuccess
    from poco_vla.robots.signals import KnowsSuccess

    arm = object.__new__(judged_arm.JudgedArm)
    model = type("Model", (), {"compute_reward": lambda self, batch: batch["observation.images.front"].amax() > 0.5})()
    arm.judge = RewardModelSuccess(model, every=5, agree=2)
    assert isinstance(arm, KnowsSuccess)
    told = []
    for _ in range(11):
        arm.judge.observe({"observation.images.front": np.full((4, 4, 3), 255, np.uint8)})
        told.append(arm.success)
    assert told == [False] * 9 + [True, False]


# -- what needs no run ------------------------------------------------------------------------------------------------


def test_the_guides_of_whole_tasks_are_run():
    """A guide that hands files from one command to the next has its steps here."""
    assert set(PAGES) == set(RUN_WHOLE)


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_says_to_an_arm_is_understood_by_lerobot(name):
    """By its own parser of robots and teleoperators: no driver of an SO-101 is installed here."""
    from lerobot.robots import RobotConfig
    from lerobot.teleoperators import TeleoperatorConfig

    from poco_vla.robots import devices

    for _, command in (part for part in parts(text_of(name)) if part[0] == "bash"):
        words = [word for word in shlex.split(command, comments=True) if word.startswith(("--robot.", "--teleop."))]
        if "so101_follower" in command:
            words = devices._with_plugins(words)
            robot = devices._config(RobotConfig, "robot", words)
            assert set(robot.cameras) == {"front", "wrist"}
            teleop = devices._config(TeleoperatorConfig, "teleop", words)
            assert teleop is None or teleop.port == "/dev/ttyACM1"


# -- the reading itself -----------------------------------------------------------------------------------------------


def test_commands_are_read_as_a_shell_reads_them():
    code = "# a comment\na --b \\\n    --c\n\ncat > x <<'END'\n{1}\nEND\nd  # why\n"
    assert commands(code) == ["a --b --c", "cat > x <<'END'\n{1}\nEND", "d  # why"]


def test_only_values_and_hardware_change():
    step = Step("go", change={"--robot.port": None, "--n": "2", "--robot.type": "sim"}, add="--small")
    small = in_small("go --robot.port=/dev/x --n 50 --name=you/set --robot.type=arm --keep 'a b'  # now", step)
    assert small == f"go --n 2 --name={USER}/set --robot.type=sim --keep 'a b' --small"
    for command, step in (
        ("go --n 3", Step("stay")),
        ("go --m 3", Step("go", change={"--n": "2"})),
        ("go --n 3", Step("go", change={"--n": None})),
    ):
        with pytest.raises(AssertionError):
            in_small(command, step)
