"""smolvla gives LeRobot's own numbers, over one prefix per state that nothing copies or changes."""

import copy

import numpy as np
import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_STATE
from poco_vla_smolvla import network
from poco_vla_smolvla.adapter import PROJECTIONS, SmolVla
from poco_vla_smolvla.checkpoint import build_pipelines
from poco_vla_smolvla.vlm import Vlm, empty_policy, random_weights, tiny_vlm
from transformers.models.smolvlm import SmolVLMConfig

from poco_vla import Poco, PocoConfig, check_policy, flow_errors, integrate, load_adapter, propose

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

LAYERS = {
    "as published": {},
    "every layer attends to the chunk": {"attention_mode": "self_attn"},
    "no layer attends to the chunk": {"self_attn_every_n_layers": -1},
    "a third of the layers": {"num_vlm_layers": 3, "self_attn_every_n_layers": 3},
    "an expert of half the layers": {"num_expert_layers": 2, "self_attn_every_n_layers": -1},
    "image tokens and a padded prefix": {"add_image_special_tokens": True, "prefix_length": 70},
}
"""Ways in which SmolVLA's configuration lets the expert attend."""


def policy_with(horizon=6, seed=0, **options):
    """A tiny policy of another configuration than `SmolVla.tiny`."""
    tiny, config = SmolVla.tiny(), copy.deepcopy(SmolVla.tiny().policy.config)
    for name, value in ({"chunk_size": horizon, "n_action_steps": horizon} | options).items():
        setattr(config, name, value)
    policy = empty_policy(config, tiny_vlm())
    policy.load_state_dict(random_weights(policy, seed), assign=True)
    return SmolVla(policy.eval(), (tiny.preprocessor, tiny.postprocessor), vlm=tiny.vlm)


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def policy(request):
    return policy_with(**request.param)


@pytest.fixture
def tiny():
    return SmolVla.tiny()


def draws(policy, n, states=3, seed=0):
    """Noisy chunks and a time for each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(states, n, policy.spec.horizon, policy.spec.width, generator=generator)
    return x, torch.rand(states, n, generator=generator)


def prefix_tensors(prefix):
    return [prefix.features, *prefix.keys, *prefix.values, prefix.mask]


# -- against LeRobot --------------------------------------------------------------------------------------------------


@torch.no_grad()
def stock_velocity(policy, obs, x, time):
    """LeRobot's `denoise_step` for each candidate, on a cache of its own: noise - action at 1 for noise."""
    model = policy.policy.model
    embedded, mask, blocks = model.embed_prefix(*network.inputs(policy.policy, obs))
    out = []
    for j in range(x.shape[1]):
        _, cache = model.vlm_with_expert.forward(
            attention_mask=network.make_att_2d_masks(mask, blocks),
            position_ids=mask.cumsum(dim=1) - 1,
            inputs_embeds=[embedded, None],
            use_cache=True,
        )
        out.append(model.denoise_step(mask, cache, x[:, j], time[:, j]))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("n", [1, 5])
def test_a_velocity_is_lerobots_denoising_step_at_each_candidates_own_time(policy, n):
    obs, (x, t) = policy.example_obs(3), draws(policy, n)
    assert len(set(obs[OBS_LANGUAGE_ATTENTION_MASK].sum(dim=1).tolist())) == 3
    found = policy.velocity(policy.encode(obs), x, t)
    torch.testing.assert_close(found, -stock_velocity(policy, obs, x, 1 - t), **CLOSE)


def test_losses_and_head_gradients_are_those_of_lerobots_training_forward(policy):
    """Its joint forward, prefix and all, once per candidate, given the noise and the time."""
    stock = copy.deepcopy(policy.policy).requires_grad_(True)
    obs, (noise, t) = policy.example_obs(3), draws(policy, 3)
    chunks = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    chunks[..., 4:] = 0
    valid = torch.ones(3, policy.spec.horizon, dtype=torch.bool)
    errors = flow_errors(policy, policy.encode(obs), chunks, valid, noise=noise, t=t)
    errors.mean().backward()

    inputs = network.inputs(stock, obs)
    losses = [stock.model.forward(*inputs, chunks[:, j], noise[:, j], 1 - t[:, j])[..., :4] for j in range(3)]
    expected = torch.stack([loss.mean(dim=(1, 2)) for loss in losses], dim=1)
    expected.mean().backward()
    torch.testing.assert_close(errors, expected, rtol=1e-5, atol=0)
    theirs = dict(stock.named_parameters())
    trained = {name: p.grad for name, p in policy.policy.named_parameters() if p.requires_grad}
    gaps = {name: (g - theirs[name].grad).norm() / theirs[name].grad.norm() for name, g in trained.items()}
    assert len(gaps) == len(list(policy.head.parameters()))
    assert max(gaps.values()) < 1e-5, gaps
    assert theirs["model.state_proj.weight"].grad.any(), "LeRobot trains what is frozen here"


def test_proposals_are_lerobots_samples(policy):
    obs, (noise, _) = policy.example_obs(3), draws(policy, 2)
    chunks = propose(policy, policy.encode(obs), 2, noise=noise)
    for j in range(2):
        expected = policy.native_sample(obs, noise[:, j])
        torch.testing.assert_close(chunks[:, j, :, :4], expected[..., :4], **CLOSE)
    assert not chunks[..., 4:].any()
    assert chunks.abs().max() > 1, "no clip"


def test_no_difference_hides(monkeypatch, tiny):
    """Positions that are off by a hundredth are seen."""
    obs, (x, t) = tiny.example_obs(3), draws(tiny, 2)
    expected = -stock_velocity(tiny, obs, x, 1 - t)
    rotate = network._rotate
    monkeypatch.setattr(network, "_rotate", lambda heads, positions: rotate(heads, positions * 1.01))
    assert (tiny.velocity(tiny.encode(obs), x, t) - expected).abs().max() > 1e-4


def test_times_are_drawn_as_smolvla_draws_them(tiny):
    """Mirrored 0.999 Beta(1.5, 1) + 0.001: mean 0.4, most near noise; LeRobot's own draws have the same deciles."""
    ours = tiny.sample_time((200_000,), torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = 1 - tiny.policy.model.sample_time(200_000, "cpu")
    deciles = torch.linspace(0.1, 0.9, 9)
    torch.testing.assert_close(ours.quantile(deciles), theirs.quantile(deciles), rtol=0, atol=0.01)
    assert (ours.min(), ours.max()) >= (0, 0)
    assert ours.max() <= 0.999


# -- the contract and the shared prefix -------------------------------------------------------------------------------


def test_the_contract():
    check_policy(SmolVla.tiny())
    assert load_adapter("smolvla") is SmolVla


@pytest.mark.parametrize(
    "layers",
    [
        *("an expert of half the layers", "image tokens and a padded prefix"),
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in (
                "every layer attends to the chunk",
                "no layer attends to the chunk",
                "a third of the layers",
            )
        ),
    ],
)
def test_the_contract_at_other_layers(layers):
    check_policy(policy_with(**LAYERS[layers]))


def test_what_trains_is_the_expert_and_four_projections_in_float32(tiny):
    trained = {name for name, p in tiny.policy.named_parameters() if p.requires_grad}
    heads = ("model.vlm_with_expert.lm_expert.", *(f"model.{name}." for name in PROJECTIONS))
    assert trained == {name for name, _ in tiny.policy.named_parameters() if name.startswith(heads)}
    assert not any("state_proj" in name for name in trained)
    assert {p.dtype for p in tiny.head.parameters()} == {torch.float32}
    assert sum(p.numel() for p in tiny.head.parameters()) == 136_832


def test_the_published_sizes():
    """lerobot/smolvla_base, as its own description of SmolVLM2-500M builds it: LeRobot says 450,046,176
    parameters and, with the state's projection, 99,880,992 that learn."""
    text = {
        "model_type": "llama",
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "vocab_size": 49_280,
    }
    vision = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 512, "patch_size": 16}
    sizes = {"text_config": text, "vision_config": vision, "scale_factor": 4}
    images = {f"observation.images.camera{i}": PolicyFeature(FeatureType.VISUAL, (3, 256, 256)) for i in (1, 2, 3)}
    config = SmolVLAConfig(
        input_features=images | {OBS_STATE: PolicyFeature(FeatureType.STATE, (6,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (6,))},
        device="cpu",
    )
    vlm = Vlm(SmolVLMConfig.from_dict(sizes), tiny_vlm().tokenizer)
    policy = empty_policy(config, vlm)
    assert all(p.device.type == "meta" for p in policy.parameters())
    stats = {OBS_STATE: {}, ACTION: {}}
    adapter = SmolVla(policy, build_pipelines(config, stats, vlm.tokenizer))
    total = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in adapter.head.parameters())
    print(f"{total:,} parameters, {trained:,} of them trained")
    assert adapter.spec.width == 32
    of_state = sum(p.numel() for p in policy.model.state_proj.parameters())
    assert (total, trained + of_state) == (450_046_176, 99_880_992)


def test_candidates_share_a_prefix_that_nothing_touches(tiny):
    prefix = tiny.encode(tiny.example_obs(3))
    tensors = prefix_tensors(prefix)
    before, places = [tensor.clone() for tensor in tensors], [tensor.data_ptr() for tensor in tensors]
    x, t = draws(tiny, 6)
    tiny.velocity(prefix, x, t).square().mean().backward()
    integrate(tiny, prefix, x, 3)
    assert [tensor.data_ptr() for tensor in prefix_tensors(prefix)] == places
    assert all(torch.equal(now, was) for now, was in zip(prefix_tensors(prefix), before, strict=True))
    assert not any(tensor.requires_grad for tensor in tensors)
    assert {keys.shape[0] for keys in prefix.keys} == {3}


def test_keys_are_not_copied_per_candidate(tiny):
    """What is kept for backward of a long prefix and short chunks grows by far less than its keys per candidate."""
    obs = tiny.example_obs(2)
    prefix = tiny.encode(obs | {OBS_STATE: obs[OBS_STATE]})
    longer = network.SmolVlaPrefix(
        prefix.features,
        *(tuple(kept.repeat(1, 1, 40, 1) for kept in column) for column in (prefix.keys, prefix.values)),
        prefix.mask.repeat(1, 40),
    )
    one_copy = sum(kept.nbytes for kept in (*longer.keys, *longer.values))

    def kept(n):
        seen = {}

        def keep(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x, t = draws(policy_short, n, states=2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            policy_short.velocity(longer, x, t)
        return sum(seen.values())

    policy_short = policy_with(horizon=1)
    assert (kept(9) - kept(1)) / 8 < 0.5 * one_copy


@pytest.mark.parametrize("index", [[2, 0], torch.tensor([2, 0]), slice(1, 3), torch.tensor([True, False, True])])
def test_a_prefix_is_selected_as_a_whole(tiny, index):
    prefix, (x, t) = tiny.encode(tiny.example_obs(3)), draws(tiny, 2)
    chosen = prefix.select(index)
    torch.testing.assert_close(tiny.velocity(chosen, x[index], t[index]), tiny.velocity(prefix, x, t)[index], **CLOSE)


def test_a_camera_that_shows_nothing_is_a_camera_that_is_not_there(tiny):
    """LeRobot's `<camera>_padding_mask`: such a picture's tokens neither attend nor advance positions."""
    obs, (x, t) = tiny.example_obs(3), draws(tiny, 2)
    hidden = tiny.encode(obs | {f"{WRIST}_padding_mask": torch.zeros(3)})
    without = tiny.encode({key: value for key, value in obs.items() if key != WRIST})
    torch.testing.assert_close(hidden.features, without.features, **CLOSE)
    torch.testing.assert_close(tiny.velocity(hidden, x, t), tiny.velocity(without, x, t), **CLOSE)
    assert (tiny.encode(obs).features - without.features).abs().max() > 1e-2


def test_what_stands_in_padding_never_enters_a_flow_error(tiny):
    """Neither in action dimensions beyond the robot's, nor, for the error itself, in steps that do not count."""
    prefix, (noise, t) = tiny.encode(tiny.example_obs(3)), draws(tiny, 2)
    chunk = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(50) < torch.tensor([[50], [30], [1]])

    def errors_and_gradients(chunk):
        tiny.zero_grad()
        errors = flow_errors(tiny, prefix, chunk, valid, noise=noise, t=t)
        errors.sum().backward()
        return [errors.detach(), *(p.grad.clone() for p in tiny.head.parameters())]

    scrawled = chunk.clone()
    scrawled[..., 4:] = 1e3
    assert all(map(torch.equal, errors_and_gradients(scrawled), errors_and_gradients(chunk)))


def test_the_critic_sees_the_mean_of_valid_hidden_states_and_the_normalised_state(tiny):
    obs = tiny.example_obs(3)
    features = tiny.encode(obs).features
    assert features.shape == (3, tiny.feature_dim) == (3, 48 + 6)
    assert torch.equal(features[:, 48:], obs[OBS_STATE])


def test_pictures_are_kept_at_the_models_resolution(tiny):
    """As LeRobot's own letterbox leaves them: what the model makes of either differs by rounding to uint8 only."""
    images = np.random.default_rng(0).integers(0, 256, (2, 90, 120, 3), dtype=np.uint8)
    kept = tiny.resize_images(images)
    assert (kept.shape, kept.dtype) == ((2, 32, 32, 3), np.uint8)
    assert tiny.resize_images(kept) is kept
    seen = [
        tiny.policy.prepare_images({FRONT: torch.from_numpy(p).permute(0, 3, 1, 2) / 255})[0][0] for p in (images, kept)
    ]
    assert (seen[0] - seen[1]).abs().max() < 1.01 / 255


def test_mixed_precision_of_a_trainer_does_not_change_the_policy(tiny):
    obs, (x, t) = tiny.example_obs(2), draws(tiny, 2, states=2)
    plain = tiny.velocity(tiny.encode(obs), x, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tiny.velocity(tiny.encode(obs), x, t), plain)


def test_a_prefix_that_was_stored_is_good_after_the_head_has_trained(tiny):
    obs, (x, t) = tiny.example_obs(3), draws(tiny, 2)
    stored = tiny.encode(obs)
    Poco(tiny, PocoConfig(num_candidates=2, zeta=1.0))  # takes the policy as it is
    with torch.no_grad():
        for p in tiny.head.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(stored.features, tiny.encode(obs).features)
    assert torch.equal(tiny.velocity(stored, x, t), tiny.velocity(tiny.encode(obs), x, t))
