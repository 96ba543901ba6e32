"""Check SmolVLA's checkpoints beyond what all VLAs have in common (test_lerobot_vlas.py)."""

import copy
import shutil

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_TOKENS, OBS_STATE
from peft import PeftModel
from pi05_folders import change_json, change_weights
from poco_vla_smolvla import checkpoint
from poco_vla_smolvla.adapter import LORA_TARGETS, SmolVla
from safetensors.torch import load_file

from poco_vla import DataError, PolicyError, check_policy, export_policy, flow_errors, propose
from poco_vla.pretrained import heads

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
PROJECTION = "model.action_out_proj.weight"
FROZEN = "model.vlm_with_expert.vlm.model.text_model.norm.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smolvla") / "tiny"
    SmolVla.tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(saved, tmp_path / "policy")


def dataset(state=6, action=4, cameras=(FRONT, WRIST), spread=4.0):
    """LeRobot features and statistics of a dataset; all deviations are `spread`."""
    camera = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    sizes = {OBS_STATE: state, ACTION: action}
    features: dict = dict.fromkeys(cameras, camera)
    features |= {key: {"dtype": "float32", "shape": (n,), "names": None} for key, n in sizes.items()}
    stats = {key: {"mean": torch.zeros(n), "std": torch.full((n,), spread)} for key, n in sizes.items()}
    return {"features": features, "stats": stats}


def raw_batch(size=2, seed=0, cameras=(FRONT, WRIST), state=6, action=4, steps=50):
    """What a dataset gives, in the robot's units."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.rand(size, 3, 64, 64, generator=generator) for key in cameras} | {
        OBS_STATE: torch.rand(size, state, generator=generator) * 2 - 1,
        ACTION: torch.rand(size, steps, action, generator=generator) * 2 - 1,
        "task": ["pick up the pen", "hang the keychain on the hook"][:size],
    }


@torch.no_grad()
def velocity(policy, horizon=10, obs=None):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, horizon, 32, generator=generator)
    obs = SmolVla.tiny().example_obs(2) if obs is None else obs
    return policy.velocity(policy.encode(obs), x, torch.rand(2, 3, generator=generator))


# -- what cannot be loaded --------------------------------------------------------------------------------------------


def drop(name):
    return lambda folder: change_weights(folder, lambda weights: weights.pop(name))


SPOILED = {
    "missing language head that is not tied": (drop(checkpoint.LANGUAGE_HEAD), "1 missing: .*lm_head"),
    "Aloha's actions": (lambda f: change_json(f / "config.json", adapt_to_pi_aloha=True), "adapt_to_pi_aloha"),
    "damaged VLM": (lambda f: (f / "vlm" / "config.json").write_text("{"), 'of the VLM ".*/vlm" cannot be loaded'),
    "VLM of another size": (
        lambda f: change_json(f / "vlm" / "config.json", scale_factor=4),
        r"of another shape: .*modality_projection\.proj\.weight is \[48, 128\], expected \[48, 512\]",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILED.values(), ids=SPOILED)
def test_a_folder_with_a_fault_is_refused_and_the_fault_named(folder, spoil, words):
    spoil(folder)
    with pytest.raises(PolicyError, match=words):
        SmolVla.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vlm": "/nowhere"}, 'VLM "/nowhere" cannot be loaded .*policy_options a "vlm"'),
    ],
)
def test_options_that_cannot_work_are_named(saved, options, words):
    with pytest.raises(PolicyError, match=words):
        SmolVla.from_pretrained(saved, **options)


# -- what is loaded and saved -----------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_even_from_another_place(saved, tmp_path):
    moved = shutil.copytree(saved, tmp_path / "moved")
    policy, loaded = SmolVla.tiny(), SmolVla.from_pretrained(moved)
    assert loaded.spec == policy.spec
    assert loaded.input_keys == policy.input_keys == (FRONT, WRIST, OBS_STATE)
    for name, p in policy.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], p), name
    found, expected = (p.preprocess(raw_batch()) for p in (loaded, policy))
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key
    assert torch.equal(loaded.postprocess(found[ACTION]), policy.postprocess(expected[ACTION]))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(velocity(SmolVla.from_pretrained(tmp_path / "again")), velocity(policy))


def test_lerobots_own_loader_loads_the_folder_without_a_plug_in_and_acts_alike(tmp_path, monkeypatch):
    """Offline and strictly, from raw batch to actions in the robot's units, in chunks of ten."""
    SmolVla.tiny(seed=4).save_pretrained(tmp_path / "base")
    policy = SmolVla.from_pretrained(tmp_path / "base", horizon=10, statistics="dataset", **dataset())
    policy.save_pretrained(tmp_path / "policy")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    theirs = SmolVLAPolicy.from_pretrained(tmp_path / "policy", strict=True)
    assert theirs.config.chunk_size == theirs.config.n_action_steps == 10
    preprocess, postprocess = make_pre_post_processors(theirs.config, pretrained_path=str(tmp_path / "policy"))
    obs = preprocess(raw_batch())
    noise = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    expected = theirs.predict_action_chunk(obs, noise=noise)
    own = policy.preprocess(raw_batch())
    chunks = propose(policy, policy.encode(own), 1, noise=noise[:, None])[:, 0, :, :4]
    torch.testing.assert_close(chunks, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(policy.postprocess(chunks), postprocess(chunks))
    assert theirs.select_action(obs).shape == (2, 4)


def test_a_shorter_chunk_is_the_beginning_of_the_long_one(saved):
    """No step sees one after it."""
    short, whole = SmolVla.from_pretrained(saved, horizon=10), SmolVla.from_pretrained(saved)
    torch.testing.assert_close(velocity(short), velocity(whole, horizon=10), rtol=1e-5, atol=1e-5)
    assert short.spec.horizon == 10


def test_new_pipelines_are_lerobots_step_by_step(saved):
    policy = SmolVla.from_pretrained(saved)
    config = copy.deepcopy(policy.policy.config)
    config.vlm_model_name = str(saved / "vlm")
    stats = dataset()["stats"]
    ours = checkpoint.build_pipelines(config, stats, policy.vlm.tokenizer)
    theirs = make_smolvla_pre_post_processors(config, dataset_stats=stats)
    for own, stocks in zip(ours, theirs, strict=True):
        assert own.name == stocks.name
        assert [type(step) for step in own.steps] == [type(step) for step in stocks.steps]
        for step, stock in zip(own.steps, stocks.steps, strict=True):
            settings = stock.get_config()
            settings.pop("tokenizer_name", None)
            assert step.get_config() == settings
    found, expected = (pre(raw_batch()) for pre in (ours[0], theirs[0]))
    for key in (OBS_STATE, ACTION, OBS_LANGUAGE_TOKENS):
        assert torch.equal(found[key], expected[key])


def test_the_head_is_float32_on_a_frozen_part_of_another_dtype(saved, tmp_path):
    """As it is asked for, or as the file has it."""
    policy = SmolVla.from_pretrained(saved, horizon=10, dtype="bfloat16")
    dtypes = {name: p.dtype for name, p in policy.policy.named_parameters()}
    of_vlm = {name for name in dtypes if ".vlm." in name}
    assert {dtypes[name] for name in of_vlm} == {torch.bfloat16}
    assert {dtypes[name] for name in dtypes.keys() - of_vlm} == {torch.float32}
    check_policy(policy, atol=0.05)
    policy.save_pretrained(tmp_path / "rounded")
    assert torch.equal(velocity(SmolVla.from_pretrained(tmp_path / "rounded")), velocity(policy))
    gap = (velocity(policy) - velocity(SmolVla.from_pretrained(saved))).abs().max()
    assert 0 < gap < 0.1


def test_a_tied_language_head_is_one_tensor_in_a_file(folder):
    """Either name: what LeRobot writes of a tied pair is safetensors' choice."""
    change_json(folder / "vlm" / "config.json", tie_word_embeddings=True)
    change_weights(folder, lambda weights: weights.pop(checkpoint.LANGUAGE_HEAD))
    policy = SmolVla.from_pretrained(folder)
    assert torch.equal(velocity(policy), velocity(SmolVla.tiny()))
    policy.save_pretrained(folder)
    SmolVLAPolicy.from_pretrained(folder, strict=True)
    change_weights(folder, lambda w: w.update({checkpoint.LANGUAGE_HEAD: w.pop(checkpoint.EMBEDDINGS)}))
    assert torch.equal(velocity(SmolVla.from_pretrained(folder)), velocity(policy))


# -- whose statistics -------------------------------------------------------------------------------------------------


def normalised(policy, value):
    """What a state and an action of `value` in all dimensions become; and the way back."""
    batch = raw_batch(1, cameras=policy.input_keys[:-1]) | {
        OBS_STATE: torch.full((1, policy.feature_dim - 48), value),
        ACTION: torch.full((1, 3, policy.spec.action_dim), value),
    }
    processed = policy.preprocess(batch)
    torch.testing.assert_close(policy.postprocess(processed[ACTION]), batch[ACTION], rtol=1e-5, atol=1e-5)
    return processed[OBS_STATE].unique().item(), processed[ACTION].unique().item()


@pytest.mark.parametrize("statistics", ["auto", "dataset"])
@pytest.mark.parametrize("kind", ["padded actions", "no statistics"])
def test_a_base_model_takes_the_datasets(folder, statistics, kind):
    if kind == "padded actions":
        wide = {
            OBS_STATE: {"type": "STATE", "shape": [32]},
            "observation.images.top": {"type": "VISUAL", "shape": [3, 8, 8]},
        }
        change_json(
            folder / "config.json", input_features=wide, output_features={ACTION: {"type": "ACTION", "shape": [32]}}
        )
    else:
        for file in folder.glob("policy_*"):
            file.unlink()
        with pytest.raises(DataError, match=r'has no mean and std for "observation\.state" \(found: nothing\)'):
            SmolVla.from_pretrained(folder)
    policy = SmolVla.from_pretrained(folder, statistics=statistics, **dataset())
    assert policy.input_keys == (FRONT, WRIST, OBS_STATE)
    assert (policy.spec.action_dim, policy.spec.width) == (4, 32)
    assert normalised(policy, 4.0) == pytest.approx((1.0, 1.0))


def test_a_normalisation_that_is_asked_for_is_used_and_saved(saved, tmp_path):
    mapping = {"STATE": "IDENTITY"}
    SmolVla.from_pretrained(saved, normalization_mapping=mapping).save_pretrained(tmp_path / "again")
    data = dataset()
    for policy in (
        SmolVla.from_pretrained(tmp_path / "again"),
        SmolVla.from_pretrained(saved, statistics="dataset", normalization_mapping=mapping, **data),
    ):
        assert normalised(policy, 3.0)[0] == 3.0


LONG = "pick up the red cube from the left tray next to the blue bowl and put it into the "


def test_an_instruction_whose_end_would_be_cut_off_is_refused_with_the_way_out(saved):
    """A byte is a token: two instructions that differ beyond token 48 would be one to the model."""
    policy = SmolVla.from_pretrained(saved)
    words = r"takes \d+ tokens, and SmolVLA reads 48: .*\"tokenizer_max_length\": 96"
    with pytest.raises(DataError, match=words):
        policy.preprocess(raw_batch() | {"task": ["pick", LONG + "green"]})
    with pytest.raises(DataError, match=words):
        policy.check_prompts(["pick", LONG + "green"])


def test_a_longer_instruction_is_read_in_full_where_it_is_asked_for(saved):
    policy = SmolVla.from_pretrained(saved, tokenizer_max_length=96)
    green, black = (
        policy.preprocess(raw_batch() | {"task": [LONG + colour] * 2})[OBS_LANGUAGE_TOKENS]
        for colour in ("green", "black")
    )
    assert not torch.equal(green, black)


def test_an_instruction_that_just_fits_is_taken(saved):
    """47 bytes and the line's end."""
    policy = SmolVla.from_pretrained(saved)
    tokens = policy.preprocess(raw_batch() | {"task": ["a" * 47] * 2})[OBS_LANGUAGE_TOKENS]
    assert tokens.shape[1] == 48
    policy.check_prompts(["a" * 47])


def test_a_camera_that_the_saved_pipeline_renames_is_asked_for_by_its_own_name(saved, tmp_path):
    policy = SmolVla.from_pretrained(saved)
    policy.preprocessor.steps[0].rename_map = {"observation.images.top": FRONT}
    policy.save_pretrained(tmp_path / "renaming")
    renamed = SmolVla.from_pretrained(tmp_path / "renaming")
    assert renamed.input_keys == ("observation.images.top", WRIST, OBS_STATE)
    assert FRONT in renamed.preprocess(raw_batch(cameras=renamed.input_keys[:-1]))


# -- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(saved):
    """A LoRA whose matrices have all moved."""
    policy, generator = SmolVla.from_pretrained(saved, lora=2, horizon=10), torch.Generator().manual_seed(0)
    assert torch.equal(velocity(policy), velocity(SmolVla.from_pretrained(saved))), "at first it changes nothing"
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return policy


def test_a_lora_keeps_the_contract(lora):
    check_policy(lora)


def test_only_lora_matrices_train_and_every_target_has_a_pair(lora):
    """Seven projections in each of four layers, and the four around them: 32 pairs of rank 2."""
    trained = {name: p for name, p in lora.policy.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (7 * 4 + 4)
    assert all(".lora_" in name for name in trained)
    assert {target for target in LORA_TARGETS if any(f"{target}.lora_A" in name for name in trained)} == {*LORA_TARGETS}
    valid = torch.ones(2, 10, dtype=torch.bool)
    flow_errors(lora, lora.encode(lora.example_obs(2)), torch.randn(2, 3, 10, 32), valid).mean().backward()
    for name, p in lora.policy.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) is p.requires_grad, name


def test_a_merged_lora_is_a_plain_policy(lora, saved, tmp_path):
    lora.save_pretrained(tmp_path / "merged")
    SmolVLAPolicy.from_pretrained(tmp_path / "merged", strict=True)
    plain = SmolVla.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(velocity(plain), velocity(lora), rtol=1e-4, atol=1e-4)
    assert (velocity(plain) - velocity(SmolVla.from_pretrained(saved))).abs().max() > 1e-2


# -- a head alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lora": 2}, {"dtype": "bfloat16"}], ids=["full", "LoRA", "bfloat16"])
def test_a_head_is_put_on_its_base_again(saved, tmp_path, options):
    """Full or LoRA, on a rounded base; statistics and chunk size travel with it."""
    policy = SmolVla.from_pretrained(saved, horizon=10, statistics="dataset", **dataset(), **options)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05)
    policy.save_head(tmp_path / "head")
    held = load_file(tmp_path / "head" / heads.HEAD_WEIGHTS)
    assert held.keys() == {name for name, p in policy.policy.named_parameters() if p.requires_grad}
    loaded = SmolVla.from_pretrained(tmp_path / "head")
    assert (loaded.spec, loaded.lora, loaded.base) == (policy.spec, policy.lora, str(saved))
    assert loaded.base_version == policy.base_version
    assert torch.equal(velocity(loaded), velocity(policy))
    assert normalised(loaded, 4.0) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("options", [{}, {"lora": 2}], ids=["full", "LoRA"])
def test_lerobot_puts_an_exported_head_on_its_base_by_itself(saved, tmp_path, options, monkeypatch):
    """As a peft adapter, with nothing of poco_vla."""
    policy = SmolVla.from_pretrained(saved, horizon=10, **options)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05)
    policy.save_head(tmp_path / "head")
    export_policy(tmp_path / "head", tmp_path / "peft", form="peft")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = PreTrainedConfig.from_pretrained(tmp_path / "peft")
    base = SmolVLAPolicy.from_pretrained(saved, config=config)
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft")
    obs, noise = policy.example_obs(2), torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    expected = policy.native_sample(obs, noise)[..., :4]
    found = theirs.predict_action_chunk(dict(obs), noise=noise)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - SmolVla.tiny().native_sample(obs, noise.repeat(1, 5, 1))[:, :10, :4]).abs().max() > 1e-2
