"""pi05 gives LeRobot's own numbers, and its fast path does what it is for."""

import copy
import os
import subprocess
import sys

import check_pi05
import pytest
import torch
from check_pi05 import BOUNDS, FULL_WIDTH, Case, differences, observations, stock_errors, stock_policy, stock_sample
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from poco_vla_pi05 import checkpoint, expert
from poco_vla_pi05 import prefix as prefix_module
from poco_vla_pi05.adapter import Pi05
from poco_vla_pi05.architecture import TINY, Architecture, empty_policy, lerobot_builds
from poco_vla_pi05.prefix import Pi05Prefix, encode
from safetensors.torch import save_file
from torch.nn import functional as F

from poco_vla import PolicyError, check_policy, flow_errors, integrate, propose
from poco_vla.adapting import weights

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
SHORT = 5
"""Steps of a chunk where the number does not matter."""


@pytest.fixture
def policy():
    return Pi05.tiny()


@pytest.fixture
def obs(policy):
    return policy.example_obs(3)


def draws(policy, n, horizon=SHORT, states=3, seed=0):
    """Noisy chunks and a time for each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(states, n, horizon, policy.spec.width, generator=generator)
    return x, torch.rand(states, n, generator=generator)


def language_model(policy):
    return policy.policy.model.paligemma_with_expert.paligemma.model.language_model


def prefix_tensors(prefix):
    mask = [] if prefix.mask is None else [prefix.mask]
    return [prefix.features, *prefix.keys, *prefix.values, prefix.lengths, *mask]


# -- against LeRobot --------------------------------------------------------------------------------------------------

CASES = {
    "1 candidate": Case(candidates=1),
    "5 candidates": Case(candidates=5, seed=1),
    "16 candidates": Case(candidates=16, seed=2),
    "1 camera": Case(candidates=3, cameras=1),
    "3 cameras, the last one missing": Case(candidates=3, cameras=3, missing=True),
    "50 steps": Case(candidates=2, horizon=50),
    "1 state": Case(candidates=3, states=1),
    "1 step, 4 states": Case(candidates=2, horizon=1, states=4),
}


def assert_within_bounds(found):
    assert found.keys() == BOUNDS.keys()
    beyond = {name: value for name, value in found.items() if not value <= BOUNDS[name]}  # NaN is beyond
    assert not beyond, f"{beyond} beyond {BOUNDS}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses_head_gradients_and_samples_are_lerobots(case):
    assert_within_bounds(differences(case))


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("POCO_FULL_WIDTH") != "1",
    reason="the real layers, two of each stack, need 10 GB and two minutes: set POCO_FULL_WIDTH=1",
)
@pytest.mark.parametrize("case", [Case(candidates=4, architecture=FULL_WIDTH.with_depth(2))])
def test_the_same_at_the_real_width(case):
    assert_within_bounds(differences(case))


def test_the_cases_are_not_easier_than_they_look():
    """Prompts differ in length, a missing camera is configured and not observed."""
    case = CASES["3 cameras, the last one missing"]
    stock = stock_policy(case)
    obs = observations(stock, case)
    assert len(set(obs[OBS_LANGUAGE_ATTENTION_MASK].sum(dim=1).tolist())) == case.states
    assert set(stock.config.image_features) - obs.keys() == {"observation.images.cam2"}


def test_no_difference_hides(monkeypatch):
    """A velocity that is off by a thousandth moves all three figures beyond their bounds."""
    velocity = expert.velocity

    def off(*args, **kwargs):
        return 1.001 * velocity(*args, **kwargs)

    monkeypatch.setattr(expert, "velocity", off)
    found = differences(Case(candidates=2))
    assert all(found[name] > bound for name, bound in BOUNDS.items())


def run_script(*args):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, check_pi05.__file__, *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_parity_script_runs_by_itself():
    done = run_script("--seed", "3", "--candidates", "4", "--cameras", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in BOUNDS)


@pytest.mark.parametrize(("factor", "fails"), [(0.5, False), (2.0, True), (float("nan"), True)])
@pytest.mark.parametrize("name", BOUNDS)
def test_the_parity_script_fails_where_one_figure_is_beyond_its_bound(monkeypatch, name, factor, fails):
    found = dict.fromkeys(BOUNDS, 0.0) | {name: factor * BOUNDS[name]}
    monkeypatch.setattr(check_pi05, "differences", lambda case: found)
    monkeypatch.setattr(sys, "argv", ["check_pi05.py"])
    with pytest.raises(SystemExit) as end:
        check_pi05.main()
    assert bool(end.value.code) is fails


def test_a_bfloat16_backbone_is_no_further_from_float32_than_lerobots_own(tmp_path):
    """Largest differences from LeRobot in float32, relative to the largest number; tiny random model, 6 states.

    LeRobot with dtype="bfloat16": losses 1.1e-3, Euler samples 1.5e-3. pi05 on a bfloat16 backbone with its float32
    head: 9.0e-4 and 8.0e-4; with matrix products in float32, too: 2.4e-4 and 5.2e-4.
    """
    case = Case(candidates=1, states=6)
    stock = stock_policy(case)
    obs = observations(stock, case)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 1, case.horizon, 32, generator=generator)
    chunks = torch.nn.functional.pad(torch.randn(6, 1, case.horizon, 6, generator=generator), (0, 26))
    t = torch.rand(6, 1, generator=generator)

    config = copy.deepcopy(stock.config)
    config.dtype = "bfloat16"
    with lerobot_builds(TINY):
        rounded = PI05Policy(config).eval()
    rounded.load_state_dict(stock.state_dict())
    whole = {name: tensor.contiguous() for name, tensor in stock.state_dict().items()}
    save_file(whole, tmp_path / checkpoint.WEIGHTS, metadata={"format": "pt"})

    def ours(compute):
        empty = empty_policy(config, TINY)
        opened = weights.of_file(tmp_path / checkpoint.WEIGHTS)
        dtypes = {"backbone": torch.bfloat16, "vision": torch.float32}
        checkpoint.load_weights(empty, opened, **dtypes, in_head=Pi05.in_head, device="cpu")
        return Pi05(empty, compute=compute).eval()

    @torch.no_grad()
    def figures(adapter):
        prefix, valid = adapter.encode(obs), torch.ones(6, case.horizon, dtype=torch.bool)
        errors = flow_errors(adapter, prefix, chunks, valid, noise=noise, t=t)
        return errors, integrate(adapter, prefix, noise, 10)

    with torch.no_grad():
        expected = stock_errors(stock, obs, chunks, noise, 1 - t), stock_sample(stock, obs, noise[:, 0])[:, None]
        theirs = stock_errors(rounded, obs, chunks, noise, 1 - t), stock_sample(rounded, obs, noise[:, 0])[:, None]
    rows = {"LeRobot": theirs, "pi05": figures(ours(None)), "float32 products": figures(ours(torch.float32))}
    gaps = {
        name: [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(row, expected, strict=True)]
        for name, row in rows.items()
    }
    for name, (loss, samples) in gaps.items():
        print(f"{name:20} loss {loss:.1e}   Euler samples {samples:.1e}")
    for name in ("pi05", "float32 products"):
        assert all(own <= 1.25 * stocks for own, stocks in zip(gaps[name], gaps["LeRobot"], strict=True)), gaps
    assert max(gaps["pi05"]) < 0.005


# -- the contract and the fast path -----------------------------------------------------------------------------------


def test_the_contract():
    check_policy(Pi05.tiny())


def test_the_contract_in_training_mode_with_lerobots_gradient_checkpointing():
    """A policy that LeRobot trained with it is wrapped as it is: its VLM would give no cache in train mode."""
    policy = Pi05.tiny()
    policy.policy.model.gradient_checkpointing_enable()
    check_policy(policy)


def test_every_candidate_has_a_time_of_its_own(policy, obs):
    x, t = draws(policy, 4)
    prefix = policy.encode(obs)
    together = policy.velocity(prefix, x, t)
    alone = torch.cat([policy.velocity(prefix, x[:, [j]], t[:, [j]]) for j in range(4)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    mixed = policy.velocity(prefix, x, t.flip(1))
    assert (together - mixed).abs().amax(dim=(2, 3)).min() > 1e-3


def test_candidates_share_a_prefix_that_nothing_touches(policy, obs):
    prefix = policy.encode(obs)
    tensors = prefix_tensors(prefix)
    before, places = [tensor.clone() for tensor in tensors], [tensor.data_ptr() for tensor in tensors]
    x, t = draws(policy, 6)
    policy.velocity(prefix, x, t).square().mean().backward()
    integrate(policy, prefix, x, 3)
    propose(policy, prefix, 2)
    assert [tensor.data_ptr() for tensor in prefix_tensors(prefix)] == places
    assert all(torch.equal(now, was) for now, was in zip(prefix_tensors(prefix), before, strict=True))
    assert {keys.shape[0] for keys in prefix.keys} == {3}


def kept_bytes(policy, prefix, monkeypatch, recompute):
    """Bytes kept for backward beside the weights and the prefix, and the head's gradients.

    What a checkpoint keeps are its inputs: no hook sees those, so they are counted where they are given to it.
    """
    policy.recompute = recompute
    policy.zero_grad()
    known = {tensor.data_ptr() for tensor in (*policy.parameters(), *prefix_tensors(prefix))}
    kept, real = {}, torch.utils.checkpoint.checkpoint

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def watched(run, *inputs, **options):
        for tensor in inputs:
            keep(tensor)
        return real(run, *inputs, **options)

    monkeypatch.setattr(expert, "checkpoint", watched)
    x, t = draws(policy, 8, horizon=10)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        error = policy.velocity(prefix, x, t).square().mean()
    total = sum(kept.values())
    error.backward()
    return total, {name: p.grad.clone() for name, p in policy.head.named_parameters()}


def test_recomputation_gives_the_same_gradients_out_of_a_fraction_of_the_memory(policy, obs, monkeypatch):
    """16 times less on the tiny model (3 layers; 3 states of 8 candidates of 10 steps)."""
    prefix = policy.encode(obs)
    plain, expected = kept_bytes(policy, prefix, monkeypatch, recompute=False)
    again, found = kept_bytes(policy, prefix, monkeypatch, recompute=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    print(
        f"kept for backward: {plain / 2**20:.2f} MiB, with recomputation {again / 2**20:.2f} MiB: {plain / again:.1f}x"
    )
    assert plain > 10 * again


def rows_through_norms(policy, call):
    """How many conditions go through each adaRMS projection, per call of it."""
    rows = []
    core = policy.policy.model.paligemma_with_expert.gemma_expert.model
    norms = [norm for layer in core.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    handles = [
        norm.dense.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[:-1].numel()))
        for norm in (*norms, core.norm)
    ]
    call()
    for handle in handles:
        handle.remove()
    return rows


@torch.no_grad()
def test_a_time_that_all_share_is_embedded_once(policy, obs):
    """Also of one candidate per state, as at the bootstrap sample."""
    prefix, (x, _) = policy.encode(obs), draws(policy, 4)
    shared = torch.full((1, 1), 0.3)
    each = shared.repeat(3, 4)
    torch.testing.assert_close(
        policy.velocity(prefix, x, shared), policy.velocity(prefix, x, each), rtol=1e-5, atol=1e-5
    )
    norms = 2 * 3 + 1
    assert rows_through_norms(policy, lambda: policy.velocity(prefix, x, shared)) == [1] * norms
    assert rows_through_norms(policy, lambda: policy.velocity(prefix, x, each)) == [12] * norms
    for n in (4, 1):
        assert rows_through_norms(policy, lambda n=n: integrate(policy, prefix, x[:, :n], 10)) == [1] * norms * 10


def test_the_vlm_never_sees_padding(policy, obs):
    """Two cameras of 16 tokens and the longest prompt; LeRobot's own prefix has all 200 prompt tokens."""
    seen = []
    first = language_model(policy).layers[0]
    handle = first.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0].shape), with_kwargs=True)
    prefix = policy.encode(obs)
    lengths = obs[OBS_LANGUAGE_ATTENTION_MASK].sum(dim=1) + 32
    assert seen == [(3, lengths.max(), 64)]
    assert torch.equal(prefix.lengths, lengths)
    assert torch.equal(prefix.mask.sum(dim=1), lengths)
    obs[FRONT + "_is_pad"] = torch.ones(3, dtype=torch.bool)
    policy.encode(obs)
    handle.remove()
    assert seen[1] == (3, lengths.max() - 16, 64)


def test_prompts_of_one_length_need_no_mask(policy, obs):
    obs = {key: value[:1].expand(3, *value.shape[1:]) for key, value in obs.items()}
    prefix = policy.encode(obs)
    assert prefix.mask is None
    x, t = draws(policy, 2)
    one = policy.encode({key: value[:1] for key, value in obs.items()})
    torch.testing.assert_close(
        policy.velocity(prefix, x, t)[:1], policy.velocity(one, x[:1], t[:1]), rtol=1e-5, atol=1e-5
    )
    assert prefix.select(slice(0, 2)).mask is None


@torch.no_grad()
@pytest.mark.parametrize("same", [True, False])
def test_prefixes_are_padded_to_whole_tiles_or_not_masked(policy, obs, same, monkeypatch):
    """As on a GPU. What is padded is masked; states of one length are not padded, and their attention gets no mask."""
    obs = {key: value[:1].expand(3, *value.shape[1:]) for key, value in obs.items()} if same else obs
    expected, (x, t) = policy.encode(obs), draws(policy, 2)
    masks, attend = [], F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(q, k, v, attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    found = encode(policy.policy, obs, tile=64)
    assert all((mask is None) == same for mask in masks[-3:])  # the VLM's three layers
    longest = int(expected.lengths.max())
    assert found.keys[0].shape[1] == (longest if same else -(-longest // 64) * 64)
    assert (found.mask is None) == same
    torch.testing.assert_close(found.features, expected.features, rtol=1e-5, atol=1e-5)
    velocities = [policy.velocity(prefix, x, t) for prefix in (found, expected)]
    torch.testing.assert_close(*velocities, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(prefix_module, "tile_on", lambda device: 64)
    again = policy.unpack(policy.pack(expected))
    assert again.keys[0].shape == found.keys[0].shape
    torch.testing.assert_close(policy.velocity(again, x, t), velocities[1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("camera", [FRONT, WRIST])
def test_a_padded_camera_is_a_camera_that_is_not_there(policy, obs, camera):
    """State by state: 0 and 2 as if encoded without it, 1 as if nothing had been said."""
    padded = torch.tensor([True, False, True])
    x, t = draws(policy, 2)
    without = {key: value for key, value in obs.items() if key != camera}
    found, all_there, not_there = (policy.encode(o) for o in (obs | {f"{camera}_is_pad": padded}, obs, without))
    assert torch.equal(found.lengths, torch.where(padded, not_there.lengths, all_there.lengths))
    for rows, expected in ((padded, not_there), (~padded, all_there)):
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found.features[rows], expected.features[rows], **close)
        velocities = [policy.velocity(prefix.select(rows), x[rows], t[rows]) for prefix in (found, expected)]
        torch.testing.assert_close(*velocities, **close)
    assert (all_there.features - not_there.features).abs().max() > 1e-2


def test_without_any_camera_lerobots_own_error_comes_through(policy, obs):
    with pytest.raises(ValueError, match="All image features are missing"):
        policy.encode({key: value for key, value in obs.items() if "images" not in key})


@pytest.mark.parametrize("index", [[2, 0], torch.tensor([2, 0]), slice(1, 3), torch.tensor([True, False, True])])
def test_a_prefix_is_selected_and_moved_as_a_whole(policy, obs, index):
    prefix = policy.encode(obs)
    part = prefix.select(index).to("cpu")
    assert isinstance(part, Pi05Prefix)
    for found, whole in zip(prefix_tensors(part), prefix_tensors(prefix), strict=True):
        assert torch.equal(found, whole[index])
    assert all(tensor.device.type == "meta" for tensor in prefix_tensors(prefix.to("meta")))


def test_encoding_leaves_no_gradient_and_changes_no_mode(policy, obs):
    policy.train()
    modes = [module.training for module in policy.modules()]
    with torch.enable_grad():
        prefix = policy.encode(obs)
    assert not any(tensor.requires_grad for tensor in prefix_tensors(prefix))
    assert all(p.grad is None for p in policy.parameters())
    assert [module.training for module in policy.modules()] == modes
    policy.eval()
    evaluated = policy.encode(obs)
    assert all(torch.equal(a, b) for a, b in zip(prefix_tensors(prefix), prefix_tensors(evaluated), strict=True))


@torch.no_grad()
def test_the_critic_sees_the_mean_of_the_vlms_last_hidden_states_and_the_state(policy, obs):
    """Held against LeRobot's own prefix forward, padding, eager attention and all."""
    model = policy.policy.model
    images, present = policy.policy._preprocess_images(dict(obs))
    tokens, text = obs[OBS_LANGUAGE_TOKENS], obs[OBS_LANGUAGE_ATTENTION_MASK]
    embedded, valid, blocks = model.embed_prefix(images, present, tokens, text)
    model.paligemma_with_expert.paligemma.model.language_model.config._attn_implementation = "eager"
    (hidden, _), _ = model.paligemma_with_expert.forward(
        attention_mask=prepare_attention_masks_4d(make_att_2d_masks(valid, blocks)),
        position_ids=torch.cumsum(valid, dim=1) - 1,
        inputs_embeds=[embedded, None],
        use_cache=True,
    )
    mean = torch.stack([row[there].mean(dim=0) for row, there in zip(hidden, valid, strict=True)])
    expected = torch.cat([mean, obs[OBS_STATE]], dim=-1)
    features = policy.encode(obs).features
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert features.shape == (3, policy.feature_dim) == (3, 64 + 6)


def test_times_are_pi05s_own_mirrored(policy):
    """Beta(1.5, 1) has the distribution function x^1.5; with t = 1 - (0.999 x + 0.001), the share p of draws lies below
    t = 1 - (0.999 (1 - p)^(2/3) + 0.001): the median is 0.37, most draws are near the noise."""
    t = policy.sample_time((400, 500), torch.Generator().manual_seed(0))
    assert t.shape == (400, 500)
    assert t.dtype == torch.float32
    shares = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    expected = 1 - (0.999 * (1 - shares) ** (2 / 3) + 0.001)
    found = t.flatten().sort().values[(shares * t.numel()).long()]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.005)
    assert t.min() >= 0
    assert t.max() <= 0.999


def test_times_come_from_the_generator_that_is_given(policy):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, same, other = (policy.sample_time((4,), torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    policy.sample_time((4,))
    assert not torch.equal(torch.get_rng_state(), state)


def test_chunks_are_not_clipped(policy, obs):
    assert policy.spec.clip is None
    prefix, noise = policy.encode(obs), 3 * draws(policy, 2, horizon=50)[0]
    chunks = propose(policy, prefix, 2, noise=noise)
    with torch.no_grad():
        plain = integrate(policy, prefix, noise, policy.spec.flow_steps)
    assert torch.equal(chunks[..., :4], plain[..., :4])
    assert chunks.abs().max() > 1
    assert not chunks[..., 4:].any()


def test_what_stands_in_padding_never_enters_a_flow_error(policy, obs):
    """Neither in action dimensions beyond the robot's, nor, for the error itself, in steps that do not count."""
    prefix, (noise, t) = policy.encode(obs), draws(policy, 2)
    chunk = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])

    def errors_and_gradients(chunk):
        policy.zero_grad()
        errors = flow_errors(policy, prefix, chunk, valid, noise=noise, t=t)
        errors.sum().backward()
        return errors.detach(), [p.grad.clone() for p in policy.head.parameters()]

    errors, gradients = errors_and_gradients(chunk)
    scrawled = chunk.clone()
    scrawled[..., 4:] = 1e3
    found, found_gradients = errors_and_gradients(scrawled)
    assert torch.equal(found, errors)
    assert all(torch.equal(a, b) for a, b in zip(found_gradients, gradients, strict=True))

    outputs = []
    velocity = policy.velocity

    def watched(prefix, x, t):
        outputs.append(velocity(prefix, x, t))
        outputs[-1].retain_grad()
        return outputs[-1]

    policy.velocity = watched
    errors_and_gradients(chunk)
    (gradient,) = (out.grad for out in outputs)
    assert not gradient[~valid[:, None].expand(-1, 2, -1)].any()
    assert not gradient[..., 4:].any()
    assert gradient[..., :4][valid[:, None].expand(-1, 2, -1)].all()


# -- the head ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_size():
    """LeRobot's own pi0.5 at its own sizes: parameters without memory."""
    images = {FRONT: PolicyFeature(FeatureType.VISUAL, (3, 224, 224))}
    config = PI05Config(
        input_features=images | {OBS_STATE: PolicyFeature(FeatureType.STATE, (32,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (32,))},
        device="cpu",
    )
    return empty_policy(config, Architecture())


def test_pi05_has_the_sizes_of_the_published_one(real_size):
    """Parameters per part, as counted in lerobot/pi05_base: 813 tensors, 4.14 billion."""
    sizes = {name: p.numel() for name, p in real_size.named_parameters()}
    assert all(p.device.type == "meta" for p in real_size.parameters())
    parts = {
        "paligemma.model.vision_tower.": 412_442_352,
        "paligemma.model.multi_modal_projector.": 2_361_344,
        "paligemma.model.language_model.embed_tokens.": 526_647_296,
        "paligemma.lm_head.": 526_647_296,
        "gemma_expert.lm_head.": 263_323_648,
    }
    for part, size in parts.items():
        assert sum(n for name, n in sizes.items() if name.startswith(checkpoint.CORE + part)) == size, part
    assert sizes[checkpoint.VLM_HEAD] + sizes[checkpoint.EXPERT_HEAD] == 789_970_944
    assert sum(sizes.values()) == 4_143_404_816
    assert len(sizes) == 813
    assert sum(n for name, n in sizes.items() if Pi05.in_head(name)) == 430_098_464


def test_the_head_is_the_expert_and_four_projections_and_nothing_else_trains(real_size):
    policy = Pi05(copy.deepcopy(real_size))
    assert sum(p.numel() for p in policy.head.parameters()) == 430_098_464
    trained = {name for name, p in policy.policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in policy.policy.named_parameters() if Pi05.in_head(name)}
    assert {id(p) for p in policy.parameters() if p.requires_grad} == {id(p) for p in policy.head.parameters()}


def test_the_head_is_float32_and_the_frozen_part_has_lerobots_dtypes(tmp_path):
    """LeRobot keeps SigLIP and all norms in float32 when the rest is bfloat16."""
    Pi05.tiny().save_pretrained(tmp_path)
    ours = Pi05.from_pretrained(tmp_path, dtype="bfloat16")
    config = copy.deepcopy(ours.policy.config)
    config.dtype = "bfloat16"
    with lerobot_builds(TINY):
        stock = {name: p.dtype for name, p in PI05Policy(config).named_parameters()}
    found = {name: p.dtype for name, p in ours.policy.named_parameters()}
    assert {dtype for name, dtype in found.items() if Pi05.in_head(name)} == {torch.float32}
    frozen = {name: dtype for name, dtype in found.items() if not Pi05.in_head(name)}
    assert set(frozen.values()) == {torch.float32, torch.bfloat16}
    assert frozen == {name: stock[name] for name in frozen}
    assert stock.keys() - found.keys() == {checkpoint.VLM_HEAD, checkpoint.EXPERT_HEAD}


def test_a_bfloat16_head_becomes_float32(policy):
    policy.policy.to(torch.bfloat16)
    again = Pi05.wrap(policy.policy)
    assert {p.dtype for p in again.head.parameters()} == {torch.float32}
    assert again.compute == torch.bfloat16


def test_siglip_in_bfloat16_is_an_option_that_a_save_remembers(tmp_path):
    """Features are what float32's are but for bfloat16's rounding; LeRobot's own bfloat16 of the VLM is coarser."""
    Pi05.tiny().save_pretrained(tmp_path / "policy")
    exact = Pi05.from_pretrained(tmp_path / "policy", dtype="bfloat16")
    rounded = Pi05.from_pretrained(tmp_path / "policy", dtype="bfloat16", vision_dtype="bfloat16")
    vision = [name for name, _ in rounded.policy.named_parameters() if "vision_tower" in name or "projector" in name]
    own, other = dict(rounded.policy.named_parameters()), dict(exact.policy.named_parameters())
    assert vision
    for name in own:
        assert own[name].dtype == (torch.bfloat16 if name in vision else other[name].dtype), name
    obs = exact.example_obs(4)
    features, found = exact.encode(obs).features, rounded.encode(obs).features
    assert not found.equal(features)
    assert (found - features).norm() < 0.01 * features.norm()
    rounded.save_head(tmp_path / "head")
    rounded.save_pretrained(tmp_path / "whole")
    for saved in ("head", "whole"):
        assert Pi05.from_pretrained(tmp_path / saved).encode(obs).features.equal(found), saved
    with pytest.raises(PolicyError, match="vision_dtype"):
        Pi05.from_pretrained(tmp_path / "policy", vision_dtype="float16")
