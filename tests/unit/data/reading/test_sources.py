from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from data_cases import write_lines
from reading_cases import mistake_of, read, read_all

from packhorse.data.gather.sources import read_rows
from packhorse.data.read.streams import PIECE_BYTES
from packhorse.errors import UserError
from packhorse.recipe.schema import Source

ROWS = [{"text": "one"}, {"text": "two\u2028three\x85four"}, {"text": "five"}]


@pytest.mark.parametrize("escaped", [True, False], ids=["escaped", "raw"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_jsonl_splits_on_line_feeds_alone(tmp_path: Path, escaped: bool, end: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes("".join(json.dumps(row, ensure_ascii=escaped) + end for row in ROWS).encode())
    assert read(path) == [(f"rows.jsonl:{number}", row) for number, row in enumerate(ROWS, 1)]


def test_jsonl_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}')
    assert read(path) == [("rows.jsonl:1", {"text": "one"}), ("rows.jsonl:3", {"text": "two"})]


def test_all_broken_lines_are_told_with_their_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS[0], '{"text": ""x"}', "[1, 2]", ROWS[1], '{"text": "ab')
    message = mistake_of(path)
    assert f"{path}:2: the line is not JSON: Expecting ',' delimiter at column 12" in message
    assert '; it begins {"text": ""x"}' in message
    assert f"{path}:3: the row is not a JSON object but list; it begins [1, 2]" in message
    assert f"{path}:5: the line is not JSON: Unterminated string" in message
    assert f"{path} has 3 rows with mistakes of 2 kinds." in message


def test_three_rows_of_a_kind_are_shown(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *["{"] * 50)
    message = mistake_of(path)
    assert message.startswith(
        f"50 rows of {path} have a mistake of one kind, such as\n    {path}:1: the line is not JSON"
    )
    assert message.count("the line is not JSON") == 3
    assert message.count("  fix: ") == 2
    assert "has 50 rows with mistakes." in message


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        pytest.param("rows.jsonl", b"", "rows.jsonl is empty: 0 bytes.", id="empty"),
        pytest.param("rows.jsonl", b"\n\n", "has no rows.", id="blank"),
        pytest.param("rows.json", b"[]", "has no rows.", id="empty array"),
        pytest.param("rows.csv", b"text\n", "has no rows.", id="header only"),
        pytest.param("rows.jsonl", b'{"text": "\xff"}', "rows.jsonl:1: the line is not UTF-8", id="not utf-8"),
        pytest.param("rows.jsonl", b"[" * 100_000, "rows.jsonl:1: the line is not JSON", id="deep"),
        pytest.param("rows.json", b'"text"', 'begins with "text"', id="no array"),
        pytest.param("rows.json", b" \n ", "has no rows.", id="blank array"),
        pytest.param("rows.parquet", b"no parquet", "cannot be read as Parquet after row 0", id="parquet"),
        pytest.param("rows.txt", b"text", "ends in .txt.", id="extension"),
        pytest.param("rows.txt.gz", b"text", "ends in .gz.", id="packed extension"),
        pytest.param("rows", b"text", "ends in no extension.", id="no extension"),
        pytest.param("rows.jsonl", "text".encode("utf-16")[:-1], "cannot be decoded after 9 bytes", id="utf-16"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert told in mistake_of(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_under_the_name_of_lines_is_read(tmp_path: Path, indent: int | None, encoding: str) -> None:
    path = tmp_path / "rows.jsonl"
    text = json.dumps(ROWS, ensure_ascii=False, indent=indent)
    mark = "\ufeff" if encoding.endswith("e") else ""
    path.write_bytes((mark + text).encode(encoding))
    assert [values for _, values in read(path)] == ROWS


def test_a_list_on_each_line_is_no_array_of_rows(tmp_path: Path) -> None:
    turns = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    path = write_lines(tmp_path / "rows.jsonl", turns, turns)
    assert f"{path}:1: the row is not a JSON object but list" in mistake_of(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_lines_with_a_mark_of_another_encoding_are_read_across_pieces(tmp_path: Path, encoding: str) -> None:
    path, rows = tmp_path / "rows.jsonl", [{"text": f"niño {number} 😀" * 20} for number in range(1500)]
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding))
    assert path.stat().st_size > 2 * PIECE_BYTES
    assert [values for _, values in read(path)] == rows


def test_missing_file_names_the_closest(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", ROWS[0])
    message = mistake_of(tmp_path / "trian.jsonl")
    assert "trian.jsonl does not exist" in message
    assert "the closest name in" in message
    assert "is train.jsonl" in message


def test_hub_failure_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*names: str, **_: object) -> None:
        raise ConnectionError(f"Couldn't reach '{names[0]}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError) as caught:
        list(read_rows(Source(id="some/rows"), Path("runs")))
    message = str(caught.value)
    assert "the data set some/rows (subset None, split train) is not available: Couldn't reach" in message
    assert "HF_HUB_OFFLINE" in message
    assert "data.sources[].path" in message


def test_hub_rows_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    held = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **rest: asked.append((names, rest)) or held)
    rows = list(read_rows(Source(id="some/rows", subset="es", revision="abc", split="test"), Path("runs")))
    assert [row.where for row in rows] == ["some/rows:1", "some/rows:2", "some/rows:3"]
    assert [row.values for row in rows] == ROWS
    assert asked == [(("some/rows",), {"name": "es", "revision": "abc", "split": "test"})]


def test_mistakes_go_where_they_are_collected(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS[0], "{", ROWS[2])
    rows, told = read_all(path)
    assert rows == [("rows.jsonl:1", ROWS[0]), ("rows.jsonl:3", ROWS[2])]
    assert [words.split(": ")[:2] for words in told] == [["rows.jsonl:2", "the line is not JSON"]]


def test_a_source_of_broken_rows_alone_is_not_called_empty(tmp_path: Path) -> None:
    assert read_all(write_lines(tmp_path / "rows.jsonl", "{", "["))[0] == []
    assert "has no rows" not in mistake_of(tmp_path / "rows.jsonl")
