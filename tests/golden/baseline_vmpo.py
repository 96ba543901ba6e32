"""vmpo: V-MPO of rlax, with returns of rlax."""

import torch
from baseline_flow_ppo import rollout_batch
from baseline_mpo import load_plain, plain, plain_gaussian, plain_gradients, plain_hidden
from golden import Actor, Golden, Numbers, gradients

from poco_vla import ActionSpec
from poco_vla.algorithms.on_policy.vmpo import Vmpo, VmpoConfig
from poco_vla.dual import top_samples_weights
from poco_vla.gae import generalized_advantages, n_step_returns

DUALS = {"temperature": "temperature", "alpha_mean": "alpha_mean", "alpha_std": "alpha_cov"}


def vmpo(golden: Golden) -> Numbers:
    """Yield returns, weights, losses and gradients of V-MPO."""
    c, obs, act = golden.config, golden["batch.obs"], golden["batch.actions"]
    steps, envs, width = act.shape

    def made(**changes: float) -> Vmpo:
        options = VmpoConfig(
            top=float(c["top_k_fraction"]),
            epsilon=c["epsilon"]["temperature"],
            epsilon_mean=c["epsilon"]["mean"],
            epsilon_std=c["epsilon"]["cov"],
            value_hidden=tuple(plain_hidden(golden, "init.value")),
            **changes,
        )
        algorithm = Vmpo(Actor(obs.shape[-1], ActionSpec(1, width, width, 1), [1]), options).double()
        algorithm.gaussian, algorithm.target_gaussian = (plain_gaussian(golden, obs.shape[-1], width) for _ in range(2))
        load_plain(golden, algorithm.gaussian, "init.actor")
        load_plain(golden, algorithm.target_gaussian, "init.target_actor")
        golden.load(plain(algorithm.value), "init.value")
        for ours, theirs in DUALS.items():
            algorithm.duals.raw[ours].data.copy_(golden[f"init.{theirs}"])
        return algorithm

    def grid(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (steps, envs))

    algorithm = made()
    with torch.no_grad():
        v = algorithm.state_values(algorithm.policy.encode({"state": obs.flatten(0, 1)})).view(steps + 1, envs)
    yield "value.v", v
    rewards, discounts = golden["batch.rewards"], golden["batch.discounts"]
    returns = n_step_returns(rewards, v, c["discount"] * discounts, n=c["n_step"])
    advantages = returns - v[:-1]
    yield "value.n_step_return", returns
    yield "value.advantage", advantages
    yield "value.gae", generalized_advantages(rewards, v, c["discount"] * discounts, lam=c["gae_lambda"])

    known = {"values": v[:-1].flatten(), "advantages": advantages.flatten(), "value_targets": returns.flatten()}
    acted = {"sample": act.flatten(0, 1)[:, None], "chain": act.flatten(0, 1)[:, None, None]}
    for section, changes, masked in (("", {}, False), ("restart.", {}, True), ("all.", {"top": 1.0}, False)):
        algorithm = made()
        algorithm.config = VmpoConfig(**(vars(algorithm.config) | changes))
        counts = {"counts": golden["batch.restarting_weights"].flatten() > 0} if masked else {}
        batch = rollout_batch(
            obs[:-1].flatten(0, 1), acted | counts, log_prob=torch.zeros(steps * envs).double(), **known
        )
        prefix, noise = algorithm.policy.encode(batch.obs), algorithm.draw_noise(batch, "online")
        terms = algorithm.terms(prefix, batch, noise)
        loss = torch.stack(list(terms.values())).sum(dim=0)
        yield f"{section}loss", grid(loss)
        yield f"{section}policy_loss", grid(terms["policy_loss"])
        yield f"{section}normalized_weights", grid(noise.weights / len(batch))
        yield f"{section}temperature_loss", terms["temperature_loss"][:1]
        eta = algorithm.duals("temperature")[0]
        options = {"epsilon": algorithm.config.epsilon, "top": algorithm.config.top, "counts": counts.get("counts")}
        yield f"{section}num_samples", top_samples_weights(batch.advantages, eta, **options)[2]
        loss.mean().backward()
        yield from plain_gradients(algorithm.gaussian, f"{section}grad.actor")
        for ours, theirs in DUALS.items():
            yield f"{section}grad.{theirs}", algorithm.duals.raw[ours].grad
        if section:
            continue
        yield "log_prob", grid(algorithm.log_prob(prefix, batch.acted))
        yield "kl_loss", grid(terms["kl_mean_loss"] + terms["kl_std_loss"])
        yield "alpha_loss", grid(terms["alpha_mean_loss"] + terms["alpha_std_loss"])
        kl_mean, kl_std = algorithm.divergences(prefix, algorithm.gaussian(prefix.features))
        yield "kl_mean", grid(kl_mean)
        yield "kl_cov", grid(kl_std)
        loss, _ = algorithm.value_loss(prefix, batch)
        loss.backward()
        yield "ref.loss.value", loss
        yield from gradients(plain(algorithm.value), "ref.grad.value")
