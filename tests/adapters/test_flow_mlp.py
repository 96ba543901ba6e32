"""flow_mlp: a LeRobot policy that LeRobot itself loads, and a poco_vla adapter that keeps the contract."""

import json

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE
from lerobot_policy_flow_mlp import FlowMlpConfig
from lerobot_policy_flow_mlp.adapter import FlowMlp
from lerobot_policy_flow_mlp.modeling_flow_mlp import FlowMlpPolicy, VectorField
from safetensors.torch import load_file, save_file
from torch import nn

from poco_vla import PolicyError, check_policy

IMAGE = "observation.images.front"
FEATURES = {
    OBS_STATE: {"dtype": "float32", "shape": (4,), "names": None},
    ACTION: {"dtype": "float32", "shape": (2,), "names": None},
}
STATS = {
    OBS_STATE: {"mean": torch.tensor([1.0, 2, 3, 4]), "std": torch.full((4,), 2.0)},
    ACTION: {"min": torch.tensor([-4.0, 0]), "max": torch.tensor([4.0, 1])},
}
SIZES = {"horizon": 3, "hidden_dims": [16, 16], "num_inference_steps": 5}


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


@pytest.fixture
def seeing(encoder):
    """State and one camera."""
    camera = {IMAGE: {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}}
    return FlowMlp.from_dataset(FEATURES | camera, STATS, **SIZES, vision_encoder=encoder)


@pytest.fixture
def saved(tmp_path):
    policy = FlowMlp.from_dataset(FEATURES, STATS, **SIZES)
    policy.save_pretrained(tmp_path)
    return policy, tmp_path


def test_the_contract_from_states():
    check_policy(FlowMlp.tiny())
    check_policy(FlowMlp.from_dataset(FEATURES, STATS, **SIZES, activation="gelu"))


def test_the_contract_from_images(seeing):
    check_policy(seeing)


def test_images_are_encoded_frozen_and_pooled(seeing):
    """Four states, then 16 channels of the last feature map averaged over its pixels; in eval mode always."""
    from transformers import AutoModel

    seeing.train()
    obs = seeing.example_obs(2)
    features = seeing.encode(obs).features
    encoder = AutoModel.from_pretrained(seeing.model.config.vision_encoder).eval()
    with torch.no_grad():
        expected = encoder(obs[IMAGE]).last_hidden_state.mean(dim=(2, 3))
    torch.testing.assert_close(features, torch.cat([obs[OBS_STATE], expected], dim=-1))
    assert seeing.feature_dim == 20
    assert {name.split(".")[0] for name, p in seeing.model.named_parameters() if p.requires_grad} == {"net"}


def test_the_vector_field_is_a_plain_mlp_over_features_chunk_and_time():
    field = VectorField(feature_dim=3, chunk_dim=4, hidden=[8, 8], activation="silu").double()
    layers = [module for linear in field.layers for module in (linear, nn.SiLU())][:-1]
    features, chunk, t = torch.randn(2, 3).double(), torch.randn(2, 5, 4).double(), torch.rand(2, 5).double()
    inputs = torch.cat([features[:, None].expand(-1, 5, -1), chunk, t[..., None]], dim=-1)
    torch.testing.assert_close(field(features, chunk, t), nn.Sequential(*layers)(inputs))


def test_what_is_saved_comes_back(saved):
    policy, path = saved
    loaded = FlowMlp.from_pretrained(path)
    assert loaded.spec == policy.spec
    assert loaded.input_keys == policy.input_keys == (OBS_STATE,)
    for name, p in policy.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], p, rtol=0, atol=0)


def test_processors_normalise_and_come_back(saved):
    """State (3, 2, 3, 4) with mean (1, 2, 3, 4), deviation 2 becomes (1, 0, 0, 0); the normalised action (0, 1) is the
    middle of [-4, 4] and the upper end of [0, 1]."""
    for policy in (saved[0], FlowMlp.from_pretrained(saved[1])):
        state = policy.preprocess({OBS_STATE: torch.tensor([3.0, 2, 3, 4])})[OBS_STATE]
        torch.testing.assert_close(state, torch.tensor([[1.0, 0, 0, 0]]))
        torch.testing.assert_close(policy.postprocess(torch.tensor([[0.0, 1.0]])), torch.tensor([[0.0, 1.0]]))


def test_lerobots_own_loader_loads_the_folder_and_acts(saved):
    policy, path = saved
    config = PreTrainedConfig.from_pretrained(path)
    assert isinstance(config, FlowMlpConfig)
    assert config.type == "flow_mlp"
    theirs = get_policy_class("flow_mlp").from_pretrained(path, config=config)
    assert isinstance(theirs, FlowMlpPolicy)
    preprocess, postprocess = make_pre_post_processors(config, pretrained_path=str(path))
    raw = {OBS_STATE: torch.tensor([0.5, 1, 2, 3])}
    noise = torch.randn(1, 3, 2)
    chunk = theirs.predict_action_chunk(preprocess(raw), noise=noise)
    ours = policy.native_sample(policy.preprocess(raw), noise).clamp(-1, 1)
    torch.testing.assert_close(chunk, ours)
    action = postprocess(theirs.select_action(preprocess(raw)))
    assert action.shape == (1, 2)
    assert 0 <= action[0, 1] <= 1


def test_lerobots_factory_knows_the_type():
    config = make_policy_config("flow_mlp", chunk_size=3, n_action_steps=3, device="cpu")
    assert isinstance(config, FlowMlpConfig)


def test_actions_are_executed_open_loop():
    """A chunk's steps come out in order, whatever the observations between; then a new chunk is sampled."""
    model = FlowMlp.tiny().model
    torch.manual_seed(0)
    chunk = model.predict_action_chunk({OBS_STATE: torch.zeros(1, 6)})
    torch.manual_seed(0)
    model.reset()
    acted = [model.select_action({OBS_STATE: torch.full((1, 6), float(k))}) for k in range(4)]
    torch.testing.assert_close(torch.stack(acted, dim=1), chunk)
    assert not torch.equal(model.select_action({OBS_STATE: torch.zeros(1, 6)}), acted[0])


def test_lerobots_loss_ignores_padded_steps():
    model = FlowMlp.tiny().model
    batch = {
        OBS_STATE: torch.randn(2, 6),
        ACTION: torch.randn(2, 4, 3),
        "action_is_pad": torch.zeros(2, 4, dtype=torch.bool),
    }
    batch["action_is_pad"][:, 2:] = True
    losses = []
    for last in (0.0, 1.0):
        batch[ACTION][:, 2:] = last
        batch[ACTION].requires_grad_()
        torch.manual_seed(0)
        loss, _ = model(batch)
        loss.backward()
        losses.append(loss.item())
        batch[ACTION] = batch[ACTION].detach()
    assert losses[0] != losses[1]  # the network does read them
    gradients = [p.grad for p in model.net.layers[-1].parameters()]
    for gradient in gradients:
        assert not gradient.unflatten(0, (4, 3))[2:].any()
        assert gradient.unflatten(0, (4, 3))[:2].any()


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_refused(saved, change):
    _, path = saved
    weights = load_file(path / "model.safetensors")
    if change == "missing":
        del weights["net.layers.1.bias"]
    elif change == "extra":
        weights["net.layers.9.bias"] = torch.zeros(2)
    else:
        weights["net.layers.1.bias"] = torch.zeros(3)
    save_file(weights, path / "model.safetensors")
    with pytest.raises(PolicyError, match=r"do not fit its config\.json"):
        FlowMlp.from_pretrained(path)


def test_a_policy_of_another_type_is_refused(saved):
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    act = ACTConfig(input_features={OBS_STATE: PolicyFeature(FeatureType.STATE, (4,))}, push_to_hub=False)
    act.save_pretrained(path)
    assert json.loads((path / "config.json").read_text())["type"] != config["type"]
    with pytest.raises(PolicyError, match='type "act", expected "flow_mlp"'):
        FlowMlp.from_pretrained(path)


def test_another_horizon_is_refused_and_the_same_accepted(saved):
    _, path = saved
    with pytest.raises(PolicyError, match="chunks of 3 steps, asked for 7"):
        FlowMlp.from_pretrained(path, horizon=7)
    assert FlowMlp.from_pretrained(path, horizon=3).spec.horizon == 3


def test_options_on_a_pretrained_policy_are_refused(saved):
    with pytest.raises(PolicyError, match=r"takes no options, got \['hidden_dims'\]"):
        FlowMlp.from_pretrained(saved[1], hidden_dims=[8])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_dims": []}, "hidden_dims is"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"layers": 3}, "layers"),
    ],
)
def test_options_that_cannot_work_are_named(options, words):
    with pytest.raises(PolicyError, match=words):
        FlowMlp.from_dataset(FEATURES, STATS, **(SIZES | options))


def test_a_dataset_without_observations_is_refused():
    with pytest.raises(PolicyError, match=r"observation\.state"):
        FlowMlp.from_dataset({ACTION: FEATURES[ACTION]}, STATS, **SIZES)


def test_tiny_is_reproducible_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    one, same, other = FlowMlp.tiny(), FlowMlp.tiny(), FlowMlp.tiny(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [p.head.layers[0].weight for p in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_policy_saved_on_another_device_loads_where_it_is_asked_to(tmp_path):
    policy = FlowMlp.from_dataset(FEATURES, STATS, **SIZES)
    policy.save_pretrained(tmp_path)
    for name in ("config.json", "policy_preprocessor.json"):
        path = tmp_path / name
        text = path.read_text()
        assert '"device": "cpu"' in text
        path.write_text(text.replace('"device": "cpu"', '"device": "cuda"'))
    loaded = FlowMlp.from_pretrained(tmp_path, device="cpu")
    obs = {OBS_STATE: torch.ones(2, 4), "task": ["", ""]}
    torch.testing.assert_close(loaded.preprocess(dict(obs))[OBS_STATE], policy.preprocess(dict(obs))[OBS_STATE])
    assert loaded.preprocess(dict(obs))[OBS_STATE].device.type == "cpu"


def test_a_folder_without_weights_is_named(tmp_path):
    FlowMlp.tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PolicyError, match="no weights"):
        FlowMlp.from_pretrained(tmp_path)


def test_state_keys_that_the_network_does_not_read_are_no_inputs():
    extra = FEATURES | {"observation.effort": {"dtype": "float32", "shape": (4,), "names": None}}
    assert FlowMlp.from_dataset(extra, STATS, **SIZES).input_keys == (OBS_STATE,)


PULSES = torch.cat([torch.zeros(90, 2), torch.ones(10, 2)])
PULSE_STATS = STATS | {
    ACTION: {"mean": PULSES.mean(0), "std": PULSES.std(0), "min": PULSES.amin(0), "max": PULSES.amax(0)}
    | {"q10": torch.zeros(2), "q90": torch.zeros(2)}
}


@pytest.mark.parametrize("mode", ["MEAN_STD", "QUANTILE10", "IDENTITY", "MIN_MAX"])
def test_every_demonstrated_action_can_be_sampled(mode, tmp_path):
    """Normalised by its deviation, a gripper that is open in a tenth of the frames reaches 3."""
    policy = FlowMlp.from_dataset(FEATURES, PULSE_STATS, **SIZES, normalization_mapping={"ACTION": mode})
    policy.save_pretrained(tmp_path)
    for one in (policy, FlowMlp.from_pretrained(tmp_path)):
        reached = one.postprocess(torch.full((1, 3, 2), one.spec.clip[1]))
        torch.testing.assert_close(reached, torch.ones(1, 3, 2), rtol=1e-4, atol=1e-4)


def test_kinds_that_a_mapping_does_not_name_keep_their_default():
    policy = FlowMlp.from_dataset(FEATURES, PULSE_STATS, **SIZES, normalization_mapping={"ACTION": "MEAN_STD"})
    seen = policy.preprocess({OBS_STATE: torch.tensor([[1.0, 2, 3, 6]])})[OBS_STATE]
    torch.testing.assert_close(seen, torch.tensor([[0.0, 0, 0, 1]]))
    with pytest.raises(PolicyError, match='names "STATES"'):
        FlowMlp.from_dataset(FEATURES, PULSE_STATS, **SIZES, normalization_mapping={"STATES": "MEAN_STD"})


def test_a_trained_policy_may_take_a_datasets_statistics(saved):
    wide = STATS | {ACTION: {"min": torch.full((2,), -9.0), "max": torch.full((2,), 9.0)}}
    policy = FlowMlp.from_pretrained(saved[1], features=FEATURES, stats=wide, statistics="dataset")
    torch.testing.assert_close(policy.postprocess(torch.ones(1, 3, 2)), torch.full((1, 3, 2), 9.0))
