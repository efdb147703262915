"""Prepared data that is not as it was written is found: by its size before a run, by its bytes in `verify`."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.data.data_manifest import (
    DataManifest,
    SplitCounts,
    content_faults,
    read_data_manifest,
    recorded_files,
    require_sizes,
    size_faults,
)
from packhorse.data.packs.store import open_store
from packhorse.data.prepare import prepare
from packhorse.errors import UserError
from packhorse.recipe.load import load_recipe
from prepared import Document, write_prepared
from tiny import write_tiny

DOCUMENTS: list[Document] = [([1, 2, 3, 4, 5], [0, 0, 1, 1, 1], {"text": "a"}), ([6, 7, 8], [0, 1, 1], {"text": "b"})]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_prepared(tmp_path / "data", {"train": DOCUMENTS, "validation": DOCUMENTS})


def manifest_of(folder: Path) -> DataManifest:
    manifest = read_data_manifest(folder)
    assert manifest is not None
    return manifest


def test_every_file_is_watched_whatever_is_done_to_it(folder: Path) -> None:
    manifest = manifest_of(folder)
    files = recorded_files(manifest)
    assert files.keys() == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != "data.json"
    }
    assert content_faults(folder, manifest) == {}
    for name in files:
        content = (folder / name).read_bytes()
        for at in range(0, len(content), max(1, len(content) // 10)):
            (folder / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert content_faults(folder, manifest) == {name: f"{name} has other content than was written (sha256)."}
            assert size_faults(folder, manifest) == {}
        (folder / name).write_bytes(content[:-1])
        said = f"{name} has {len(content) - 1:,} bytes instead of {len(content):,}."
        assert size_faults(folder, manifest) == content_faults(folder, manifest) == {name: said}
        with pytest.raises(UserError, match="is damaged"):
            require_sizes(folder, manifest)
        (folder / name).unlink()
        assert content_faults(folder, manifest) == {name: f"{name} is missing."}
        (folder / name).write_bytes(content)
    require_sizes(folder, manifest)


def test_what_was_prepared_before_there_were_records_is_still_read(folder: Path) -> None:
    bare = {
        name: SplitCounts(**counts.model_dump(exclude={"files"})) for name, counts in manifest_of(folder).splits.items()
    }
    old = manifest_of(folder).model_copy(update={"splits": bare})
    kept = old.model_dump(exclude={"files": True, "splits": {"__all__": {"files"}}}, mode="json")
    assert recorded_files(DataManifest.model_validate(kept | {"shares": tuple(kept["shares"])})) == {}
    require_sizes(folder, old)


def test_prepare_records_every_file_that_it_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = '{"text": "a row of text"}\n{"text": "another row"}\n{"text": 3}\n' + '{"text": "filler"}\n' * 200
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    data = {"sources": [{"path": "rows.jsonl"}], "on_bad_row": "drop", "duplicates": {"exact": "drop"}}
    done = prepare(load_recipe(str(write_tiny(tmp_path, data={**data, "most_bad_rows": 0.5}))))
    left = {path.relative_to(done.folder).as_posix() for path in done.folder.rglob("*") if path.is_file()}
    assert recorded_files(done.manifest).keys() == left - {"data.json"}
    assert "dropped.jsonl" in left
    assert content_faults(done.folder, manifest_of(done.folder)) == {}
    assert (done.folder / "data.json").stat().st_size < 20_000


def test_what_is_no_array_is_refused_by_name(folder: Path) -> None:
    file = folder / "train" / "documents.npy"
    file.write_bytes(b"\x80\x04N.".ljust(file.stat().st_size, b"\0"))
    with pytest.raises(UserError, match=r"documents.npy is not an array of numbers"):
        open_store(folder, "train")
