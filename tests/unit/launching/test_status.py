"""`packhorse status` of a run that was killed, and of one that is running."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path

import pytest
from launching_cases import planned

from packhorse.cli.status import status
from packhorse.run_folder.attempts import AttemptStart, end_attempt, write_attempt_start
from packhorse.run_folder.checkpoints.manifest import RunFacts, bring_to_disk, write_manifest
from packhorse.run_folder.layout import LOCK_FILE
from packhorse.run_folder.status import Status, write_status

NOBODY = 2**22 + 1  # above the kernel's highest process number


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose first attempt lost steps 31 to 37, and whose second reached step 44 with a checkpoint of step 40."""
    monkeypatch.setenv("COLUMNS", "200")
    folder = Path(planned(tmp_path).run_folder)
    attempt(folder, 1, first=0, last=37, pid=NOBODY)
    end_attempt(folder, 1, "lost", "rank 1 was killed by SIGKILL", 150.0)
    attempt(folder, 2, first=30, last=44, pid=NOBODY)
    checkpoint = folder / "checkpoints" / "step-000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    facts = RunFacts(step=40, engine="ddp", world_size=2, plan="p", data="d")
    write_manifest(checkpoint, facts, bring_to_disk(checkpoint, [checkpoint / "state.json"]))
    lines = [{"step": step, "time/elapsed_seconds": step * 2.0, "speed/step_seconds": 2.0} for step in range(1, 45)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_status(folder, Status(state="training", step=44, num_steps=100, attempt=2))
    return folder


def attempt(folder: Path, number: int, first: int, last: int, pid: int) -> None:
    logs = folder / "logs" / f"attempt-{number}"
    logs.mkdir(parents=True, exist_ok=True)
    write_attempt_start(logs, AttemptStart(started_at=100.0 * number))
    beat = {"rank": 0, "pid": pid, "host": socket.gethostname(), "phase": "backward", "step": last, "since": 250.0}
    (logs / "heartbeat-0.json").write_text(json.dumps(beat | {"at": 260.0, "first_step": first}))


def shown(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert status(str(run)) == 0
    return re.sub(r" +", " ", capsys.readouterr().out)


def test_a_run_that_was_killed_whole_is_not_shown_as_training(run: Path, capsys) -> None:
    (run / LOCK_FILE).write_text(json.dumps({"pid": NOBODY, "host": socket.gethostname(), "since": "x"}))
    text = shown(run, capsys)
    assert "state killed at " in text
    assert "rank 0 in phase backward of step 45" in text
    assert "checkpoint step 40 is the newest complete one" in text


def test_lost_steps_and_ettr_count_from_the_newest_checkpoint(run: Path, capsys) -> None:
    """51 steps were made, of which 7 twice and 4 are lost; 80 s of 160 s were spent in steps that count."""
    text = shown(run, capsys)
    assert "attempts 1: steps 0 to 37 in 50 s, lost: rank 1 was killed by SIGKILL" in text
    assert "attempts 2: steps 30 to 44 in 60 s, killed" in text
    assert "lost 11 of 51 steps were lost or repeated, about 22 s" in text
    assert "ETTR 78.4% of the steps count; 50.0% of the 160 s since the first start" in text


@pytest.mark.parametrize("alive", ["rank", "launcher"])
def test_a_run_under_way_is_shown_as_such(run: Path, capsys, alive: str) -> None:
    if alive == "rank":
        attempt(run, 2, first=30, last=44, pid=os.getpid())
    else:
        (run / LOCK_FILE).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": "x"}))
    text = shown(run, capsys)
    assert "state training" in text
    if alive == "rank":
        assert "2: steps 30 to 44, runs since" in text
        assert "lost 7 of 51 steps" in text


def test_ranks_of_another_host_that_spoke_just_now_are_dead_once_their_attempt_has_ended(run: Path, capsys) -> None:
    beat = {"rank": 0, "pid": 1, "host": "elsewhere", "phase": "backward", "step": 44, "since": time.time()}
    heartbeat = run / "logs" / "attempt-2" / "heartbeat-0.json"
    heartbeat.write_text(json.dumps(beat | {"at": time.time(), "first_step": 30}))
    assert "2: steps 30 to 44, runs since" in shown(run, capsys)
    end_attempt(run, 2, "failed", "rank 0 failed: x", 300.0)
    assert "2: steps 30 to 44 in 100 s, failed: rank 0 failed: x" in shown(run, capsys)
