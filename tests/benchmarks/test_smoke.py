"""Each benchmark runs in its smallest form, so that none fails on the day on which it is wanted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# What others import, and what engines.py starts.
PARTS = {"contestants", "lab_log", "peer"}
# A word of the table that each prints.
TABLES = {
    "chaos": "bit for bit",
    "checkpoint_scale": "resume",
    "engines": "bare loop, our loss and attention",
    "loader": "middle of epoch 3",
    "loss_memory": "packhorse",
    "merge": "copy of the files",
    "packing": "best_fit",
    "parity": "full",
    "plan_accuracy": "within 10 %",
    "prepare": "packhorse prepare, cold",
    "prepare_memory": "bytes a row",
    "rendezvous": "all pairs",
    "saving": "fsdp2 × 2",
    "start_up": "cold",
    "step_loop": "bare loop, the model's own loss",
    "verdicts": "calibration error",
}


def test_every_benchmark_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == TABLES.keys() | PARTS


@pytest.mark.parametrize("name", TABLES)
def test_it_prints_its_table(name: str) -> None:
    log = FOLDER.parent / "docs" / "lab-log.md"
    before = log.read_bytes()
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    words = [sys.executable, str(FOLDER / f"{name}.py"), "--smoke"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert any(line.startswith("| -") for line in done.stdout.splitlines()), done.stdout[-3000:]
    assert TABLES[name] in done.stdout
    assert log.read_bytes() == before, "a smoke form writes nothing down"
