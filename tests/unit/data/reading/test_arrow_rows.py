"""Parquet and Arrow, whole and cut off at every byte; packed files of every form."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import ipc, parquet
from reading_cases import mistake_of, read, read_all, rows_of

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"hi {number}"}, {"role": "assistant", "content": "é"}], "n": number}
    for number in range(2500)
]


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=700)
    return sink.getvalue()


def as_arrow(rows: list[dict[str, Any]], new: Any) -> bytes:
    sink, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1100)
    return sink.getvalue()


def as_json(rows: list[dict[str, Any]], parting: str = "\n") -> bytes:
    return parting.join(json.dumps(row) for row in rows).encode()


WRITERS = {
    "rows.parquet": as_parquet,
    "stream.arrow": lambda rows: as_arrow(rows, ipc.new_stream),
    "file.arrow": lambda rows: as_arrow(rows, ipc.new_file),
    "rows.jsonl": as_json,
    "rows.json": lambda rows: b"[" + as_json(rows, ",\n") + b"]",
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True)}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_form_packed_and_not(tmp_path: Path, name: str, packing: str) -> None:
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(PACKERS[packing](WRITERS[name](ROWS)))
    assert read(path) == [(f"{path.name}:{number}", row) for number, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_packed_members_one_after_another_are_one_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    pack = PACKERS[ending]
    path.write_bytes(pack(as_json(ROWS[:3]) + b"\n") + pack(as_json(ROWS[3:5])))
    assert [values for _, values in read(path)] == ROWS[:5]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_packed_file_that_was_cut_off_anywhere(tmp_path: Path, name: str, ending: str) -> None:
    content = PACKERS[ending](WRITERS[name](ROWS[:3]))
    path = tmp_path / f"{name}{ending}"
    for size in [*range(1, 30), *range(30, len(content), 23), len(content) - 1]:
        path.write_bytes(content[:size])
        message = mistake_of(path)
        assert message.startswith(f"{path} cannot be decompressed as "), size


@pytest.mark.parametrize("name", ["rows.parquet", "stream.arrow", "file.arrow"])
def test_a_file_that_was_cut_off_anywhere(tmp_path: Path, name: str) -> None:
    content = WRITERS[name](ROWS[:3])
    path = tmp_path / name
    for size in range(1, len(content), 3):
        path.write_bytes(content[:size])
        assert "the file cannot be read as " in mistake_of(path), size


def test_a_stream_that_ends_between_two_batches_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    sink, table = io.BytesIO(), pyarrow.Table.from_pylist(ROWS[:2])
    with ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
        whole = sink.getvalue()
    path.write_bytes(whole)
    # pyarrow itself reads it without a word.
    assert ipc.open_stream(whole).read_all().num_rows == 2
    assert "the end mark is missing, so the file was cut off" in mistake_of(path)


def test_a_data_set_that_was_saved(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=12)
    found = read(tmp_path / "saved")
    assert [values for _, values in found] == ROWS
    assert found[0][0] == "data-00000-of-00012.arrow:1"


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    path = tmp_path / name
    if name == "rows.arrow":
        with ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        parquet.write_table(table, path)
    assert "two columns are named text" in mistake_of(path)


def test_a_row_that_python_cannot_hold_costs_itself_alone(tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"\xff", b"fine"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": text}), path)
    rows, mistakes = read_all(path)
    assert rows == [("rows.parquet:1", {"text": "good"}), ("rows.parquet:3", {"text": "fine"})]
    assert mistakes == ["rows.parquet:2: a value of the row cannot be read: byte 0xff at column 1 (invalid start byte)"]


def test_offsets_that_lie_are_found_before_they_are_followed(tmp_path: Path) -> None:
    content = as_arrow([{"text": "abc"}, {"text": "def"}], ipc.new_stream)
    # Offsets 0, 3, 6 of the two texts stand there as 32-bit numbers.
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 3, 6))
    assert content.count(offsets) == 1
    path = tmp_path / "rows.arrow"
    path.write_bytes(content.replace(offsets, offsets[:4] + (1 << 28).to_bytes(4, "little") + offsets[8:]))
    assert "the file cannot be read as Arrow after row 0" in mistake_of(path)


def test_maps_are_objects(tmp_path: Path) -> None:
    kind = pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))
    turns = [("role", "user"), ("content", "hi")]
    parquet.write_table(pyarrow.table({"messages": pyarrow.array([[turns]], kind)}), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet")[0][1] == {"messages": [{"role": "user", "content": "hi"}]}


def test_memory_stays_flat(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    table = pyarrow.Table.from_pylist([{"text": "x" * 1000}] * 1000)
    with ipc.new_stream(str(path), table.schema) as writer:
        for _ in range(40):
            writer.write_table(table)
    before = pyarrow.total_allocated_bytes()
    most = 0
    for row in rows_of(path):
        if row.where.endswith("000"):
            most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 0 < most < 8 << 20
