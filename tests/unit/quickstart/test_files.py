"""The quickstart's built-in files: written whole, once, and without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from packhorse.quickstart import files
from packhorse.quickstart.files import BUILTIN_NAMES, materialise, put_in_place


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_a_builtin_is_written_once_and_nothing_is_left_beside_it(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "new" / "folder"
    path = materialise(name, folder)
    before = path.stat().st_mtime_ns
    assert materialise(name, folder) == path == folder / name
    assert path.stat().st_mtime_ns == before
    assert [child.name for child in folder.iterdir()] == [name]


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'core\.csv'.*core\.messages\.jsonl.*tokenizer"):
        materialise("core.csv", tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(name: str, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_builtin", break_off)
    with pytest.raises(OSError, match="No space"):
        materialise("core.messages.jsonl", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_wrote_first_is_kept(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "tokenizer.json").write_text(folder.name)
    put_in_place(ours, theirs)
    assert (theirs / "tokenizer.json").read_text() == "theirs"


def test_another_error_than_a_lost_race_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "absent", tmp_path / "target")


def test_importing_the_files_imports_no_torch() -> None:
    code = (
        "import sys, packhorse.quickstart.files; "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
