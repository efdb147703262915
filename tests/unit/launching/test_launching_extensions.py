"""C++ extensions: one build folder per environment, and no run waits for a builder that is gone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from packhorse.launching.local.environment import (
    extensions_folder,
    remove_abandoned_locks,
    without_other_launchers,
)


def test_two_environments_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = extensions_folder()
    assert first == extensions_folder()
    assert first.is_relative_to(tmp_path)
    monkeypatch.setattr(sys, "prefix", "/another/venv")
    assert extensions_folder() != first
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/chosen")
    assert extensions_folder() == Path("/chosen")


def test_only_locks_that_nobody_holds_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own lock is held while the file is open."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    held, left = tmp_path / "py311_cpu" / "built_now", tmp_path / "killed"
    for folder in (held, left):
        folder.mkdir(parents=True)
        baton = FileBaton(str(folder / "lock"))
        assert baton.try_acquire()
        if folder == left:
            os.close(baton.fd)
    assert remove_abandoned_locks(tmp_path) == [left / "lock"]
    assert (held / "lock").is_file()
    assert FileBaton(str(left / "lock")).try_acquire()


def test_variables_of_other_launchers_are_not_inherited() -> None:
    left = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    left |= {"OMPI_COMM_WORLD_SIZE": "2", "PMI_RANK": "1", "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_USE_CPU": "true"}
    kept = {"PATH": "/bin", "HF_HUB_OFFLINE": "1", "SLURM_JOB_ID": "7", "WANDB_MODE": "offline", "NCCL_DEBUG": "INFO"}
    assert without_other_launchers(left | kept) == kept
