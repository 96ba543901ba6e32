"""Each stage of an update, traced by torch.compile: one graph, not traced again for another batch, the same results.

`aot_eager` is the tracing without a code generator, which would take half a minute per stage here.
"""

import sys

import torch
from toy_policies import ToyPolicy, toy_batch

from poco_vla import GlobalBatchRNG, Poco, PocoConfig
from poco_vla.algorithms import Stage


def compare(stage: Stage) -> None:
    """Loss and gradients of the traced update are the plain one's, to float64's rounding."""
    config = PocoConfig(critic_hidden=(8, 8), num_candidates=4, zeta=1.5, anchor="demos", drop_crossing=True)
    poco = Poco(ToyPolicy(dtype=torch.float64), config, GlobalBatchRNG(torch.Generator().manual_seed(0))).double()
    compiled = torch.compile(poco, backend="aot_eager", fullgraph=True, dynamic=False)
    parameters = [p for p in poco.parameters() if p.requires_grad]
    for seed in (0, 1):
        batch = toy_batch(poco.policy, 6, seed=seed, dtype=torch.float64)
        plan = poco.draw_noise(batch, stage)
        results = []
        for module in (poco, compiled):
            loss, metrics = module(batch, stage, plan)
            results.append((loss, metrics, torch.autograd.grad(loss, parameters, allow_unused=True)))
        torch.testing.assert_close(results[1], results[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(batch, stage, poco.draw_noise(batch, stage))


if __name__ == "__main__":
    compare(*sys.argv[1:])
