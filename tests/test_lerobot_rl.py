"""POCO under LeRobot's RLTrainer, and what a HIL-SERL set-up brings: its datasets and its reward classifier."""

from dataclasses import dataclass
from pathlib import Path

import draccus
import gymnasium as gym
import numpy as np
import pytest
import torch
from lerobot.envs.configs import GripperConfig, HILSerlProcessorConfig, HILSerlRobotEnvConfig, ResetConfig
from lerobot.optim.optimizers import load_optimizer_state, save_optimizer_state
from lerobot.rewards.classifier.configuration_classifier import RewardClassifierConfig
from lerobot.rl import ReplayBuffer, RLAlgorithm, RLAlgorithmConfig, RLTrainer, make_algorithm
from lerobot_policy_flow_mlp.adapter import FlowMlp

from poco_vla.checkpointing.checkpoint import trainable_state
from poco_vla.config import DatasetConfig, OptimConfig, PocoConfig, TrainConfig
from poco_vla.data import Episode, Replay, open_dataset, read_episodes
from poco_vla.data.dataset import describe_dataset
from poco_vla.errors import CheckpointError, DataError, NonFiniteError
from poco_vla.lerobot_rl import ChunkMixer, PocoAlgorithm, PocoAlgorithmConfig
from poco_vla.recording.recorder import write_dataset
from poco_vla.robots import RewardModelSuccess, Signal
from poco_vla.training import Trainer, train

STATE, FRONT = "observation.state", "observation.images.front"
POCO = PocoConfig(num_candidates=3, eta=0.2, zeta=0.8, gamma=0.9, critic_hidden=(16, 16))
HORIZON, BATCH = 4, 8
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four short episodes, three of which succeed at their end."""
    rng = np.random.default_rng(0)
    episodes = []
    for i, length in enumerate((9, 5, 7, 6)):
        success = np.arange(length) == (length - 1 if i else length)
        columns = {name: rng.normal(size=(length, n)).astype(np.float32) for name, n in ((STATE, 3), ("action", 2))}
        obs, action = {STATE: columns[STATE]}, columns["action"]
        episodes.append(Episode(obs, action, success.astype(np.float32), success, success, task="push"))
    root = tmp_path_factory.mktemp("data") / "set"
    return DatasetConfig("local/set", write_dataset(episodes, root, fps=10, repo_id="local/set"))


def pool_of(data, policy, **options):
    replay = Replay(horizon=HORIZON, gamma=POCO.gamma, **options)
    replay.extend(read_episodes(open_dataset(data), data, policy.input_keys), is_demo=True)
    return replay


def config_of(**changes):
    common = {"poco": POCO, "sft_steps": 3, "warmup_steps": 3, "actor_lr": 1e-3, "critic_lr": 2e-3, "seed": 7}
    return PocoAlgorithmConfig(**(common | changes))


def fresh(data):
    """A policy by the dataset, its weights by torch's generator."""
    info = describe_dataset(open_dataset(data))
    torch.manual_seed(7)
    return FlowMlp.from_dataset(info.features, info.stats, horizon=HORIZON, hidden_dims=[16, 16], num_inference_steps=3)


def lerobots(data, config=None):
    """LeRobot's trainer around a fresh policy."""
    policy = fresh(data)
    algorithm = PocoAlgorithm(policy, config or config_of())
    return RLTrainer(algorithm, ChunkMixer(pool_of(data, policy), policy, seed=7), BATCH)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("limit", [None, 0.1])
def test_lerobots_trainer_gives_the_weights_of_our_own_bit_for_bit(data, tmp_path, limit):
    """Three updates of imitation, three of warm-up, six online; and the same figures."""
    ours = Trainer(
        TrainConfig(
            dataset=data,
            env=None,
            online_steps=0,
            horizon=HORIZON,
            policy_options={"hidden_dims": [16, 16], "num_inference_steps": 3},
            poco=POCO,
            optim=OptimConfig(batch_size=BATCH, actor_lr=1e-3, critic_lr=2e-3, max_grad_norm=limit),
            seed=7,
            output_dir=tmp_path / "run",
        )
    )
    with ours.display.stage("by hand", 12) as bar:
        for stage, updates in (("sft", 3), ("warmup", 3), ("online", 6)):
            for _ in range(updates):
                ours.updater.update(stage, bar)
    ours.close()

    theirs = lerobots(data, config_of(grad_clip_norm=limit))
    before = {name: tensor.clone() for name, tensor in trainable_state(theirs.algorithm.poco).items()}
    for _ in range(12):
        theirs.training_step()
    after = trainable_state(theirs.algorithm.poco)
    assert_same(after, trainable_state(ours.updater.algorithm))
    assert {name.split(".")[0] for name in after if not after[name].equal(before[name])} == {
        "policy",
        "critic",
        "target_critic",
    }


def test_each_stage_logs_its_own_figures_under_our_names(data):
    trainer = lerobots(data)
    logged = [trainer.training_step().to_log_dict() for _ in range(7)]
    assert trainer.algorithm.optimization_step == 7
    assert trainer.algorithm.stage == "online"
    assert logged[0].keys() == {"bc_loss", "actor_grad_norm"}
    assert logged[3].keys() == {"critic_loss", "q", "target", "critic_grad_norm"}
    assert logged[6].keys() >= {"bc_loss", "posterior_loss", "critic_loss", "effective_sample_size", "candidate_q"}
    assert all(isinstance(value, float) for line in logged for value in line.values())


def test_what_is_pushed_to_actors_is_the_head_alone_and_arrives_by_lerobots_transport(data):
    utils = pytest.importorskip("lerobot.transport.utils", reason="needs grpcio")
    trainer = lerobots(data)
    for _ in range(2):
        trainer.training_step()
    weights = trainer.algorithm.get_weights()
    trained = {f"policy.{name}" for name, p in trainer.algorithm.policy.named_parameters() if p.requires_grad}
    assert weights["policy"].keys() == trained
    actor = lerobots(data).algorithm
    critic = {name: tensor.clone() for name, tensor in actor.state_dict().items()}
    assert any(not actor.get_weights()["policy"][name].equal(tensor) for name, tensor in weights["policy"].items())
    actor.load_weights(utils.bytes_to_state_dict(utils.state_to_bytes(weights)), device="cpu")
    assert_same(actor.get_weights()["policy"], weights["policy"])
    assert_same(actor.state_dict(), critic)
    with pytest.raises(CheckpointError, match=r"do not fit this model"):
        actor.load_weights({"policy": dict(list(weights["policy"].items())[1:])})


def test_a_saved_algorithm_goes_on_bit_for_bit(data, tmp_path):
    """By what LeRobot's learner saves: the policy's folder, the algorithm's, the optimizers'."""
    trainer = lerobots(data)
    for _ in range(8):
        trainer.training_step()
    algorithm, rng = trainer.algorithm, trainer.data_mixer.rng.bit_generator.state
    algorithm.save_pretrained(tmp_path / "algorithm")
    algorithm.policy.save_pretrained(tmp_path / "policy")
    save_optimizer_state(algorithm.get_optimizers(), tmp_path)

    policy = FlowMlp.from_pretrained(tmp_path / "policy")
    again = PocoAlgorithm.from_pretrained(tmp_path / "algorithm", policy=policy)
    assert again.config == algorithm.config
    again.optimization_step = algorithm.optimization_step
    other = RLTrainer(again, ChunkMixer(trainer.data_mixer.replay, policy), BATCH)
    other.data_mixer.rng.bit_generator.state = rng
    load_optimizer_state(again.get_optimizers(), tmp_path)
    for one in (other, trainer):
        for _ in range(3):
            one.training_step()
    assert_same(trainable_state(again.poco), trainable_state(algorithm.poco))


def test_a_loss_that_is_not_finite_changes_nothing(data):
    trainer = lerobots(data, config_of(sft_steps=0, warmup_steps=0))
    trainer.training_step()
    next(trainer.algorithm.poco.target_critic.parameters()).fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in trainer.algorithm.get_weights()["policy"].items()}
    with pytest.raises(NonFiniteError, match=r"update 1 \(online\): the loss is nan"):
        trainer.training_step()
    assert_same(trainer.algorithm.get_weights()["policy"], before)


def test_a_gradient_that_is_not_finite_changes_nothing(data):
    """Make the critic's gradient alone infinite, so that the head's step would come first."""
    trainer = lerobots(data, config_of(sft_steps=0, warmup_steps=0))
    trainer.training_step()
    poco = trainer.algorithm.poco
    before = {name: p.detach().clone() for name, p in poco.named_parameters()}
    next(poco.critic.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"update 1 \(online\): the loss is \S+, its gradient not finite \(actor"):
        trainer.training_step()
    assert all(torch.equal(p, before[name]) for name, p in poco.named_parameters())


@dataclass
class Program:
    """Of one option, as LeRobot's learner has it."""

    algorithm: RLAlgorithmConfig | None = None


def test_lerobots_command_lines_parse_it_with_every_option():
    words = ["--algorithm.type=poco", "--algorithm.poco.zeta=auto", "--algorithm.poco.critic_hidden=[8,8]"]
    config = draccus.parse(Program, None, [*words, "--algorithm.warmup_steps=9"]).algorithm
    assert config == PocoAlgorithmConfig(poco=PocoConfig(zeta="auto", critic_hidden=(8, 8)), warmup_steps=9)
    assert config.type == "poco"
    assert RLAlgorithmConfig.get_choice_class("poco").from_policy_config(None) == PocoAlgorithmConfig()
    assert issubclass(PocoAlgorithm, RLAlgorithm)


def test_lerobots_own_factory_does_not_make_it_yet():
    """When this fails, LeRobot has opened its list: the README and the HIL-SERL guide say otherwise."""
    config = config_of()
    config.policy_config = object()  # what TrainRLServerPipelineConfig.validate does
    with pytest.raises(ValueError, match=r"'poco' is not available"):
        make_algorithm(config, torch.nn.Linear(1, 1))


def transitions(size):
    """LeRobot's own pool of single steps."""
    buffer = ReplayBuffer(capacity=size, device="cpu", state_keys=[STATE], storage_device="cpu", use_drq=False)
    for i in range(size):
        state = {STATE: torch.full((1, 3), float(i))}
        buffer.add(state, torch.full((1, 2), i / 10), float(i % 3 == 2), state, i % 3 == 2, False)
    return buffer


def test_single_steps_are_refused_with_what_to_give_instead(data):
    with pytest.raises(DataError, match=r"a batch of state, action, .* give the RLTrainer a .*ChunkMixer"):
        PocoAlgorithm(fresh(data), config_of()).update(iter([dict(transitions(6).sample(4))]))


# -- what HIL-SERL recorded -----------------------------------------------------------------------------------------


class Push(gym.Env):
    """Counts its steps; the first episode succeeds at the fourth."""

    observation_space = gym.spaces.Dict(
        {
            "agent_pos": gym.spaces.Box(-9, 9, (3,), np.float32),
            "pixels": gym.spaces.Dict({"front": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)}),
        }
    )
    action_space = gym.spaces.Box(-1, 1, (4,), np.float32)
    episode = -1

    def _observation(self):
        grey = np.full((64, 64, 3), 20 * self.steps, np.uint8)
        return {"agent_pos": np.full(3, self.steps, np.float32), "pixels": {"front": grey}}

    def reset(self, *, seed=None, options=None):
        self.steps, self.episode = 0, self.episode + 1
        return self._observation(), {}

    def step(self, action):
        self.steps += 1
        success = self.episode == 0 and self.steps == 4
        teleop = np.array([0.1 * self.steps, 0, 0, 1], np.float32)
        info = {"is_intervention": True, "teleop_action": teleop, "discrete_penalty": -0.02}
        return self._observation(), float(success), success, False, info


@pytest.fixture(scope="module")
def hilserl(tmp_path_factory):
    """Two episodes, recorded by LeRobot's own gym_manipulator: a success, and one cut off by the time limit."""
    from lerobot.rl import gym_manipulator

    root = tmp_path_factory.mktemp("hilserl") / "push"
    processor = HILSerlProcessorConfig(reset=ResetConfig(control_time_s=0.35), gripper=GripperConfig(use_gripper=True))
    env_config = HILSerlRobotEnvConfig(name="gym_hil", fps=20, processor=processor)
    dataset = gym_manipulator.DatasetConfig("you/push", "push the cube", str(root), num_episodes_to_record=2)
    env = Push()
    gym_manipulator.control_loop(
        env,
        *gym_manipulator.make_processors(env, None, env_config),
        None,
        gym_manipulator.GymManipulatorConfig(env_config, dataset, mode="record"),
    )
    return DatasetConfig("you/push", root)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small ResNet with random weights, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], embedding_size=8, layer_type="basic"
    )
    path = tmp_path_factory.mktemp("encoder")
    transformers.ResNetModel(config).save_pretrained(path)
    return str(path)


def test_a_hilserl_dataset_is_read_without_any_option(hilserl):
    """Success is where the reward is 1. Its next.done is "terminated or truncated" in one: an episode that the time
    limit cut off ends there, as it does in LeRobot's own pool."""
    dataset = open_dataset(hilserl)
    assert dataset.meta.features.keys() >= {"next.reward", "next.done", "complementary_info.discrete_penalty"}
    assert dataset.meta.features[FRONT]["shape"] == (3, 64, 64)
    won, cut = read_episodes(dataset, hilserl, [STATE, FRONT], horizon=HORIZON)
    assert won.success.tolist() == won.terminal.tolist() == [False, False, False, True]
    assert won.reward.tolist() == [0, 0, 0, 1]
    assert not cut.success.any()
    assert cut.terminal.tolist() == [False] * (len(cut) - 1) + [True]
    np.testing.assert_allclose(won.action[:, 0], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    assert won.obs[STATE][:, 0].tolist() == [0, 1, 2, 3]
    assert won.obs[FRONT].shape == (4, 64, 64, 3)
    assert np.abs(won.obs[FRONT][:, 32, 32, 0].astype(int) - [0, 20, 40, 60]).max() <= 2
    assert won.task == "push the cube"


@pytest.mark.exhaustive
@pytest.mark.slow
def test_our_trainer_imitates_a_hilserl_dataset_with_its_camera(hilserl, encoder, tmp_path):
    result = train(
        TrainConfig(
            dataset=hilserl,
            env=None,
            sft_steps=2,
            online_steps=0,
            horizon=HORIZON,
            policy_options={"hidden_dims": [16], "vision_encoder": encoder},
            optim=OptimConfig(batch_size=4),
            output_dir=tmp_path / "run",
        )
    )
    policy = FlowMlp.from_pretrained(result.policy_dir)
    assert set(policy.input_keys) == {STATE, FRONT}
    assert policy.spec.action_dim == 4


def test_the_pool_that_lerobots_learner_saves_is_read_too(tmp_path):
    """Its checkpoints write the online transitions as a dataset: what was tried so far is not lost."""
    transitions(6).to_lerobot_dataset("you/online", fps=10, root=tmp_path / "dataset")
    config = DatasetConfig("you/online", Path(tmp_path / "dataset"))
    episodes = read_episodes(open_dataset(config), config, [STATE])
    assert [episode.success.tolist() for episode in episodes] == [[False, False, True]] * 2
    assert [episode.obs[STATE][:, 0].tolist() for episode in episodes] == [[0, 1, 2], [3, 4, 5]]


def test_a_hilserl_reward_classifier_judges_our_episodes(encoder):
    """LeRobot's own Classifier, told by its last bias what to say, through its own processor."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.rewards.factory import make_reward_model, make_reward_pre_post_processors

    config = RewardClassifierConfig(
        model_name=encoder,
        num_cameras=1,
        latent_dim=8,
        hidden_dim=8,
        input_features={FRONT: PolicyFeature(FeatureType.VISUAL, (3, 128, 128))},
    )
    model = make_reward_model(config).eval()
    stats = {FRONT: {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.5)}}
    preprocess, _ = make_reward_pre_post_processors(config, dataset_stats=stats)
    signals = RewardModelSuccess(model, preprocess=preprocess, every=2, agree=2)
    seen = {STATE: np.zeros(3, np.float32), FRONT: np.full((128, 128, 3), 200, np.uint8)}

    def heard(bias):
        torch.nn.init.zeros_(model.classifier_head[-1].weight)
        torch.nn.init.constant_(model.classifier_head[-1].bias, bias)
        signals.begin()
        said = []
        for _ in range(6):
            signals.observe(seen)
            said.append(signals.poll())
        return said

    assert heard(-5.0) == [None] * 6
    assert heard(5.0) == [None, None, None, Signal.SUCCESS, None, None]
