"""A checkpoint that is not what was written is found before training; the one before it is gone on from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cli import curve, packhorse
from packhorse.run_folder.checkpoints.manifest import checkpoint_faults
from tiny import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was stopped at step 4 of 6 by its plan, with checkpoints of steps 2 and 4."""
    place = tmp_path_factory.mktemp("damaged")
    write_tiny(place, checkpoint={"every_steps": 2, "keep_last": 3}, evaluation={"max_answered_rows": 0})
    done = packhorse(place, "train", "tiny.yaml")
    assert done.code == 0, done.err
    return place


def stopped_at_4(folder: Path, name: str) -> Path:
    """A copy of the run as if it had been killed after its second checkpoint."""
    run = folder / "runs" / name
    shutil.copytree(folder / "runs" / "tiny", run)
    shutil.rmtree(run / "checkpoints" / "step-000006")
    shutil.rmtree(run / "model")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "training", "step": 4}))
    return run


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_every_file_of_a_real_checkpoint_is_watched(folder: Path) -> None:
    run = stopped_at_4(folder, "watched")
    checkpoint = run / "checkpoints" / "step-000004"
    names = {path.name for path in files_of(checkpoint)}
    assert {"model.safetensors", "config.json", "optimizer.json", "state.json", "manifest.json"} <= names
    for path in files_of(checkpoint):
        content = path.read_bytes()
        damages = [b"", content[: len(content) // 2]]
        for offset in range(0, len(content), max(1, len(content) // 50)):
            damages.append(content[:offset] + bytes([content[offset] ^ 0x10]) + content[offset + 1 :])
        for damaged in damages:
            path.write_bytes(damaged)
            assert any(path.name in fault for fault in checkpoint_faults(checkpoint)), (path.name, len(damaged))
        path.unlink()
        assert any(path.name in fault for fault in checkpoint_faults(checkpoint))
        path.write_bytes(content)
    assert list(checkpoint_faults(checkpoint)) == []


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one_to_the_same_end(folder: Path) -> None:
    run = stopped_at_4(folder, "damaged")
    weights = run / "checkpoints" / "step-000004" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)

    told = packhorse(folder, "verify", "runs/damaged")
    assert told.code == 1
    assert "step-000004/model/model.safetensors has other content than was written" in told.out
    assert "resumes from step-000002" in told.out

    done = packhorse(folder, "train", "runs/damaged", "--resume")
    assert done.code == 0, done.err
    assert curve(run) == curve(folder / "runs" / "tiny")
    ours, unbroken = ((folder / "runs" / name / "model" / "model.safetensors") for name in ("damaged", "tiny"))
    assert ours.read_bytes() == unbroken.read_bytes()
    log = (run / "logs" / "attempt-2" / "rank-0.log").read_text()
    assert "passed over: step-000004/model/model.safetensors has other content" in log
    assert (run / "checkpoints" / "step-000004.damaged-1").is_dir()
    assert packhorse(folder, "verify", "runs/damaged").code == 0, "step 4 was written again"


def test_where_none_is_sound_nothing_begins_again_unasked(folder: Path) -> None:
    run = stopped_at_4(folder, "hopeless")
    for state in (run / "checkpoints").glob("step-*/state.json"):
        os.truncate(state, 3)
    before = (run / "metrics.jsonl").read_bytes()
    done = packhorse(folder, "train", "runs/hopeless", "--resume")
    assert done.code == 2
    assert "no checkpoint of hopeless can be read" in done.err
    assert "packhorse verify" in done.err
    assert (run / "metrics.jsonl").read_bytes() == before
