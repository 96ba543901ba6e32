"""bc: flow behaviour cloning of ColinQiyangLi/qc."""

import torch
from golden import Golden, Numbers, Scripted, actor, chunk_batch, chunk_window, dense, drawn, gradients, values

from poco_vla.algorithms.imitation import Imitation, ImitationConfig


def bc(golden: Golden) -> Numbers:
    """Yield the losses, gradients and parameters of whole updates, and a sample at the initial weights."""
    yield from chunk_window(golden)
    batch, policy = chunk_batch(golden), actor(golden)
    algorithm = Imitation(policy, ImitationConfig(anchor="all", error_mean="all"))
    entries = dense(policy.head.layers)
    if "draw.act.noise" in golden:
        with drawn(golden["draw.act.noise"]):
            yield "act.action", algorithm.act(policy.encode(batch.obs))
    optimizer = torch.optim.Adam(algorithm.parameter_groups(actor_lr=golden.config["lr"]))
    for u in golden.updates():
        draw = f"draw.update{u}.bc"
        algorithm.rng = Scripted([golden[f"{draw}.x0"]], [golden[f"{draw}.t"]])
        loss, _ = algorithm(batch, "online")
        optimizer.zero_grad()
        loss.backward()
        yield f"update{u}.bc_loss", loss
        yield from gradients(entries, f"update{u}.grad.actor")
        optimizer.step()
        yield from values(entries, f"update{u}.actor")
