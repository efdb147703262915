"""A stop request in each phase, to one rank alone: all save and stop, and the run goes on as if nothing had been."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from cli import PACKHORSE, environment, metrics, packhorse
from packhorse.errors import EXIT_STOPPED
from packhorse.run_folder.checkpoints.manifest import checkpoint_faults
from ranks import run_ranks, to_the_end, trained
from tiny import write_tiny

WORDS = ("parallel.processes=2", "batch.micro=2")
MEASURED = ("train/loss", "train/grad_norm", "train/learning_rate", "evaluation/loss")
# The launcher makes one ending of two where one rank stops before both have met; later the ranks agree themselves.
WITH_LAUNCHER = "load"
# Phase -> steps done when rank 1 is told to stop, and steps of the checkpoint that it leaves. With accumulation: a
# stop in `forward` falls between the passes of a step; the last one finds all steps done, and an evaluation to make up.
PHASES = {
    "load": (0, 0),
    "forward": (1, 2),
    "backward": (2, 3),
    "optimizer": (3, 4),
    "evaluate": (6, 6),
    "save": (9, 10),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(
        tmp_path_factory.mktemp("signals"),
        steps=10,
        checkpoint={"every_steps": 3, "keep_last": 9},
        evaluation={"every_steps": 2, "max_answered_rows": 0},
    )


def test_stopped_in_each_phase_it_goes_on_as_if_nothing_had_been(recipe: Path) -> None:
    unbroken = trained(recipe, "unbroken", *WORDS)
    run = unbroken.with_name("broken")
    for attempt, (phase, (step, saved)) in enumerate(PHASES.items(), start=1):
        asked = f"term-{phase}@{step}:1:{attempt}"
        if phase == WITH_LAUNCHER:
            done = packhorse(recipe.parent, "train", recipe.name, "name=broken", *WORDS, fault=asked)
            assert done.code == EXIT_STOPPED, done.err
        else:
            ended = [record["exit_code"] for record in run_ranks(run, asked, attempt)]
            assert ended == [EXIT_STOPPED] * 2, (asked, ended)
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["step"]) == ("stopped", saved), asked
        checkpoints = sorted((run / "checkpoints").glob("step-*"))
        assert [path.name for path in checkpoints][-1:] == ([f"step-{saved:06d}"] if saved else []), asked
        assert all(list(checkpoint_faults(path)) == [] for path in checkpoints), asked
    to_the_end(run, attempt=len(PHASES) + 1)
    assert [line["step"] for line in metrics(run)] == list(range(11))
    for one, other in zip(metrics(run), metrics(unbroken), strict=True):
        assert [one.get(key) for key in MEASURED] == [other.get(key) for key in MEASURED], one["step"]
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (unbroken / weights).read_bytes()


def test_files_in_the_run_folder_save_and_stop_by_hand(recipe: Path) -> None:
    folder = recipe.parent
    write = ["name=by-hand", *WORDS, "steps=4000", "checkpoint.every_steps=null", "evaluation.every_steps=null"]
    child = subprocess.Popen([str(PACKHORSE), "train", "tiny.yaml", *write], cwd=folder, env=environment())
    run = folder / "runs" / "by-hand"
    wait_for((run / "metrics.jsonl").is_file)
    (run / "CHECKPOINT").touch()
    wait_for(lambda: any((run / "checkpoints").glob("step-*/manifest.json")))
    wait_for(lambda: not (run / "CHECKPOINT").exists())
    assert child.poll() is None, "it saves and goes on"
    (run / "STOP").touch()
    assert child.wait(timeout=120) == 75
    assert not (run / "STOP").exists()
    (run / "STOP").touch()  # seen before the first step is made
    assert packhorse(folder, "train", str(run), "--resume").code == 75
    assert not (run / "STOP").exists(), "else no later attempt would come further"


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)
