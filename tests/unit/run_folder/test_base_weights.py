"""The base of a run is recognised by its weights: another file, or none, ends an evaluation before it measures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packhorse.errors import UserError
from packhorse.run_folder.base_weights import record_base, require_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(b"1" * 10)
    (folder / "model-2.safetensors").write_bytes(bytes(9_000_000))
    return folder


def run_of(base: Path | None) -> Any:
    model = SimpleNamespace(path=str(base) if base else None, revision=None)
    folder = base.with_name("run") if base else Path("/nowhere")
    folder.mkdir(exist_ok=True) if base else None
    recipe = SimpleNamespace(model=model)
    return SimpleNamespace(run_folder=str(folder), base_model=str(base) if base else None, recipe=recipe)


def test_the_weights_of_training_are_accepted_and_a_moved_run_folder_too(base: Path) -> None:
    run = run_of(base)
    require_base(run)  # a run of an earlier version has no record
    record_base(run)
    require_base(run)
    assert set(json.loads((Path(run.run_folder) / "base.json").read_text())) == {
        "model-1.safetensors", "model-2.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("at", [0, 8_999_999], ids=["first byte", "last byte"])
def test_other_weights_are_refused_with_both_fingerprints(base: Path, at: int) -> None:
    run = run_of(base)
    record_base(run)
    with (base / "model-2.safetensors").open("r+b") as file:
        file.seek(at)
        file.write(b"1")
    record_base(run)  # a resumed run keeps the record of its start
    with pytest.raises(UserError, match="model-2.safetensors is not the file that .*: 9000000-.* is not 9000000-"):
        require_base(run)


def test_a_missing_file_and_a_missing_base_are_refused(base: Path) -> None:
    run = run_of(base)
    record_base(run)
    (base / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="absent is not 10-"):
        require_base(run)
    base.rename(base.with_name("moved"))
    with pytest.raises(UserError, match="base, does not exist"):
        require_base(run)


def test_a_fresh_model_has_no_base() -> None:
    record_base(run_of(None))
    require_base(run_of(None))
