"""Test the check of an adapter's methods beside its mathematics, required and optional."""

import logging

import pytest
from lerobot_policy_flow_mlp.adapter import FlowMlp

from poco_vla import FlowPolicy, PolicyError, check_policy
from poco_vla.conformance.interface import left_out, missing_parts


class Bare(FlowPolicy):
    pass


class NarrowLoad(FlowMlp):
    @classmethod
    def from_pretrained(cls, repo_or_path, *, horizon=None, device="cpu"):
        return FlowMlp.from_pretrained(repo_or_path, horizon=horizon, device=device)


class NoProcessors(FlowMlp):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.preprocess, self.input_keys = None, ()


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (NarrowLoad, "from_pretrained does not take features, stats, statistics, dataset_meta"),
        (NoProcessors, r"policy\.preprocess is missing(.|\n)*policy\.input_keys is \(\)"),
    ],
)
def test_what_a_run_would_miss_is_found(policy, words):
    with pytest.raises(PolicyError, match=words):
        check_policy(policy.tiny())


def test_an_adapter_that_has_all_breaks_nothing():
    assert list(missing_parts(FlowMlp.tiny())) == []


def test_optional_methods_are_said_and_no_error(caplog):
    class NoDataset(FlowMlp):
        from_dataset = FlowPolicy.from_dataset  # pyright: ignore

    assert left_out(NoDataset.tiny())[0] == "from_dataset (a run then needs a pretrained policy (--policy))"
    with caplog.at_level(logging.INFO):
        check_policy(NoDataset.tiny())
    assert "optional and not written: from_dataset" in caplog.text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Bare.from_dataset({}, {}, horizon=1), "Bare has no from_dataset.*give a pretrained one"),
        (lambda: Bare().example_obs(1), "Bare has no example_obs .it is optional.: give observations of your own"),
        (lambda: Bare().encode({}), "Bare has no encode"),
        (lambda: Bare.from_pretrained("x"), "Bare has no from_pretrained"),
    ],
)
def test_a_method_that_is_not_written_is_an_error_of_the_library(call, words):
    with pytest.raises(PolicyError, match=words):
        call()
