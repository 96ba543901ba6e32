"""mpo and mpo_poco: MPO with dual variables of acme and rlax, and the POCO authors' at a fixed temperature."""

import torch
from golden import (
    Actor,
    Entries,
    Golden,
    Numbers,
    Scripted,
    chunk_batch,
    chunk_window,
    dense,
    ensemble,
    gradients,
    values,
)
from torch import Tensor, nn

from poco_vla import ActionSpec
from poco_vla.algorithms.mpo import Mpo, MpoConfig
from poco_vla.gaussian import Gaussian, GaussianNetwork, SquashedGaussian
from poco_vla.mlp import Mlp


def head(network: GaussianNetwork) -> Entries:
    """Return the entries of a Gaussian's network: "l0", "l1", ..., "mean", "log_std"."""
    return dense(network.layers) + dense([network.mean], "mean") + dense([network.log_std], "log_std")


# -- the POCO authors' ------------------------------------------------------------------------------------------------


def mpo_poco(golden: Golden) -> Numbers:
    """Yield candidates, weights, losses, gradients and whole updates of the POCO authors' MPO."""
    c, sizes, batch = golden.config, golden.sizes, chunk_batch(golden)
    yield from chunk_window(golden)
    horizon, width = batch.actions.shape[1:]
    options = {
        "form": "fixed",
        "num_candidates": golden["draw.cand.noise"].shape[1],
        "gamma": c["discount"],
        "temperature": float(c["temperature"]),
        "beta": float(c["beta"]),
        "bc_weight": float(c["bc_loss_coef"]),
        "bc_form": c["bc_loss_type"],
        "bc_std": c["bc_std_target"],
        "target_period": 1,
        "tau": c["tau"],
        "target_mixes": "before",
        "drop_crossing": True,
        "error_mean": "all",
        "hidden": tuple(golden.hidden("init.actor")),
        "log_std": (c["log_std_min"], c["log_std_max"]),
        "critic_hidden": tuple(golden.hidden("init.critic.0")),
        "critic_members": sizes["K"],
    }

    def made(**changes: object) -> Mpo:
        policy = Actor(batch.obs["state"].shape[1], ActionSpec(horizon, width, width, 1), [1])
        algorithm = Mpo(policy, MpoConfig(**(options | changes))).double()
        golden.load(head(algorithm.gaussian), "init.actor")
        golden.load(ensemble(algorithm.critic), "init.critic")
        golden.load(ensemble(algorithm.target_critic.network), "init.target_critic")
        if algorithm.target_critic.before is not None:
            golden.load(ensemble(algorithm.target_critic.before), "init.critic")
        return algorithm

    def draws(prefix: str = "draw") -> Scripted:
        return Scripted([golden[f"{prefix}.critic.noise"], golden[f"{prefix}.cand.noise"]])

    def e_step(algorithm: Mpo, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return candidates, the target critics' values of each, and the log-probabilities."""
        x, _ = algorithm.candidates(prefix, noise.unflatten(-1, (horizon, width)))
        g = algorithm.gaussian(prefix.features)
        return x, algorithm.target_critic(prefix.features, x), squashed(g).log_prob(x)

    def metrics(algorithm: Mpo, draw: str, losses: dict[str, Tensor], name: str) -> Numbers:
        with torch.no_grad():
            _, q_each, log_prob = e_step(algorithm, golden[f"{draw}.cand.noise"])
            q_data = algorithm.critic(prefix.features, batch.actions[:, None])
        q = q_each.mean(dim=0)
        bc, fit = losses["bc_loss"] / algorithm.config.bc_weight, losses["q_loss"] / algorithm.config.beta
        yield f"{name}.actor.actor_loss", losses["actor_loss"]
        yield f"{name}.actor.bc_loss", bc
        yield f"{name}.actor.q_loss", fit
        yield f"{name}.actor.bc_loss_coef", torch.tensor(algorithm.config.bc_weight)
        yield f"{name}.actor.log_probs_mean", log_prob.mean()
        yield f"{name}.critic.critic_loss", losses["critic_loss"]
        described = {"actor.target_q": q, "actor.weights": algorithm.weights(q), "critic.q": q_data}
        for what, numbers in described.items():
            yield f"{name}.{what}_mean", numbers.mean()
            yield f"{name}.{what}_max", numbers.max()
            yield f"{name}.{what}_min", numbers.min()
            yield f"{name}.{what}_std", numbers.std(correction=0)

    algorithm = made()
    prefix, next_prefix = algorithm.policy.encode(batch.obs), algorithm.policy.encode(batch.next_obs)
    critic_noise = golden["draw.critic.noise"].view(len(batch), 1, horizon, width)
    with torch.no_grad():
        x, q_each, log_prob = e_step(algorithm, golden["draw.cand.noise"])
        g = algorithm.gaussian(prefix.features)
        yield "cand.mean", g.mean.flatten(1)
        yield "cand.std", g.std.flatten(1)
        yield "cand.actions", x.flatten(2)
        yield "cand.q_each", q_each
        yield "cand.log_prob", log_prob
        raw = squashed(g).base.sample(golden["draw.cand.noise"].unflatten(-1, (horizon, width))).tanh()
        yield "cand.clipped_share", (raw.abs() > 1 - 1e-5).double().mean()
        for name in golden.results:
            if name.startswith("weights.temp"):
                temperature = float(name.removeprefix("weights.temp"))
                yield name, made(temperature=temperature).weights(q_each.mean(dim=0))
        yield "bc.log_prob", squashed(g).log_prob(batch.actions[:, None])[:, 0]
        chunk, _ = algorithm.candidates(next_prefix, critic_noise, limit=1.0)
        yield "critic.next_action", chunk[:, 0].flatten(1)
        yield "critic.next_q_each", algorithm.target_critic(next_prefix.features, chunk)[..., 0]
        y = batch.returns + batch.discount * algorithm.next_value(next_prefix, critic_noise)
        yield "critic.target", y
        yield "critic.q", algorithm.critic(prefix.features, batch.actions[:, None])[..., 0]

    for suffix, changes in variants(golden, algorithm.config.temperature):
        algorithm = made(**changes)
        algorithm.rng = draws()
        loss, losses = algorithm(batch, "online")
        loss.backward()
        if not suffix:
            yield "loss.total", loss
            yield from metrics(algorithm, "draw", losses, "loss")
            yield from gradients(ensemble(algorithm.critic), "grad.critic")
        yield from gradients(head(algorithm.gaussian), f"grad{suffix}.actor")
        yield f"loss.actor.actor_loss{suffix}", losses["actor_loss"]
        yield f"loss.actor.bc_loss{suffix}", losses["bc_loss"] / algorithm.config.bc_weight
        yield f"loss.actor.q_loss{suffix}", losses["q_loss"] / algorithm.config.beta

    algorithm = made()
    optimizer = torch.optim.Adam(algorithm.parameter_groups(c["lr"], c["lr"]))
    for u in golden.updates():
        algorithm.rng = draws(f"draw.update{u}")
        loss, losses = algorithm(batch, "online")
        yield from metrics(algorithm, f"draw.update{u}", losses, f"update{u}.metric")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        new = made(target_mixes="after")
        new.target_critic.network.load_state_dict(algorithm.target_critic.network.state_dict())
        new.target_critic.follow(algorithm.critic)
        algorithm.after_step("online")
        yield from values(head(algorithm.gaussian), f"update{u}.actor")
        yield from values(ensemble(algorithm.critic), f"update{u}.critic")
        yield from values(ensemble(algorithm.target_critic.network), f"update{u}.target_critic")
        yield from values(ensemble(new.target_critic.network), f"update{u}.target_if_new_params")


def squashed(g: Gaussian) -> SquashedGaussian:
    """Return the distribution of each state's candidates."""
    return SquashedGaussian(Gaussian(g.mean[:, None], g.std[:, None]))


def variants(golden: Golden, temperature: float) -> list[tuple[str, dict[str, object]]]:
    """Return what the names of a file's losses and gradients end with, and the options of each."""
    stem = "loss.actor.actor_loss"
    suffixes = [name.removeprefix(stem) for name in golden.results if name.startswith(stem)]
    found: list[tuple[str, dict[str, object]]] = []
    for suffix in suffixes:
        if suffix.startswith(".temp"):
            found.append((suffix, {"temperature": float(suffix.removeprefix(".temp"))}))
        else:
            found.append((suffix, {"bc_form": suffix.removeprefix(".")} if suffix else {}))
    return found


# -- acme's and rlax's ------------------------------------------------------------------------------------------------


class PlainCritics(nn.Module):
    """The critics of the file, which have no LayerNorm."""

    def __init__(self, golden: Golden, obs: int, act: int, members: int) -> None:
        super().__init__()
        self.members = nn.ModuleList()
        for k in range(members):
            prefix = f"init.target_critic.{k}"
            net = Mlp(obs + act, plain_hidden(golden, prefix), 1, "gelu").double()
            golden.load(plain(net), prefix)
            self.members.append(net)

    def forward(self, features: Tensor, chunk: Tensor) -> Tensor:
        state = features[:, None].expand(-1, chunk.shape[1], -1)
        return torch.stack([net(torch.cat([state, chunk.flatten(2)], dim=-1))[..., 0] for net in self.members])


def plain_hidden(golden: Golden, prefix: str) -> list[int]:
    """Return the hidden widths of a network whose last layer is "out"."""
    count = sum(f"{prefix}.l{i}.w" in golden for i in range(99))
    return [golden[f"{prefix}.l{i}.w"].shape[1] for i in range(count)]


def plain(net: Mlp) -> Entries:
    """Return the entries of a network whose last layer is "out"."""
    *hidden, last = net.layers
    return dense(hidden) + dense([last], "out")


def plain_gaussian(golden: Golden, obs: int, act: int) -> GaussianNetwork:
    return GaussianNetwork(
        obs, 1, act, hidden=plain_hidden(golden, "init.actor"), activation="gelu", log_std=(-20.0, 20.0)
    ).double()


def load_plain(golden: Golden, network: GaussianNetwork, prefix: str) -> None:
    """Give a Gaussian's network the weights at `prefix`, of which std = exp(0.5 (h @ w + b) - 1)."""
    golden.load(head(network), prefix)
    network.log_std.weight.data *= 0.5
    network.log_std.bias.data = network.log_std.bias.data * 0.5 - 1


def plain_gradients(network: GaussianNetwork, prefix: str) -> Numbers:
    """Yield gradients with respect to the weights that the file has."""
    for name, value in gradients(head(network), prefix):
        yield name, value * 0.5 if ".log_std." in name else value


def mpo(golden: Golden) -> Numbers:
    """Yield the losses and gradients of acme's and rlax's MPO."""
    c, sizes = golden.config, golden.sizes
    obs, act = sizes["obs"], sizes["act"]
    hidden = tuple(plain_hidden(golden, "init.actor"))
    options = {
        "num_candidates": golden["draw.cand.noise"].shape[0],
        "gamma": c["discount"],
        "epsilon": c["epsilon"],
        "epsilon_mean": c["epsilon_mean"],
        "epsilon_std": c["epsilon_stddev"],
        "hidden": hidden,
        "critic_hidden": (1,),
    }

    def made(**changes: object) -> Mpo:
        algorithm = Mpo(Actor(obs, ActionSpec(1, act, act, 1), [1]), MpoConfig(**(options | changes))).double()
        algorithm.gaussian, algorithm.target_gaussian = (plain_gaussian(golden, obs, act) for _ in range(2))
        load_plain(golden, algorithm.gaussian, "init.actor")
        load_plain(golden, algorithm.target_gaussian, "init.target_actor")
        algorithm.target_critic = PlainCritics(golden, obs, act, sizes["K"])
        return algorithm

    def load_duals(algorithm: Mpo, names: dict[str, str]) -> None:
        for ours, theirs in names.items():
            parameter = algorithm.duals.raw[ours]
            parameter.data.copy_(golden[theirs][: len(parameter)])

    def noise(name: str) -> Tensor:
        return golden[name].transpose(0, 1)[:, :, None]

    acme = {"alpha_mean": "init.dual.log_alpha_mean", "alpha_std": "init.dual.log_alpha_stddev"}
    acme |= {"temperature": "init.dual.log_temperature"}
    penalized = acme | {"penalty": "init.dual.log_penalty_temperature"}
    variants = {
        "acme": ({"penalty": c["epsilon_penalty"]}, penalized),
        "acme.no_penalty": ({"penalty": None}, acme),
        "acme.full_kl": ({"penalty": None, "per_dimension": False}, acme),
    }
    algorithm = made()
    prefix = algorithm.policy.encode({"state": golden["batch.obs"]})
    next_prefix = algorithm.policy.encode({"state": golden["batch.next_obs"]})
    with torch.no_grad():
        old = algorithm.target_gaussian(prefix.features)
    x, q = algorithm.candidates(prefix, noise("draw.cand.noise"))
    yield "cand.target_mean", old.mean
    yield "cand.target_std", old.std
    yield "cand.actions", x[:, :, 0].transpose(0, 1)
    yield "cand.q_each", algorithm.target_critic(prefix.features, x).transpose(1, 2)
    yield "cand.q", q.T
    yield "cand.out_of_bound_share", (x.abs() > 1).flatten(2).any(dim=-1).double().mean()
    next_value = algorithm.next_value(next_prefix, noise("draw.critic.noise"))
    yield "ref.critic.next_value", next_value
    yield "ref.critic.target", golden["batch.rewards"] + c["discount"] * golden["batch.discounts"] * next_value

    for name, (changes, duals) in variants.items():
        algorithm = made(**changes)
        load_duals(algorithm, duals)
        new = algorithm.gaussian(prefix.features)
        for parameter in (new.mean, new.std):
            parameter.retain_grad()
        terms = algorithm.gaussian_terms(new, old, x, q)
        loss = torch.stack([term.mean() for term in terms.values()]).sum()
        loss.backward()
        yield f"{name}.loss", loss
        yield f"{name}.grad.online_mean", new.mean.grad
        yield f"{name}.grad.online_std", new.std.grad
        for ours, theirs in duals.items():
            yield theirs.replace("init", f"{name}.grad"), algorithm.duals.raw[ours].grad
        if name == "acme":
            yield from plain_gradients(algorithm.gaussian, "acme.grad.actor")
            yield from acme_details(algorithm, new, old, terms, x, q)
        yield from acme_statistics(name, algorithm, new, old, terms, x, q, loss)

    yield from rlax(golden, made, load_duals, x, q, old)


def acme_details(
    algorithm: Mpo, new: Gaussian, old: Gaussian, terms: dict[str, Tensor], x: Tensor, q: Tensor
) -> Numbers:
    yield "acme.online_mean", new.mean
    yield "acme.online_std", new.std
    yield "acme.weights", algorithm.weights(q).T
    cost = algorithm.penalty_cost(x)
    yield "acme.penalty_cost", cost.T
    yield "acme.penalty_weights", algorithm.weights(cost, "penalty").T
    kl_mean, kl_std = algorithm.divergences(new, old)
    yield "acme.kl_mean", kl_mean
    yield "acme.kl_stddev", kl_std
    names = {"temperature_loss": "loss_temperature", "penalty_loss": "loss_penalty_temperature"}
    names |= {"mean_loss": "loss_policy_mean", "std_loss": "loss_policy_stddev"}
    names |= {"kl_mean_loss": "loss_kl_mean", "kl_std_loss": "loss_kl_stddev"}
    names |= {"alpha_mean_loss": "loss_alpha_mean", "alpha_std_loss": "loss_alpha_stddev"}
    for ours, theirs in names.items():
        yield f"acme.{theirs}", terms[ours].mean()


def acme_statistics(
    name: str,
    algorithm: Mpo,
    new: Gaussian,
    old: Gaussian,
    terms: dict[str, Tensor],
    x: Tensor,
    q: Tensor,
    loss: Tensor,
) -> Numbers:
    """Yield what acme logs: its loss_policy is the whole loss."""
    cfg = algorithm.config

    def relative(w: Tensor, epsilon: float) -> Tensor:
        return (w * (w.shape[1] * w + 1e-8).log()).sum(dim=1).mean() / epsilon

    stat = {f"dual_{theirs}": algorithm.duals(ours).mean() for ours, theirs in DUALS.items()}
    stat["kl_q_rel"] = relative(algorithm.weights(q), cfg.epsilon)
    if cfg.penalty is not None:
        stat["penalty_kl_q_rel"] = relative(algorithm.weights(algorithm.penalty_cost(x), "penalty"), cfg.penalty)
    kl_mean, kl_std = algorithm.divergences(new, old)
    stat["kl_mean_rel"], stat["kl_stddev_rel"] = kl_mean.mean(0) / cfg.epsilon_mean, kl_std.mean(0) / cfg.epsilon_std
    stat["loss_policy"] = loss
    stat["loss_alpha"] = (terms["alpha_mean_loss"] + terms["alpha_std_loss"]).mean()
    stat["loss_temperature"] = (terms["temperature_loss"] + terms.get("penalty_loss", 0.0)).mean()
    stat["q_min"], stat["q_max"] = q.amin(dim=1).mean(), q.amax(dim=1).mean()
    std = new.std.flatten(1)
    stat["pi_stddev_min"], stat["pi_stddev_max"] = std.amin(dim=1).mean(), std.amax(dim=1).mean()
    stat["pi_stddev_cond"] = (std.amax(dim=1) / std.amin(dim=1)).mean()
    yield from ((f"{name}.stat.{key}", value) for key, value in stat.items())


DUALS = {"temperature": "temperature", "alpha_mean": "alpha_mean", "alpha_std": "alpha_stddev"}


def rlax(golden: Golden, made, load_duals, x: Tensor, q: Tensor, old: Gaussian) -> Numbers:
    algorithm = made(form="rlax")
    names = {"temperature": "temperature", "alpha_mean": "alpha_mean", "alpha_std": "alpha_cov"}
    load_duals(algorithm, {ours: f"init.rlax.{theirs}" for ours, theirs in names.items()})
    prefix = algorithm.policy.encode({"state": golden["batch.obs"]})
    new = algorithm.gaussian(prefix.features)
    terms = algorithm.gaussian_terms(new, old, x, q)
    loss = torch.stack(list(terms.values())).sum(dim=0)
    loss.mean().backward()
    yield "rlax.loss", loss
    yield "rlax.policy_loss", terms["policy_loss"]
    yield "rlax.temperature_loss", terms["temperature_loss"]
    yield "rlax.kl_loss", terms["kl_mean_loss"] + terms["kl_std_loss"]
    yield "rlax.alpha_loss", terms["alpha_mean_loss"] + terms["alpha_std_loss"]
    yield "rlax.normalized_weights", algorithm.weights(q).T
    yield "rlax.num_samples", torch.tensor(float(q.shape[1]))
    yield "rlax.log_prob", Gaussian(new.mean[:, None], new.std[:, None]).log_prob(x).T
    yield from plain_gradients(algorithm.gaussian, "rlax.grad.actor")
    for ours, theirs in names.items():
        yield f"rlax.grad.{theirs}", algorithm.duals.raw[ours].grad
