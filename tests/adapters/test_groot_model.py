"""GR00T N1.6's network gives the original's numbers, and its fast path does what it is for."""

import copy
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import check_groot
import pytest
import torch
from check_groot import BOUND, differences
from lerobot_policy_groot_n1d6.model import (
    GrootN1d6,
    GrootSizes,
    HeadSizes,
    VisionSizes,
    random_weights,
    rollout,
    sample_time,
    sort_tokens,
    training_loss,
)
from lerobot_policy_groot_n1d6.model.vision import flat_patches, unshuffle
from plain_groot import plain_velocity
from safetensors.torch import load_file, safe_open, save_file
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden"
HEAD_FILE, VISION_FILE = GOLDEN / "groot_head.safetensors", GOLDEN / "groot_vision.safetensors"

BASE_CONFIG = {
    "model_type": "Gr00tN1d6",
    "select_layer": 16,
    "backbone_embedding_dim": 2048,
    "action_horizon": 50,
    "max_state_dim": 128,
    "max_action_dim": 128,
    "hidden_size": 1024,
    "input_embedding_dim": 1536,
    "max_seq_len": 1024,
    "use_alternate_vl_dit": True,
    "attend_text_every_n_blocks": 2,
    "state_dropout_prob": 0.0,
    "max_num_embodiments": 32,
    "num_inference_timesteps": 4,
    "num_timestep_buckets": 1000,
    "noise_beta_alpha": 1.5,
    "noise_beta_beta": 1.0,
    "noise_s": 0.999,
    "diffusion_model_cfg": {
        "positional_embeddings": None,
        "num_layers": 32,
        "num_attention_heads": 32,
        "attention_head_dim": 48,
        "norm_type": "ada_norm",
        "dropout": 0.2,
        "final_dropout": True,
        "output_dim": 1024,
        "interleave_self_attention": True,
    },
}
"""What the specification says of the base checkpoint's config.json."""


def encoded_by(network, *inputs):
    """Features of every token of some states."""
    return network.vision_language.encode(*inputs)


@pytest.fixture(scope="module")
def tiny():
    """Shared: a test that changes it takes a copy."""
    return GrootN1d6.random(GrootSizes.tiny())


@pytest.fixture
def network(tiny):
    return copy.deepcopy(tiny)


@pytest.fixture
def head(network):
    return network.action_head


@pytest.fixture(params=[1, 5], ids=["1 candidate", "5 candidates"])
def inputs(request, head):
    return head_inputs(head, candidates=request.param)


LAYOUT = ["tiitt", "ttttttii", "titititt"]
"""Text and image tokens of three states; shorter ones have padding on their left."""


def head_inputs(head, candidates=5, layout=LAYOUT, seed=0):
    """Random features and everything else that a velocity takes: embodiments and times differ."""
    generator = torch.Generator().manual_seed(seed)
    sizes, states, length = head.sizes, len(layout), max(map(len, layout))
    padded = [kinds.rjust(length) for kinds in layout]
    return {
        "features": torch.randn(states, length, sizes.context, generator=generator),
        "image_mask": torch.tensor([[kind == "i" for kind in kinds] for kinds in padded]),
        "mask": torch.tensor([[kind != " " for kind in kinds] for kinds in padded]),
        "state": torch.randn(states, 1, sizes.state_dim, generator=generator),
        "x": torch.randn(states, candidates, sizes.horizon, sizes.action_dim, generator=generator),
        "t": torch.rand(states, candidates, generator=generator),
        "embodiment": torch.randint(sizes.num_embodiments, (states,), generator=generator),
    }


def fast(head, features, image_mask, mask, state, x, t, embodiment, **options):
    kv = head.cross_kv(sort_tokens(features, image_mask, mask))
    return head.velocity(kv, head.state_tokens(state, embodiment), x, t, embodiment, **options)


def plain(head, features, image_mask, mask, state, x, t, embodiment):
    """The plain reading, a row per candidate."""
    rows = [tensor.repeat_interleave(x.shape[1], dim=0) for tensor in (features, image_mask, mask, state, embodiment)]
    velocity = plain_velocity(head, *rows[:4], x.flatten(0, 1), t.flatten(), rows[4])
    return velocity.unflatten(0, x.shape[:2])


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same_gradients(found, expected):
    """Each parameter's relative to its norm; 1e-5 for those that are zero but for rounding, as biases of keys."""
    assert found.keys() == expected.keys()
    gaps = {name: (found[name] - grad).norm() / grad.norm().clamp(min=1) for name, grad in expected.items()}
    assert {name: gap for name, gap in gaps.items() if not gap < 1e-5} == {}


# -- against the original ---------------------------------------------------------------------------------------------


def test_the_originals_numbers():
    assert {key: value for key, value in differences(HEAD_FILE, VISION_FILE).items() if not value <= BOUND} == {}


@pytest.mark.parametrize("output", ["out.loss", "out.velocity_x0_t750", "out.vit2"])
def test_the_check_fails_where_a_number_differs(output, tmp_path, monkeypatch):
    files = []
    for file in (HEAD_FILE, VISION_FILE):
        tensors = load_file(file)
        if output in tensors:
            tensors[output] = tensors[output] + 2 * BOUND
        with safe_open(file, "pt") as opened:
            save_file(tensors, tmp_path / file.name, opened.metadata())
        files.append(str(tmp_path / file.name))
    monkeypatch.setattr("sys.argv", ["check_groot.py", *files])
    with pytest.raises(SystemExit) as ended:
        check_groot.main()
    assert ended.value.code == 1


def test_an_output_that_nobody_computes_is_not_passed_over(tmp_path):
    tensors = load_file(HEAD_FILE) | {"out.surprise": torch.zeros(1)}
    with safe_open(HEAD_FILE, "pt") as opened:
        save_file(tensors, tmp_path / "head.safetensors", opened.metadata())
    with pytest.raises(ValueError, match="surprise"):
        differences(tmp_path / "head.safetensors", VISION_FILE)


def test_keys_and_shapes_are_the_checkpoints():
    listed = (line.split("\t") for line in (GOLDEN / "groot_state_dict_keys.txt").read_text().splitlines() if line)
    expected = {key: shape.strip() for key, shape in listed}
    state = GrootN1d6.empty(GrootSizes()).state_dict()
    assert len(expected) == 1106
    assert {key: str(list(tensor.shape)) for key, tensor in state.items()} == expected
    assert sum(tensor.numel() for tensor in state.values()) == 3_286_608_832
    assert all(tensor.is_meta for tensor in state.values())


def test_a_mask_token_is_there_when_asked_for():
    sizes = replace(GrootSizes(), head=replace(HeadSizes(), mask_token=True))
    keys = GrootN1d6.empty(sizes).state_dict().keys() - GrootN1d6.empty(GrootSizes()).state_dict().keys()
    assert keys == {"action_head.mask_token"}


def test_the_base_checkpoints_configuration_is_the_default():
    assert GrootSizes.from_config(BASE_CONFIG) == GrootSizes()


def test_sizes_are_read_from_a_configuration():
    config = BASE_CONFIG | {"select_layer": 12, "action_horizon": 16, "state_dropout_prob": 0.8, "max_state_dim": 29}
    sizes = GrootSizes.from_config(config)
    assert sizes.language.depth == 12
    assert (sizes.head.horizon, sizes.head.state_dim, sizes.head.mask_token) == (16, 29, True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_alternate_vl_dit": False}, "use_alternate_vl_dit"),
        ({"diffusion_model_cfg": {"norm_type": "layer_norm"}}, "norm_type"),
        ({"input_embedding_dim": 512}, "input_embedding_dim is 512: expected 1536"),
        ({"action_horizon": 2000}, "at most max_steps"),
        ({"backbone_embedding_dim": 1024}, "language.width"),
    ],
)
def test_another_model_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        GrootSizes.from_config(BASE_CONFIG | changed)


@pytest.mark.parametrize("config", [{"use_rope": True}, {"hidden_act": "gelu"}, {"num_patches": 250}])
def test_another_vision_tower_is_refused(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        VisionSizes.from_config(config)


# -- what nothing computes with ---------------------------------------------------------------------------------------


def unused(network):
    return {key for key in network.state_dict() if "vision_model.head." in key or "lm_head" in key}


def test_unused_tensors_are_written_back_as_they_were(network):
    weights = random_weights(network, seed=1)
    weights = {key: value.bfloat16() if key in unused(network) else value for key, value in weights.items()}
    network.load_state_dict(weights)
    back = network.to(torch.float64).state_dict()
    assert len(unused(network)) == 12
    for key in unused(network):
        assert back[key].dtype == torch.bfloat16
        assert torch.equal(back[key], weights[key])


def test_unused_tensors_are_not_parameters(network):
    known = {name for name, _ in [*network.named_parameters(), *network.named_buffers()]}
    assert network.state_dict().keys() - known == unused(network)


@pytest.mark.parametrize("change", ["missing", "misshapen", "unexpected"])
def test_unused_tensors_are_loaded_strictly(network, change):
    key = "backbone.model.language_model.lm_head.weight"
    weights = network.state_dict()
    if change == "missing":
        del weights[key]
    elif change == "misshapen":
        weights[key] = torch.zeros(3, 3)
    else:
        weights["backbone.model.language_model.lm_head.bias"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="lm_head"):
        network.load_state_dict(weights)


# -- images -----------------------------------------------------------------------------------------------------------


def images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(1, 3, height, width, generator=generator) * 2 - 1 for height, width in sizes]


def test_no_image_sees_another(network):
    """Whatever lies beside an image, in the same batch of sizes or not, its tokens are those it has alone."""
    several = images((56, 84), (56, 56), (56, 84), (84, 56))
    together = network.vision_language.image_tokens(several)
    assert [len(tokens) for tokens in together] == [6, 4, 6, 6]
    for image, tokens in zip(several, together, strict=True):
        (alone,) = network.vision_language.image_tokens([image])
        torch.testing.assert_close(tokens, alone, rtol=0, atol=1e-5)
    several[0] = torch.full_like(several[0], float("nan"))
    assert not any(tokens.isnan().any() for tokens in network.vision_language.image_tokens(several)[1:])


def test_a_patch_is_flattened_by_row_column_channel():
    """Pixel (1, 2) of channel 0 in the second patch of a row: number (1 * 14 + 2) * 3."""
    image = torch.zeros(1, 3, 28, 28)
    image[0, 0, 1, 14 + 2] = 1
    assert flat_patches(image, 14).nonzero().tolist() == [[0, 1, (1 * 14 + 2) * 3]]


def test_unshuffle_is_channel_major():
    """2 x 4 patches of 2 channels. Patch (1, 2) lies in the second square, at its row 1, column 0: numbers 4 c + 2."""
    patches = torch.zeros(8, 2)
    patches[1 * 4 + 2] = 1
    assert unshuffle(patches, 2, 4).nonzero().tolist() == [[1, 2], [1, 4 + 2]]


def test_positions_of_the_native_size_are_the_table(network):
    tower = network.vision_language.tower
    table = tower.embeddings.position_embedding.weight
    torch.testing.assert_close(tower._positions(tower.sizes.grid, tower.sizes.grid), table, rtol=0, atol=5e-6)


def test_an_image_of_odd_size_says_what_to_do(network):
    with pytest.raises(ValueError, match="56 x 42 pixels: expected multiples of 28"):
        network.vision_language.image_tokens(images((56, 42)))


# -- the language model -----------------------------------------------------------------------------------------------


def prompt(network, kinds):
    """A token for each letter: an image's where it is "i"."""
    image_token = network.sizes.language.image_token
    return torch.tensor([image_token if kind == "i" else 10 + place for place, kind in enumerate(kinds)])


def padded(prompts, side="left"):
    longest = max(map(len, prompts))
    pads = [(longest - len(p), 0) if side == "left" else (0, longest - len(p)) for p in prompts]
    ids = torch.stack([F.pad(p, pad) for p, pad in zip(prompts, pads, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(p), pad) for p, pad in zip(prompts, pads, strict=True)])
    return ids, mask


@torch.no_grad()
def test_features_are_qwen3s_after_its_last_norm(network):
    """transformers' own causal model, its own mask and rotary module, on the same weights and embeddings."""
    ids, mask = padded([prompt(network, "ttttt"), prompt(network, "ttttttttt")])
    language = network.vision_language.language_model
    stock = Qwen3ForCausalLM(language.model.config)
    stock.load_state_dict(language.state_dict())
    expected = stock(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    found = encoded_by(network, [], ids, mask).features
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


@torch.no_grad()
def test_images_and_padding_stay_where_they_belong(network):
    """Two states of different length and images, together and each alone: the same features."""
    kinds = ["ttiiiitt", "tiiiiiitiiiitt"]
    shown = [images((56, 56)), images((56, 84), (56, 56), seed=1)]
    prompts = [prompt(network, letters) for letters in kinds]
    encoded = encoded_by(network, [*shown[0], *shown[1]], *padded(prompts))
    assert encoded.features.isfinite().all()
    for i, (letters, pictures) in enumerate(zip(kinds, shown, strict=True)):
        alone = encoded_by(network, pictures, prompts[i][None], torch.ones(1, len(letters), dtype=torch.long))
        torch.testing.assert_close(encoded.features[i, -len(letters) :], alone.features[0], rtol=0, atol=1e-5)
        assert encoded.image_mask[i, -len(letters) :].tolist() == [kind == "i" for kind in letters]
        assert encoded.mask[i].sum() == len(letters)


@torch.no_grad()
def test_padding_means_nothing_to_the_velocity(network):
    """The same states with more padding on the left."""
    ids, mask = padded([prompt(network, "ttiiiitt"), prompt(network, "tiiiit")])
    shown = images((56, 56), (56, 56))
    rest = head_inputs(network.action_head, candidates=2, layout=["t", "t"])
    velocities = []
    for more in (0, 3):
        encoded = encoded_by(network, shown, F.pad(ids, (more, 0)), F.pad(mask, (more, 0)))
        rest |= {"features": encoded.features, "image_mask": encoded.image_mask, "mask": encoded.mask}
        velocities.append(fast(network.action_head, **rest))
    torch.testing.assert_close(*velocities, rtol=0, atol=1e-5)


def test_images_and_prompts_must_agree(network):
    with pytest.raises(ValueError, match="1 images make 4 tokens, the prompts have 3"):
        encoded_by(network, images((56, 56)), prompt(network, "tiiit")[None], torch.ones(1, 5, dtype=torch.long))


@torch.no_grad()
def test_bfloat16_does_not_round_rotary_angles(network):
    """Position 300 in bfloat16 would be off by a radian."""
    rotary = network.to(torch.bfloat16).vision_language.language_model.model.rotary_emb
    cos, _ = rotary(torch.empty(0), torch.tensor([[301]]))
    torch.testing.assert_close(cos[0, 0, 0], torch.tensor(301.0).cos())


# -- fast and plain ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_fast_is_plain(head, inputs):
    """States of mixed length and embodiment, each candidate at a time of its own."""
    torch.testing.assert_close(fast(head, **inputs), plain(head, **inputs), rtol=0, atol=BOUND)


@torch.no_grad()
def test_one_time_for_all_and_one_embodiment_for_all(head, inputs):
    inputs |= {"t": torch.full(inputs["t"].shape, 0.5), "embodiment": torch.tensor([7] * 3)}
    expected = plain(head, **inputs)
    inputs["t"] = torch.full((1, 1), 0.5)
    torch.testing.assert_close(fast(head, **inputs), expected, rtol=0, atol=BOUND)
    torch.testing.assert_close(fast(head, **inputs | {"embodiment": 7}), expected, rtol=0, atol=BOUND)


@torch.no_grad()
def test_rollouts_agree(head, inputs):
    tokens = sort_tokens(inputs["features"], inputs["image_mask"], inputs["mask"])
    kv, token = head.cross_kv(tokens), head.state_tokens(inputs["state"], inputs["embodiment"])
    found = rollout(lambda x, t: head.velocity(kv, token, x, t, inputs["embodiment"]), inputs["x"], 4)
    expected = rollout(lambda x, t: plain(head, **inputs | {"x": x, "t": t}), inputs["x"], 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_are_plains(head, inputs, recompute):
    weights = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(3))
    found = gradients(head, (fast(head, **inputs, recompute=recompute) * weights).sum())
    expected = gradients(head, (plain(head, **inputs) * weights).sum())
    assert all(gradient is not None for gradient in expected.values())
    assert_same_gradients(found, expected)


def test_gradients_reach_the_features(head, inputs):
    grads = []
    for path in (fast, plain):
        features = inputs["features"].clone().requires_grad_()
        path(head, **inputs | {"features": features}).square().sum().backward()
        grads.append(features.grad)
    assert not grads[0][~inputs["mask"]].any()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layout",
    [["tiit", "ttt"], ["iii", "tiit"], ["ttt", "tt"], ["ii", "iii"]],
    ids=["one without images", "one without text", "none with images", "none with text"],
)
def test_a_state_without_tokens_of_a_kind(head, layout):
    """Such a layer attends to nothing; numbers and gradients stay finite."""
    inputs = head_inputs(head, candidates=2, layout=layout)
    found, expected = fast(head, **inputs), plain(head, **inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=BOUND)
    found = gradients(head, found.square().sum())
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert_same_gradients(found, gradients(head, expected.square().sum()))


def test_recomputing_with_dropout_draws_the_same(head):
    inputs = head_inputs(head)
    head.train()
    found = []
    for recompute in (True, False):
        torch.manual_seed(0)
        found.append(gradients(head, fast(head, **inputs, recompute=recompute).square().sum()))
    assert_same_gradients(*found)


@torch.no_grad()
def test_dropout_is_for_training_only(head):
    inputs = head_inputs(head)
    assert torch.equal(fast(head, **inputs), fast(head, **inputs))
    head.train()
    assert not torch.equal(fast(head, **inputs), fast(head, **inputs))


# -- what is computed once --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_keys_exist_once_per_state(head):
    """All candidates' queries are one row per state; keys and values are the memory's own storage."""
    inputs = head_inputs(head, candidates=5)
    kv = head.cross_kv(sort_tokens(inputs["features"], inputs["image_mask"], inputs["mask"]))
    token = head.state_tokens(inputs["state"], inputs["embodiment"])
    with patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attention:
        head.velocity(kv, token, inputs["x"], inputs["t"], inputs["embodiment"])
    crossing = [call.args for call in attention.call_args_list if len(call.args) == 4]
    assert len(crossing) == len(kv) == 2
    steps = 5 * (1 + head.sizes.horizon)
    for (queries, keys, values, _), memory in zip(crossing, kv, strict=True):
        assert (queries.shape[0], queries.shape[2]) == (3, steps)
        assert (keys.data_ptr(), values.data_ptr()) == (memory.keys.data_ptr(), memory.values.data_ptr())


@torch.no_grad()
def test_keys_are_projected_once_per_rollout(head):
    inputs = head_inputs(head)
    calls = []
    head.model.transformer_blocks[0].attn1.to_k.register_forward_hook(lambda *_: calls.append(1))
    kv = head.cross_kv(sort_tokens(inputs["features"], inputs["image_mask"], inputs["mask"]))
    token = head.state_tokens(inputs["state"], inputs["embodiment"])
    rollout(lambda x, t: head.velocity(kv, token, x, t, inputs["embodiment"]), inputs["x"], 4)
    assert len(calls) == 1


@torch.no_grad()
def test_only_tokens_of_the_kind_become_keys(head):
    """ "tiitt", "ttttttii", "titititt": at most 6 of text, 3 of images."""
    inputs = head_inputs(head)
    tokens = sort_tokens(inputs["features"], inputs["image_mask"], inputs["mask"])
    assert (tokens.text.tokens.shape[1], tokens.image.tokens.shape[1]) == (6, 3)
    assert torch.equal(tokens.image.tokens[0, :2], inputs["features"][0, -4:-2])
    assert [memory.keys.shape[2] for memory in head.cross_kv(tokens)] == [6, 3]


@torch.no_grad()
def test_states_of_one_layout_need_no_mask(head):
    inputs = head_inputs(head, layout=["tit", "itt"])
    kv = head.cross_kv(sort_tokens(inputs["features"], inputs["image_mask"], inputs["mask"]))
    assert all(memory.mask is None and memory.absent is None for memory in kv)


@torch.no_grad()
@pytest.mark.parametrize(("shared", "rows"), [(True, (1, 1)), (False, (3, 5))])
def test_modulations_are_made_once_for_one_time(head, shared, rows):
    inputs = head_inputs(head)
    if shared:
        inputs["t"] = torch.full((1, 1), 0.25)
    shapes = []
    for module in (head.model.transformer_blocks[0].norm1["linear"], head.model.proj_out_1):
        module.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape[:2])))
    fast(head, **inputs)
    assert shapes == [rows, rows]


@torch.no_grad()
def test_conditions_can_be_picked_and_moved(head):
    inputs = head_inputs(head)
    tokens = sort_tokens(inputs["features"], inputs["image_mask"], inputs["mask"])
    expected = fast(head, **inputs)[[2, 0]]
    rest = [inputs[name][[2, 0]] for name in ("state", "x", "t", "embodiment")]
    token = head.state_tokens(rest[0], rest[3])
    for kv in (
        head.cross_kv(tokens.select([2, 0]).to("cpu")),
        tuple(memory.select([2, 0]).to("cpu") for memory in head.cross_kv(tokens)),
    ):
        torch.testing.assert_close(head.velocity(kv, token, *rest[1:]), expected, rtol=0, atol=5e-6)


# -- time, states, embodiments ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_network_knows_a_thousand_times(head):
    """0.2500 to 0.2509 are one, 0.2511 is the next."""
    inputs = head_inputs(head)
    first, same, other = (
        fast(head, **inputs | {"t": torch.full_like(inputs["t"], time)}) for time in (0.2501, 0.2509, 0.2511)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_every_euler_grid_hits_its_bucket(head):
    """int(1000 k / K) of the original, from k / K in float32."""
    for steps in range(1, 101):
        times = torch.tensor([k / steps for k in range(steps)])
        assert head.buckets(times).tolist() == [int(k / steps * 1000) for k in range(steps)]


def test_training_times_lie_near_the_noise():
    """P(t < c) = 1 - (1 - c / 0.999)^1.5 and mean 0.999 * (1 - 1.5 / 2.5) = 0.3996."""
    times = sample_time((200, 1000), HeadSizes(), torch.Generator().manual_seed(0))
    assert times.shape == (200, 1000)
    assert times.min() >= 0
    assert times.max() <= 0.999
    assert times.mean().item() == pytest.approx(0.3996, abs=2e-3)
    for bound, share in ((0.25, 0.351), (0.5, 0.647), (0.75, 0.876)):
        assert (times < bound).float().mean().item() == pytest.approx(share, abs=4e-3)


def test_the_loss_of_a_closed_form():
    """Off by 2 in every entry, 3 of 8 valid: errors 4 there and 0 elsewhere, mean 4."""
    action, noise = torch.randn(2, 2, 2), torch.randn(2, 2, 2)
    mask = torch.tensor([1.0, 0, 1, 0, 1, 0, 0, 0]).view(2, 2, 2)
    seen = []

    def velocity(x, t):
        seen.append((x, t))
        return action - noise + 2

    loss, errors = training_loss(velocity, action, mask, noise, torch.tensor([0.25, 1.0]))
    assert loss.item() == pytest.approx(4, rel=1e-5)
    torch.testing.assert_close(errors, 4 * mask)
    (x, _), *_ = seen
    torch.testing.assert_close(x[0], 0.75 * noise[0] + 0.25 * action[0])
    torch.testing.assert_close(x[1], action[1])


@torch.no_grad()
def test_padded_noise_is_seen(head):
    """Masked entries count in no loss, but the network reads their noise."""
    inputs = head_inputs(head)
    other = inputs["x"].clone()
    other[:, :, -1, -1] += 1
    difference = fast(head, **inputs) - fast(head, **inputs | {"x": other})
    assert difference[:, :, 0, 0].abs().min() > 0


def test_rollout_integrates_a_constant_field_exactly():
    noise, direction = torch.randn(2, 3, 4, 5), torch.randn(5)
    times = []

    def velocity(x, t):
        times.append(t)
        return direction.expand_as(x)

    torch.testing.assert_close(rollout(velocity, noise, 4), noise + direction)
    assert [t[0, 0].item() for t in times] == [0, 0.25, 0.5, 0.75]
    assert all(t.shape == (2, 3) and t.stride() == (0, 0) for t in times)


@torch.no_grad()
def test_embodiments_have_weights_of_their_own(head):
    inputs = head_inputs(head)
    found = fast(head, **inputs | {"embodiment": torch.tensor([3, 4, 3])})
    third, fourth = (fast(head, **inputs | {"embodiment": slot}) for slot in (3, 4))
    torch.testing.assert_close(found[[0, 2]], third[[0, 2]], rtol=0, atol=5e-6)
    torch.testing.assert_close(found[1], fourth[1], rtol=0, atol=5e-6)
    assert not torch.allclose(third, fourth)


def test_an_embodiment_without_a_slot(head):
    with pytest.raises(ValueError, match="embodiment is 32: expected a slot from 0 to 31"):
        fast(head, **head_inputs(head) | {"embodiment": 32})


def test_a_chunk_that_is_too_long(head):
    inputs = head_inputs(head)
    inputs["x"] = inputs["x"].repeat(1, 1, 3, 1)
    with pytest.raises(ValueError, match="24 steps: expected at most 16"):
        fast(head, **inputs)


def test_dropped_states_become_the_mask_token():
    sizes = GrootSizes.tiny()
    head = GrootN1d6.random(replace(sizes, head=replace(sizes.head, mask_token=True))).action_head
    state, slots = torch.randn(2, 1, 16), torch.tensor([1, 2])
    tokens = head.state_tokens(state, slots, dropped=torch.tensor([True, False]))
    assert torch.equal(tokens[0], head.mask_token[0])
    assert torch.equal(tokens[1], head.state_tokens(state, slots)[1])


def test_dropping_states_needs_a_mask_token(head):
    with pytest.raises(ValueError, match="mask token"):
        head.state_tokens(torch.randn(2, 1, 16), 0, dropped=torch.tensor([True, False]))


# -- dtypes -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_checkpoint_of_mixed_dtypes(network):
    """As after fine-tuning: the language model's top layer and the action head in float32, the rest in bfloat16."""
    weights = {
        key: value if key.startswith("action_head") or ".layers.1." in key else value.bfloat16()
        for key, value in random_weights(network, seed=2).items()
    }
    loaded = GrootN1d6.empty(network.sizes)
    loaded.load_state_dict(weights, assign=True)
    assert all(loaded.state_dict()[key].dtype == value.dtype for key, value in weights.items())
    loaded.eval().backbone.to(torch.bfloat16)
    network.load_state_dict(weights)
    ids, mask = padded([prompt(network, "ttiiiitt"), prompt(network, "tiiiit")])
    shown = images((56, 56), (56, 56))
    found, expected = (encoded_by(model, shown, ids, mask) for model in (loaded, network))
    assert found.features.dtype == torch.bfloat16
    valid = mask.bool()
    assert F.cosine_similarity(found.features[valid].float(), expected.features[valid], dim=-1).min() > 0.99
    rest = head_inputs(loaded.action_head, candidates=2, layout=["t", "t"])
    rest |= {"features": found.features, "image_mask": found.image_mask, "mask": found.mask}
    assert fast(loaded.action_head, **rest).dtype == torch.float32


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_products_in_bfloat16(head, weights):
    """float32 in and out, close to the exact velocity, gradients in each weight's own dtype."""
    inputs = head_inputs(head)
    expected = fast(head, **inputs).detach()
    head.to(weights)
    kv = head.cross_kv(sort_tokens(inputs["features"], inputs["image_mask"], inputs["mask"]), compute=torch.bfloat16)
    token = head.state_tokens(inputs["state"], inputs["embodiment"], compute=torch.bfloat16)
    rest = [inputs[name] for name in ("x", "t", "embodiment")]
    found = head.velocity(kv, token, *rest, compute=torch.bfloat16)
    assert kv[0].keys.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() < 0.03
    found.square().sum().backward()
    assert all(parameter.grad.dtype == weights for parameter in head.parameters())
