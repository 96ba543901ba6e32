"""What the pi05 adapter relies on in LeRobot: these fail, and say where, when a new LeRobot changes it."""

import copy
import inspect

import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy, PI05Pytorch
from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors
from lerobot.policies.pi_gemma import PiGemmaRMSNorm
from lerobot.processor import TokenizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from poco_vla_pi05 import processors
from poco_vla_pi05.adapter import Pi05
from poco_vla_pi05.architecture import TINY, empty_policy, lerobot_builds
from poco_vla_pi05.tokenizer import DEFAULT, byte_tokenizer
from transformers import AutoTokenizer

FRONT, WRIST = "observation.images.front", "observation.images.wrist"


def tiny_config(**options):
    images = {key: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for key in (FRONT, WRIST)}
    return PI05Config(
        input_features=images | {OBS_STATE: PolicyFeature(FeatureType.STATE, (6,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (4,))},
        image_resolution=(TINY.image_size, TINY.image_size),
        device="cpu",
        **options,
    )


def stock(config):
    """The policy as LeRobot's own constructor makes it."""
    with lerobot_builds(TINY):
        return PI05Policy(config)


@pytest.mark.parametrize(
    ("function", "first"),
    [
        (PI05Pytorch.embed_prefix, ["self", "images", "img_masks", "tokens", "masks"]),
        (PI05Pytorch.forward, ["self", "images", "img_masks", "tokens", "masks", "actions", "noise", "time"]),
        (PI05Pytorch.sample_actions, ["self", "images", "img_masks", "tokens", "masks", "noise", "num_steps"]),
        (PI05Pytorch.denoise_step, ["self", "prefix_pad_masks", "past_key_values", "x_t", "timestep"]),
        (PI05Pytorch.__init__, ["self", "config", "rtc_processor"]),
        (PI05Policy._preprocess_images, ["self", "batch"]),
        (PiGemmaRMSNorm.forward, ["self", "x", "cond"]),
        (make_pi05_pre_post_processors, ["config", "dataset_stats"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_lerobots_functions_take_what_they_are_given(function, first):
    names = [n for n, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD]
    assert names == first


def test_the_time_embedding_takes_its_options_by_name():
    options = {"min_period": 4e-3, "max_period": 4.0, "device": torch.device("cpu")}
    assert create_sinusoidal_pos_embedding(torch.rand(3), 8, **options).shape == (3, 8)


def test_the_layers_have_the_parts_that_the_fast_path_runs():
    core = stock(tiny_config()).model.paligemma_with_expert
    expert, vlm = core.gemma_expert.model, core.paligemma.model.language_model
    linear = torch.nn.Linear
    for layer in expert.layers:
        assert all(type(getattr(layer.self_attn, f"{name}_proj")) is linear for name in "qkvo")
        assert all(type(getattr(layer.mlp, f"{name}_proj")) is linear for name in ("gate", "up", "down"))
        assert callable(layer.mlp.act_fn)
        assert layer.self_attn.scaling == TINY.expert.head_dim**-0.5
        assert layer.self_attn.head_dim == TINY.expert.head_dim
        assert isinstance(layer.input_layernorm, PiGemmaRMSNorm)
        assert isinstance(layer.post_attention_layernorm, PiGemmaRMSNorm)
        names = {name.split(".")[0] for name, _ in layer.named_parameters()}
        assert names == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}, "a part is new"
    assert isinstance(expert.norm, PiGemmaRMSNorm)
    assert torch.equal(expert.rotary_emb.inv_freq, vlm.rotary_emb.inv_freq)  # LeRobot's joint forward uses the VLM's
    assert expert.rotary_emb.attention_scaling == 1
    assert core.paligemma.config.text_config.hidden_size == TINY.vlm.width


def test_the_adaptive_norm_takes_four_axes():
    """Conditions [B N 1 C] over hidden states [B N H C] give what one call for each (b, n) gives."""
    torch.manual_seed(0)
    norm = PiGemmaRMSNorm(8, cond_dim=6)
    torch.nn.init.normal_(norm.dense.weight)
    x, condition = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 1, 6)
    out, gate = norm(x, cond=condition)
    one, one_gate = norm(x.flatten(0, 1), cond=condition.flatten(0, 2))
    torch.testing.assert_close(out.flatten(0, 1), one)
    torch.testing.assert_close(gate.flatten(0, 1), one_gate)
    shared, _ = norm(x, cond=condition[:1, :1])
    torch.testing.assert_close(shared[0, 0], out[0, 0])


def test_images_come_back_in_order_with_missing_cameras_last():
    """[0, 1] becomes [-1, 1] at the model's resolution; the camera that is not there is -1 and masked."""
    policy = stock(tiny_config())
    white = torch.ones(2, 3, TINY.image_size, TINY.image_size)
    images, present = policy._preprocess_images({WRIST: white})
    assert [image.shape for image in images] == [white.shape] * 2
    assert torch.equal(images[0], white)
    assert torch.equal(images[1], -white)
    assert [mask.tolist() for mask in present] == [[True, True], [False, False]]
    images, present = policy._preprocess_images({WRIST: 0 * white, FRONT: white})
    assert images[0].eq(1).all()
    assert images[1].eq(-1).all()
    assert all(mask.all() for mask in present)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_policy_is_what_lerobots_constructor_makes_without_its_numbers(dtype):
    """The same attributes, parameters and buffers: bfloat16 rounds rotary frequencies, here as there."""
    theirs = stock(tiny_config(dtype=dtype))
    ours = empty_policy(tiny_config(dtype=dtype), TINY)
    assert vars(ours).keys() == vars(theirs).keys()
    assert vars(ours.model).keys() == vars(theirs.model).keys()
    assert ours.config == theirs.config
    kinds = [[(name, type(m).__qualname__) for name, m in policy.named_modules()] for policy in (ours, theirs)]
    assert kinds[0] == kinds[1]
    shapes = [{name: p.shape for name, p in policy.state_dict().items()} for policy in (ours, theirs)]
    assert shapes[0] == shapes[1]
    dtypes = [{name: p.dtype for name, p in policy.named_parameters()} for policy in (ours, theirs)]
    assert dtypes[0] == dtypes[1]
    assert all(p.device.type == "meta" for p in ours.parameters())
    buffers = dict(theirs.named_buffers())
    assert any("rotary" in name for name in buffers)
    assert dict(ours.named_buffers()).keys() == buffers.keys()
    for name, buffer in ours.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name


def test_bfloat16_rounds_the_rotary_frequencies():
    """A checkpoint that was trained with rounded ones keeps them: they are another function."""
    names = ("model.paligemma_with_expert.gemma_expert.model.rotary_emb.inv_freq",)
    exact, rounded = (
        dict(empty_policy(tiny_config(dtype=dtype), TINY).named_buffers()) for dtype in ("float32", "bfloat16")
    )
    for name in names:
        assert rounded[name].dtype == torch.bfloat16
        assert torch.equal(exact[name].bfloat16(), rounded[name])
        assert not torch.equal(rounded[name].float(), exact[name])


def test_features_that_a_configuration_leaves_out_are_those_that_lerobot_puts_in():
    """State and action of the padded widths, and an empty camera."""
    images = {FRONT: PolicyFeature(FeatureType.VISUAL, (3, 64, 64))}
    size = (TINY.image_size, TINY.image_size)
    bare = PI05Config(input_features=images, output_features={}, image_resolution=size, empty_cameras=1, device="cpu")
    ours = empty_policy(copy.deepcopy(bare), TINY)
    assert ours.config == stock(bare).config
    wrapped = Pi05.wrap(ours)
    assert wrapped.spec.action_dim == wrapped.spec.width == 32
    assert wrapped.input_keys == (FRONT, OBS_STATE)


def test_outside_its_context_lerobot_builds_its_own_sizes():
    from lerobot.policies.pi05 import modeling_pi05

    before = {name: getattr(modeling_pi05, name) for name in vars(modeling_pi05)}
    with lerobot_builds(TINY):
        assert modeling_pi05.get_gemma_config("gemma_2b") == TINY.vlm
    assert {name: getattr(modeling_pi05, name) for name in vars(modeling_pi05)} == before


# -- processors -------------------------------------------------------------------------------------------------------


def statistics():
    generator = torch.Generator().manual_seed(0)

    def of(n):
        low = torch.rand(n, generator=generator) - 2
        return {"q01": low, "q99": low + 1 + torch.rand(n, generator=generator), "mean": low, "std": low.abs()}

    return {OBS_STATE: of(6), ACTION: of(4)}


@pytest.fixture(params=["absolute", "relative"])
def both(request, monkeypatch):
    """Our pipelines and LeRobot's own, with one tokenizer: LeRobot's factory asks for its own by name."""
    config = tiny_config(use_relative_actions=request.param == "relative", relative_exclude_joints=[])
    asked = []

    def offline(name, **options):
        asked.append(name)
        return byte_tokenizer()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    theirs = make_pi05_pre_post_processors(config, dataset_stats=statistics())
    assert asked == [DEFAULT]
    return processors.build(config, statistics(), byte_tokenizer()), theirs


def test_our_pipelines_are_lerobots_step_by_step(both):
    for ours, theirs in zip(*both, strict=True):
        assert ours.name == theirs.name
        assert [type(step) for step in ours.steps] == [type(step) for step in theirs.steps]
        for own, stocks in zip(ours.steps, theirs.steps, strict=True):
            expected = stocks.get_config()
            if isinstance(own, TokenizerProcessorStep):
                assert expected.pop("tokenizer_name") == DEFAULT
            assert own.get_config() == expected
            states = own.state_dict(), stocks.state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_our_pipelines_do_what_lerobots_do_and_back(both):
    (pre, post), (their_pre, their_post) = both
    generator = torch.Generator().manual_seed(1)
    batch = {
        FRONT: torch.rand(2, 3, 64, 64, generator=generator),
        WRIST: torch.rand(2, 3, 64, 64, generator=generator),
        OBS_STATE: torch.rand(2, 6, generator=generator) * 2 - 2,
        ACTION: torch.rand(2, 5, 4, generator=generator) * 2 - 2,
        "task": ["pick up the pen", "hang_the\nkeychain "],
    }
    found, expected = pre(copy.deepcopy(batch)), their_pre(copy.deepcopy(batch))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key
    assert not torch.equal(found[ACTION], batch[ACTION])
    back, their_back = post(found[ACTION]), their_post(expected[ACTION])
    assert torch.equal(back, their_back)
    torch.testing.assert_close(back, batch[ACTION], rtol=1e-5, atol=1e-5)
