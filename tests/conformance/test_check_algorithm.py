"""Every algorithm keeps the contract, and one that breaks it is told in words where."""

import pytest
import torch
from toy_policies import ToyPolicy, toy_batch

from poco_vla import Algorithm, PocoConfig, available_algorithms, check_algorithm, load_adapter, load_algorithm
from poco_vla.algorithms.imitation import Imitation, ImitationConfig
from poco_vla.algorithms.poco import Poco
from poco_vla.config import from_json
from poco_vla.errors import AlgorithmError

SMALL = PocoConfig(num_candidates=3, critic_hidden=(8,))


def tiny_options(name):
    kind = load_algorithm(name)
    return SMALL if kind is Poco else from_json(kind.config_class, kind.tiny_options)


@pytest.mark.parametrize("name", available_algorithms())
def test_every_algorithm_keeps_the_contract(name):
    check_algorithm(load_algorithm(name), tiny_options(name), load_adapter("flow_mlp").tiny())


def test_other_options_keep_it_too():
    policy = load_adapter("flow_mlp").tiny()
    check_algorithm(Poco, PocoConfig(num_candidates=2, critic_hidden=(8,), warmup_bc=True, zeta="auto"), policy)
    learned = PocoConfig(
        num_candidates=4, critic_hidden=(8,), critic_members=3, eta_bound=0.1, aggregation="mean_minus_std"
    )
    check_algorithm(Poco, learned, policy)
    check_algorithm(Imitation, ImitationConfig(anchor="demos_and_successes"), policy)


class LeakingCritic(Poco):
    """Q's gradient reaches the actor: the chunk at the next state is a sample with gradient."""

    def critic_loss(self, prefix, batch, noise=None):
        loss, metrics = super().critic_loss(prefix, batch, noise)
        return loss + 0 * sum(p.sum() for p in self.policy.head.parameters()), metrics


class ForgottenCritic(Poco):
    def parameter_groups(self, actor_lr=3e-4, critic_lr=3e-4):
        return super().parameter_groups(actor_lr, critic_lr)[:1]


class DrawsItself(Imitation):
    def online_loss(self, batch, noise=None):
        loss, metrics = super().online_loss(batch, noise)
        return loss * (1 + torch.rand(())), metrics


class CountsRows(Imitation):
    def online_loss(self, batch, noise=None):
        loss, metrics = super().online_loss(batch, noise)
        return loss * len(batch), metrics


class ReadsOn(Imitation):
    def online_loss(self, batch, noise=None):
        loss, metrics = super().online_loss(batch, noise)
        return loss + sum(value.float().mean() for value in batch.next_obs.values()), metrics


class ActsByMode(Imitation):
    @torch.no_grad()
    def act(self, prefix, n=1, generator=None):
        return super().act(prefix, n, generator) * (0.5 if self.training else 1)


class ActsAtRandom(Imitation):
    @torch.no_grad()
    def act(self, prefix, n=1, generator=None):
        return super().act(prefix, n, None)


class HiddenState(Imitation):
    count = 0

    def after_step(self, phase):
        self.count += 1

    def online_loss(self, batch, noise=None):
        loss, metrics = super().online_loss(batch, noise)
        return loss * (1 + self.count), metrics


class HiddenNetwork(Poco):
    """Acts by its critic, which its view for acting does not hold."""

    @torch.no_grad()
    def act(self, prefix, n=1, generator=None):
        return super().act(prefix, 3, generator)


class ForgetsItsDiscount(Poco):
    @classmethod
    def gamma(cls, config):
        return 1.0


class RanksNothing(Imitation):
    ranks_candidates = True


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (ForgetsItsDiscount, SMALL, r"gamma\(config\) is 1.0, the option is 0.99"),
        (RanksNothing, ImitationConfig(), "options: raised AssertionError: RanksNothing does not rank candidates"),
        (LeakingCritic, SMALL, 'in phase "warmup" the gradient reaches group "actor", which trained_groups does not'),
        (ForgottenCritic, SMALL, r"in no parameter group, so that it never trains: critic\.weights"),
        (DrawsItself, ImitationConfig(), "online_loss draws random numbers itself"),
        (CountsRows, ImitationConfig(), "the micro-batches of online_loss do not add up"),
        (ReadsOn, ImitationConfig(), r'online_loss reads the next observations, but reads_next\("online"\) is False'),
        (ActsByMode, ImitationConfig(), "act gives another chunk in train mode"),
        (ActsAtRandom, ImitationConfig(), "act draws from torch's own generator"),
        (HiddenState, ImitationConfig(), "what updates change belongs into parameters or buffers"),
        (HiddenNetwork, SMALL, "acting: raised AttributeError"),
    ],
)
def test_what_is_broken_is_said(kind, options, words):
    policy = ToyPolicy()
    with pytest.raises(AlgorithmError, match=words):
        check_algorithm(kind, options, policy, toy_batch(policy, 6).obs)


def test_an_algorithm_without_losses_is_told_so():
    class Empty(Algorithm):
        pass

    policy = ToyPolicy()
    with pytest.raises(AlgorithmError, match="NotImplementedError: Empty has no sft_loss"):
        check_algorithm(Empty, None, policy, toy_batch(policy, 6).obs)
