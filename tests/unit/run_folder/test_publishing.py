"""Files of the ranks become a checkpoint only if all are there, as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.errors import UserError
from packhorse.run_folder.checkpoints import manifest
from packhorse.run_folder.checkpoints.manifest import RunFacts, bring_to_disk, checkpoint_faults, read_manifest
from packhorse.run_folder.checkpoints.publishing import publish_checkpoint, write_file_list
from packhorse.run_folder.layout import unfinished_step_folder

FACTS = RunFacts(step=4, engine="fsdp2", world_size=2, plan="p", data="d")


def written(folder: Path, ranks: int = 2) -> Path:
    temporary = unfinished_step_folder(folder, FACTS.step)
    temporary.mkdir()
    for rank in range(ranks):
        file = temporary / f"optimizer-{rank}.safetensors"
        file.write_bytes(b"states" * (rank + 1))
        write_file_list(temporary, rank, bring_to_disk(temporary, [file]))
    return temporary


def test_the_files_of_all_ranks_are_in_the_manifest_and_their_lists_are_gone(tmp_path: Path) -> None:
    checkpoint = publish_checkpoint(written(tmp_path), FACTS)
    assert checkpoint == tmp_path / "step-000004"
    made = read_manifest(checkpoint)
    assert made is not None
    assert {name: record.bytes for name, record in made.files.items()} == {
        "optimizer-0.safetensors": 6,
        "optimizer-1.safetensors": 12,
    }
    assert list(checkpoint_faults(checkpoint)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]


def test_a_run_folder_that_not_all_nodes_share_is_reported(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    (run / "checkpoints").mkdir(parents=True)
    temporary = written(run / "checkpoints", ranks=1)
    with pytest.raises(UserError, match=f"{run} holds what 1 of 2 processes have written") as caught:
        publish_checkpoint(temporary, FACTS, shared_seconds=0.0)
    assert "set runs_folder to a folder that all nodes share" in str(caught.value)
    assert not (run / "checkpoints" / "step-000004").exists()


@pytest.mark.parametrize("change", ["cut", "gone", "another"])
def test_what_changed_after_it_was_read_back_is_not_published(change: str, tmp_path: Path) -> None:
    temporary = written(tmp_path)
    file = temporary / "optimizer-1.safetensors"
    if change == "cut":
        file.write_bytes(b"states")
    elif change == "gone":
        file.unlink()
    else:
        (temporary / "optimizer-2.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match="not as it was written"):
        publish_checkpoint(temporary, FACTS)
    assert not (tmp_path / "step-000004").exists()


def test_a_disk_that_returns_other_bytes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"what training held")
    monkeypatch.setattr(manifest, "forget_cached", lambda path: path.write_bytes(b"what the disk kept"))
    with pytest.raises(OSError, match="other bytes are read back than were written"):
        bring_to_disk(tmp_path, [file])
