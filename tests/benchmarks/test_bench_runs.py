"""The benchmark runs, at sizes that take seconds, and counts FLOPs as torch does. No time is asserted."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from poco_vla import Poco, PocoConfig

sys.path.insert(0, str(Path(__file__).parent))
import measure
from measure import Size

TINY = Size(batch=6, width=16, layers=3, candidates=4, flow_steps=3, horizon=2, critics=2, action_dim=3, state_dim=7)


@pytest.mark.slow
def test_every_section_runs_and_is_kept(tmp_path, capsys):
    sizes = [f"--size.{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]
    common = ["--quick", "--threads", "1", *sizes, "--replay-steps=2000", f"--output={tmp_path}"]
    path = measure.main(["update", "loop", *common])
    assert measure.main(["replay", *common]) == path
    kept = json.loads(path.read_text())
    assert {"device", "update", "loop", "replay"} == set(kept)
    for section in ("update", "loop", "replay"):
        assert {"date", "torch", "rows", "seconds"} == set(kept[section])
        figures = [v for row in kept[section]["rows"] for v in row.values() if not isinstance(v, str)]
        assert figures
        assert all(math.isfinite(v) and v > 0 for v in figures)
    assert [row["what"] for row in kept["update"]["rows"]][:3] == ["BC", "critic (warm-up)", "POCO"]
    assert "x slower half alone" in kept["loop"]["rows"][-1]
    assert "POCO" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["sft", "warmup", "online"])
def test_flops_are_those_that_torch_counts(stage):
    """Counted by hand from the layer sizes; torch counts the products that run. The hand count takes a backward pass as
    two forward passes, a little too much: no gradient is formed for a network's inputs."""
    poco = Poco(
        measure.mlp(TINY),
        PocoConfig(num_candidates=4, critic_hidden=(16,) * 3, critic_members=2),
    )
    batch = measure.random_batch(TINY, "cpu")
    with FlopCounterMode(display=False) as counter:
        poco(batch, stage)[0].backward()
    assert TINY.flops(stage) == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert TINY.flops(stage) >= counter.get_total_flops()


def test_the_papers_size_costs_what_it_is_known_to_cost():
    """About 213 GFLOP for critic and actor, 136 of them for sampling the candidates (by an independent count)."""
    size = Size()
    assert size.flops("online") / 1e9 == pytest.approx(213, rel=0.03)
    sampling = size.flow_steps * size.actor_flops(size.batch * size.candidates, size.batch)
    assert sampling / 1e9 == pytest.approx(136, rel=0.03)


def test_the_loop_over_samples_gives_what_the_replay_gives():
    """A baseline that does less work would be no baseline: same shapes, same kinds of numbers."""
    import numpy as np

    from poco_vla.data import Replay

    episodes = measure.random_episodes(TINY, 400, length=20)
    replay = Replay(horizon=TINY.horizon, gamma=0.99)
    replay.extend(episodes, is_demo=True)
    raw = replay.sample(TINY.batch, np.random.default_rng(0))
    state, after, actions, valid, returns, discount = measure.sample_one_by_one(
        episodes, TINY, np.random.default_rng(0)
    )
    key = "observation.state"
    pairs = [(state, raw.obs[key]), (after, raw.next_obs[key]), (actions, raw.actions), (valid, raw.valid)]
    for a, b in [*pairs, (returns, raw.returns), (discount, raw.discount)]:
        assert a.shape == b.shape
        assert a.dtype == b.dtype


def test_settings_are_put_back():
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with measure.thread_count(1), measure.tf32(True):
        assert torch.get_num_threads() == 1
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
