"""dsrl: noise steering of ajwagen/dsrl. dsrl_sac: SAC in noise, of the same."""

from typing import Any

import torch
from baseline_rlpd import gaussian, log_alpha
from golden import Actor, Golden, Numbers, Scripted, dense, ensemble, gradients, values
from torch import Tensor

from poco_vla import ActionSpec, ChunkBatch
from poco_vla.algorithms.noise_steering import Dsrl, DsrlConfig


def dsrl(golden: Golden) -> Numbers:
    """Yield the pieces of the first step, and losses, gradients and parameters of all of them."""
    steps, distillations = count(golden, "step"), count(golden, "distill")
    algorithm = learner(golden, action="chunk" if distillations else "noise")
    batch = batch_of(golden, "step0", algorithm.policy.spec)
    if "draw.act.noise" in golden:
        yield from acting(golden, algorithm, batch)
    yield from first_step(golden, algorithm, batch)
    optimizer = torch.optim.Adam([p for p in algorithm.parameters() if p.requires_grad], lr=golden.config["lr"])
    sums: dict[str, list[Tensor]] = {}

    def step(name: str, phase: str, draw: str) -> Numbers:
        """Make one optimizer step, and yield its gradients."""
        algorithm.rng = Scripted([golden[draw]])
        number = name.removeprefix("step").removeprefix("distill")
        loss, metrics = algorithm(batch_of(golden, name, algorithm.policy.spec), phase)
        optimizer.zero_grad()
        loss.backward()
        nets = {"critic": ["critic"], "actor": ["actor", "temp"], "distill": ["noise_critic"]}[phase]
        for net in nets:
            kind = phase if net == "noise_critic" else net
            below = "" if net == "temp" else f".{net}"
            yield from gradients(networks(algorithm)[net], f"grad.{kind}{number}{below}")
        optimizer.step()
        algorithm.after_step(phase)
        for metric, value in metrics.items():
            sums.setdefault(metric, []).append(value)

    for i in range(steps):
        yield from step(f"step{i}", "critic", f"draw.step{i}.next.noise")
        yield from step(f"step{i}", "actor", f"draw.step{i}.actor.noise")
    for i in range(distillations):
        yield from step(f"distill{i}", "distill", f"draw.distill{i}.noise")
    names = {"actor_loss": "actor_loss", "critic_loss": "critic_loss", "temperature": "ent_coef"}
    names |= {"temperature_loss": "ent_coef_loss", "noise_critic_loss": "noise_critic_loss"}
    for ours, theirs in names.items():
        if ours in sums:
            yield f"mean_metric.{theirs}", torch.stack(sums[ours]).mean()
    for net, entries in networks(algorithm).items():
        yield from values(entries, "after" if net == "temp" else f"after.{net}")


def first_step(golden: Golden, algorithm: Dsrl, batch: ChunkBatch) -> Numbers:
    """Yield samples, values and target of the first gradient step, at the initial weights."""
    prefix, next_prefix = algorithm.encode(batch), algorithm.encode_next(batch)
    horizon, width = batch.actions.shape[1:]
    with torch.no_grad():
        p, log_prob = algorithm.distribution(prefix).sample(
            golden["draw.step0.actor.noise"].unflatten(1, (horizon, width))
        )
        noise = golden["draw.step0.next.noise"].unflatten(1, (horizon, width))
        next_p, next_log_prob = algorithm.distribution(next_prefix).sample(noise)
        chunk = next_p if algorithm.noise_critic is None else algorithm.steered(next_prefix, next_p)
        steered = algorithm.noise_critic or algorithm.critic
        yield "step0.pi", p
        yield "step0.log_prob", log_prob
        yield "step0.next_pi", next_p
        yield "step0.next_log_prob", next_log_prob
        yield "step0.next_noise", algorithm.config.noise_bound * next_p
        yield "step0.next_actions", chunk
        yield "step0.next_q_each", algorithm.target_critic(next_prefix.features, chunk[:, None])
        yield "step0.q_each", algorithm.critic(prefix.features, batch.actions[:, None])
        yield "step0.q_pi_each_before_steps", steered(prefix.features, p[:, None])
        algorithm.rng = Scripted([noise])
        next_value = algorithm.next_value(next_prefix, algorithm.draw_noise(batch, "critic"))
        yield "step0.target", batch.returns + batch.discount * next_value


def acting(golden: Golden, algorithm: Dsrl, batch: ChunkBatch) -> Numbers:
    """Yield the noise that is chosen, and the chunk that comes of it."""
    prefix, spec = algorithm.encode(batch), algorithm.policy.spec
    with torch.no_grad():
        distribution = algorithm.distribution(prefix)
        p, _ = distribution.sample(golden["draw.act.noise"].unflatten(1, (spec.horizon, spec.width)))
        yield "act.noise_chosen", algorithm.config.noise_bound * p
        yield "act.noise_deterministic", algorithm.config.noise_bound * distribution.mode
        yield "act.action", algorithm.steered(prefix, p)


def networks(algorithm: Dsrl) -> dict[str, list[Any]]:
    """Return the entries of each network that a file stores."""
    found = {
        "actor": gaussian(algorithm.actor),
        "critic": ensemble(algorithm.critic),
        "target_critic": ensemble(algorithm.target_critic.network),
        "temp": log_alpha(algorithm.temperature, "log_ent_coef"),
    }
    return found if algorithm.noise_critic is None else found | {"noise_critic": ensemble(algorithm.noise_critic)}


def learner(golden: Golden, **options: Any) -> Dsrl:
    """Return the algorithm with the file's weights and options, in float64."""
    config, sizes = golden.config, golden.sizes
    spec = ActionSpec(sizes["T"], sizes["act"], sizes["act"], sizes["flow_steps"])
    flow = golden.hidden("init.flow") if "init.flow.l0.w" in golden else [4]
    policy = Actor(golden["batch.step0.obs"].shape[-1], spec, flow).double()
    if "init.flow.l0.w" in golden:
        golden.load(dense(policy.head.layers), "init.flow")
    policy.requires_grad_(False)
    found: dict[str, Any] = {
        "gamma": config["gamma"],
        "tau": config["tau"],
        "noise_bound": config["noise_bound"],
        "critic_members": sizes["K"],
        "aggregation": config["combine"],
        "target_entropy": config["target_entropy"] / (sizes["T"] * sizes["act"]),
        "hidden": tuple(golden.hidden("init.critic.0")),
    }
    algorithm = Dsrl(policy, DsrlConfig(**found | options)).double()
    for net, entries in networks(algorithm).items():
        golden.load(entries, "init" if net == "temp" else f"init.{net}")
    return algorithm


def batch_of(golden: Golden, name: str, spec: ActionSpec) -> ChunkBatch:
    """Return a batch of the file: the reward of a chunk is a plain sum, and a chunk is one step of the discount."""
    actions = golden[f"batch.{name}.actions"].unflatten(1, (spec.horizon, spec.width))
    rows = torch.ones(len(actions), dtype=torch.bool)
    obs = golden[f"batch.{name}.obs"]
    has_next = f"batch.{name}.next_obs" in golden
    return ChunkBatch(
        obs={"state": obs},
        next_obs={"state": golden[f"batch.{name}.next_obs"] if has_next else obs},
        actions=actions,
        valid=rows[:, None].expand(-1, spec.horizon),
        returns=golden[f"batch.{name}.rewards"] if has_next else torch.zeros(len(rows)).double(),
        discount=golden.config["gamma"] * (1 - golden[f"batch.{name}.dones"])
        if has_next
        else torch.zeros(len(rows)).double(),
        is_demo=rows,
        is_success=rows,
    )


def count(golden: Golden, kind: str) -> int:
    """Return how many batches of a kind the file has."""
    found = 0
    while f"batch.{kind}{found}.obs" in golden:
        found += 1
    return found
