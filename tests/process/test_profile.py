"""`track.profile` in a real run: the same losses to the last bit, a trace that says where the time went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from packhorse.cli.main import main
from ranks import trained
from tiny import write_tiny

NUM_STEPS = 4
TIMES = ("speed/", "time/", "memory/", "checkpoint/")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    recipe = write_tiny(tmp_path_factory.mktemp("profile"), steps=NUM_STEPS, checkpoint={"every_steps": 3})
    profiled = trained(recipe, "profiled", "track.profile={steps: [2, 3]}")
    return {"plain": trained(recipe, "plain"), "profiled": profiled}


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in lines]


def test_the_profiled_run_has_the_same_losses_and_weights(runs: dict[str, Path]) -> None:
    assert len(metrics(runs["plain"])) == NUM_STEPS + 1
    assert metrics(runs["profiled"]) == metrics(runs["plain"])
    weights = [run / "model" / "model.safetensors" for run in runs.values()]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not (runs["plain"] / "profile").exists()


def test_profile_says_where_the_time_went(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(runs["profiled"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == [2, 3]
    phases = {phase["name"]: phase["seconds"] for phase in found["phases"]}
    assert list(phases) == ["data", "forward", "backward", "optimizer", "save", "other"]
    assert sum(phases.values()) == pytest.approx(found["step_seconds"], rel=0.05)
    # Two layers of 7 products and a head, forward and twice backward, in each pass; the loss computes in chunks.
    products = next(kind for kind in found["kinds"] if kind["name"] == "products")
    assert products["seconds"] > 0
    assert found["idle_share"] is None  # a CPU has no device to wait for


def test_a_run_without_a_trace_is_answered_with_the_fix(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", str(runs["plain"])]) == 2
    message = capsys.readouterr().err
    assert "holds no trace of rank 0" in message
    assert "track.profile={steps: [10, 13]}" in message
