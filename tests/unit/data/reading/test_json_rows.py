"""JSON that Python reads and others do not, or read otherwise; arrays in pieces."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from data_cases import write_lines
from reading_cases import mistake_of, read, read_all, rows_of

from packhorse.data.read import json_array, streams

GOOD = {"text": "good"}


def jsonl(folder: Path, *lines: str) -> Path:
    return write_lines(folder / "rows.jsonl", *lines)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        pytest.param('{"text": "a", "text": "b"}', "the key text is twice in one object", id="key twice"),
        pytest.param('{"text" : "a", "text" : "b"}', "the key text is twice in one object", id="key twice, spaced"),
        pytest.param('{"a": {"b": [{"c": 1, "c": 2}]}}', "the key c is twice in one object", id="key twice inside"),
        pytest.param('{"text": "a", "n": NaN}', "NaN is not a JSON number", id="nan"),
        pytest.param('{"text": "a", "n": -Infinity}', "-Infinity is not a JSON number", id="infinity"),
        pytest.param('{"text": "a", "n": 1e999}', "the number 1e999 is too large", id="too large"),
        pytest.param('{"text": "a", "n": ' + "9" * 5000 + "}", "an integer of more than 4300 digits", id="digits"),
        pytest.param('{"text": "\\ud800"}', "half a surrogate pair (\\ud800)", id="half pair"),
        pytest.param(
            '{"text": "a", "x": [{"\\uDC00": 1}]}', "half a surrogate pair (\\udc00)", id="half pair in a key"
        ),
        pytest.param('{"a": ' * 65 + "1" + "}" * 65, "nested more than 64 levels deep", id="65 levels"),
        pytest.param('{"a": ' + "[" * 100_000, "nested too deeply", id="100,000 levels"),
        pytest.param('{"text": "a"} {"text": "b"}', "Extra data at column 14", id="two rows"),
        pytest.param('{"text": "a\0b"}', "Invalid control character at at column 12", id="raw NUL"),
    ],
)
def test_lines_that_others_read_otherwise_are_refused(tmp_path: Path, line: str, told: str) -> None:
    rows, mistakes = read_all(jsonl(tmp_path, json.dumps(GOOD), line, json.dumps(GOOD)))
    assert rows == [("rows.jsonl:1", GOOD), ("rows.jsonl:3", GOOD)]
    (mistake,) = mistakes
    assert mistake.startswith("rows.jsonl:2: the line is not JSON: ")
    assert told in mistake


@pytest.mark.parametrize(
    ("line", "values"),
    [
        pytest.param('{"text": "\\ud83d\\ude00"}', {"text": "\U0001f600"}, id="whole pair"),
        pytest.param('{"text": "\\\\ud800"}', {"text": "\\ud800"}, id="escaped backslash"),
        pytest.param('{"text": "\\u0000"}', {"text": "\0"}, id="escaped NUL"),
        pytest.param('{"text": "\\"a\\": 1", "b": ":"}', {"text": '"a": 1', "b": ":"}, id="text like a key"),
        pytest.param('{"a": {"x": 1}, "b": {"x": 1}}', {"a": {"x": 1}, "b": {"x": 1}}, id="key in two objects"),
        pytest.param('{"a": ' * 64 + "1" + "}" * 64, None, id="64 levels"),
        pytest.param('{"n": ' + "9" * 4000 + "}", {"n": 10**4000 - 1}, id="4,000 digits"),
        pytest.param(' \t{"text": "a"} \r', {"text": "a"}, id="spaces around"),
        pytest.param('{"n": 1e308}', {"n": 1e308}, id="large"),
        pytest.param('{"text":\r "a\u2028b\x85"}', {"text": "a\u2028b\x85"}, id="line ends inside"),
    ],
)
def test_lines_that_only_look_odd_are_read(tmp_path: Path, line: str, values: dict[str, Any] | None) -> None:
    expected = json.loads(line) if values is None else values
    assert read(jsonl(tmp_path, line)) == [("rows.jsonl:1", expected)]


def test_a_broken_row_shows_its_beginning_as_a_terminal_can_print_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path, "\x1b[2J" + "x" * 200)
    (in_a_log,) = read_all(path)[1]
    assert in_a_log.endswith("it begins \\x1b[2J" + "x" * 200)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    (on_a_terminal,) = read_all(path)[1]
    assert on_a_terminal.endswith("it begins \\x1b[2J" + "x" * 76)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64], ids="{} bytes".format)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_pieces_of_any_size_give_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    rows = [{"text": "é\u2028\U0001f600", "n": -12.5e3}, {"a": [True, None, 123456789]}, {"text": "x" * 300}, {}]
    path = tmp_path / name
    if name == "rows.json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        write_lines(path, *rows, '{"text": "\\ud83d\\ude00"}')
        rows.append({"text": "\U0001f600"})
    monkeypatch.setattr(streams, "PIECE_BYTES", size)
    found = read(path)
    assert [values for _, values in found] == rows
    if name == "rows.jsonl":
        assert [where for where, _ in found] == [f"rows.jsonl:{number}" for number in range(1, 6)]
    else:
        lines = path.read_text(encoding="utf-8").split("\n")
        # An empty object is written on one line, the others begin with a brace alone.
        begins = [number for number, line in enumerate(lines, 1) if line in (" {", " {}")]
        assert [where for where, _ in found] == [f"rows.json:{number}" for number in begins]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('[{"text": "a"}, {"text": "b"}]', id="array"),
        pytest.param('\ufeff\n[{"text": "a"},\n{"text": "b"}]\n', id="array with a mark"),
        pytest.param(
            '{"version": "1", "tags": ["x"], "data": [{"text": "a"}, {"text": "b"}], "n": {"m": []}}', id="object"
        ),
        pytest.param('{"text": "a"}\n{"text": "b"}\n', id="one row a line"),
        pytest.param('\n{"text": "a"} \r\n\n  {"text": "b"}', id="one row a line, blanks"),
    ],
)
def test_forms_of_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    assert [values for _, values in read(path)] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("size", [1, 5, 13], ids="{} bytes".format)
def test_a_number_that_is_cut_by_a_piece_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"size": 1234567890, "rows": [{"text": "a"}], "last": -1.5e10}')
    monkeypatch.setattr(streams, "PIECE_BYTES", size)
    assert [values for _, values in read(path)] == [{"text": "a"}]


def test_json_array_knows_each_row_s_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n  {"text": "one"},\n  {\n    "text": "two"\n  }, {"text": "three"}\n]\n')
    assert read(path) == [
        ("rows.json:2", {"text": "one"}),
        ("rows.json:3", {"text": "two"}),
        ("rows.json:5", {"text": "three"}),
    ]


@pytest.mark.parametrize("size", [1, 7, 1 << 20], ids="{} bytes".format)
@pytest.mark.parametrize(
    "form", ["[%s]", '{"version": 1, "rows": [%s]}', "\n\n [%s]\n"], ids=["list", "object", "blanks"]
)
def test_rows_of_one_line_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, size: int) -> None:
    path = tmp_path / "rows.json"
    rows: list[Any] = [{"text": str(number)} for number in range(1, 8)]
    path.write_text(form % ", ".join(map(json.dumps, [*rows, 8, {"text": "9"}])))
    monkeypatch.setattr(streams, "PIECE_BYTES", size)
    found, mistakes = read_all(path)
    assert [where for where, _ in found] == [f"rows.json row {number}" for number in (*range(1, 8), 9)]
    assert [mistake.partition(":")[0] for mistake in mistakes] == ["rows.json row 8"]
    path.write_text(form % ", ".join([*map(json.dumps, rows), '{"text" 8}']))
    assert mistake_of(path).startswith(f"{path} row 8: the JSON cannot be read further: Expecting ':'")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param(
            '[\n{"a": 1},\n{"b" 2}]', "rows.json:3: the JSON cannot be read further: Expecting ':'", id="colon"
        ),
        pytest.param(
            '[\n{"a": 1}\n{"b": 2}]', "rows.json:3: the JSON cannot be read further: Expecting ',' or", id="comma"
        ),
        pytest.param(
            '[{"a": 1},\n{"b": "c', "rows.json:2: the JSON cannot be read further: Unterminated", id="cut in a text"
        ),
        pytest.param(
            '[{"a": 1}', "rows.json row 1: the JSON cannot be read further: Expecting ',' or ']'", id="cut in the list"
        ),
        pytest.param('[{"a": 1},]', "the JSON cannot be read further: Expecting value", id="comma at the end"),
        pytest.param('[{"a": 1}] x', "the JSON cannot be read further: Extra data; it begins x", id="more after it"),
        pytest.param(
            '{"rows": [{"a": 1}]', "the JSON cannot be read further: Expecting ',' or '}'", id="cut in the object"
        ),
        pytest.param('{"rows": [{"a": 1}],}', "Expecting property name", id="comma at the object's end"),
        pytest.param('{"a": [{}], "b": [{}]}', "with several lists of objects: a, b", id="two lists"),
        pytest.param('{"a": ["x"], "b": 1}', "is an object without a list of objects", id="no list"),
        pytest.param("[" * 100_000, "nested too deeply", id="deep"),
        pytest.param('[{"a": ' + "9" * 5000 + "}]", "an integer of more than 4300 digits", id="digits"),
        pytest.param('[{"a": NaN}]', "NaN is not a JSON number", id="nan"),
    ],
)
def test_json_that_cannot_be_read_on(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert told in mistake_of(path)


SPLITS = '{"about": {"n": 2}, "train": [{"a": 1},\n{"a": 2}], "tags": ["x"], "test": [{"a": 3}], "none": []}'


def test_a_key_selects_one_of_several_lists(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(SPLITS)
    message = mistake_of(path)
    assert "is an object with several lists of objects: train, test." in message
    # The fix can be typed: it selects the first list.
    assert "{path: rows.json, key: train}" in message
    assert read(path, key="train") == [("rows.json:1", {"a": 1}), ("rows.json:2", {"a": 2})]
    assert read(path, key="test") == [("rows.json row 1", {"a": 3})]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("rows.json", SPLITS, "has no list of objects with the key none; its lists are train, test."),
        ("rows.json", '{"none": [{}], "none": [{}]}', "has more than one list of objects with the key none"),
        ("rows.json", '[{"a": 1}]', "the source's key is none, for "),
        ("rows.json", '{"a": 1}\n{"a": 2}', "rows.json, which has one object per line."),
        ("rows.jsonl", '{"a": 1}', "rows.jsonl, which is a .jsonl file."),
    ],
)
def test_a_key_that_selects_nothing(tmp_path: Path, name: str, text: str, told: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert told in mistake_of(path, key="none")


def test_an_array_goes_on_after_a_row_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},\n3,\n{"a": 1, "a": 2},\n{"a": "\\ud800"},\n{"a": 5}]')
    rows, mistakes = read_all(path)
    assert rows == [("rows.json:1", {"a": 1}), ("rows.json:5", {"a": 5})]
    assert [mistake.partition(";")[0] for mistake in mistakes] == [
        "rows.json:2: the row is not a JSON object but int",
        "rows.json:3: the row is not sound JSON: the key a is twice in one object",
        "rows.json:4: the row is not sound JSON: half a surrogate pair (\\ud800), which is not a character",
    ]


def test_bytes_that_are_no_utf8_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": 1},\n{"a": "\xff"}]')
    assert 'rows.json:2: the line is not UTF-8: byte 0xff (invalid start byte); it begins {"a"' in mistake_of(path)
    path.write_bytes(b'[{"a": 1}, {"a": 2}, {"a": "\xff"}]')
    assert "rows.json row 3: the line is not UTF-8: byte 0xff" in mistake_of(path)
    path.write_bytes(b'[{"a": 1}]\n\xe2\x80')
    assert "rows.json:2: the line is not UTF-8: byte 0xe2 (unexpected end of data)" in mistake_of(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_row_without_end_is_not_gathered_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in (streams, json_array):
        monkeypatch.setattr(module, "LARGEST_ROW_BYTES", 1 << 20)
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(b'["' + b"x" * 20_000_000))
    assert "the row is longer than 1 MiB" in mistake_of(path)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json", "rows.csv.gz"])
def test_memory_stays_flat(tmp_path: Path, name: str) -> None:
    row, path = json.dumps({"text": "x" * 1000}), tmp_path / name
    lines = {"rows.jsonl.gz": f"{row}\n", "rows.json": f"{row},\n", "rows.csv.gz": f"{'x' * 1000}\n"}[name] * 30_000
    content = f"[{lines.rstrip()[:-1]}]" if name == "rows.json" else f"text\n{lines}" if "csv" in name else lines
    path.write_bytes(gzip.compress(content.encode(), 1) if path.suffix == ".gz" else content.encode())
    tracemalloc.start()
    try:
        assert sum(1 for _ in rows_of(path)) == 30_000
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
