"""A run goes on after the loss of a rank, by itself, or of its launcher, when asked to: as if nothing had been."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cli import PACKHORSE, ROOM, curve, environment, metrics, packhorse, processes_that_name
from packhorse.run_folder.attempts import read_attempts
from ranks import trained
from tiny import write_tiny

STEPS = 30
WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that nothing happened to."""
    place = tmp_path_factory.mktemp("restarts")
    recipe = write_tiny(
        place,
        steps=STEPS,
        batch={"length": 256, "packs": 64},  # steps that are long enough to be caught in their midst
        parallel={"processes": 2},
        checkpoint={"every_steps": 5},
        evaluation={"max_answered_rows": 0},
    )
    trained(recipe, "unbroken")
    return place


def assert_equal_to_unbroken(run: Path) -> None:
    unbroken = run.parent / "unbroken"
    assert [line["step"] for line in metrics(run)] == list(range(STEPS + 1))
    assert curve(run) == curve(unbroken)
    assert curve(run, "train/grad_norm") == curve(unbroken, "train/grad_norm")
    assert (run / WEIGHTS).read_bytes() == (unbroken / WEIGHTS).read_bytes()


def test_a_killed_rank_is_gone_on_from_by_itself_to_the_same_end(folder: Path) -> None:
    done = packhorse(folder, "train", "tiny.yaml", "name=killed", "--restarts", "2", fault="kill@17:1")
    assert done.code == 0, done.err
    (line,) = [line for line in done.err.splitlines() if "starting again" in line]
    assert line.startswith(
        "runs/killed: rank 1 was killed by SIGKILL in phase data of step 18; starting again from step "
    )
    assert line.endswith("(restart 1 of 2)")
    run = folder / "runs" / "killed"
    assert_equal_to_unbroken(run)
    first, second = read_attempts(run)
    assert (first.outcome, first.first_step, first.last_step) == ("lost", 0, 17)
    assert (second.outcome, second.last_step) == ("finished", STEPS)
    assert second.first_step in (10, 15)  # that of step 15 may still have been written
    told = packhorse(folder, "status", "runs/killed").out
    lost = 17 - second.first_step
    assert f"{lost} of {STEPS + lost} steps were lost or repeated" in told
    assert f"{1 - lost / (STEPS + lost):.1%} of the steps count" in told


def test_the_same_exception_at_the_same_step_is_not_tried_a_third_time(folder: Path) -> None:
    done = packhorse(folder, "train", "tiny.yaml", "name=fails", "--restarts", "5", fault="raise@3:1:9")
    assert done.code == 1
    assert "not started again: the previous attempt failed at the same step with the same message" in done.err
    assert "RuntimeError: a fault was injected here" in done.err
    assert [attempt.outcome for attempt in read_attempts(folder / "runs" / "fails")] == ["failed", "failed"]


def test_without_its_launcher_no_rank_lives_on_and_the_run_goes_on_to_the_same_end(folder: Path) -> None:
    """Stopped before its ranks are up, then by SIGUSR2, then its launcher killed; then to the end."""
    run = folder / "runs" / "orphaned"
    child = started(folder, "tiny.yaml", "name=orphaned")
    wait_for((run / "logs" / "attempt-1" / "stderr.log").exists)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 75
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert processes_that_name(run) == []

    child = started(folder, str(run), "--resume")
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) > 2)
    child.send_signal(signal.SIGUSR2)
    child.send_signal(signal.SIGUSR2)  # a warning that comes twice is no second Ctrl-C
    assert child.wait(timeout=60) == 75
    stopped_at = json.loads((run / "status.json").read_text())["step"]
    assert 0 < stopped_at < STEPS
    assert (run / "checkpoints" / f"step-{stopped_at:06d}").is_dir()

    child = started(folder, str(run), "--resume")
    wait_for(lambda: metrics(run)[-1]["step"] > stopped_at)
    assert len(processes_that_name(run)) == 3  # two ranks, and torch's agent
    child.kill()
    child.wait()
    killed = time.monotonic()
    wait_for(lambda: not processes_that_name(run))
    assert time.monotonic() - killed < 5 * ROOM
    assert "killed at " in packhorse(folder, "status", str(run)).out

    done = packhorse(folder, "train", str(run), "--resume")
    assert done.code == 0, done.err
    assert_equal_to_unbroken(run)
    assert [attempt.outcome for attempt in read_attempts(run)] == ["stopped", "stopped", "killed", "finished"]


def started(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(PACKHORSE), "train", *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
