"""LeRobot's own commands on this library's policies, episodes and robot. (That pi0.5 and GR00T are evaluated by the
line that their run prints is in their recipes' tests; here they are evaluated in batches.)"""

import importlib
import json
import re
import subprocess
from dataclasses import dataclass, fields

import forked
import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot_commands import BIN, TASK, evaluation, picture, recording, rollout, run, training

from poco_vla import load_adapter
from poco_vla.config import DatasetConfig, EnvSpec, EvalConfig, OptimConfig, PocoConfig, TrainConfig
from poco_vla.data import Episode, open_dataset, read_episodes
from poco_vla.recording.recorder import write_dataset
from poco_vla.training import train

pytest.importorskip("ogbench")
CAMERAS, SIZE, FPS = ("front", "wrist"), 64, 20
STATE = "observation.state"
VIEWS = (f"--robot.views=[{','.join(CAMERAS)}]", f"--robot.image_size={SIZE}")
PICTURES = (f"--env.cameras=[{','.join(CAMERAS)}]", f"--env.image_size={SIZE}")
STEPS = 12
"""Of an episode."""

# One worker runs them all: they share the runs.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("lerobot_commands")]


@dataclass(frozen=True)
class LeRobotRun:
    """A finished run of our trainer: its folder, and what LeRobot's commands need beside its policy's."""

    folder: object
    plugins: tuple

    @property
    def policy(self):
        return self.folder / "policy"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Datasets of two short random episodes for this task: by the whole state, and by two cameras."""
    rng = np.random.default_rng(0)

    def episode(width, cameras):
        shapes = {STATE: width, "action": 5}
        columns = {name: rng.uniform(-1, 1, (STEPS, n)).astype(np.float32) for name, n in shapes.items()}
        action, end = columns.pop("action"), np.arange(STEPS) == STEPS - 1
        images = {
            f"observation.images.{name}": rng.integers(0, 255, (STEPS, SIZE, SIZE, 3), np.uint8) for name in cameras
        }
        return Episode(columns | images, action, end.astype(np.float32), end, end, task="put the cube on its target")

    root = tmp_path_factory.mktemp("data")
    for name, width, cameras in (("state", 28, ()), ("cameras", 19, CAMERAS)):
        write_dataset([episode(width, cameras) for _ in range(2)], root / name, fps=FPS, repo_id="local/cube")
    return root


def trained(name, root, data):
    """Every stage, in a few seconds."""
    adapter, state_only = load_adapter(name), name == "flow_mlp"
    if not state_only:
        adapter.tiny().save_pretrained(root / "base")
    cameras = {} if state_only else {"cameras": list(CAMERAS), "image_size": SIZE}
    result = train(
        TrainConfig(
            adapter=name,
            policy=None if state_only else str(root / "base"),
            policy_options={"hidden_dims": [16, 16]} if state_only else {},
            statistics="auto" if state_only else "dataset",
            dataset=DatasetConfig("local/cube", data / ("state" if state_only else "cameras")),
            env=EnvSpec("ogbench", TASK, cameras | {"episode_length": STEPS}, num_envs=1, in_process=True),
            horizon=5,
            poco=PocoConfig(num_candidates=2, critic_hidden=(16,)),
            optim=OptimConfig(batch_size=4),
            eval=EvalConfig(episodes=1, videos=False),
            sft_steps=1,
            warmup_steps=1,
            online_steps=2 * STEPS,
            updates_per_step=0.2,
            num_threads=1,
            output_dir=root / "run",
        )
    )
    told = json.loads((result.output_dir / "result.json").read_text())
    return LeRobotRun(result.output_dir, tuple(told["lerobot_arguments"]))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Runs by their adapter's name, each made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = trained(name, tmp_path_factory.mktemp(name), data)
        return made[name]

    return get


# -- lerobot-train, lerobot-eval ------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_lerobot_train_makes_a_policy_that_lerobot_eval_runs(data, tmp_path):
    small = ("--policy.hidden_dims=[16,16]", "--steps=3", "--batch_size=4", "--num_workers=0")
    run("lerobot-train", *training(data / "state", tmp_path / "train", *small))
    policy = tmp_path / "train" / "checkpoints" / "last" / "pretrained_model"
    shown = run("lerobot-eval", *evaluation(policy, tmp_path / "eval"))
    assert "'pc_success': 0.0" in shown
    assert (tmp_path / "eval" / "eval_info.json").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["flow_mlp", "pi05", "groot_n1d6"])
def test_lerobot_eval_runs_what_we_export_in_batches(runs, name, tmp_path):
    """Two environments side by side; the figures that it prints are those of its file, and each episode has a film."""
    made = runs(name)
    more = made.plugins if name == "flow_mlp" else (*made.plugins, *PICTURES)
    shown = run("lerobot-eval", *evaluation(made.policy, tmp_path, *more, episodes=2))
    overall = json.loads((tmp_path / "eval_info.json").read_text())["overall"]
    assert overall["n_episodes"] == 2
    assert f"'pc_success': {overall['pc_success']}" in shown
    assert f"'avg_sum_reward': {overall['avg_sum_reward']}" in shown
    assert len(list((tmp_path / "videos").rglob("*.mp4"))) == 2


WITHOUT_US = """
import importlib.abc, json, sys
from pathlib import Path
from types import SimpleNamespace

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith(("poco_vla", "lerobot_policy_")):
            raise ModuleNotFoundError(f"{name} is not there")

sys.meta_path.insert(0, Absent())
import numpy, torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pi05 import modeling_pi05 as code
from lerobot.policies.utils import prepare_observation_for_inference

folder = Path(sys.argv[1])
sizes = json.loads((folder / "architecture.json").read_text())  # of the tiny model; nothing else is not LeRobot's own
stacks = {"gemma_2b": sizes["vlm"], "gemma_300m": sizes["expert"]}
code.get_gemma_config = lambda variant: SimpleNamespace(**stacks[variant])
vlm, expert = code.PaliGemmaForConditionalGenerationWithPiGemma, code.PiGemmaForCausalLM

def small_vlm(config):
    vision, text, small = config.vision_config, config.text_config, sizes["vision"]
    vision.hidden_size, vision.num_hidden_layers, vision.patch_size = small["width"], small["depth"], small["patch"]
    vision.intermediate_size, vision.num_attention_heads = small["mlp_dim"], small["num_heads"]
    vision.projection_dim = config.projection_dim = sizes["vlm"]["width"]
    text.vocab_size = config.image_token_index = sizes["vocab"]
    text.pad_token_id = config.pad_token_id = 0
    return vlm(config)

def small_expert(config):
    config.vocab_size = sizes["vocab"]
    return expert(config)

code.PaliGemmaForConditionalGenerationWithPiGemma, code.PiGemmaForCausalLM = small_vlm, small_expert
config = PreTrainedConfig.from_pretrained(str(folder))
policy = get_policy_class(config.type).from_pretrained(str(folder), config=config).eval()
before, after = make_pre_post_processors(config, pretrained_path=str(folder))
seen = {"observation.state": numpy.zeros(19, numpy.float32)}
seen |= {f"observation.images.{name}": numpy.zeros((64, 64, 3), numpy.uint8) for name in ("front", "wrist")}
with torch.inference_mode():
    action = after(policy.select_action(before(prepare_observation_for_inference(seen, torch.device("cpu"), "put"))))
assert not {name for name in sys.modules if name.startswith(("poco_vla", "lerobot_policy_"))}
print("acts in", tuple(action.shape), bool(action.isfinite().all()), config.type)
"""


@pytest.mark.exhaustive
def test_an_exported_pi05_needs_nothing_of_ours(runs):
    """In a process where this library and its adapters cannot be imported, LeRobot's own code loads the folder without
    a missing or unexpected tensor, and acts. Only the sizes are told to it: the real model's are LeRobot's own."""
    program = [BIN / "python", "-c", WITHOUT_US, runs("pi05").policy]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "All keys loaded successfully!" in done.stdout
    assert "acts in (1, 5) True pi05" in done.stdout


# -- lerobot-rollout ------------------------------------------------------------------------------------------------


def test_lerobot_rollout_drives_the_simulated_arm_and_records_what_it_did(runs, tmp_path):
    """Strategy "episodic". The recorded actions, given to the environment that the arm stands for, lead through the
    recorded states: the policy saw and moved what it was trained on. LeRobot records neither reward nor success, so
    that nobody knows how an episode ended: it is no demonstration."""
    from poco_vla.simulators.ogbench_gym import OGBenchEnv

    root, made = tmp_path / "recorded", runs("flow_mlp")
    episodes = ("--dataset.num_episodes=2", "--dataset.episode_time_s=1", "--dataset.reset_time_s=0.1")
    options = ("--robot.views=[]", "--strategy.type=episodic", "--strategy.reset_to_initial_position=false")
    words = rollout(made.policy, *options, *recording("cube", root, *episodes))
    shown = run("lerobot-rollout", *words, begin=forked.run)
    assert "Rollout finished" in shown
    config = DatasetConfig("you/rollout_cube", root, success_at_end=False)
    dataset = open_dataset(config)
    assert dataset.num_episodes == 2
    assert not {"next.reward", "next.done", "next.success"} & dataset.meta.features.keys()
    assert dataset.meta.features["action"]["names"] == ["x.vel", "y.vel", "z.vel", "yaw.vel", "gripper.vel"]
    recorded = read_episodes(dataset, config, [STATE])
    assert all(1 <= len(episode) <= FPS + 1 for episode in recorded)
    assert not any(episode.succeeded for episode in recorded)
    env = OGBenchEnv(TASK)
    seen, _ = env.reset(seed=3)
    for episode in recorded:  # nobody puts the scene back between them
        for state, action in zip(episode.obs[STATE], episode.action, strict=True):
            np.testing.assert_array_equal(state, seen["agent_pos"])
            seen = env.step(action.clip(-1, 1))[0]


@pytest.mark.exhaustive
def test_lerobot_rollout_records_pi05_and_its_cameras(runs, tmp_path):
    """Strategy "sentry", which goes on until its time is over."""
    root, made = tmp_path / "recorded", runs("pi05")
    options = (*made.plugins, *VIEWS, "--strategy.type=sentry", "--duration=2")
    run("lerobot-rollout", *rollout(made.policy, *options, *recording("pick", root)))
    dataset = LeRobotDataset("you/rollout_pick", root=root)
    assert dataset.num_episodes == 1
    assert dataset.meta.video_keys == [f"observation.images.{name}" for name in CAMERAS]
    assert dataset.num_frames > 2
    assert dataset[0]["observation.images.wrist"].shape == (3, SIZE, SIZE)
    assert dataset[0]["task"] == "put the cube on its target"


@pytest.mark.exhaustive
def test_lerobot_rollout_runs_groot_by_its_name(runs):
    """Strategy "base", which records nothing."""
    made = runs("groot_n1d6")
    shown = run("lerobot-rollout", *rollout(made.policy, *VIEWS, "--task=put the cube on its target", "--duration=1"))
    assert "Policy loaded: type=groot_n1d6" in shown
    assert "Duration limit reached" in shown


# -- lerobot-dataset-viz --------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_lerobot_dataset_viz_shows_a_recorded_online_episode(runs, tmp_path):
    """A row for each of two cameras, action, state, done, reward and success at every step."""
    pytest.importorskip("rerun", reason="needs lerobot[viz]")
    episodes = runs("pi05").folder / "episodes"
    run("lerobot-dataset-viz", *picture(episodes, tmp_path, episode=1))
    (film,) = tmp_path.glob("*.rrd")
    assert film.name == "local_episodes_episode_1.rrd"
    counted = run("rerun", "rrd", "stats", film, home=tmp_path)
    (rows,) = re.findall(r"num_rows = ([\d_,]+)", counted)
    assert int(re.sub(r"\D", "", rows)) >= 7 * STEPS


# -- what LeRobot cannot do yet -------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_what_the_readme_says_that_does_not_work_with_lerobot_yet():
    """A line that fails here is a line to take out of the README."""
    from lerobot.async_inference.constants import SUPPORTED_POLICIES
    from lerobot.rollout.configs import RolloutStrategyConfig
    from lerobot.rollout.inference.rtc import supports_rtc_inference
    from lerobot.rollout.strategies.factory import create_strategy

    record = importlib.import_module("lerobot.scripts.lerobot_record")
    assert "policy" not in {field.name for field in fields(record.RecordConfig)}
    assert "pi05" in SUPPORTED_POLICIES
    assert not {"flow_mlp", "groot_n1d6"} & set(SUPPORTED_POLICIES)
    assert supports_rtc_inference(load_adapter("pi05").tiny().policy)
    assert not supports_rtc_inference(load_adapter("flow_mlp").tiny().model)
    assert not supports_rtc_inference(load_adapter("groot_n1d6").tiny().policy)

    @RolloutStrategyConfig.register_subclass("with_success")
    @dataclass
    class Mine(RolloutStrategyConfig):
        pass

    with pytest.raises(ValueError, match="Unknown strategy type 'with_success'"):
        create_strategy(Mine())
