"""groot_n1d6 behind poco_vla's contract: the plain path's numbers, what is cached, what trains, what is loaded."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from groot_folders import (
    ACTION,
    FRONT,
    OPTIONS,
    STATE,
    WRIST,
    change_json,
    change_weights_of,
    dataset,
    nvidia_folder,
    raw_batch,
)
from lerobot_policy_groot_n1d6.adapter import GrootN1d6Adapter
from lerobot_policy_groot_n1d6.model import tokens
from lerobot_policy_groot_n1d6.model.head import ActionHead
from lerobot_policy_groot_n1d6.processing.steps import EMBODIMENT_ID
from lerobot_policy_groot_n1d6.processing.steps import STATE as PROCESSED_STATE
from plain_groot import plain_velocity

from poco_vla import PolicyError, check_policy, flow_errors, integrate, load_adapter, propose
from poco_vla.data.batches import chunk_batch, preprocess_obs
from poco_vla.data.replay import Transitions
from poco_vla.policy import copy_policy

GR1 = {"embodiment": {"tag": "gr1"}}
"""The embodiment that the small checkpoint describes: a hand in [0, 1], an arm within 1 of the state's."""


@pytest.fixture
def policy():
    return GrootN1d6Adapter.tiny()


@pytest.fixture
def obs(policy):
    return policy.example_obs(3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groot") / "tiny"
    GrootN1d6Adapter.tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nvidia(tmp_path_factory):
    return nvidia_folder(tmp_path_factory.mktemp("groot") / "nvidia")


@pytest.fixture
def gr1(nvidia):
    """A policy whose arm's actions are relative to the state."""
    return GrootN1d6Adapter.from_pretrained(nvidia, **OPTIONS, **dataset(), **GR1)


def draws(policy, n, states=3, seed=0):
    """Noisy chunks and a time for each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(states, n, policy.spec.horizon, policy.spec.width, generator=generator)
    return x, torch.rand(states, n, generator=generator)


def plain(policy, obs, x, t):
    """One candidate per row, features and keys made for each."""
    encoded, n = policy.policy.encode(obs), x.shape[1]
    rows = [
        tensor.repeat_interleave(n, dim=0)
        for tensor in (encoded.features, encoded.image_mask, encoded.mask, obs[PROCESSED_STATE])
    ]
    slots = obs[EMBODIMENT_ID].repeat_interleave(n)
    return plain_velocity(policy.head, *rows, x.flatten(0, 1), t.flatten(), slots).unflatten(0, x.shape[:2])


def prefix_tensors(prefix):
    groups = (prefix.tokens.text, prefix.tokens.image)
    tensors = [prefix.features, prefix.state, *(group.tokens for group in groups), *(group.mask for group in groups)]
    for memory in prefix.memories:
        tensors += [memory.keys, memory.values, memory.mask, memory.absent]
    return [tensor for tensor in tensors if tensor is not None]


def velocity(policy, seed=0):
    x, t = draws(policy, 3, states=2)
    with torch.no_grad():
        return policy.velocity(policy.encode(policy.example_obs(2, seed)), x, t)


# -- the contract and the plain path ----------------------------------------------------------------------------------


def test_it_keeps_the_contract(policy):
    check_policy(policy)


def test_it_keeps_the_contract_on_a_described_embodiment(gr1):
    check_policy(gr1)


def test_it_is_found_by_its_name():
    assert load_adapter("groot_n1d6") is GrootN1d6Adapter


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("grad", [False, True])
@torch.no_grad()
def test_velocities_are_the_plain_paths(policy, obs, n, grad):
    """Each candidate at a time of its own; prompts of different lengths. With gradients keys are made anew."""
    x, t = draws(policy, n)
    assert len(set(obs["observation.groot.attention_mask"].sum(dim=1).tolist())) > 1
    expected = plain(policy, obs, x, t)
    with torch.set_grad_enabled(grad):
        found = policy.velocity(policy.encode(obs), x, t)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_candidates_at_one_time_are_the_plain_paths(policy, obs):
    """One number: what Euler steps hand over."""
    x, _ = draws(policy, 5)
    expected = plain(policy, obs, x, torch.full((3, 5), 0.25))
    found = policy.velocity(policy.encode(obs), x, torch.full((1, 1), 0.25))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_proposals_are_the_plain_samplers(policy, obs):
    """Four Euler steps; proposals are clipped and their padding is zero."""
    x, _ = draws(policy, 2)
    field = SimpleNamespace(velocity=lambda obs, x, t: plain(policy, obs, x, t))
    expected = integrate(field, obs, x, policy.spec.flow_steps)
    found = propose(policy, policy.encode(obs), 2, noise=x)
    torch.testing.assert_close(found[..., :4], expected[..., :4].clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert not found[..., 4:].any()


def test_features_are_the_mean_of_valid_tokens_and_the_state(policy, obs):
    encoded = policy.policy.encode(obs)
    features = policy.encode(obs).features
    assert policy.feature_dim == features.shape[1] == policy.policy.sizes.language.width + 6
    for i in range(3):
        mean = encoded.features[i][encoded.mask[i]].mean(dim=0)
        torch.testing.assert_close(features[i], torch.cat([mean, obs[PROCESSED_STATE][i, 0, :6]]))
    assert not encoded.mask.all()


def test_padding_does_not_reach_the_features(policy, obs):
    """A state encoded beside longer prompts, and alone."""
    alone = {key: value[:1] for key, value in obs.items()}
    longer = policy.encode(obs).features[:1]
    torch.testing.assert_close(policy.encode(alone).features, longer, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_keys_are_padded_to_whole_tiles_on_a_gpu(policy, obs, monkeypatch):
    """Tokens of prompts that differ in length; what is padded is masked, from `encode` and from the store alike."""
    expected, (x, t) = policy.encode(obs), draws(policy, 2)
    monkeypatch.setattr(tokens, "tile_on", lambda device: 64)
    found = policy.encode(obs)
    longest = expected.tokens.text.tokens.shape[1]
    assert found.tokens.text.tokens.shape[1] == -(-longest // 64) * 64 > longest
    assert found.tokens.image.mask is None
    for prefix in (found, policy.unpack(policy.pack(expected))):
        assert prefix.tokens.text.tokens.shape == found.tokens.text.tokens.shape
        torch.testing.assert_close(policy.velocity(prefix, x, t), policy.velocity(expected, x, t), rtol=1e-5, atol=1e-5)


# -- what is cached ---------------------------------------------------------------------------------------------------


def test_candidates_attend_to_the_prefixs_own_keys(policy, obs, monkeypatch):
    """The same tensors at every Euler step, not copied for candidates, not changed."""
    prefix = policy.encode(obs)
    before = [(tensor.clone(), tensor.data_ptr()) for tensor in prefix_tensors(prefix)]
    seen, own = [], policy.head.velocity

    def watched(memories, *args, **kwargs):
        seen.append(memories)
        return own(memories, *args, **kwargs)

    monkeypatch.setattr(policy.head, "velocity", watched)
    monkeypatch.setattr(policy.head, "cross_kv", lambda *_, **__: pytest.fail("keys are made again"))
    propose(policy, prefix, 5)
    assert len(seen) == policy.spec.flow_steps
    assert all(memories is prefix.memories for memories in seen)
    assert all(memory.keys.shape[0] == 3 for memory in prefix.memories)
    for tensor, (copy_, pointer) in zip(prefix_tensors(prefix), before, strict=True):
        assert tensor.equal(copy_)
        assert tensor.data_ptr() == pointer


def test_the_backbone_runs_once_per_state(policy, obs, monkeypatch):
    calls, own = [], policy.policy.encode
    monkeypatch.setattr(policy.policy, "encode", lambda batch: calls.append(1) or own(batch))
    propose(policy, policy.encode(obs), 5)
    assert len(calls) == 1


def test_only_text_or_images_become_keys(policy, obs):
    """81 tokens of each of two pictures; the text's keys are as many as the longest prompt's other tokens."""
    prefix = policy.encode(obs)
    images = prefix.tokens.image.tokens.shape[1]
    text = prefix.tokens.text.tokens.shape[1]
    assert images == 2 * 81
    assert text == obs["observation.groot.attention_mask"].sum(dim=1).max() - images
    assert [memory.keys.shape[2] for memory in prefix.memories] == [text, images]


# -- gradients --------------------------------------------------------------------------------------------------------


def gradients(policy, obs, prefix=None):
    x, t = draws(policy, 2)
    policy.zero_grad()
    policy.velocity(policy.encode(obs) if prefix is None else prefix, x, t).square().mean().backward()
    return {name: p.grad for name, p in policy.head.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
def test_every_head_parameter_gets_the_plain_paths_gradient(policy, obs, recompute):
    """Keys' and values' projections, and the norm before them, included: the prefix was made without gradient."""
    policy.recompute = recompute
    prefix = policy.encode(obs)
    assert not any(tensor.requires_grad for tensor in prefix_tensors(prefix))
    found = gradients(policy, obs, prefix)
    x, t = draws(policy, 2)
    policy.zero_grad()
    plain(policy, obs, x, t).square().mean().backward()
    for name, p in policy.head.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6, msg=lambda words, n=name: f"{n}: {words}")
    for part in ("vlln", "0.attn1.to_k", "0.attn1.to_v", "2.attn1.to_k", "2.attn1.to_v"):
        assert found[next(name for name in found if part in name and name.endswith("weight"))].abs().max() > 0


def test_only_the_head_trains(policy):
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    head = {id(p) for p in policy.head.parameters()}
    assert trained
    assert all((id(p) in head) == p.requires_grad for p in policy.parameters())


def test_embodiment_networks_can_be_left_out(saved):
    policy = GrootN1d6Adapter.from_pretrained(saved, tune_embodiment_encoders=False)
    trained = {name for name, p in policy.head.named_parameters() if p.requires_grad}
    assert trained
    assert not any(part in name for name in trained for part in ("state_encoder", "action_encoder", "action_decoder"))
    policy.encode(policy.example_obs(2))
    x, t = draws(policy, 2, states=2)
    policy.velocity(policy.encode(policy.example_obs(2)), x, t).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in policy.head.parameters())


def test_the_own_embodiments_slot_alone_is_trained_and_learns_as_among_all(monkeypatch):
    alone = GrootN1d6Adapter.tiny()
    monkeypatch.setattr(ActionHead, "train_slot", lambda head, slot: None)
    among = GrootN1d6Adapter.tiny()
    before = {name: tensor.clone() for name, tensor in among.policy.state_dict().items()}
    assert alone.head.action_encoder.W1.W.shape == among.head.action_encoder.W1.W.shape[1:]
    for policy in (alone, among):
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for _ in range(3):
            prefix = policy.encode(policy.example_obs(2))
            x, t = draws(policy, 2, states=2)
            optimizer.zero_grad()
            policy.velocity(prefix, x, t).square().mean().backward()
            optimizer.step()
    own, other = alone.policy.state_dict(), among.policy.state_dict()
    assert own.keys() == other.keys()
    for name, tensor in other.items():
        assert own[name].equal(tensor), name
    name = "action_head.action_encoder.W2.W"
    changed = [slot for slot in range(len(own[name])) if not own[name][slot].equal(before[name][slot])]
    assert changed == [10]


def test_a_head_that_trains_one_slot_refuses_another(policy, obs):
    with pytest.raises(ValueError, match="only slot 10 is trained here: give embodiment=10, not 3"):
        policy.head.state_tokens(obs[PROCESSED_STATE], 3)


def test_copies_of_a_policy_share_the_slots_that_do_not_train(policy):
    one, other = policy.head.action_encoder.W1, copy_policy(policy).head.action_encoder.W1
    assert one._all.tensors["W"] is other._all.tensors["W"]


def test_a_new_head_needs_no_new_prefix_for_gradients(policy, obs):
    """Flow errors of a stored prefix follow the weights of the time of the loss, not of encoding."""
    prefix = policy.encode(obs)
    x, t = draws(policy, 2)
    with torch.no_grad():
        for p in policy.head.parameters():
            p.mul_(1.1)
    stored = policy.velocity(prefix, x, t)
    torch.testing.assert_close(stored, policy.velocity(policy.encode(obs), x, t))


def test_bfloat16_products_stay_close(policy, obs):
    """Largest differences over 3 states and 5 candidates, relative to the largest velocity; measured 0.9 % to 1.6 %
    over five seeds, for the head alone and with the backbone."""
    x, t = draws(policy, 5)
    with torch.no_grad():
        exact = policy.velocity(policy.encode(obs), x, t)
        policy.policy.config.compute = "bfloat16"
        rounded = policy.velocity(policy.encode(obs), x, t)
        policy.policy.backbone.to(torch.bfloat16)
        both = policy.velocity(policy.encode(obs), x, t)
    assert rounded.dtype == both.dtype == torch.float32
    for found, bound in ((rounded, 0.03), (both, 0.03)):
        gap = ((found - exact).abs().max() / exact.abs().max()).item()
        assert 1e-5 < gap < bound


def test_mixed_precision_of_a_trainer_does_not_change_the_policy(policy, obs):
    x, t = draws(policy, 2)
    with torch.no_grad():
        expected = policy.velocity(policy.encode(obs), x, t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert policy.velocity(policy.encode(obs), x, t).equal(expected)


# -- loading and saving -----------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(policy, saved):
    loaded = GrootN1d6Adapter.from_pretrained(saved)
    assert loaded.spec == policy.spec
    assert loaded.input_keys == policy.input_keys == (FRONT, WRIST, STATE)
    for name, tensor in policy.policy.state_dict().items():
        assert loaded.policy.state_dict()[name].equal(tensor), name
    batch = raw_batch()
    found, expected = (p.preprocess(copy.deepcopy(batch)) for p in (loaded, policy))
    for key, value in expected.items():
        assert found[key].equal(value) if isinstance(value, torch.Tensor) else found[key] == value, key
    assert loaded.postprocess(found[ACTION]).equal(policy.postprocess(expected[ACTION]))
    assert velocity(loaded).equal(velocity(policy))


def test_actions_come_back_in_the_robots_units(policy):
    batch = raw_batch()
    processed = policy.preprocess(dict(batch))
    torch.testing.assert_close(policy.postprocess(processed[ACTION]), batch[ACTION], rtol=1e-5, atol=1e-5)


def test_a_trained_policy_is_saved_over_its_own_folder(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "policy")
    policy = GrootN1d6Adapter.from_pretrained(folder)
    with torch.no_grad():
        policy.head.model.proj_out_2.weight.mul_(2)
    policy.save_pretrained(folder)
    assert velocity(GrootN1d6Adapter.from_pretrained(folder)).equal(velocity(policy))
    assert not velocity(policy).equal(velocity(GrootN1d6Adapter.from_pretrained(saved)))


def test_a_shorter_horizon_is_the_first_steps_of_the_same_network(saved):
    """Eight steps denoised, not sixteen: steps see each other, so these are other chunks; they come back whole."""
    policy = GrootN1d6Adapter.from_pretrained(saved, horizon=8)
    config = policy.policy.config
    assert policy.spec.horizon == config.chunk_size == config.n_action_steps == config.max_action_horizon == 8
    check_policy(policy)
    batch = raw_batch(steps=8)
    raw = policy.postprocess(policy.preprocess(dict(batch))[ACTION])
    torch.testing.assert_close(raw, batch[ACTION], rtol=1e-5, atol=1e-5)


def test_a_shorter_horizon_is_saved(saved, tmp_path):
    policy = GrootN1d6Adapter.from_pretrained(saved, horizon=8)
    policy.save_pretrained(tmp_path / "short")
    loaded = GrootN1d6Adapter.from_pretrained(tmp_path / "short")
    assert loaded.spec == policy.spec
    assert velocity(loaded).equal(velocity(policy))


def test_statistics_of_a_dataset_take_the_place_of_the_folders(saved):
    """Its range is three times as wide: what was 1.5 is 0.25 then."""
    state = {STATE: torch.full((1, 6), 1.5), ACTION: torch.full((1, 16, 4), 1.5)}
    batch = raw_batch(1) | state
    for spread, options, expected in ((1.0, {}, 0.75), (3.0, {"statistics": "dataset"}, 0.25)):
        policy = GrootN1d6Adapter.from_pretrained(saved, **dataset(spread=spread), **options)
        processed = policy.preprocess(dict(batch))
        torch.testing.assert_close(processed[PROCESSED_STATE][0, 0, :6], torch.full((6,), expected))
        torch.testing.assert_close(processed[ACTION][0, :, :4], torch.full((16, 4), expected))


def test_a_dataset_of_another_robot_is_adopted(saved):
    """One camera, three state and two action numbers."""
    data = dataset(state=3, action=2, cameras=("observation.images.top",))
    policy = GrootN1d6Adapter.from_pretrained(saved, **data, statistics="dataset", horizon=4)
    assert policy.input_keys == ("observation.images.top", STATE)
    assert (policy.spec.action_dim, policy.spec.horizon) == (2, 4)
    check_policy(policy)


FAULTS = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "weights cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        r"model\.safetensors is damaged, cut short",
    ),
    "missing tensor": (change_weights_of(lambda w: w.pop("action_head.vlln.weight")), r"action_head\.vlln\.weight"),
    "tensor too many": (change_weights_of(lambda w: w.update(extra=torch.zeros(1))), r"1 unexpected: extra"),
    "wrong shape": (
        change_weights_of(lambda w: w.update({"action_head.vlln.weight": torch.zeros(7)})),
        r"action_head\.vlln\.weight is \[7\], expected",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "damaged configuration": (lambda f: (f / "config.json").write_text("{"), r"config\.json is damaged"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), r"config\.json is damaged.*expected an object"),
    "unknown field": (
        lambda f: change_json(f / "config.json", memory=3),
        r"config\.json is not understood by LeRobot: .*no field memory",
    ),
    "field of the wrong kind": (lambda f: change_json(f / "config.json", dtype="float8"), r"(?s)float8"),
    "another policy": (lambda f: change_json(f / "config.json", type="act"), r"expected \"Gr00tN1d6\""),
    "damaged pre-processor": (
        lambda f: (f / "policy_preprocessor.json").write_text("{"),
        r"policy_preprocessor.json is damaged",
    ),
    "no pre-processor": (lambda f: (f / "policy_preprocessor.json").unlink(), r"policy_preprocessor\.json"),
    "lost statistics": (lambda f: next(f.glob("policy_pre*.safetensors")).unlink(), r"encode\.safetensors"),
}


@pytest.mark.parametrize(("spoil", "words"), FAULTS.values(), ids=FAULTS)
def test_a_folder_with_a_fault_is_refused(saved, tmp_path, spoil, words):
    folder = shutil.copytree(saved, tmp_path / "policy")
    spoil(folder)
    with pytest.raises(PolicyError, match=words):
        GrootN1d6Adapter.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lorra": 2, "colour": 1}, "groot_n1d6 has no option colour, lorra; it has .*tokenizer"),
        ({"tune_top_llm_layers": 4}, "the language model is frozen.*tune_top_llm_layers=0"),
        ({"horizon": 17}, "chunks of 16 steps, asked for 17: .* Choose a shorter"),
        ({"horizon": 0}, "horizon is 0"),
        ({"statistics": "mine"}, 'statistics is "mine"; expected one of auto, checkpoint, dataset'),
        ({"statistics": "dataset"}, 'statistics="dataset" without a dataset'),
        ({"dtype": "float16"}, 'dtype is "float16": expected bfloat16 or float32'),
        ({"compute": "int8"}, 'compute is "int8": expected bfloat16 or float32'),
        ({"letterbox": True}, "keeps processors of its own, which letterbox would not reach"),
        ({"embodiment": {"tag": "gr1"}}, "keeps processors of its own, which embodiment would not reach"),
        ({"revision": "v1"}, 'is a local folder and has no revisions, but revision "v1"'),
    ],
)
def test_options_that_cannot_work_are_named(saved, options, words):
    with pytest.raises(PolicyError, match=words):
        GrootN1d6Adapter.from_pretrained(saved, **options)


def test_options_that_a_folder_has_already_are_no_change(saved):
    assert GrootN1d6Adapter.from_pretrained(saved, tokenizer="bytes", letterbox=False).spec.horizon == 16


def test_a_horizon_beyond_the_statistics_is_refused(saved, tmp_path):
    """A network that denoises 16 steps, trained on chunks of 8."""
    GrootN1d6Adapter.from_pretrained(saved, **dataset(), statistics="dataset", horizon=8).save_pretrained(
        tmp_path / "p"
    )
    change_json(tmp_path / "p" / "config.json", max_action_horizon=16)
    with pytest.raises(PolicyError, match="chunks of 8 steps, asked for 12"):
        GrootN1d6Adapter.from_pretrained(tmp_path / "p", horizon=12)


def test_it_does_not_start_from_nothing():
    with pytest.raises(PolicyError, match=r"starts from a pretrained base.*GR00T-N1\.6-3B"):
        GrootN1d6Adapter.from_dataset({}, {}, horizon=10)


# -- NVIDIA's checkpoints behind the adapter --------------------------------------------------------------------------


def test_a_base_model_takes_a_datasets_robot(nvidia):
    policy = GrootN1d6Adapter.from_pretrained(nvidia, **OPTIONS, **dataset(action=3, state=5), horizon=10)
    assert (policy.spec.horizon, policy.spec.width, policy.spec.action_dim) == (10, 12, 3)
    assert policy.embodiment.slot == 10
    check_policy(policy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (OPTIONS, "is a base model: which robot"),
        (OPTIONS | dataset() | {"horizon": 17}, "chunks of 16 steps, asked for 17"),
        (OPTIONS | dataset() | {"colour": 1}, "no option colour"),
        (OPTIONS | dataset() | {"tune_top_llm_layers": 4}, "tune_top_llm_layers=0"),
        (OPTIONS | dataset(cameras=(FRONT,)) | GR1, rf"reads {WRIST}, which the data lack; they have action"),
        (OPTIONS | dataset(state=3) | GR1, 'state key "hand" is columns 2 to 4 of observation.state, which has 3'),
        (OPTIONS | dataset(action=5) | GR1, 'cover 4 columns, "action" has 5'),
        (OPTIONS | dataset() | {"embodiment": {"tag": "g1"}}, 'not describe embodiment "g1". It knows gr1'),
        (
            OPTIONS | dataset() | {"embodiment": {"tag": "g1", "action": {"all": [0, 4]}}},
            'unknown embodiment "g1". Known: behavior_r1_pro, gr1, libero_panda, new_embodiment',
        ),
        (OPTIONS | dataset() | {"max_action_dim": 8}, "has 32 state and 12 action dimensions"),
    ],
)
def test_what_does_not_fit_a_base_model_is_named(nvidia, options, words):
    with pytest.raises(PolicyError, match=words):
        GrootN1d6Adapter.from_pretrained(nvidia, **options)


def test_an_exported_policy_needs_its_base_no_more(tmp_path):
    base = nvidia_folder(tmp_path / "base")
    policy = GrootN1d6Adapter.from_pretrained(base, **OPTIONS, **dataset(), **GR1)
    policy.save_pretrained(tmp_path / "out")
    shutil.rmtree(base)
    loaded = GrootN1d6Adapter.from_pretrained(tmp_path / "out")
    assert loaded.embodiment == policy.embodiment
    assert velocity(loaded).equal(velocity(policy))


# -- relative actions -------------------------------------------------------------------------------------------------


def transitions(seed=0, size=3, steps=16):
    """Transitions of gr1 in its units: the arm's actions within 1 above the state's, no two states alike."""
    rng = np.random.default_rng(seed)
    image = {key: rng.integers(0, 256, (size, 64, 64, 3)).astype(np.uint8) for key in (FRONT, WRIST)}
    states = rng.random((2, size, 6)).astype(np.float32)
    actions = rng.random((size, steps, 4)).astype(np.float32)
    actions[..., 2:] += states[0, :, None, :2]  # columns: hand, then arm
    return Transitions(
        obs=image | {STATE: states[0]},
        next_obs=image | {STATE: states[1] + 5},
        actions=actions,
        valid=np.ones((size, steps), bool),
        returns=np.zeros(size, np.float32),
        discount=np.ones(size, np.float32),
        is_demo=np.ones(size, bool),
        is_success=np.zeros(size, bool),
        tasks=["pick up the pen"] * size,
        ids=np.arange(size),
        next_ids=np.arange(size) + 1,
    )


def test_chunks_of_a_batch_are_relative_to_their_own_state(gr1):
    """Not to the next one's, which is processed first: 2 (a - s) - 1 by hand, and back."""
    raw = transitions()
    batch = chunk_batch(gr1, raw)
    state, actions = torch.from_numpy(raw.obs[STATE]), torch.from_numpy(raw.actions)
    torch.testing.assert_close(batch.actions[..., :2], 2 * actions[..., :2] - 1)
    torch.testing.assert_close(batch.actions[..., 2:4], 2 * (actions[..., 2:] - state[:, None, :2]) - 1)
    assert not batch.actions[..., 4:].any()
    torch.testing.assert_close(gr1.postprocess(batch.actions[..., :4]), actions)
    torch.testing.assert_close(gr1.postprocess(batch.actions), actions)  # padded ones, too


def test_a_chunk_sampled_for_an_observation_refers_to_it(gr1):
    """As a rollout does: observe, encode, propose, decode."""
    raw = transitions()
    obs = preprocess_obs(gr1, raw.obs, raw.tasks)
    chunk = propose(gr1, gr1.encode(obs), 1)[:, 0]
    found = gr1.postprocess(chunk[..., :4])
    arm = torch.from_numpy(raw.obs[STATE])[:, None, :2] + (chunk[..., 2:4] + 1) / 2
    torch.testing.assert_close(found[..., 2:], arm)
    torch.testing.assert_close(found[..., :2], (chunk[..., :2] + 1) / 2)


def test_a_chunk_of_another_batch_is_not_decoded(gr1):
    raw = transitions()
    preprocess_obs(gr1, raw.obs, raw.tasks)
    with pytest.raises(ValueError, match=r"2 chunks of relative actions, but the last batch .* 3 states"):
        gr1.postprocess(torch.zeros(2, 16, 4))


def test_flow_errors_of_a_relative_batch_are_finite(gr1):
    batch = chunk_batch(gr1, transitions())
    noise, t = draws(gr1, 2)
    chunks = batch.actions[:, None].expand_as(noise)
    errors = flow_errors(gr1, gr1.encode(batch.obs), chunks, batch.valid, noise=noise, t=t)
    assert errors.isfinite().all()
    errors.mean().backward()
    assert all(p.grad is not None for p in gr1.head.parameters())


def test_relative_actions_of_a_new_robot_need_the_datasets_frames(nvidia):
    """Statistics alone cannot tell the range of differences."""
    described = {
        "views": {"front": FRONT},
        "state": {"arm": [0, 4]},
        "action": {"arm": {"slice": [0, 4], "representation": "RELATIVE"}},
    }
    with pytest.raises(PolicyError, match="is relative: its statistics are those of differences"):
        GrootN1d6Adapter.from_pretrained(nvidia, **OPTIONS, **dataset(), embodiment=described)


def test_the_processors_of_a_saved_relative_policy_stay_linked(gr1, tmp_path):
    gr1.save_pretrained(tmp_path / "out")
    loaded = GrootN1d6Adapter.from_pretrained(tmp_path / "out")
    batch = chunk_batch(loaded, transitions())
    torch.testing.assert_close(loaded.postprocess(batch.actions), torch.from_numpy(transitions().actions))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["type"] == "groot_n1d6"


def test_a_prefix_can_be_picked_and_moved(policy, obs):
    prefix = policy.encode(obs)
    picked = prefix.select(torch.tensor([2, 0])).to("cpu")
    for found, tensor in zip(prefix_tensors(picked), prefix_tensors(prefix), strict=True):
        assert found.equal(tensor[[2, 0]])


def test_a_lora_trains_alone_changes_nothing_at_first_and_is_merged_on_export(saved, tmp_path):
    """Rank 2 on the default targets; trained by hand to see that the export holds it."""
    full = GrootN1d6Adapter.from_pretrained(saved)
    policy = GrootN1d6Adapter.from_pretrained(saved, lora=2)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    torch.testing.assert_close(velocity(policy), velocity(full), rtol=0, atol=1e-6)
    check_policy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    policy.save_pretrained(tmp_path / "out")
    merged = GrootN1d6Adapter.from_pretrained(tmp_path / "out")
    assert merged.policy.state_dict().keys() == full.policy.state_dict().keys()
    torch.testing.assert_close(velocity(merged), velocity(policy), rtol=0, atol=1e-5)
    with pytest.raises(PolicyError, match='lora target "to_nowhere" is the end of no linear layer'):
        GrootN1d6Adapter.from_pretrained(saved, lora={"rank": 2, "targets": ["to_nowhere"]})


def test_a_datasets_statistics_need_no_base_checkpoint(tmp_path):
    """Of a policy that came from NVIDIA's weights, when these are gone."""
    base = nvidia_folder(tmp_path / "nvidia")
    GrootN1d6Adapter.from_pretrained(base, **dataset(), **OPTIONS, horizon=8).save_pretrained(tmp_path / "out")
    shutil.rmtree(base)
    policy = GrootN1d6Adapter.from_pretrained(tmp_path / "out", **dataset(), statistics="dataset")
    assert policy.spec.horizon == 8
