"""pi05's way from a raw batch to tokens and back: whose statistics, which tokenizer, what is refused."""

import copy

import pytest
import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from pi05_folders import (
    ACTION,
    FRONT,
    OPENPI_STATS,
    STATE,
    WRIST,
    change_json,
    dataset,
    openpi_folder,
    raw_batch,
    tokenizer_folder,
)
from poco_vla_pi05.adapter import Pi05
from poco_vla_pi05.tokenizer import DEFAULT, byte_tokenizer, load_tokenizer
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from poco_vla import DataError, PolicyError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained policy: two cameras, 6 state and 4 action dimensions, quantiles -2 and 2."""
    folder = tmp_path_factory.mktemp("pi05") / "tiny"
    Pi05.tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def policy():
    return Pi05.tiny()


@pytest.fixture
def base(tmp_path):
    """What a base model on the Hub is: padded actions, cameras of its own, no processors."""
    Pi05.tiny().save_pretrained(tmp_path / "base")
    for file in (tmp_path / "base").glob("policy_*"):
        file.unlink()
    wide = {"observation.images.base_0_rgb": {"type": "VISUAL", "shape": [3, 224, 224]}}
    wide |= {STATE: {"type": "STATE", "shape": [32]}}
    action = {ACTION: {"type": "ACTION", "shape": [32]}}
    change_json(tmp_path / "base" / "config.json", input_features=wide, output_features=action)
    return tmp_path / "base"


def normalised(policy, value, **row):
    """What a state and an action of `value` in all dimensions become; and the way back."""
    size = {key: f.shape[0] for key, f in policy.policy.config.input_features.items() if key == STATE}[STATE]
    batch = raw_batch(1) | {
        STATE: torch.full((1, size), value),
        ACTION: torch.full((1, 3, policy.spec.action_dim), value),
    }
    processed = policy.preprocess(batch | row)
    back = policy.postprocess(processed[ACTION])
    torch.testing.assert_close(back, batch[ACTION], rtol=1e-5, atol=1e-5)
    return processed[STATE].unique().item(), processed[ACTION].unique().item()


# -- whose statistics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["auto", "dataset"])
def test_a_base_model_takes_the_datasets(base, tmp_path, statistics):
    policy = Pi05.from_pretrained(base, statistics=statistics, **dataset(), tokenizer=tokenizer_folder(tmp_path / "t"))
    assert policy.input_keys == (FRONT, WRIST, STATE)
    assert (policy.spec.action_dim, policy.spec.width) == (4, 32)
    assert normalised(policy, 4.0) == pytest.approx((1.0, 1.0))


def test_a_base_model_without_a_dataset_is_told_what_it_lacks(base, tmp_path):
    options = {"tokenizer": tokenizer_folder(tmp_path / "t")}
    with pytest.raises(DataError, match=r"base has no q01 and q99 for \"observation\.state\" \(found: nothing\)"):
        Pi05.from_pretrained(base, **options)
    with pytest.raises(DataError, match="base has no q01 and q99"):
        Pi05.from_pretrained(base, statistics="checkpoint", **dataset(), **options)


@pytest.mark.parametrize(("statistics", "bound"), [("auto", 1.0), ("dataset", 4.0)])
def test_openpis_statistics_of_real_dimensions_are_a_checkpoints(tmp_path, statistics, bound):
    """Four dimensions are not padded: the checkpoint was trained on this robot. Actions' first upper quantile is 1."""
    folder = openpi_folder(tmp_path / "openpi", Pi05.tiny())
    options = {"tokenizer": tokenizer_folder(tmp_path / "t"), "statistics": statistics}
    policy = Pi05.from_pretrained(folder, **options, **dataset())
    assert policy.postprocess(torch.ones(1, 4))[0, 0].item() == pytest.approx(bound)


def test_padded_openpi_statistics_are_a_base_models(tmp_path):
    padded = {
        name: {kind: numbers + [1.0 if kind == "q99" else 0.0] * (32 - len(numbers)) for kind, numbers in table.items()}
        for name, table in OPENPI_STATS.items()
    }
    folder = openpi_folder(tmp_path / "openpi", Pi05.tiny(), {"droid": padded})
    policy = Pi05.from_pretrained(folder, tokenizer=tokenizer_folder(tmp_path / "t"), **dataset())
    assert policy.postprocess(torch.ones(1, 4))[0, 0].item() == pytest.approx(4.0)


def test_a_new_dataset_is_not_renamed_as_the_old_one_was(saved, tmp_path):
    """The saved pipeline calls camera "top" "front"; the new dataset has a "front" of its own."""
    policy = Pi05.from_pretrained(saved)
    policy.preprocessor.steps[0].rename_map = {"observation.images.top": FRONT}
    policy.save_pretrained(tmp_path / "renaming")
    renamed = Pi05.from_pretrained(tmp_path / "renaming")
    assert renamed.input_keys == ("observation.images.top", WRIST, STATE)
    batch = raw_batch(cameras=("observation.images.top", WRIST))
    assert FRONT in renamed.preprocess(batch)
    top = ("observation.images.top", WRIST)
    taken = Pi05.from_pretrained(tmp_path / "renaming", statistics="dataset", **dataset(cameras=top))
    assert taken.input_keys == (*top, STATE)
    assert taken.encode(taken.preprocess(raw_batch(cameras=top))).lengths.min() > 2 * 16


def test_a_camera_that_the_dataset_lacks_is_named(saved):
    options = dataset() | {"statistics": "dataset"}
    with pytest.raises(PolicyError, match=rf"no camera observation\.images\.hand; its cameras: {FRONT}, {WRIST}"):
        Pi05.from_pretrained(saved, cameras=[FRONT, "observation.images.hand"], **options)
    with pytest.raises(PolicyError, match="no camera at all; its cameras: none"):
        Pi05.from_pretrained(saved, statistics="dataset", **dataset(cameras=()))


@pytest.mark.parametrize("statistics", ["checkpoint", "dataset"])
def test_a_normalisation_that_is_asked_for_is_used(saved, tmp_path, statistics):
    """The dataset's mean is 0, its deviation 4, its maximum 8; a checkpoint keeps all statistics that it was given."""
    Pi05.from_pretrained(saved, statistics="dataset", **dataset()).save_pretrained(tmp_path / "rich")
    mapping = {"STATE": "MEAN_STD", "ACTION": "MIN_MAX"}
    policy = Pi05.from_pretrained(
        tmp_path / "rich", statistics=statistics, normalization_mapping=mapping, **dataset(spread=4.0)
    )
    assert normalised(policy, 8.0) == pytest.approx((2.0, 1.0))
    policy.save_pretrained(tmp_path / "again")
    assert normalised(Pi05.from_pretrained(tmp_path / "again"), 8.0) == pytest.approx((2.0, 1.0))


def test_a_checkpoint_without_the_statistics_of_a_new_normalisation_is_refused(saved):
    """LeRobot would leave the columns as they are, or fail at the first batch."""
    with pytest.raises(DataError, match=r'has no mean and std for "observation.state" \(found: q01, q99\).*MEAN_STD'):
        Pi05.from_pretrained(saved, normalization_mapping={"STATE": "MEAN_STD"})


def test_another_prompt_length_is_taken_where_it_is_asked_for(saved):
    policy = Pi05.from_pretrained(saved, tokenizer_max_length=90)
    assert policy.preprocess(raw_batch(1))[OBS_LANGUAGE_TOKENS].shape == (1, 90)
    assert policy.example_obs(2)[OBS_LANGUAGE_TOKENS].shape == (2, 90)


# -- tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = ["Task: pick up the pen, State: 192 3 128 76;\nAction: ", "Task: hang  the keychain, State: 0 255;\nAction: "]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    """A small model of PaliGemma's kind: BPE with byte fallback, digits apart, pad 0, eos 1, bos 2."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    words = ["pick", "up", "the", "pen", "and", "hang", "keychain", "on", "hook", "place", "stack", "cube", "drawer"]
    lines = [
        f"Task: {a} {b} {c}, State: {i} {7 * i};"
        for i, (a, b, c) in enumerate(zip(words, words[3:], words[5:], strict=False))
    ]
    (folder / "text.txt").write_text("\n".join(lines * 20))
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "small"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return folder / "small.model"


def test_a_sentencepiece_file_gives_sentencepieces_own_tokens(sentencepiece_file):
    """With the token that begins a text, as openpi encodes its prompts; words, digits, spaces, line ends and bytes."""
    tokenizer, model = load_tokenizer(sentencepiece_file), SentencePieceProcessor(model_file=str(sentencepiece_file))
    for text in (*TEXTS, "größer 漢字 \n\n  x"):
        assert tokenizer(text)["input_ids"] == model.encode(text, add_bos=True), text
    batch = tokenizer(TEXTS, padding="max_length", max_length=90, padding_side="right", return_tensors="pt")
    lengths = [len(model.encode(text, add_bos=True)) for text in TEXTS]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert batch["input_ids"][0, lengths[0] :].eq(model.pad_id()).all()


def test_a_policy_with_a_sentencepiece_file_is_saved_and_loaded(saved, sentencepiece_file, tmp_path):
    """The folder that is saved has the tokenizer in it, and gives the same tokens."""
    policy = Pi05.from_pretrained(saved, tokenizer=sentencepiece_file)
    expected = policy.preprocess(raw_batch())
    policy.save_pretrained(tmp_path / "policy")
    found = Pi05.from_pretrained(tmp_path / "policy").preprocess(raw_batch())
    assert torch.equal(found[OBS_LANGUAGE_TOKENS], expected[OBS_LANGUAGE_TOKENS])
    assert not torch.equal(
        Pi05.from_pretrained(saved).preprocess(raw_batch())[OBS_LANGUAGE_TOKENS], expected[OBS_LANGUAGE_TOKENS]
    )


def test_a_folder_is_a_tokenizer(tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path / "t"))
    assert tokenizer(TEXTS[0])["input_ids"] == byte_tokenizer()(TEXTS[0])["input_ids"]


def test_the_gated_default_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PolicyError, match=rf'"{DEFAULT}" cannot be loaded .*hf auth login.*paligemma_tokenizer\.model'):
        load_tokenizer(None)


@pytest.mark.parametrize("content", [b"no model at all", b""])
def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path, content):
    (tmp_path / "paligemma.model").write_bytes(content)
    with pytest.raises(PolicyError, match=r"paligemma\.model is no sentencepiece model"):
        load_tokenizer(tmp_path / "paligemma.model")


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PolicyError, match=r"file .*/x\.model is not there.*how|file .*/x\.model is not there. Accept"):
        load_tokenizer(tmp_path / "x.model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PolicyError, match=rf'"{tmp_path / "empty"}" cannot be loaded'):
        load_tokenizer(tmp_path / "empty")


# -- what a batch may hold --------------------------------------------------------------------------------------------


WRONG = {
    "too long an instruction": (
        lambda b: b.update({"task": ["pick", "pick " * 40]}),
        r"prompt of row 1 takes 342 tokens, and the policy reads 200.*\"tokenizer_max_length\": 400",
    ),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_a_batch_that_cannot_be_read_is_refused_and_the_cause_named(policy, change, words):
    batch = raw_batch()
    change(batch)
    with pytest.raises(DataError, match=words):
        policy.preprocess(batch)


def test_a_batch_without_actions_or_of_one_state_is_read(policy):
    """Acting has no actions; LeRobot's pipeline takes an observation without a batch axis, too, and one instruction."""
    batch = raw_batch()
    whole = policy.preprocess(copy.deepcopy(batch))
    del batch[ACTION]
    acting = policy.preprocess(copy.deepcopy(batch))
    assert torch.equal(acting[OBS_LANGUAGE_TOKENS], whole[OBS_LANGUAGE_TOKENS])
    single = {key: value[0] for key, value in batch.items()}
    alone = policy.preprocess(single)
    for key in (FRONT, STATE, OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK):
        assert torch.equal(alone[key], whole[key][:1]), key
    with pytest.raises(DataError, match=f'"{STATE}" is NaN or infinite in row 0'):
        policy.preprocess({key: value[0] for key, value in batch.items()} | {STATE: torch.full((6,), float("nan"))})


def test_a_prompt_is_read_in_full_with_a_longer_limit(saved):
    batch = raw_batch() | {"task": ["pick", "pick " * 40]}
    processed = Pi05.from_pretrained(saved, tokenizer_max_length=400).preprocess(batch)
    assert not processed[OBS_LANGUAGE_ATTENTION_MASK].all(dim=1).any()


def test_the_longest_prompt_of_any_state_is_checked_before_training(saved):
    """By hand, a byte a token and three a blank: 66 and the instruction; with states of one digit, 54."""
    policy = Pi05.from_pretrained(saved)
    fits, longer = "a" * 130, "a" * 140
    policy.check_prompts([fits])
    with pytest.raises(
        DataError, match=r"with a state of 6 numbers takes up to \d+ tokens.*\"tokenizer_max_length\": 400"
    ):
        policy.check_prompts([fits, longer])
    Pi05.from_pretrained(saved, tokenizer_max_length=400).check_prompts([longer])


def test_no_state_makes_a_longer_prompt_than_the_one_that_is_checked(saved):
    """Hold for all numbers, also beyond the statistics: three digits are the most."""
    policy = Pi05.from_pretrained(saved, tokenizer_max_length=82)
    task = "a" * 15
    policy.check_prompts([task])
    batch = raw_batch() | {"task": [task] * 2}
    for state in (-1e6, -2.0, -0.4, 0.0, 1.9, 1e6):
        policy.preprocess(batch | {STATE: torch.full_like(batch[STATE], state)})


# -- what a dataset may hold ------------------------------------------------------------------------------------------


def with_stats(key, **values):
    options = dataset()
    for name, value in values.items():
        options["stats"][key][name] = torch.as_tensor(value)
    return options


def without_stats(*kinds):
    options = dataset()
    options["stats"] = {
        key: {kind: value for kind, value in table.items() if kind not in kinds}
        for key, table in options["stats"].items()
    }
    return options


def without_feature(key):
    options = dataset()
    del options["features"][key]
    return options


BAD_DATASETS = {
    "too many state dimensions": (dataset(state=33), PolicyError, f'"{STATE}" has 33 dimensions.* at most 32'),
    "too many action dimensions": (dataset(action=40), PolicyError, '"action" has 40 dimensions.* at most 32'),
    "no state": (without_feature(STATE), PolicyError, rf"needs {STATE} and action; the dataset has"),
    "no action": (without_feature(ACTION), PolicyError, rf"needs {STATE} and action; the dataset has"),
    "no quantiles": (
        without_stats("q01", "q99"),
        DataError,
        rf'the dataset has no q01 and q99 for "{STATE}" \(found: min, max, mean, std\).*augment_dataset_quantile_stats',
    ),
    "quantiles the wrong way round": (
        with_stats(ACTION, q01=[1.0, -4, -4, -4], q99=[-1.0, 4, 4, 4]),
        DataError,
        r'the dataset has statistics of "action" that cannot be: q01 1 and q99 -1 in dimension 0',
    ),
    "quantiles that are not finite": (
        with_stats(ACTION, q01=[float("nan"), -4, -4, -4]),
        DataError,
        r'statistics of "action" that cannot be: q01 nan and q99 4 in dimension 0',
    ),
    "statistics of other sizes": (
        with_stats(ACTION, q01=[-1.0] * 3, q99=[1.0] * 3),
        DataError,
        'statistics of 3 dimensions for "action", which has 4',
    ),
    "a deviation below zero": (
        with_stats(STATE, std=[-1.0, 1, 1, 1, 1, 1]) | {"normalization_mapping": {"STATE": "MEAN_STD"}},
        DataError,
        rf'statistics of "{STATE}" that cannot be: mean 0 and std -1 in dimension 0',
    ),
}


@pytest.mark.parametrize(("options", "error", "words"), BAD_DATASETS.values(), ids=BAD_DATASETS)
def test_a_dataset_that_cannot_be_used_is_refused_and_the_cause_named(saved, options, error, words):
    with pytest.raises(error, match=words):
        Pi05.from_pretrained(saved, statistics="dataset", **options)


@pytest.mark.parametrize("mode", ["QUANTILES", "QUANTILE10", "MIN_MAX", "MEAN_STD"])
def test_a_constant_dimension_becomes_lerobots_constant_and_comes_back(saved, mode, caplog):
    """LeRobot 0.6.1: -1 by a range of zero, 0 by a deviation of zero; back: the constant whatever the network says."""
    fixed = {name: [50.0, 4, 4, 4] for name in ("max", "q99", "q90")} | {
        name: [50.0, -4, -4, -4] for name in ("min", "q01", "q10")
    }
    options = with_stats(ACTION, mean=[50.0, 0, 0, 0], std=[0.0, 4, 4, 4], **fixed)
    mapping = {"ACTION": mode, "STATE": "QUANTILES"}
    policy = Pi05.from_pretrained(saved, statistics="dataset", normalization_mapping=mapping, **options)
    actions = torch.tensor([50.0, 4, 4, 4]).expand(1, 50, 4)
    there = policy.preprocess(raw_batch(1) | {ACTION: actions})[ACTION]
    torch.testing.assert_close(there[0, 0], torch.tensor([0.0 if mode == "MEAN_STD" else -1.0, 1, 1, 1]))
    back = policy.postprocess(torch.full((1, 50, 4), 0.7))
    torch.testing.assert_close(back[0, 0], torch.tensor([50.0, 2.8, 2.8, 2.8]))
    (message,) = [r.getMessage() for r in caplog.records if "never moves" in r.getMessage()]
    assert '"action" in dimension 0' in message


def test_a_gripper_whose_quantiles_are_equal_is_normalised_by_its_range(saved):
    """It closes in less than 1 % of the frames: by LeRobot's quantiles these would be 2e8."""
    flat = with_stats(ACTION, q01=[0.0, -4, -4, -4], q99=[0.0, 4, 4, 4], min=[0.0, -4, -4, -4], max=[1.0, 4, 4, 4])
    policy = Pi05.from_pretrained(saved, statistics="dataset", **flat)
    actions = torch.tensor([[0.0, 4, 4, 4], [1.0, 4, 4, 4]])[None]
    there = policy.preprocess(raw_batch(1) | {ACTION: actions})[ACTION]
    assert there[0, :, 0].tolist() == [-1, 1]
    torch.testing.assert_close(policy.postprocess(there), actions)


def test_a_state_that_never_moved_and_moves_after_all_stays_of_order_one(saved):
    """LeRobot would divide what it moved by 1e-8."""
    fixed = {kind: [0.5] * 6 for kind in ("min", "max", "q01", "q99")}
    policy = Pi05.from_pretrained(saved, statistics="dataset", **with_stats(STATE, **fixed))
    states = torch.tensor([[0.5] * 6, [0.75] * 6])
    there = policy.preprocessor(raw_batch(2) | {STATE: states})[STATE]
    torch.testing.assert_close(there[:, 0], torch.tensor([-1.0, -0.75]))


def test_a_policy_of_relative_actions_is_not_given_absolute_statistics(saved, tmp_path):
    policy = Pi05.from_pretrained(saved)
    policy.policy.config.use_relative_actions = True
    policy.save_pretrained(tmp_path / "relative")
    with pytest.raises(PolicyError, match="acts relative to the state"):
        Pi05.from_pretrained(tmp_path / "relative", statistics="dataset", **dataset())


# -- a policy that was wrapped without processors ----------------------------------------------------------------------


def test_a_policy_without_processors_says_what_it_cannot_do(policy, tmp_path):
    bare = Pi05.wrap(policy.policy)
    assert bare.input_keys == (FRONT, WRIST, STATE)
    obs = policy.example_obs(2)
    assert torch.equal(bare.encode(obs).features, policy.encode(obs).features)
    for call in (lambda: bare.preprocess(raw_batch()), lambda: bare.postprocess(torch.zeros(1, 4))):
        with pytest.raises(PolicyError, match=r"wrapped without processors: give Pi05\.wrap"):
            call()
    with pytest.raises(PolicyError, match="wrapped without processors"):
        bare.save_pretrained(tmp_path / "policy")
    assert not list(tmp_path.iterdir())
