"""reinflow and dppo: PPO over a flow's denoising steps. What the library has no use for is written out here: DPPO's
diffusion schedule, ReinFlow's own network, its other time grid and its optional distance to the frozen policy."""

from dataclasses import replace

import torch
from golden import Actor, Entries, Golden, Numbers, dense, drawn, gradients
from torch import Tensor, nn
from torch.nn import functional as F

from poco_vla import ActionSpec
from poco_vla.algorithms.on_policy.contract import OnPolicy
from poco_vla.algorithms.on_policy.dppo import Dppo, DppoConfig
from poco_vla.algorithms.on_policy.flow_ppo import FlowPpo
from poco_vla.algorithms.on_policy.reinflow import ReinFlow, ReinFlowConfig
from poco_vla.types import RolloutBatch

# -- what both sections of both files share ---------------------------------------------------------------------------


def policy_of(golden: Golden, net: str, steps: int, clip: tuple[float, float] | None) -> Actor:
    """Return the flow policy at `net`, whose chunks are flat in the file."""
    sizes = golden.sizes
    spec = ActionSpec(sizes["T"], sizes["act"], sizes["act"], steps, clip)
    policy = Actor(sizes["obs"], spec, golden.hidden(net)).double()
    load_policy(golden, policy, net)
    return policy


def load_policy(golden: Golden, policy: nn.Module, net: str) -> None:
    golden.load(dense(policy.head.layers), net)


def draws(start: Tensor, steps: Tensor) -> list[Tensor]:
    """Return the normal numbers of a chain in the order in which they are drawn."""
    return [start, *steps.unbind(dim=1)]


def rollout_batch(obs: Tensor, acted: dict[str, Tensor], **known: Tensor) -> RolloutBatch:
    """Return rows of a rollout; what is not `known` is zero."""
    rows, chain = len(obs), acted["chain"]
    zeros = torch.zeros(rows).double()
    known = {"values": zeros, "advantages": zeros, "value_targets": zeros} | known
    return RolloutBatch(
        obs={"state": obs},
        next_obs={},
        actions=chain[:, -1],
        valid=torch.ones(rows, chain.shape[2], dtype=torch.bool),
        returns=zeros,
        discount=zeros,
        is_demo=zeros.bool(),
        is_success=zeros.bool(),
        acted=acted,
        **known,
    )


def entries_of(algorithm: OnPolicy) -> dict[str, Entries]:
    """Return the entries of an algorithm's networks by the file's names."""
    nets = {"actor": algorithm.policy.head, "value": algorithm.value}
    nets |= {"noise": algorithm.noise} if isinstance(algorithm, ReinFlow) else {}
    return {name: dense(net.layers) for name, net in nets.items()}


def load(golden: Golden, algorithm: OnPolicy, prefix: str) -> None:
    """Give an algorithm's networks the weights at `prefix`, as far as the file has some."""
    for net, entries in entries_of(algorithm).items():
        if f"{prefix}.{net}.l0.w" in golden:
            golden.load(entries, f"{prefix}.{net}")


def all_gradients(algorithm: OnPolicy, loss: Tensor, prefix: str = "grad") -> Numbers:
    algorithm.zero_grad()
    loss.backward()
    for net, entries in entries_of(algorithm).items():
        if all(parameter.grad is not None for _, parameter, _ in entries):
            yield from gradients(entries, f"{prefix}.{net}")


# -- ReinFlow ---------------------------------------------------------------------------------------------------------


class OfficialGrid(ReinFlow):
    """ReinFlow as its sampler has it: the last step at t = 1."""

    @property
    def flow_times(self) -> Tensor:
        return torch.linspace(0, 1, self.num_steps, dtype=torch.float64)


def reinflow(golden: Golden) -> Numbers:
    """Yield chains, log-probabilities, advantages, losses and gradients of ReinFlow."""
    c = golden.config
    options = ReinFlowConfig(
        discount=c["gamma"],
        gae_lambda=c["gae_lambda"],
        noise_bound=float(c["randn_clip_value"]),
        clip=c["clip_ploss_coef"],
        min_std=c["min_std"],
        max_std=c["max_std"],
        mean_clip=float(c["denoised_clip_value"]),
        log_prob_range=(c["logprob_min"], c["logprob_max"]),
        entropy_weight=c["ent_coef"],
        value_weight=c["vf_coef"],
        reward_factor=float(c["reward_scale_const"]),
        noise_hidden=tuple(golden.hidden("init.noise")),
        value_hidden=tuple(golden.hidden("init.value")),
    )
    chain = (c["K"], (float(c["act_min"]), float(c["act_max"])))
    obs, normal = golden["batch.obs"], draws(golden["draw.x0"], golden["draw.steps"])
    grids: list[type[ReinFlow]] = [ReinFlow, OfficialGrid]
    made = [grid(policy_of(golden, "init.actor", *chain), options).double() for grid in grids]
    algorithm = made[0]
    prefix = algorithm.policy.encode({"state": obs})
    for ours, name in zip(made, ("sample", "official_grid"), strict=True):
        load(golden, ours, "init.behaviour")
        with drawn(*normal):
            action, acted = ours.explore(prefix)
        yield f"{name}.action", action
        yield f"{name}.chain", acted["chain"]
        with torch.no_grad():
            yield f"{name}.log_prob", ours.log_prob(prefix, acted)
    with drawn(golden["draw.x0"]):
        yield "act.deterministic", algorithm.act(prefix)
    with drawn(*normal):
        acted = algorithm.explore(prefix)[1]

    # The rollout, by the weights that acted
    t = algorithm.flow_times.expand(len(obs), -1)
    with torch.no_grad():
        values, log_prob = algorithm.look_back(prefix, acted)
        start, steps, stds = algorithm.chain_terms(prefix, acted["chain"])
        yield "behaviour.mean", algorithm.step_means(prefix, acted["chain"][:, :-1], t)
        last_value = algorithm.state_values(algorithm.policy.encode({"state": golden["batch.last_obs"]}))
    yield "behaviour.std", stds
    yield "behaviour.init_log_prob", start
    yield "behaviour.step_log_prob", steps
    yield "behaviour.log_prob", log_prob
    rewards, terminated, truncated = (golden[f"batch.{name}"] for name in ("rewards", "terminated", "truncated"))
    firsts = torch.ones(len(rewards) + 1, rewards.shape[1], dtype=torch.bool)
    firsts[1:] = (terminated + truncated) > 0
    yield "rollout.firsts", firsts.double()
    values = values.view(rewards.shape)
    yield "rollout.values", values
    yield "rollout.last_value", last_value
    running = torch.zeros(rewards.shape[1]).double()
    rollout = (rewards, torch.cat([values, last_value[None]]), terminated.bool(), firsts[:-1])
    advantages, returns = algorithm.advantages(*rollout, running)
    yield "rollout.advantages", advantages
    yield "rollout.returns", returns
    scaler = algorithm.reward_scaler
    yield from ((f"rollout.scaler_{name}", getattr(scaler, name)) for name in ("mean", "var", "count"))
    yield "rollout.scaler_ret", running
    for gamma, name in ((c["gamma"], ""), (0.99, "_gamma0.99")):
        scaler = type(scaler)(gamma)
        yield f"rollout.scaled_rewards{name}", scaler(rewards, firsts[:-1], torch.zeros_like(running))

    # PPO's update of the new weights
    load(golden, algorithm, "init")
    batch = rollout_batch(
        obs,
        acted,
        log_prob=log_prob,
        values=values.flatten(),
        advantages=advantages.flatten(),
        value_targets=returns.flatten(),
    )
    noise = algorithm.draw_noise(batch, "online")
    yield "new.advantages_normalized", noise.advantages
    with torch.no_grad():
        new, stds = algorithm.log_prob(prefix, acted), algorithm.stds(prefix, t)
        yield "new.log_prob", new
        yield "new.ratio", (new.clamp(*options.log_prob_range) - log_prob.clamp(*options.log_prob_range)).exp()
        yield "new.entropy_rate", algorithm.entropy_rate(stds)
        yield "new.std_mean", stds.mean()
    loss, metrics = algorithm(batch, "online", noise)
    yield "loss.total", loss
    yield "loss.pg", metrics["policy_loss"]
    yield "loss.value", metrics["value_loss"]
    yield "loss.entropy", -metrics["entropy"]
    yield "loss.approx_kl", metrics["approximate_kl"]
    yield "loss.clipfrac", metrics["clipped_ratios"]
    yield "loss.ratio_mean", metrics["ratio"]
    yield from all_gradients(algorithm, loss)
    if "init.actor_frozen.l0.w" in golden:
        loss = distance_to_frozen(policy_of(golden, "init.actor_frozen", *chain), algorithm, prefix)
        yield "loss.bc_w2_official", loss
        yield from all_gradients(algorithm, loss, "grad.bc_w2_official")
    if "net.t" in golden:
        yield from flow_mlp(golden)


def distance_to_frozen(frozen: Actor, algorithm: FlowPpo, prefix) -> Tensor:
    """Return the official distance of the tuned policy's chunks to the frozen one's, from zero noise. Its slip is here
    too: the tuned policy starts where the frozen one's first step ends."""
    steps, spec = algorithm.num_steps, frozen.spec
    noise = torch.zeros(len(prefix.features), 1, spec.horizon, spec.width).double()
    times = torch.linspace(0, 1, steps).double().tolist()

    def end(policy: Actor, x: Tensor) -> Tensor:
        for t in times:
            x = (x + policy.velocity(prefix, x, x.new_full(x.shape[:2], t)) / steps).clamp(-1, 1)
        return x

    with torch.no_grad():
        wanted = end(frozen, noise)
        noise = noise + frozen.velocity(prefix, noise, noise.new_zeros(noise.shape[:2])) / steps
    return F.mse_loss(end(algorithm.policy, noise), wanted)


def flow_mlp(golden: Golden) -> Numbers:
    """Yield the outputs of ReinFlow's own network, which is stored as torch has it: weights [out, in]."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, golden[f"net.{name}.weight"], golden[f"net.{name}.bias"])

    half = golden["net.time_embedding.1.weight"].shape[1] // 2
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0).double()) * torch.arange(half).double() / (half - 1))
    angles = golden["net.t"].reshape(-1, 1) * frequencies
    embedded = linear("time_embedding.1", torch.cat([angles.sin(), angles.cos()], dim=-1))
    embedded = linear("time_embedding.3", F.mish(embedded))
    yield "net.time_embedding_out", embedded
    x = golden["net.x"]
    h = linear("mlp_mean.layers.0", torch.cat([x.flatten(1), embedded, golden["net.obs"]], dim=-1))
    blocks = len({name.split(".")[3] for name in golden.inputs if name.startswith("net.mlp_mean.layers.")})
    for i in range(1, blocks - 1):
        block = f"mlp_mean.layers.{i}"
        h = h + linear(f"{block}.l2", F.relu(linear(f"{block}.l1", F.relu(h))))
    yield "net.velocity", linear(f"mlp_mean.layers.{blocks - 1}", h).view_as(x)


# -- DPPO -------------------------------------------------------------------------------------------------------------


class Ddpm(Dppo):
    """DPPO over the diffusion that its authors tune: another mean and another deviation of each step, nothing else."""

    def schedule(self) -> dict[str, Tensor]:
        """Return the cosine schedule, indexed by diffusion time."""
        steps = self.num_steps
        x = torch.linspace(0, steps + 1, steps + 1).double()
        f = torch.cos((x / (steps + 1) + 0.008) / 1.008 * torch.pi / 2) ** 2
        f = f / f[0]
        betas = (1 - f[1:] / f[:-1]).clamp(0, 0.999)
        alphas = 1 - betas
        products = alphas.cumprod(0)
        before = torch.cat([torch.ones(1).double(), products[:-1]])
        return {
            "betas": betas,
            "alphas_cumprod": products,
            "ddpm_var": betas * (1 - before) / (1 - products),
            "ddpm_mu_coef1": betas * before.sqrt() / (1 - products),
            "ddpm_mu_coef2": (1 - before) * alphas.sqrt() / (1 - products),
        }

    def step_means(self, prefix, x, t, policy=None):
        """Return the mean of the step at flow time t, a diffusion time, which the network reads over K."""
        s, time = self.schedule(), self.diffusion_times(t)
        of = {name: value[time][..., None, None] for name, value in s.items()}
        eps = (policy or self.policy).velocity(prefix, x, time.double() / self.num_steps)
        clean = (1 / of["alphas_cumprod"]).sqrt() * x - (1 / of["alphas_cumprod"] - 1).sqrt() * eps
        return of["ddpm_mu_coef1"] * clean.clamp(-1, 1) + of["ddpm_mu_coef2"] * x

    def stds(self, t, least):
        variances = self.schedule()["ddpm_var"].clamp(min=1e-20)
        return variances[self.diffusion_times(t)][..., None, None].sqrt().clamp(min=least)

    def diffusion_times(self, t):
        """Return the index K - 1, ..., 0 of flow times 0, ..., (K - 1) / K."""
        return (self.num_steps * (1 - t)).round().long() - 1


def dppo(golden: Golden) -> Numbers:
    """Yield chains, log-probabilities, losses and gradients of DPPO, of a flow and of a diffusion."""
    for section, method in (("flow", Dppo), ("ddpm", Ddpm)):
        if f"{section}.draw.x_init" in golden:
            yield from dppo_section(golden, section, method)


def dppo_section(golden: Golden, section: str, method: type[Dppo]) -> Numbers:
    c = golden.config
    options = DppoConfig(
        noise_bound=float(c["randn_clip_value"]),
        clip=c["clip_ploss_coef"],
        clip_base=c["clip_ploss_coef_base"],
        clip_rate=float(c["clip_ploss_coef_rate"]),
        tuned_steps=c["ft_denoising_steps"],
        std=c["flow_sigma"],
        min_sampling_std=c["min_sampling_denoising_std"],
        min_log_prob_std=c["min_logprob_denoising_std"],
        denoising_discount=c["gamma_denoising"],
        log_prob_steps=c["reward_horizon"],
        value_weight=c["vf_coef"],
        value_hidden=tuple(golden.hidden(f"{section}.init.value")),
    )
    steps, nets = c["denoising_steps"], f"{section}.init"

    def made(**changes: object) -> Dppo:
        policy = policy_of(golden, f"{nets}.actor", steps, clip=None)
        algorithm = method(policy, replace(options, **changes)).double()
        load(golden, algorithm, nets)
        if algorithm.reference is not None:
            load_policy(golden, algorithm.reference, f"{nets}.actor_frozen")
        return algorithm

    algorithm = made()
    if isinstance(algorithm, Ddpm):
        yield from ((f"{section}.schedule.{name}", value) for name, value in algorithm.schedule().items())
    obs = golden["batch.obs"]
    prefix = algorithm.policy.encode({"state": obs})
    load(golden, algorithm, f"{nets}.behaviour")
    with drawn(*draws(golden[f"{section}.draw.x_init"], golden[f"{section}.draw.steps"])):
        action, acted = algorithm.explore(prefix)
    with torch.no_grad():
        old = algorithm.log_prob(prefix, acted)
    yield f"{section}.sample.action", action
    yield f"{section}.sample.chain", acted["chain"]
    yield f"{section}.old.log_prob", old

    # Rows are pairs of a chunk and one of its denoising steps.
    load(golden, algorithm, nets)
    rows, index = (golden[f"batch.{name}"].long() for name in ("env_index", "denoising_index"))
    batch = rollout_batch(
        obs[rows],
        {"chain": acted["chain"][rows], "steps": index[:, None]},
        log_prob=old[rows, index][:, None],
        values=golden[f"{section}.batch.old_values"][rows],
        advantages=golden["batch.advantages"][rows],
        value_targets=golden["batch.returns"][rows],
    )
    noise, (clip, discount) = algorithm.draw_noise(batch, "online"), algorithm.step_schedules(index[:, None])
    yield "clip_coef", clip
    yield "denoising_discount", discount
    yield "advantages_used", noise.advantages * discount[:, 0]
    with torch.no_grad():
        new = algorithm.log_prob(algorithm.policy.encode(batch.obs), batch.acted)
        yield f"{section}.new.log_prob", new
        yield f"{section}.new.ratio", (algorithm.step_log_probs(new) - algorithm.step_log_probs(batch.log_prob)).exp()
    loss, metrics = algorithm(batch, "online", noise)
    yield f"{section}.loss.pg", metrics["policy_loss"]
    yield f"{section}.loss.value", metrics["value_loss"]
    yield f"{section}.loss.approx_kl", metrics["approximate_kl"]
    yield f"{section}.loss.clipfrac", metrics["clipped_ratios"]
    yield f"{section}.loss.ratio_mean", metrics["ratio"]
    yield from all_gradients(algorithm, loss, f"{section}.grad")
    variants = {
        "pg.no_norm": ({"normalize_advantages": False}, "policy_loss"),
        "pg.quantile": ({"advantage_quantiles": tuple(c["quantile_variant"])}, "policy_loss"),
        "value.vclip": ({"value_clip": c["clip_vloss_coef_variant"]}, "value_loss"),
    }
    for name, (changes, metric) in variants.items():
        yield f"{section}.loss.{name}", made(**changes)(batch, "online")[1][metric]
