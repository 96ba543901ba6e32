"""Counts of an update without a GPU: those by hand, and those that are kept within their bounds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import bench_counts
from bench_counts import BOUNDS, KEPT, RATES, Kernel, estimate, exceeded
from measure import Size

ROOT = Path(__file__).parents[2]


def test_the_mlps_products_are_counted_as_by_hand():
    """10 Euler steps of 256 x 32 candidates. By hand a backward pass is two forward passes: a little too much."""
    found = bench_counts.count("mlp")
    size = Size()
    assert found["phases"]["E-step"]["fp32"] == pytest.approx(10 * size.actor_flops(256 * 32, 256), rel=0.01)
    whole = sum(part["fp32"] for part in found["phases"].values())
    assert 0.9 * size.flops("online") < whole <= size.flops("online")
    assert found["waits"] == 0


def test_seconds_are_the_longer_of_products_bytes_and_launches():
    """67 TFLOP in float32 are a second of an H200 at best, and 4/3 of one eagerly; a kernel that waits comes after."""
    rates = RATES["H200"]
    product, copy = Kernel("", int(67e12), "fp32", 8, 1), Kernel("", 0, "", int(4.3e12), 1)
    assert estimate([product, copy], rates, "ideal") == pytest.approx(2, rel=1e-4)
    assert estimate([product, copy], rates, "eager") == pytest.approx(8 / 3, rel=1e-4)
    small = [Kernel("", 0, "", 8, 1)] * 1000
    assert estimate(small, rates, "eager") == pytest.approx(8e-3, rel=1e-2)  # the host is behind
    assert estimate([product, *small], rates, "ideal") == pytest.approx(1.0015, rel=1e-4)  # it is ahead


def test_kept_counts_are_within_their_bounds():
    kept = json.loads(KEPT.read_text())
    assert kept.keys() >= BOUNDS.keys()
    assert [text for name, found in kept.items() for text in exceeded(name, found)] == []
    worse = kept["pi05"] | {"launches": 10 * kept["pi05"]["launches"]}
    assert "pi05: launches is" in exceeded("pi05", worse)[0]


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", list(BOUNDS))
def test_counts_are_those_that_are_kept(name):
    found, kept = bench_counts.count(name), json.loads(KEPT.read_text())[name]
    assert found["launches"] == pytest.approx(kept["launches"], rel=0.005)
    assert found["peak"] == pytest.approx(kept["peak"], rel=0.01)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_make_gpu_runs_through_on_a_cpu(tmp_path):
    """Each part once, tiny; a second call repeats nothing."""
    command = ["bash", ".ci/gpu", "--rehearse"]
    environment = {"OUT": str(tmp_path), "PYTHON": sys.executable}

    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "is done" in done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {part: one["exit_code"] for part, one in found.items()} == dict.fromkeys(
        ("test_gpu", "precision", "attention", "pi05", "groot", "latency", "mlp", "poco"), 0
    )
    assert all(found[part]["figures"] for part in ("precision", "attention", "pi05", "groot", "latency", "mlp"))
