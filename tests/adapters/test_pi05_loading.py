"""Check pi0.5's checkpoints beyond what all VLAs have in common (test_lerobot_vlas.py); openpi's among them."""

import copy
import json
import shutil

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from pi05_folders import (
    ACTION,
    FRONT,
    OPENPI_STATS,
    STATE,
    WRIST,
    change_json,
    dataset,
    move_base,
    openpi_folder,
    raw_batch,
    tokenizer_folder,
)
from poco_vla_pi05 import checkpoint
from poco_vla_pi05.adapter import Pi05
from poco_vla_pi05.architecture import ARCHITECTURE_FILE, TINY, lerobot_builds
from safetensors.torch import load_file

from poco_vla import DataError, PolicyError, propose
from poco_vla.pretrained import heads

LAST_NORM = "model.paligemma_with_expert.paligemma.model.language_model.norm.weight"
PROJECTION = "model.action_out_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pi05") / "tiny"
    Pi05.tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(saved, tmp_path / "policy")


@torch.no_grad()
def velocity(policy, obs=None, horizon=10):
    generator = torch.Generator().manual_seed(3)
    obs = Pi05.tiny().example_obs(2) if obs is None else obs
    x = torch.randn(2, 3, horizon, 32, generator=generator)
    return policy.velocity(policy.encode(obs), x, torch.rand(2, 3, generator=generator))


def proposals(policy):
    return propose(policy, policy.encode(policy.example_obs(2)), 2, generator=torch.Generator().manual_seed(0))


# -- what cannot be loaded --------------------------------------------------------------------------------------------


SPOILED = {
    "field of the wrong kind": (
        lambda f: change_json(f / "config.json", dtype="float8"),
        r"(?s)config\.json is not understood by LeRobot: .*float8",
    ),
    "damaged sizes": (lambda f: (f / ARCHITECTURE_FILE).write_text('{"vlm": 1}'), r"architecture\.json is damaged"),
    "sizes missing": (lambda f: (f / ARCHITECTURE_FILE).unlink(), "does not hold this model's weights"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILED.values(), ids=SPOILED)
def test_a_folder_with_a_fault_is_refused_and_the_fault_named(folder, spoil, words):
    spoil(folder)
    with pytest.raises(PolicyError, match=words):
        Pi05.from_pretrained(folder)


def test_a_repository_in_the_hubs_cache_is_loaded_offline_with_its_commit(saved, tmp_path, monkeypatch):
    """The Hub client's own cache layout: snapshots/<commit>, and refs that name one."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--somebody--pi05"
    shutil.copytree(saved, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    policy = Pi05.from_pretrained("somebody/pi05")
    assert policy.base == "somebody/pi05"
    assert policy.source.revision == commit
    assert torch.equal(velocity(policy), velocity(Pi05.tiny()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compute": "int8"}, 'compute is "int8".*bfloat16, float32'),
        ({"tokenizer": "/nowhere"}, "tokenizer's folder /nowhere is not there"),
    ],
)
def test_options_that_cannot_work_are_named(saved, options, words):
    with pytest.raises(PolicyError, match=words):
        Pi05.from_pretrained(saved, **options)


# -- what is loaded ---------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(saved):
    policy, loaded = Pi05.tiny(), Pi05.from_pretrained(saved)
    assert loaded.spec == policy.spec
    assert loaded.input_keys == policy.input_keys == (FRONT, WRIST, STATE)
    assert loaded.base == str(saved)
    for name, p in policy.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], p), name
    batch = raw_batch()
    found, expected = (p.preprocess(copy.deepcopy(batch)) for p in (loaded, policy))
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key
    assert torch.equal(loaded.postprocess(found[ACTION]), policy.postprocess(expected[ACTION]))


def test_a_folder_may_be_moved(saved, tmp_path):
    """Its tokenizer is found beside it, not where it was saved."""
    Pi05.tiny().save_pretrained(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert torch.equal(velocity(Pi05.from_pretrained(tmp_path / "new")), velocity(Pi05.tiny()))


def test_training_a_loaded_policy_leaves_its_file_alone(folder):
    before = load_file(folder / checkpoint.WEIGHTS)
    policy = Pi05.from_pretrained(folder)
    with torch.no_grad():
        for p in policy.head.parameters():
            p.add_(1)
    after = load_file(folder / checkpoint.WEIGHTS)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_shorter_chunk_is_lerobots_model_with_that_chunk_size(saved):
    """Ten steps of a model of fifty, against LeRobot's own with chunk_size=10."""
    policy = Pi05.from_pretrained(saved, horizon=10)
    assert policy.spec.horizon == policy.policy.config.chunk_size == policy.policy.config.n_action_steps == 10
    config = PreTrainedConfig.from_pretrained(saved)
    config.chunk_size = config.n_action_steps = 10
    with lerobot_builds(TINY):
        theirs = PI05Policy.from_pretrained(saved, config=config).eval()
    obs = policy.example_obs(2)
    images, present = theirs._preprocess_images(dict(obs))
    tokens, text = obs["observation.language.tokens"], obs["observation.language.attention_mask"]
    noise = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    expected = theirs.model.sample_actions(images, present, tokens, text, noise=noise)
    chunks = propose(policy, policy.encode(obs), 1, noise=noise[:, None])[:, 0]
    torch.testing.assert_close(chunks[..., :4], expected[..., :4], rtol=1e-5, atol=1e-5)
    whole = propose(Pi05.from_pretrained(saved), policy.encode(obs), 1, noise=torch.cat([noise] * 5, dim=1)[:, None])
    assert (whole[:, 0, :10, :4] - chunks[..., :4]).abs().max() > 1e-3  # steps see each other


def test_language_heads_are_dropped_in_memory_and_written_again(saved):
    policy = Pi05.from_pretrained(saved)
    assert not any("lm_head" in name for name, _ in policy.policy.named_parameters())
    weights = load_file(saved / checkpoint.WEIGHTS)
    assert torch.equal(weights[checkpoint.VLM_HEAD], weights[checkpoint.EMBEDDINGS])
    assert weights[checkpoint.EXPERT_HEAD].shape == (TINY.vocab, TINY.expert.width)
    assert not weights[checkpoint.EXPERT_HEAD].any()


# -- LeRobot's own loader ---------------------------------------------------------------------------------------------


def test_lerobots_strict_loader_loads_the_folder_and_acts_alike(tmp_path, capsys):
    """With no plug-in and no override, from raw batch to actions in the robot's units."""
    policy = Pi05.tiny(seed=4)
    policy.save_pretrained(tmp_path / "policy")
    config = PreTrainedConfig.from_pretrained(tmp_path / "policy")
    assert isinstance(config, PI05Config)
    with lerobot_builds(TINY):
        theirs = PI05Policy.from_pretrained(tmp_path / "policy", config=config)
    shown = capsys.readouterr().out
    assert "All keys loaded successfully!" in shown
    assert "Warning" not in shown
    preprocess, postprocess = make_pre_post_processors(config, pretrained_path=str(tmp_path / "policy"))
    obs = preprocess(raw_batch())
    torch.manual_seed(0)
    expected = theirs.predict_action_chunk(obs)
    torch.manual_seed(0)
    noise = theirs.model.sample_noise((2, 50, 32), "cpu")
    own = policy.preprocess(raw_batch())
    chunks = propose(policy, policy.encode(own), 1, noise=noise[:, None])[:, 0, :, :4]
    torch.testing.assert_close(chunks, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(policy.native_sample(own, noise)[..., :4], expected, rtol=1e-5, atol=1e-5)
    actions = postprocess(theirs.select_action(obs))
    assert actions.shape == (2, 4)
    torch.testing.assert_close(policy.postprocess(chunks), postprocess(expected), rtol=1e-5, atol=1e-5)


def test_saving_twice_and_going_on_changes_nothing(tmp_path):
    policy = Pi05.tiny()
    before = policy.preprocess(raw_batch())
    for name in ("one", "two"):
        policy.save_pretrained(tmp_path / name)
        again = policy.preprocess(raw_batch())
        assert torch.equal(again["observation.language.tokens"], before["observation.language.tokens"])
    names = [sorted(p.name for p in (tmp_path / name).rglob("*")) for name in ("one", "two")]
    assert names[0] == names[1]
    texts = [(tmp_path / name / "policy_preprocessor.json").read_text() for name in ("one", "two")]
    assert texts[0].replace("/one/", "/two/") == texts[1]


@pytest.mark.parametrize("part", ["vision_tower", "self_attn.q_proj", "embed_tokens"])
def test_a_head_notices_a_base_that_changed_anywhere(folder, tmp_path, part):
    policy = Pi05.from_pretrained(folder)
    policy.save_head(tmp_path / "head")
    with torch.no_grad():
        name = next(n for n, p in policy.policy.named_parameters() if part in n and not p.requires_grad)
        policy.policy.get_parameter(name).add_(1)
    policy.save_pretrained(folder)
    with pytest.raises(PolicyError, match="another base model"):
        Pi05.from_pretrained(tmp_path / "head")


def test_mixed_precision_of_a_trainer_does_not_change_the_policy(folder):
    """Acting and evaluation run without autocast: training must be the same function."""
    policy = Pi05.from_pretrained(folder, dtype="bfloat16")
    plain = velocity(policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert velocity(policy).equal(plain)


def test_pictures_are_kept_at_the_models_resolution():
    """As LeRobot's own letterbox leaves them: what the model makes of either differs by rounding to uint8 only."""
    policy = Pi05.tiny()
    images = torch.randint(0, 256, (2, 90, 120, 3), dtype=torch.uint8).numpy()
    kept = policy.resize_images(images)
    assert kept.shape == (2, 56, 56, 3)
    assert kept.dtype == images.dtype
    assert policy.resize_images(kept) is kept


def test_a_folder_can_be_saved_over_the_one_it_came_from(folder):
    policy = Pi05.from_pretrained(folder)
    with torch.no_grad():
        policy.policy.model.action_out_proj.weight.mul_(2)
    expected = velocity(policy)
    policy.save_pretrained(folder)
    assert torch.equal(velocity(Pi05.from_pretrained(folder)), expected)
    assert not torch.equal(velocity(Pi05.tiny()), expected)


# -- openpi -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens(tmp_path):
    return {"tokenizer": tokenizer_folder(tmp_path / "tokenizer")}


def test_an_openpi_checkpoint_is_the_same_model(tmp_path, tokens):
    """Keys without "model.", embeddings under the language head's name; openpi's third camera is not observed."""
    policy = Pi05.tiny()
    loaded = Pi05.from_pretrained(openpi_folder(tmp_path / "openpi", policy), **tokens)
    obs = policy.example_obs(2)
    renamed = {key: value for key, value in obs.items() if "images" not in key}
    names = [f"observation.images.{name}" for name in checkpoint.OPENPI_CAMERAS]
    assert loaded.input_keys == (*names, STATE)
    renamed |= {names[0]: obs[FRONT], names[1]: obs[WRIST]}
    assert torch.equal(velocity(loaded, renamed), velocity(policy, obs))
    assert (loaded.spec.horizon, loaded.spec.width, loaded.spec.action_dim) == (50, 32, 4)


def test_openpi_statistics_are_found_and_mapped(tmp_path, tokens):
    """State -1, -2 ... are the lower quantiles: -1 each when normalised. Action 0, 0.5, 1, 1.5 is the middle."""
    policy = Pi05.from_pretrained(openpi_folder(tmp_path / "openpi", Pi05.tiny()), **tokens)
    names = [f"observation.images.{name}" for name in checkpoint.OPENPI_CAMERAS]
    batch = raw_batch(1, cameras=names) | {STATE: torch.tensor([[-1.0, -2, -3, -4, -5, -6]])}
    processed = policy.preprocess(batch)
    torch.testing.assert_close(processed[STATE], torch.full((1, 6), -1.0))
    torch.testing.assert_close(policy.postprocess(torch.zeros(1, 4)), torch.tensor([[0.0, 0.5, 1.0, 1.5]]))


def test_openpi_statistics_of_several_datasets_must_be_chosen(tmp_path, tokens):
    wider = {name: table | {"q99": [2 * x for x in table["q99"]]} for name, table in OPENPI_STATS.items()}
    folder = openpi_folder(tmp_path / "openpi", Pi05.tiny(), {"lerobot/droid": OPENPI_STATS, "trossen": wider})
    with pytest.raises(PolicyError, match=r"several datasets.*\['lerobot/droid', 'trossen'\]"):
        Pi05.from_pretrained(folder, **tokens)
    with pytest.raises(PolicyError, match=r'no statistics for the asset "aloha"\. Known: lerobot/droid, trossen'):
        Pi05.from_pretrained(folder, asset="aloha", **tokens)
    for asset, expected in {"lerobot/droid": 1.0, "trossen": 2.0}.items():
        policy = Pi05.from_pretrained(folder, asset=asset, **tokens)
        torch.testing.assert_close(policy.postprocess(torch.ones(1, 4))[0, 0], torch.tensor(expected))


def test_an_openpi_checkpoint_without_statistics_needs_a_dataset(tmp_path, tokens):
    folder = openpi_folder(tmp_path / "openpi", Pi05.tiny(), {})
    with pytest.raises(DataError, match=r"has no q01 and q99"):
        Pi05.from_pretrained(folder, **tokens)
    policy = Pi05.from_pretrained(folder, **tokens, **dataset())
    assert policy.input_keys == (FRONT, WRIST, STATE)
    obs = Pi05.tiny().example_obs(2)
    assert torch.equal(velocity(policy, obs), velocity(Pi05.tiny(), obs))


def test_damaged_openpi_statistics_are_named(tmp_path, tokens):
    folder = openpi_folder(tmp_path / "openpi", Pi05.tiny())
    (folder / "assets" / "droid" / "norm_stats.json").write_text('{"state": {}}')
    with pytest.raises(PolicyError, match=r"norm_stats\.json is damaged"):
        Pi05.from_pretrained(folder, **tokens)


def test_an_openpi_checkpoint_is_saved_in_lerobots_form(tmp_path, tokens, capsys):
    policy = Pi05.from_pretrained(openpi_folder(tmp_path / "openpi", Pi05.tiny()), **tokens)
    policy.save_pretrained(tmp_path / "lerobot")
    with lerobot_builds(TINY):
        PI05Policy.from_pretrained(tmp_path / "lerobot")
    assert "All keys loaded successfully!" in capsys.readouterr().out
    names = [f"observation.images.{name}" for name in checkpoint.OPENPI_CAMERAS]
    again = Pi05.from_pretrained(tmp_path / "lerobot")
    batch = raw_batch(cameras=names)
    found, expected = (p.encode(p.preprocess(copy.deepcopy(batch))).features for p in (again, policy))
    assert torch.equal(found, expected)


# -- a head alone -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(saved):
    """A policy on a saved base, its head moved a little."""
    policy = Pi05.from_pretrained(saved, horizon=10, **dataset(spread=3.0), statistics="dataset")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.head.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return policy


def test_a_head_is_put_on_its_base_again(trained, tmp_path, saved):
    trained.save_head(tmp_path / "head")
    held = {p.name for p in (tmp_path / "head").iterdir()}
    assert {heads.HEAD_WEIGHTS, heads.ABOUT, "config.json", "policy_preprocessor.json"} <= held
    assert checkpoint.WEIGHTS not in held
    head = load_file(tmp_path / "head" / heads.HEAD_WEIGHTS)
    assert sum(t.numel() for t in head.values()) == sum(p.numel() for p in trained.head.parameters())
    loaded = Pi05.from_pretrained(tmp_path / "head")
    assert loaded.spec == trained.spec
    assert loaded.base == trained.base == str(saved)
    assert torch.equal(proposals(loaded), proposals(trained))
    state = [p.preprocess(raw_batch(steps=10))[STATE] for p in (loaded, trained)]
    assert torch.equal(*state)
    assert not torch.equal(proposals(Pi05.from_pretrained(saved, horizon=10)), proposals(trained))
    loaded.save_head(tmp_path / "again")
    assert json.loads((tmp_path / "again" / heads.ABOUT).read_text()) == json.loads(
        (tmp_path / "head" / heads.ABOUT).read_text()
    )


def test_a_head_on_another_base_is_refused(trained, tmp_path):
    other = Pi05.tiny(seed=9)
    other.save_pretrained(tmp_path / "base")
    trained.save_head(tmp_path / "head")
    move_base(tmp_path / "head", tmp_path / "base")
    with pytest.raises(PolicyError, match=r"trained on another base model than .*/base is now \(fingerprint"):
        Pi05.from_pretrained(tmp_path / "head")


def test_a_base_that_is_gone_is_named(folder, tmp_path):
    policy = Pi05.from_pretrained(folder)
    policy.save_head(tmp_path / "head")
    shutil.rmtree(folder)
    with pytest.raises(PolicyError, match=rf"{folder}"):
        Pi05.from_pretrained(tmp_path / "head")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / heads.ABOUT).write_text("{"), r"poco\.json is damaged"),
        (lambda f: change_json(f / heads.ABOUT, drop=["base"]), r"poco\.json is damaged: it lacks .base"),
        (lambda f: (f / heads.HEAD_WEIGHTS).unlink(), r"head\.safetensors is missing"),
        (lambda f: (f / heads.HEAD_WEIGHTS).write_bytes(b"123"), r"head\.safetensors is damaged"),
    ],
)
def test_a_head_folder_with_a_fault_is_refused(trained, tmp_path, spoil, words):
    trained.save_head(tmp_path / "head")
    spoil(tmp_path / "head")
    with pytest.raises(PolicyError, match=words):
        Pi05.from_pretrained(tmp_path / "head")
