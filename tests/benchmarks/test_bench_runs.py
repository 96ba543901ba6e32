"""The benchmarks run, at sizes that take seconds, and count as torch does. No time is asserted."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from poco_vla import Poco, PocoConfig

sys.path.insert(0, str(Path(__file__).parent))
import bench_algorithms
import bench_groot
import bench_pi05
import bench_prefixes
import bench_startup
import measure
from measure import Size

TINY = Size(batch=6, width=16, layers=3, candidates=4, flow_steps=3, horizon=2, critics=2, action_dim=3, state_dim=7)


@pytest.mark.exhaustive
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
    assert [row["what"] for row in kept["update"]["rows"]][:3] == ["BC", "critic (warm-up)", "POCO, batch at once"]
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


def test_an_algorithms_count_is_that_of_its_products():
    """POCO's, by the count of its own benchmark; oneDNN's products count like torch's."""
    made = bench_algorithms.Measured("bc", TINY, "cpu")
    flops, moved = made.count()
    assert 0.85 * TINY.flops("sft") <= flops <= TINY.flops("sft")
    assert moved == pytest.approx(TINY.bytes("sft"), rel=0.15)


def test_every_algorithm_is_measured():
    rows = bench_algorithms.main(["--quick", "bc", "fql", "rlpd", "vmpo"])
    assert [row["algorithm"] for row in rows] == ["bc", "fql", "rlpd", "vmpo"]
    assert all(math.isfinite(v) and v > 0 for row in rows for v in row.values() if not isinstance(v, str))


def test_the_papers_size_costs_what_it_is_known_to_cost():
    """About 213 GFLOP for critic and actor, 136 of them for sampling the candidates (by an independent count)."""
    size = Size()
    assert size.flops("online") / 1e9 == pytest.approx(213, rel=0.03)
    assert size.sampling_flops() / 1e9 == pytest.approx(136, rel=0.03)


@pytest.mark.parametrize("stage", ["sft", "warmup", "online"])
def test_bytes_are_those_of_the_weights(stage):
    """Counted by hand from the layer sizes; here from the parameters, biases and norms too, which are few."""
    size = Size()
    poco = Poco(measure.mlp(size), PocoConfig(critic_hidden=(512,) * 4))
    actor, critic = (sum(p.numel() for p in part.parameters()) for part in (poco.policy.head, poco.critic))
    expected = {"sft": 10 * actor, "warmup": 10 * critic + actor + 3 * critic, "online": 10 * actor + 13 * critic}
    assert size.bytes(stage) == pytest.approx(4 * expected[stage], rel=0.01)


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


@pytest.mark.exhaustive
@pytest.mark.slow
def test_start_and_data_are_measured(tmp_path, monkeypatch):
    starts = {"import torch": ("-c", "pass"), "poco-vla --help": bench_startup.STARTS["poco-vla --help"]}
    monkeypatch.setattr(bench_startup, "STARTS", starts)
    kept = json.loads(bench_startup.main(["--quick", f"--output={tmp_path}"]).read_text())
    assert {"device", "startup start", "startup data", "startup video"} == set(kept)
    for section in kept.keys() - {"device"}:
        figures = [v for row in kept[section]["rows"] for v in row.values() if not isinstance(v, str)]
        assert all(math.isfinite(v) and v > 0 for v in figures)


def test_a_dataset_that_is_repeated_holds_its_episodes_again_and_again(tmp_path):
    """And LeRobot's own reading of a frame agrees."""
    from poco_vla.config import DatasetConfig
    from poco_vla.data import open_dataset, read_episodes
    from poco_vla.recording.recorder import write_dataset

    wrote = [bench_startup.episode(seed, 4) for seed in range(2)]
    root = write_dataset(wrote, tmp_path / "data", fps=10, repo_id="local/x")
    bench_startup.repeat(root, 3)
    config = DatasetConfig(repo_id="local/x", root=root)
    dataset = open_dataset(config)
    found = read_episodes(dataset, config, (bench_startup.STATE,))
    assert (len(dataset), dataset.num_episodes, len(found)) == (24, 6, 6)
    for episode, expected in zip(found, wrote * 3, strict=True):
        assert (episode.action == expected.action).all()
        assert (episode.obs[bench_startup.STATE] == expected.obs[bench_startup.STATE]).all()
    assert (dataset[23]["action"].numpy() == wrote[1].action[3]).all()
    assert dataset[23]["episode_index"] == 5


PI05 = ["--tiny", "--depth=1", "--states=1", "--candidates=2", "--horizon=3", "--cameras=1", "--rows=1", "--rounds=1"]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_pi05_is_measured_against_the_same_losses_and_samples(tmp_path, capsys):
    """Both codes compute the same thing, or the ratio between them would say nothing."""
    file = tmp_path / "figures.json"
    bench_pi05.main([*PI05, "--threads=1", f"--json={file}"])
    kept = json.loads(file.read_text())
    assert {"case", "torch", "args", "date", "gradient", "sampling", "update", "trainer"} == set(kept)
    gradient, sampling, update = (
        {row["what"]: row for row in kept[name]} for name in ("gradient", "sampling", "update")
    )
    assert [row["what"] for row in kept["trainer"] if "peak MB" in row] == ["ours", "LeRobot, cache repeated x2"]
    losses = [row["loss, off by"] for row in gradient.values() if "loss, off by" in row]
    assert len(losses) == 6
    assert max(losses) < 1e-5
    joint, ours, kept_all = (
        gradient[n] for n in ("LeRobot, joint, prefix repeated x2", "ours", "ours, all kept for backward")
    )
    assert joint["saved MB"] > kept_all["saved MB"] > ours["saved MB"] > 0
    assert max(value for row in sampling.values() for name, value in row.items() if name.startswith("off by")) < 1e-4
    stages = [row for name, row in update.items() if name not in {"update", "one large product"}]
    assert len(stages) == 8
    for column in ("ms", "GFLOP"):
        assert sum(row[column] for row in stages) == pytest.approx(update["update"][column])
    assert "One update of POCO" in capsys.readouterr().out


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_heads_of_the_trainer_compute_the_same(dtype, tmp_path):
    """Velocity and its gradient, on states of different lengths; bfloat16 keeps 8 bits."""
    case = bench_pi05.Case.of(bench_pi05.Args(tiny=True, depth=1, states=2, candidates=3, horizon=3, dtype=dtype))
    trainer = bench_pi05.trainer_of(case, tmp_path)
    try:
        policy, (chunks, noise, t) = trainer.parts.policy, case.draws()
        prefix = policy.encode(case.observations(2))
        found = []
        for head in (bench_pi05.nullcontext(), bench_pi05.stock_head(trainer)):
            policy.zero_grad()
            with head:
                velocity = policy.velocity(prefix, noise + chunks, t)
            velocity.square().mean().backward()
            found.append((velocity.detach(), policy.policy.model.action_in_proj.weight.grad.clone()))
    finally:
        trainer.close()
    for ours, theirs in zip(*found, strict=True):
        tolerance = 1e-4 if dtype == "float32" else 0.05
        assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


GROOT = ["--tiny", "--states=2", "--candidates=3", "--horizon=4", "--rounds=1", "--rows=4", "--threads=1"]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_groot_is_measured_against_the_same_samples_and_losses(tmp_path, capsys):
    file = tmp_path / "figures.json"
    bench_groot.main(["sampling", "gradient", "latency", "update", "memory", *GROOT, f"--json={file}"])
    kept = json.loads(file.read_text())
    assert {"case", "torch", "args", "date", "sampling", "gradient", "latency", "update"} == set(kept)
    sampling, gradient = ({row["what"]: row for row in kept[name]} for name in ("sampling", "gradient"))
    names = {"ours", "features cached", "naive", "features cached, weights gathered"}
    assert set(sampling) == names
    assert max(value for row in sampling.values() for name, value in row.items() if name.startswith("off by")) < 1e-5
    assert max(gradient[name]["loss, off by"] for name in names) < 1e-5
    assert gradient["ours"]["saved MB"] < gradient["ours, all kept for backward"]["saved MB"]
    assert gradient["ours, all kept for backward"]["saved MB"] < gradient["features cached"]["saved MB"]
    assert "One update of POCO" in capsys.readouterr().out


@pytest.mark.exhaustive
@pytest.mark.slow
def test_groot_flops_are_those_of_the_variants_that_run():
    """Counted on the meta device from their parts, and as they run."""
    case = bench_groot.Case.of(bench_groot.Args(tiny=True, states=2, candidates=3, horizon=4, rows=6))
    obs, draws, steps = case.observations(2), case.draws(), case.adapter.spec.flow_steps
    valid = torch.ones(2, 4, dtype=torch.bool)
    noise = draws[1]

    def ours():
        with torch.no_grad():
            bench_groot.integrate(case.adapter, case.adapter.encode(obs), noise, steps)

    def our_gradient():
        chunks, noise, t = draws
        prefix = case.adapter.encode(obs)
        bench_groot.flow_errors(case.adapter, prefix, chunks, valid, noise=noise, t=t).mean().backward()

    flops = bench_groot.counts(case)[0]
    runs = {
        "cached": bench_groot.Baseline(case, obs, cached=True),
        "naive": bench_groot.Baseline(case, obs, cached=False),
    }
    assert flops.sampling(steps)["ours"] == bench_groot.counted(ours)
    assert flops.gradients()["ours"] == bench_groot.counted(our_gradient)
    for name, run in runs.items():
        assert flops.sampling(steps)[name] == bench_groot.counted(lambda run=run: run.sample(noise))
        assert flops.gradients()[name] == bench_groot.counted(
            lambda run=run: [one.backward() for one in run.losses(*draws)]
        )


@pytest.mark.exhaustive
@pytest.mark.slow
def test_groot_at_full_size_costs_what_its_specification_says():
    case = bench_groot.Case.of(bench_groot.Args(tiny=True, candidates=32))
    for row in bench_groot.bench_expected(case):
        over_naive, over_cached = bench_groot.SPECIFIED[row["views"]]
        assert row["x naive"] == pytest.approx(over_naive, rel=0.02)
        assert row["x cached"] == pytest.approx(over_cached, rel=0.02)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_prefix_store_is_measured_against_none_and_against_plain_copies(capsys):
    figures = bench_prefixes.main(["--quick", "--threads=1"])
    assert set(figures) == {"update", "bytes", "fp8", "sharing"}
    assert all(row["ms"] > 0 for row in figures["update"])
    sizes = {row["what"]: row["MB a state"] for row in figures["bytes"]}
    # 18 layers, keys and values of 256 numbers of 2 bytes; features of 2,048 numbers of 4.
    assert sizes["pi0.5, 572 tokens (from shapes)"] == pytest.approx((18 * 2 * 572 * 256 * 2 + 2048 * 4) / 1e6)
    assert max(row["fp8, mean change"] for row in figures["fp8"]) < 0.1
    shares = [row["x one by one"] for row in figures["sharing"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.6
    assert "Gradients of one update" in capsys.readouterr().out


def test_stages_leave_out_what_is_inside_them():
    """A clock that is read at 0, 1, 2 ... The whole runs from 0 to 7, the first sample from 1 to 2, the critic from 3
    to 6, and the sample in it, which has a name of its own, from 4 to 5."""
    ticks = iter(range(100))
    clock = bench_pi05.Clock("cpu", lambda: next(ticks))
    sample = clock.timed(lambda: None, "outside", "inside")
    with clock.span("whole"):
        sample()
        with clock.span("critic"):
            sample()
    assert clock.stages() == {"outside": 1, "inside": 1, "critic": 2, "whole": 7 - 1 - 3}


def test_saved_bytes_are_those_of_each_storage_once():
    """y = (x w)^2 keeps x (8 floats), x w (4 floats, read twice) and w, which is a parameter; `held` adds 2 floats."""
    case = bench_pi05.Case(bench_pi05.Args(), None, 1, "")
    weight = torch.nn.Parameter(torch.ones(2, 1))
    x = torch.ones(4, 2)

    def way():
        product = x @ weight
        yield (product * product).sum()

    found = bench_pi05.backward(way, [weight], [torch.ones(2)], case)
    assert found["bytes"] == 4 * (8 + 4 + 2)
    assert found["loss"] == 16
    assert weight.grad is not None


def test_batches_grow_by_powers_of_two_and_the_steps_between():
    assert list(bench_pi05.sizes(16)) == [1, 2, 3, 4, 6, 8, 12, 16]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_an_update_that_does_not_fit_is_told_from_one_that_does(monkeypatch):
    args = bench_pi05.Args(tiny=True, depth=1, candidates=2, horizon=3, cameras=1)
    case = bench_pi05.Case.of(args)
    assert bench_pi05.update_within(case, 2)["states/s"] > 0

    def full(update, reading):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench_pi05.Update, "run", full)
    assert bench_pi05.update_within(case, 2) is None
    assert all(parameter.grad is None for parameter in case.adapter.parameters())
