"""groot_n1d6 in LeRobot: NVIDIA's checkpoints read whole or not at all, its commands, nothing of poco_vla."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from groot_folders import (
    ACTION,
    FRONT,
    INDEX,
    OPTIONS,
    SHARDS,
    SIZES,
    STATE,
    WRIST,
    all_weights,
    camera_episodes,
    camera_features,
    change_json,
    change_weights,
    nvidia_folder,
    raw_batch,
    stats_of,
    write_json,
)
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot_on_disk import write
from lerobot_policy_groot_n1d6 import weights
from lerobot_policy_groot_n1d6.configuration_groot_n1d6 import GrootN1d6Config
from lerobot_policy_groot_n1d6.model import sample_time
from lerobot_policy_groot_n1d6.modeling_groot_n1d6 import GrootN1d6Policy
from lerobot_policy_groot_n1d6.processing.errors import ProcessingError
from lerobot_policy_groot_n1d6.processor_groot_n1d6 import make_groot_n1d6_pre_post_processors
from plain_groot import plain_velocity
from safetensors.torch import load_file, save_file

VLLN = "action_head.vlln.weight"
MASK = weights.MASK_TOKEN
VISION_HEAD, LM_HEAD = "vision_model.head.", "language_model.lm_head."


def config(**changes):
    images = {key: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for key in (FRONT, WRIST)}
    fields = {
        "input_features": images | {STATE: PolicyFeature(FeatureType.STATE, (6,))},
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (4,))},
        "chunk_size": 8,
        "n_action_steps": 4,
        "max_action_horizon": 16,
        "max_state_dim": 32,
        "max_action_dim": 12,
        "device": "cpu",
        "push_to_hub": False,
    }
    return GrootN1d6Config(**fields | OPTIONS | changes)


def loaded(folder, **changes):
    return GrootN1d6Policy(config(base_model_path=str(folder), **changes)).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return nvidia_folder(tmp_path_factory.mktemp("groot") / "nvidia")


@pytest.fixture
def folder(source, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(source, tmp_path / "checkpoint")


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return GrootN1d6Policy(config())


@pytest.fixture
def pipelines():
    return make_groot_n1d6_pre_post_processors(config(), stats_of(**{STATE: 6, ACTION: 4}))


# -- NVIDIA's checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_two_shards_and_dtypes_is_loaded(source, dtype):
    """The head exactly, in float32; the frozen part in the dtype asked for."""
    held = all_weights(source)
    assert {tensor.dtype for tensor in held.values()} == {torch.float32, torch.bfloat16}
    policy = loaded(source, dtype=dtype)
    found = dict(policy.named_parameters())
    for name, p in found.items():
        expected = torch.float32 if name.startswith("action_head.") else getattr(torch, dtype)
        assert p.dtype is expected, name
        assert p.equal(held[name].to(expected)), name


def test_one_file_without_an_index_is_a_checkpoint_too(folder):
    held = all_weights(folder)
    for file in (*SHARDS, INDEX):
        (folder / file).unlink()
    save_file(held, folder / "model.safetensors")
    assert loaded(folder).action_head.vlln.weight.equal(held[VLLN])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_has_every_tensor_of_its_source(source, tmp_path, dtype):
    """Those that nothing uses bit for bit, in the dtype that they came in."""
    loaded(source, dtype=dtype).save_pretrained(tmp_path / "out")
    held, out = all_weights(source), all_weights(tmp_path / "out")
    assert out.keys() == held.keys()
    unused = [name for name in held if VISION_HEAD in name or LM_HEAD in name]
    assert len(unused) == 12
    for name in unused:
        assert out[name].dtype is held[name].dtype
        assert out[name].equal(held[name])
    assert all(out[name].equal(held[name].to(out[name].dtype)) for name in held)


def test_an_export_of_an_export_is_the_same(source, tmp_path):
    loaded(source, dtype="bfloat16").save_pretrained(tmp_path / "one")
    GrootN1d6Policy.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (all_weights(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(two[name].equal(tensor) and two[name].dtype is tensor.dtype for name, tensor in one.items())


@pytest.mark.parametrize("present", [False, True])
def test_a_mask_token_is_kept_where_there_is_one(tmp_path, present):
    source = nvidia_folder(tmp_path / "source", mask_token=present, state_dropout=0.8 if present else 0.0)
    policy = loaded(source)
    assert policy.config.mask_token is present
    policy.save_pretrained(tmp_path / "out")
    again = GrootN1d6Policy.from_pretrained(tmp_path / "out")
    assert (MASK in again.state_dict()) is present
    if present:
        assert again.action_head.mask_token.equal(all_weights(source)[MASK])


def test_sizes_of_the_checkpoint_are_saved_with_the_policy(source, tmp_path):
    """The exported policy is built from its own config.json."""
    policy = loaded(source)
    policy.save_pretrained(tmp_path / "out")
    again = GrootN1d6Policy.from_pretrained(tmp_path / "out")
    assert again.sizes == policy.sizes
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sizes"]["vision"]["width"] == SIZES.vision.width


def put(name, *shape):
    return lambda folder: change_weights(folder, lambda held: held.update({name: torch.zeros(shape)}))


def drop(name):
    return lambda folder: change_weights(folder, lambda held: held.pop(name))


def cut_short(folder):
    file = folder / SHARDS[0]
    file.write_bytes(file.read_bytes()[:-1000])


IN_SECOND = "backbone.model.vision_model.vision_model.post_layernorm.weight"

FAULTS = {
    "missing tensor": (drop(IN_SECOND), rf"not GR00T N1\.6's weights\. Tensors: 1 missing: {IN_SECOND}"),
    "unexpected tensor": (put("action_head.future_tokens.weight", 2, 2), r"1 unexpected: action_head\.future_tokens"),
    "wrong shape": (put(IN_SECOND, 7), rf"1 of another shape: {IN_SECOND} is \[7\], expected \[48\]"),
    "shard cut short": (cut_short, rf"{SHARDS[0]} is damaged or cut short"),
    "shard that is a pointer": (
        lambda f: (f / SHARDS[1]).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        rf"{SHARDS[1]} is damaged or cut short",
    ),
    "missing shard": (lambda f: (f / SHARDS[1]).unlink(), rf"is not whole: {SHARDS[1]} is missing"),
    "damaged index": (lambda f: (f / INDEX).write_text("{"), r"index\.json is damaged"),
    "empty index": (lambda f: (f / INDEX).write_text("{}"), r'index\.json is damaged: it has no "weight_map"'),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "no weights in .*: neither"),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"config\.json is missing \(the folder holds"),
    "damaged configuration": (lambda f: (f / "config.json").write_text("{"), r"config\.json is damaged"),
    "configuration that is no object": (lambda f: (f / "config.json").write_text("[]"), r"config\.json is damaged"),
    "N1.5": (
        lambda f: write_json(f / "config.json", {"model_type": "gr00t_n1_5", "action_horizon": 16}),
        r'is GR00T N1\.5, which LeRobot up to 0\.5\.1 runs with policy\.type "groot".*take nvidia/GR00T-N1\.6-3B',
    ),
    "N1.7": (
        lambda f: change_json(f / "config.json", model_type="Gr00tN1d7"),
        r'is GR00T N1\.7, which LeRobot from 0\.6 on runs with policy\.type "groot".*take nvidia/GR00T-N1\.6-3B',
    ),
    "another model": (
        lambda f: change_json(f / "config.json", model_type="qwen3"),
        r'a model of type "qwen3", expected "Gr00tN1d6"',
    ),
}


@pytest.mark.parametrize(("spoil", "words"), FAULTS.values(), ids=FAULTS)
def test_a_checkpoint_with_a_fault_is_refused_and_the_fault_named(folder, spoil, words):
    spoil(folder)
    with pytest.raises(ProcessingError, match=words):  # CheckpointError is one
        loaded(folder)


def test_many_wrong_tensors_are_counted_and_some_named(folder):
    change_weights(folder, lambda held: [held.pop(name) for name in list(held) if ".mlp." in name])
    with pytest.raises(weights.CheckpointError, match=r"\d\d missing: .*\.mlp\..* \.\.\."):
        loaded(folder)


def test_another_head_than_the_networks_is_refused(folder):
    """Without `sizes` the configuration is heeded, and it says what this network has not."""
    change_json(folder / "config.json", use_vlln=False)
    with pytest.raises(ValueError, match=r"use_vlln is False.* This is GR00T N1\.6 with use_vlln = True"):
        loaded(folder, sizes=None)


def test_widths_that_are_not_the_checkpoints_are_named(source):
    with pytest.raises(weights.CheckpointError, match="has 32 state and 12 action dimensions: give max_state_dim and"):
        loaded(source, max_state_dim=64)


def test_a_gated_checkpoint_that_cannot_be_had_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        weights.CheckpointError,
        match=r'"nvidia/GR00T-N1\.6-3B" is no local folder and cannot be had .* accept their licence .*`hf auth login`',
    ):
        loaded("nvidia/GR00T-N1.6-3B")


@pytest.mark.parametrize("path", ["/nowhere/groot", "nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(path):
    with pytest.raises(
        weights.CheckpointError, match=rf"no GR00T N1\.6 checkpoint in {path}: the folder does not exist"
    ):
        loaded(path)


# -- the policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunk_size": 17}, "n_action_steps is 4, chunk_size 17, max_action_horizon 16"),
        ({"n_action_steps": 9}, "n_action_steps is 9, chunk_size 8"),
        ({"dtype": "float16"}, 'dtype is "float16"'),
        ({"compute": "int8"}, 'compute is "int8"'),
        ({"normalization_mapping": {"STATE": "MEAN_STD"}}, "normalization_mapping must stay IDENTITY"),
    ],
)
def test_configurations_that_cannot_work_say_why(changes, words):
    with pytest.raises(ValueError, match=words):
        config(**changes)


def test_what_it_needs_of_a_dataset_is_named():
    with pytest.raises(ValueError, match="sees through cameras"):
        GrootN1d6Policy(config(input_features={STATE: PolicyFeature(FeatureType.STATE, (6,))}))
    with pytest.raises(ValueError, match='no "action" among the output features'):
        GrootN1d6Policy(config(output_features={}))


def test_the_loss_counts_valid_steps_and_real_dimensions_only(policy, pipelines):
    """By hand from the velocities of the same draws: 5 steps of 8 and 4 dimensions of 12 are real."""
    batch = pipelines[0](raw_batch(steps=8))
    batch["action_is_pad"] = torch.arange(8).expand(2, -1) >= 5
    policy.eval()
    torch.manual_seed(3)
    loss, numbers = policy.forward(dict(batch))
    assert numbers == {"flow_loss": loss.item()}

    torch.manual_seed(3)
    noise = torch.randn(2, 16, 12)
    t = sample_time((2,), policy.sizes.head)
    action = torch.nn.functional.pad(batch[ACTION], (0, 0, 0, 8))
    x = (1 - t[:, None, None]) * noise + t[:, None, None] * action
    encoded = policy.encode(batch)
    found = plain_velocity(
        policy.action_head,
        encoded.features,
        encoded.image_mask,
        encoded.mask,
        batch["observation.groot.state"],
        x,
        t,
        batch["observation.groot.embodiment_id"],
    )
    errors = (found - (action - noise)).square()[:, :5, :4]
    torch.testing.assert_close(loss, errors.mean(), rtol=1e-4, atol=1e-5)
    torch.manual_seed(3)
    rows, _ = policy.forward(dict(batch), reduction="none")
    torch.testing.assert_close(rows, errors.mean(dim=(1, 2)), rtol=1e-4, atol=1e-5)


def test_a_few_steps_of_training_lower_the_loss(policy, pipelines):
    batch = pipelines[0](raw_batch(steps=8))
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=3e-3)
    policy.train()
    losses = []
    for _ in range(30):
        torch.manual_seed(0)
        loss, _ = policy.forward(dict(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("layers", [0, 1])
def test_what_trains_is_what_is_asked_for(layers, pipelines):
    """The head, and as many of the language model's last layers as asked for."""
    policy = GrootN1d6Policy(config(tune_top_llm_layers=layers))
    policy.train()
    policy.forward(pipelines[0](raw_batch(steps=8)))[0].backward()
    trained = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    language = {name for name in trained if not name.startswith("action_head.")}
    assert any(name.startswith("action_head.") for name in trained)
    assert all("language_model.model.layers.1." in name for name in language)
    assert bool(language) is bool(layers)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} >= trained


def test_actions_are_queued_and_come_in_the_robots_units(policy, pipelines):
    """Four steps of a chunk, then the next one."""
    preprocess, postprocess = pipelines
    batch = preprocess({key: value for key, value in raw_batch().items() if key != ACTION})
    policy.eval()
    noise = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(0))
    chunk = policy.predict_action_chunk(dict(batch), noise=noise)
    assert chunk.shape == (2, 8, 4)
    steps = [policy.select_action(dict(batch), noise=noise) for _ in range(5)]
    assert all(step.equal(chunk[:, k % 4]) for k, step in enumerate(steps))
    policy.reset()
    action = postprocess(policy.select_action(dict(batch), noise=noise))
    assert action.shape == (2, 4)
    torch.testing.assert_close(action, chunk[:, 0].clamp(-1, 1) * 2)


def test_relative_actions_of_a_queue_refer_to_their_chunks_state(source):
    """gr1's arm is where the state's was when the chunk was sampled, plus a step; the state has moved on since."""
    settings = config(base_model_path=str(source), embodiment={"tag": "gr1"}, chunk_size=16, n_action_steps=16)
    preprocess, postprocess = make_groot_n1d6_pre_post_processors(settings)
    policy = GrootN1d6Policy(settings).eval()
    noise = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(0))
    first = raw_batch()
    seen = {key: value for key, value in first.items() if key != ACTION}
    chunk = policy.predict_action_chunk(preprocess(dict(seen)), noise=noise)
    for k in range(3):
        moved = dict(seen) | {STATE: seen[STATE] + k}
        action = postprocess(policy.select_action(preprocess(moved), noise=noise))
        torch.testing.assert_close(action[:, 2:], first[STATE][:, :2] + (chunk[:, k, 2:4].clamp(-1, 1) + 1) / 2)


def test_lerobot_saves_and_loads_policy_and_processors(policy, pipelines, tmp_path):
    policy.save_pretrained(tmp_path)
    for pipeline, name in zip(pipelines, ("preprocessor", "postprocessor"), strict=True):
        pipeline.save_pretrained(tmp_path, config_filename=f"policy_{name}.json")
    again = GrootN1d6Policy.from_pretrained(tmp_path)
    preprocess, postprocess = make_pre_post_processors(again.config, pretrained_path=str(tmp_path))
    noise = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(0))
    expected, found = (
        post(p.predict_action_chunk(pre(raw_batch(steps=8)), noise=noise))
        for p, pre, post in ((policy, *pipelines), (again, preprocess, postprocess))
    )
    assert found.equal(expected)


def test_lerobots_loader_is_strict(policy, tmp_path):
    """Its default would return a half-random model."""
    policy.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held.pop(VLLN)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"action_head\.vlln\.weight"):
        GrootN1d6Policy.from_pretrained(tmp_path, strict=False)


# -- without poco_vla -------------------------------------------------------------------------------------------------

ALONE = """
import sys
import torch
sys.path.insert(0, {here!r})
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
from lerobot.configs.types import FeatureType, PolicyFeature
import groot_folders as g

images = {{key: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for key in (g.FRONT, g.WRIST)}}
config = make_policy_config(
    "groot_n1d6",
    input_features=images | {{g.STATE: PolicyFeature(FeatureType.STATE, (6,))}},
    output_features={{g.ACTION: PolicyFeature(FeatureType.ACTION, (4,))}},
    chunk_size=16, n_action_steps=4, max_action_horizon=16, max_state_dim=32, max_action_dim=12,
    device="cpu", base_model_path={base!r}, **g.OPTIONS,
)
policy = get_policy_class("groot_n1d6")(config)
pre, post = make_pre_post_processors(config, dataset_stats=g.stats_of(**{{g.STATE: 6, g.ACTION: 4}}))
policy.train()
optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-3)
loss, _ = policy.forward(pre(g.raw_batch()))
loss.backward()
optimizer.step()
policy.save_pretrained({out!r})
pre.save_pretrained({out!r}, config_filename="policy_preprocessor.json")
post.save_pretrained({out!r}, config_filename="policy_postprocessor.json")
config = PreTrainedConfig.from_pretrained({out!r})
again = get_policy_class(config.type).from_pretrained({out!r}, config=config)
pre, post = make_pre_post_processors(config, pretrained_path={out!r})
print(tuple(post(again.select_action(pre(g.raw_batch()))).shape))
assert not [name for name in sys.modules if name.split(".")[0] == "poco_vla"]
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_nothing_of_poco_vla_is_needed(source, tmp_path):
    """Found by its type as LeRobot's plug-ins are, trained on a checkpoint, saved, loaded, asked for an action."""
    here = str(Path(__file__).parent)
    code = ALONE.format(here=here, base=str(source), out=str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(2, 4)" in done.stdout


# -- LeRobot's commands -----------------------------------------------------------------------------------------------


def command(name, *arguments):
    """A LeRobot command line; its output."""
    done = subprocess.run(
        [Path(sys.executable).parent / name, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MUJOCO_GL": "disable"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.exhaustive
@pytest.mark.slow
def test_lerobot_train_makes_a_policy_that_lerobot_eval_runs(source, tmp_path):
    """On a dataset of OGBench's cube as its cameras show it, in an environment of the same columns."""
    pytest.importorskip("ogbench")
    features = camera_features(19, 5)
    write(tmp_path / "data", camera_episodes(features), features, fps=20)
    command(
        "lerobot-train",
        "--policy.type=groot_n1d6",
        "--policy.push_to_hub=false",
        "--policy.device=cpu",
        f"--policy.base_model_path={source}",
        f"--policy.sizes={json.dumps(OPTIONS['sizes'])}",
        "--policy.tokenizer=bytes",
        "--policy.dtype=float32",
        "--policy.compute=float32",
        "--policy.max_state_dim=32",
        "--policy.max_action_dim=12",
        "--policy.chunk_size=8",
        "--policy.n_action_steps=2",
        "--policy.max_action_horizon=16",
        "--dataset.repo_id=local/test",
        f"--dataset.root={tmp_path / 'data'}",
        "--steps=3",
        "--batch_size=4",
        "--num_workers=0",
        "--wandb.enable=false",
        f"--output_dir={tmp_path / 'train'}",
    )
    policy = tmp_path / "train" / "checkpoints" / "last" / "pretrained_model"
    assert json.loads((policy / "config.json").read_text())["type"] == "groot_n1d6"
    shown = command(
        "lerobot-eval",
        f"--policy.path={policy}",
        "--policy.device=cpu",
        "--env.discover_packages_path=poco_vla.simulators",
        "--env.type=ogbench",
        "--env.task=cube-single-singletask-task1-v0",
        '--env.cameras=["front","wrist"]',
        "--env.image_size=64",
        "--env.episode_length=4",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        f"--output_dir={tmp_path / 'eval'}",
    )
    assert "'pc_success': 0.0" in shown
    assert (tmp_path / "eval" / "eval_info.json").exists()
