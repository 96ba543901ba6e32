"""Check that states and candidates of one batch do not see each other."""

from collections.abc import Iterator

import torch
from torch import Tensor

from poco_vla.conformance.probe import NUM_CANDIDATES, Probe


def check_candidates(probe: Probe) -> Iterator[str]:
    x, t = probe.x, torch.full_like(probe.t, 0.5)
    together = probe.velocity(x, t)
    if gap := probe.gap(together, _each_alone(probe, x, t)):
        yield (
            f"a candidate's velocity depends on the candidates beside it (N = {NUM_CANDIDATES} at once against each "
            f"alone): {gap}. They must not see each other: mask attention between candidates, or fold N into the batch"
        )


def check_times(probe: Probe) -> Iterator[str]:
    x, t = probe.x, probe.t
    together = probe.velocity(x, t)
    if not probe.gap(together, _each_alone(probe, x, t)) or probe.gap(
        probe.velocity(x, t.new_full(t.shape, 0.5)), _each_alone(probe, x, t.new_full(t.shape, 0.5))
    ):
        return  # all well, or candidates mix even at equal times: another check's finding
    shared = {
        "the time of candidate 0 is used for all candidates of a state": t[:, :1].expand_as(t),
        "the time of the last candidate is used for all candidates of a state": t[:, -1:].expand_as(t),
        "the first time of the batch is used for all": t[:1, :1].expand_as(t),
        "the mean time of a state is used for all its candidates": t.mean(dim=1, keepdim=True).expand_as(t),
    }
    cause = next(
        (words for words, times in shared.items() if not probe.gap(together, _each_alone(probe, x, times))),
        "times and candidates are likely put in different orders when N is folded",
    )
    gap = probe.gap(together, _each_alone(probe, x, t))
    yield f"each candidate must be conditioned on its own t[b, j], but {cause}: {gap}. Embed t [B, N], not t[:, 0]"


def check_select(probe: Probe) -> Iterator[str]:
    policy, x, t = probe.policy, probe.x[1:2], probe.t[1:2]
    whole, alone = probe.encode(), probe.encode(slice(1, 2))
    index = torch.tensor([1], device=whole.features.device)
    for words, selected in {
        "select([1])": whole.select([1]),
        "select(torch.tensor([1]))": whole.select(index),
        "select(slice(1, 2))": whole.select(slice(1, 2)),
        "select([1]).to(its device)": whole.select([1]).to(whole.features.device),
    }.items():
        gap = probe.gap(selected.features, alone.features)
        with torch.no_grad():
            gap = gap or probe.gap(policy.velocity(selected, x, t), probe.velocity(x, t, slice(1, 2)))
        if gap:
            yield (
                f"prefix.{words} is not what encoding that state alone gives: {gap}. Either select does not index "
                "every tensor of the prefix (cache, masks, positions, state) on its batch axis, or states see each "
                "other in encode (padding, batch norm)"
            )
            return
    if gap := probe.gap(probe.velocity(probe.x, probe.t)[1:2], probe.velocity(x, t, slice(1, 2))):
        yield f"a state's velocity depends on the other states of the batch: {gap}. Are B and N folded in one order?"
    if not probe.gap(probe.velocity(x, t, slice(0, 1)), probe.velocity(x, t, slice(1, 2))) and probe.gap(
        probe.encode(slice(0, 1)).features, alone.features
    ):
        yield "the velocity is the same in two different states: the prefix does not reach the network"


def _each_alone(probe: Probe, x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([probe.velocity(x[:, [j]], t[:, [j]]) for j in range(x.shape[1])], dim=1)
