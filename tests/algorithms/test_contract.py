"""What every algorithm offers, by both of the library's own: stages, groups, acting, and a view for acting."""

from copy import deepcopy

import pytest
import torch
from toy_policies import ToyPolicy, toy_batch

from poco_vla import Algorithm, GlobalBatchRNG, Poco, PocoConfig, propose
from poco_vla.algorithms.best_of_n import BestOfN, BestOfNConfig
from poco_vla.algorithms.imitation import Imitation, ImitationConfig
from poco_vla.algorithms.mpo import Mpo, MpoConfig
from poco_vla.algorithms.one_step import OneStepConfig, QcFql
from poco_vla.errors import UnknownNameError
from poco_vla.noise import micro_batches


def poco_of(policy, **options):
    return Poco(policy, PocoConfig(**({"num_candidates": 3, "critic_hidden": (8,)} | options)), rng())


def rng():
    return GlobalBatchRNG(torch.Generator().manual_seed(0))


def imitation_of(policy, **options):
    return Imitation(policy, ImitationConfig(**options), rng())


def best_of_n_of(policy, **options):
    return BestOfN(policy, BestOfNConfig(**({"num_candidates": 3, "critic_hidden": (8,)} | options)), rng())


def one_step_of(policy, **options):
    return QcFql(policy, OneStepConfig(**({"critic_hidden": (8,), "hidden": (8,)} | options)), rng())


def mpo_of(policy, **options):
    return Mpo(policy, MpoConfig(**({"num_candidates": 3, "critic_hidden": (8,), "hidden": (8,)} | options)), rng())


def fixed_mpo_of(policy):
    return mpo_of(policy, form="fixed", bc_weight=1.0)


ALL = [poco_of, imitation_of, best_of_n_of, one_step_of, mpo_of, fixed_mpo_of]


def stages_of(algorithm):
    return algorithm.stages()


@pytest.mark.parametrize("make", [*ALL, lambda policy: poco_of(policy, warmup_bc=True)])
def test_the_groups_that_a_stage_trains_are_those_with_a_gradient(make):
    """Every trained parameter is in one group, the first of which is the policy's."""
    policy = ToyPolicy()
    algorithm = make(policy)
    groups = {group["name"]: group["params"] for group in algorithm.parameter_groups(0.1, 0.2)}
    assert next(iter(groups)) == "actor"
    assert [id(p) for ps in groups.values() for p in ps] == [id(p) for p in algorithm.parameters() if p.requires_grad]
    for stage in stages_of(algorithm):
        algorithm.zero_grad(set_to_none=True)
        algorithm(toy_batch(policy), stage)[0].backward()
        moved = {name for name, ps in groups.items() if all(p.grad is not None for p in ps)}
        assert moved == {name for name, ps in groups.items() if any(p.grad is not None for p in ps)}
        assert moved == algorithm.trained_groups(stage)


@pytest.mark.parametrize("make", ALL)
def test_what_a_loss_reads_of_a_batch_is_what_it_says(make):
    """Next observations of NaN change nothing in a stage that does not read them."""
    policy = ToyPolicy()
    for stage in stages_of(make(policy)):
        one, two = make(policy), make(policy)
        two.load_state_dict(one.state_dict())
        if one.reads_next(stage):
            continue
        batch = toy_batch(policy)
        broken = toy_batch(policy, next_obs={"state": torch.full_like(batch.next_obs["state"], torch.nan)})
        assert one(batch, stage)[0].item() == two(broken, stage)[0].item()


@pytest.mark.parametrize("make", [*ALL, lambda policy: one_step_of(policy, normalize_q_loss=True)])
def test_the_noise_of_a_batch_is_cut_with_it(make):
    policy = ToyPolicy()
    algorithm, batch = make(policy), toy_batch(policy, 6)
    for stage in stages_of(algorithm):
        noise = algorithm.draw_noise(batch, stage)
        whole = algorithm(batch, stage, noise)[0]
        pieces = [algorithm(rows, stage, its)[0] * share for rows, its, share in micro_batches(batch, noise, 2)]
        assert len(pieces) == 3
        torch.testing.assert_close(sum(pieces), whole)


@pytest.mark.parametrize("make", [Algorithm, poco_of, imitation_of])
def test_one_candidate_is_a_plain_sample(make):
    policy = ToyPolicy()
    prefix = policy.encode(toy_batch(policy).obs)
    x = propose(policy, prefix, 1, generator=torch.Generator().manual_seed(3))[:, 0]
    assert torch.equal(make(policy).act(prefix, 1, torch.Generator().manual_seed(3)), x)


@pytest.mark.parametrize(
    ("make", "n", "beside"),
    [
        (poco_of, 1, set()),
        (poco_of, 4, {"target_critic"}),
        (imitation_of, 1, set()),
        (best_of_n_of, 1, {"critic"}),
        (best_of_n_of, 4, {"critic"}),
        (one_step_of, 1, {"one_step"}),
    ],
)
def test_the_view_for_acting_shares_weights_and_holds_no_more_than_acting_reads(make, n, beside):
    """It acts as the whole does, and can be copied; the algorithm itself keeps all that it has."""
    policy = ToyPolicy()
    algorithm = make(policy)
    whole = set(dict(algorithm.named_children()))
    prefix = policy.encode(toy_batch(policy).obs)
    view = algorithm.for_acting(n)
    assert set(dict(view.named_children())) == {"policy"} | beside
    assert {id(p) for p in view.parameters()} <= {id(p) for p in algorithm.parameters()}
    for acting in (view, deepcopy(view)):
        chunks = [one.act(prefix, n, torch.Generator().manual_seed(3)) for one in (algorithm, acting)]
        assert torch.equal(*chunks)
    assert set(dict(algorithm.named_children())) == whole


def test_an_algorithm_without_a_critic_ranks_nothing():
    policy = ToyPolicy()
    with pytest.raises(AssertionError, match="does not rank"):
        imitation_of(policy).act(policy.encode(toy_batch(policy).obs), 2)


# -- imitation --------------------------------------------------------------------------------------------------------


def test_imitation_is_pocos_stage_1_bit_for_bit():
    policy = ToyPolicy()
    batch = toy_batch(policy)
    assert imitation_of(policy).sft_loss(batch)[0].item() == poco_of(policy).sft_loss(batch)[0].item()


@pytest.mark.parametrize(("anchor", "rows"), [("all", [0, 1, 2, 3]), ("demos", [0]), ("demos_and_successes", [0, 2])])
def test_online_imitation_imitates_what_the_anchor_selects(anchor, rows):
    policy = ToyPolicy()
    algorithm = imitation_of(policy, anchor=anchor)
    kinds = {"is_demo": torch.tensor([1, 0, 0, 0]).bool(), "is_success": torch.tensor([0, 0, 1, 0]).bool()}
    actions = toy_batch(policy, 4).actions.clone().requires_grad_()
    batch = toy_batch(policy, 4, actions=actions, **kinds)
    algorithm.online_loss(batch)[0].backward()
    assert actions.grad.flatten(1).any(dim=1).nonzero().flatten().tolist() == rows


@pytest.mark.parametrize(("field", "value"), [("anchor", "demo"), ("error_mean", "some")])
def test_an_option_of_imitation_that_is_none_is_refused(field, value):
    """Set afterwards: the machine-checked signatures of the test run would refuse it before the option does."""
    config = ImitationConfig()
    object.__setattr__(config, field, value)
    with pytest.raises(UnknownNameError, match=f'no {field} named "{value}"'):
        config.__post_init__()
