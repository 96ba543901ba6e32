"""Runs side by side in processes of their own: order, failure, interruption."""

import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from poco_vla.comparison.member import Member, last_lines
from poco_vla.comparison.schedule import ATTEMPTS, Schedule, cpu_seconds_of

ENDS = (
    "import json, pathlib; f = pathlib.Path({folder!r}); f.mkdir(parents=True); (f / 'result.json').write_text('{{}}')"
)
FAILS = "print('one'); print('the reason'); raise SystemExit(3)"
SAVES = """
import os, pathlib, signal, sys, time
saved = pathlib.Path({folder!r})
def save(*_):
    (saved / "saved").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
saved.mkdir(parents=True)
(saved / "begun").touch()
while True:
    time.sleep(0.01)
"""


def member(root, name, program, needs=None):
    folder = root / name / "seed0"
    command = (sys.executable, "-c", program.format(folder=str(folder)))
    return Member(name, 0, folder, root / "logs" / f"{name}.log", command, needs, 10)


def test_a_run_begins_after_the_one_that_it_starts_from_and_a_finished_one_is_left(tmp_path):
    sft = member(tmp_path, "sft", ENDS)
    after = member(
        tmp_path, "qc", f"import pathlib; assert pathlib.Path({str(sft.folder)!r}).is_dir(); " + ENDS, sft.folder
    )
    said = []
    Schedule(tmp_path, [after, sft], 2, said.append).run(every=0.01)
    assert [line.partition(" after")[0] for line in said] == [
        *("sft seed 0 begins", "sft seed 0 is done", "qc seed 0 begins", "qc seed 0 is done"),
    ]
    again = []
    Schedule(tmp_path, [sft, after], 2, again.append).run(every=0.01)
    assert again == []
    noted = [json.loads(line) for line in (tmp_path / ATTEMPTS).read_text().splitlines()]
    assert [(line["run"], line["resumed"], line["status"]) for line in noted] == [
        *(("sft/seed0", False, 0), ("qc/seed0", False, 0)),
    ]


def test_a_failed_run_is_told_with_the_end_of_its_log_and_the_others_go_on(tmp_path):
    bad = member(tmp_path, "sft", FAILS)
    left_out, other = member(tmp_path, "qc", ENDS, bad.folder), member(tmp_path, "rlpd", ENDS)
    said = []
    schedule = Schedule(tmp_path, [bad, left_out, other], 1, said.append)
    schedule.run(every=0.01)
    assert schedule.states == {bad: "failed", left_out: "is left out", other: "is done"}
    assert schedule.failed == [bad]
    text = "\n".join(said)
    assert "sft seed 0 failed with status 3" in text
    assert "    one\n    the reason" in text
    assert "qc seed 0 is left out: sft seed 0, from which it starts, failed" in text
    assert last_lines(bad.log, 1) == ["the reason"]


def test_ctrl_c_lets_every_run_save(tmp_path):
    members = [member(tmp_path, name, SAVES) for name in ("qc", "poco", "bc")]
    schedule = Schedule(tmp_path, members, 2, lambda text: None)

    def interrupt():
        while not all((one.folder / "begun").exists() for one in members[:2]):
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        schedule.run(every=0.01)
    thread.join()
    assert [schedule.states[one] for one in members] == ["stopped", "stopped", "waits"]
    assert [(one.folder / "saved").exists() for one in members] == [True, True, False]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system shows no processes")
def test_processor_time_is_that_of_all_processes_of_a_session():
    import subprocess

    burn = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); input()"
    outer = subprocess.Popen([sys.executable, "-c", nested], stdin=subprocess.PIPE, start_new_session=True)
    try:
        most = 0.0
        end = time.monotonic() + 60
        while most < 0.2 and time.monotonic() < end:
            found = cpu_seconds_of(outer.pid)
            most = max([most, *(seconds for pid, seconds in found.items() if pid != outer.pid)])
        assert most >= 0.2
    finally:
        outer.communicate(b"\n")
