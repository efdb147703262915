"""A folder that differs from its manifest by a byte is no checkpoint."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from packhorse.run_folder.checkpoints.listing import (
    checkpoints_in,
    complete_checkpoints,
    find_newest_sound,
    remove_checkpoint,
    superseded,
)
from packhorse.run_folder.checkpoints.manifest import (
    RunFacts,
    bring_to_disk,
    checkpoint_faults,
    files_below,
    read_manifest,
    write_manifest,
)
from packhorse.run_folder.layout import MANIFEST_FILE

FACTS = RunFacts(step=4, engine="ddp", world_size=2, plan="p", data="d")
FILES = {"model/model.safetensors": os.urandom(4096), "model/config.json": b"{}", "state.json": b'{"step": 4}'}


def write(folder: Path, step: int) -> Path:
    checkpoint = folder / f"step-{step:06d}"
    for name, content in FILES.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content)
    write_manifest(checkpoint, FACTS, bring_to_disk(checkpoint, files_below(checkpoint)))
    return checkpoint


def test_the_manifest_holds_every_file_with_its_sha256(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, 4))
    assert manifest is not None
    expected = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in FILES.items()}
    assert {name: (record.bytes, record.sha256) for name, record in manifest.files.items()} == expected
    assert manifest.run == FACTS
    assert list(checkpoint_faults(tmp_path / "step-000004")) == []


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["delete", "empty", "half"])
def test_a_file_that_is_gone_or_cut_is_named(name: str, damage: str, tmp_path: Path) -> None:
    path = write(tmp_path, 4) / name
    if damage == "delete":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    (fault,) = checkpoint_faults(tmp_path / "step-000004")
    assert name in fault


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, 4) / "model" / "model.safetensors"
    content = path.read_bytes()
    for offset in range(0, len(content), 64):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
        (fault,) = checkpoint_faults(tmp_path / "step-000004")
        assert "model/model.safetensors has other content" in fault


def test_what_the_run_did_not_write_is_a_fault(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 4)
    (checkpoint / "model" / "optimizer.pt").write_bytes(b"pickle")
    (fault,) = checkpoint_faults(checkpoint)
    assert "model/optimizer.pt was not written by the run" in fault


def test_a_link_in_place_of_a_file_is_a_fault_even_to_equal_bytes(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 4)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(checkpoint / "state.json", elsewhere)
    (checkpoint / "state.json").symlink_to(elsewhere)
    assert any("state.json" in fault for fault in checkpoint_faults(checkpoint))


def test_the_newest_sound_one_is_returned_with_the_faults_of_newer_ones(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    (tmp_path / "step-000008" / MANIFEST_FILE).unlink()
    (tmp_path / "step-000006" / "state.json").write_bytes(b"!" * 11)
    found = find_newest_sound(tmp_path)
    assert found.checkpoint == tmp_path / "step-000004"
    assert [fault.split("/")[0].split()[0] for fault in found.passed_over] == ["step-000008", "step-000006"]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000002", "step-000004", "step-000006"]


def test_no_sound_checkpoint_is_reported(tmp_path: Path) -> None:
    write(tmp_path, 2).joinpath("state.json").unlink()
    found = find_newest_sound(tmp_path)
    assert found.checkpoint is None
    assert len(found.passed_over) == 1


def test_a_temporary_folder_or_a_link_is_no_checkpoint_and_steps_are_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        write(tmp_path, step)
    (tmp_path / ".step-1000001.tmp").mkdir()
    (tmp_path / "step-1000002.tmp").mkdir()
    (tmp_path / "step-1000003").symlink_to(tmp_path / "step-1000000")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-999999", "step-1000000"]


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    checkpoints = [write(tmp_path, step) for step in (2, 4, 6, 8)]
    assert [path.name for path in superseded(checkpoints, 2, "step-000002")] == ["step-000004"]
    assert superseded(checkpoints, 9, None) == []
    remove_checkpoint(checkpoints[1])
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000002", "step-000006", "step-000008"]
