"""Folders and globs: which files are read, in which order, and what is said when none is left."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest
from data_cases import write_lines
from reading_cases import mistake_of, read

from packhorse.data.resolve import source_files

HOLD = {"text": "one"}


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, {"text": name})
    return folder


def names(path: Path | str, root: Path) -> list[str]:
    return [str(file.relative_to(root)) for file in source_files(str(path), root / "runs")]


def test_a_folder_means_all_its_files_in_natural_order(tmp_path: Path) -> None:
    make(
        tmp_path,
        "part-10.jsonl",
        "part-2.jsonl",
        "part-1.jsonl",
        "b/2/x.jsonl",
        "b/10/x.jsonl",
        "a10.json",
        "a2.jsonl.gz",
    )
    make(tmp_path, ".hidden.jsonl", ".git/rows.jsonl", "README.md", "b/.cache/rows.jsonl", "rows.jsonl.lock")
    assert names(tmp_path, tmp_path) == [
        "a2.jsonl.gz", "a10.json", "b/2/x.jsonl", "b/10/x.jsonl", "part-1.jsonl", "part-2.jsonl", "part-10.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        pytest.param("*.jsonl", ["x1.jsonl", "x2.jsonl", "x10.jsonl"], id="star"),
        pytest.param("x?.jsonl", ["x1.jsonl", "x2.jsonl"], id="question mark"),
        pytest.param("x[12].jsonl", ["x1.jsonl", "x2.jsonl"], id="set"),
        pytest.param(
            "**/*.jsonl", ["sub/deep/y.jsonl", "sub/x3.jsonl", "x1.jsonl", "x2.jsonl", "x10.jsonl"], id="folders"
        ),
        pytest.param("*", ["x1.jsonl", "x2.jsonl", "x10.jsonl"], id="folders and others aside"),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    make(
        tmp_path,
        "x10.jsonl",
        "x2.jsonl",
        "x1.jsonl",
        "sub/x3.jsonl",
        "sub/deep/y.jsonl",
        "notes.md",
        ".x4.jsonl",
        "sub.jsonl/z.json",
    )
    assert names(tmp_path / pattern, tmp_path) == expected


def test_a_file_that_is_called_like_a_glob_is_that_file(tmp_path: Path) -> None:
    make(tmp_path, "rows[1].jsonl", "rows1.jsonl")
    assert names(tmp_path / "rows[1].jsonl", tmp_path) == ["rows[1].jsonl"]


def test_rows_of_several_files_in_several_forms(tmp_path: Path) -> None:
    write_lines(tmp_path / "1.jsonl", {"text": "a"}, {"text": "b"})
    (tmp_path / "2.csv").write_text("text\nc\n")
    (tmp_path / "3.json").write_text('[\n{"text": "d"}]')
    assert read(tmp_path) == [
        ("1.jsonl:1", {"text": "a"}),
        ("1.jsonl:2", {"text": "b"}),
        ("2.csv:2", {"text": "c"}),
        ("3.json:2", {"text": "d"}),
    ]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        pytest.param([], "has no file of rows; it has nothing.", id="empty"),
        pytest.param([".a.jsonl", ".git/b.jsonl"], "it has 2 hidden (.a.jsonl, .git).", id="hidden"),
        pytest.param(
            ["1.md", "2.txt", "3.py", "4"], "it has 4 with other endings (1.md, 2.txt, 3.py, …).", id="others"
        ),
        pytest.param([".a", "b.txt"], "it has 1 hidden (.a) and 1 with other endings (b.txt).", id="both"),
    ],
)
def test_a_folder_without_rows_says_what_it_has(tmp_path: Path, made: list[str], told: str) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    make(folder, *made)
    message = mistake_of(folder)
    assert told in message
    assert ".jsonl, .json, .csv, .tsv, .parquet, .arrow, each also with .gz or .zst" in message


@pytest.mark.parametrize("pattern", ["*.parquet", "**/*.csv", "none/*"])
def test_a_glob_without_files_says_so(tmp_path: Path, pattern: str) -> None:
    make(tmp_path, "a.jsonl")
    assert f"the data source {tmp_path / pattern} has no file of rows; it has nothing." in mistake_of(
        tmp_path / pattern
    )


def test_an_empty_file_in_a_folder_is_named(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").touch()
    assert "b.jsonl is empty: 0 bytes." in mistake_of(tmp_path)


def test_files_without_rows_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "b.json").write_text("[]")
    assert f"{tmp_path} has no rows." in mistake_of(tmp_path)


def test_links_are_followed_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "rows", "a/x.jsonl")
    make(tmp_path / "elsewhere", "y.jsonl")
    (folder / "round").symlink_to(folder, target_is_directory=True)
    (folder / "other").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert names(folder, folder) == ["a/x.jsonl", "other/y.jsonl"]


def test_a_link_to_nothing_is_no_silent_loss(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "b.jsonl does not exist" in mistake_of(tmp_path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    os.mkfifo(tmp_path / "b.jsonl")
    assert "b.jsonl does not exist" in mistake_of(tmp_path)


def test_a_name_that_cannot_be_printed(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")).write_text('{"text": "a"}')
    mistake_of(tmp_path).encode()


def test_saved_splits_are_not_mixed(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([HOLD])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "both")
    message = mistake_of(tmp_path / "both")
    assert "is a saved data set with the splits train, test." in message
    assert f"name one of them, e.g. {tmp_path / 'both' / 'train'}." in message
    assert [values for _, values in read(tmp_path / "both" / "test")] == [HOLD]


def test_of_a_saved_data_set_its_own_files_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([HOLD] * 4).save_to_disk(folder, num_shards=2)
    # A map of the loaded data set leaves its result beside the files.
    (folder / "cache-0123.arrow").write_bytes((folder / "data-00000-of-00002.arrow").read_bytes())
    assert names(folder, folder) == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    (folder / "data-00001-of-00002.arrow").unlink()
    assert "lacks data-00001-of-00002.arrow, which its state.json lists" in mistake_of(folder)


def test_a_state_file_of_another_kind_is_rows(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps([HOLD]))
    assert [values for _, values in read(tmp_path)] == [HOLD]
