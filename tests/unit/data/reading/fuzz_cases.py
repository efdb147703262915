"""Rows and files that are nearly as they should be, made by chance."""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
from pyarrow import ipc, parquet

Rows = list[dict[str, Any]]

# One kind of row a line; the texts hold what readers stumble over.
VALID: dict[str, Rows] = {
    "messages": [
        {"messages": [{"role": "user", "content": "hi, there"}, {"role": "assistant", "content": "two\u2028lines"}]},
        {"messages": [{"role": "system", "content": 'be "brief"'}, {"role": "user", "content": [{"type": "text",
         "text": "a"}, {"type": "text", "text": "b"}]}, {"role": "assistant", "content": "é\U0001f600"}], "n": 3},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two\nthree"}], "system": "s"},
        {"conversations": [{"from": "human", "value": "four: five"}, {"from": "gpt", "value": "\ufeffsix"}]},
    ],
    "alpaca": [
        {"instruction": "add", "input": "1\t2", "output": "3"},
        {"instruction": "name a 'fruit'", "input": "", "output": 'an "apple", say'},
    ],
    "prompt_completion": [{"prompt": "p, q", "completion": "r"}, {"prompt": "a\r\nb", "completion": "c\x0bd"}],
    "question_answer": [{"question": "2+2?", "answer": "4 #### 4"}, {"question": "¿qué?", "answer": "así: \\n"}],
    "text": [{"text": "once upon a time", "language": "en"}, {"text": "es war einmal", "language": "de"}],
    "tools": [
        {"messages": [{"role": "user", "content": "sum"}, {"role": "assistant", "content": "", "tool_calls": [{"type":
         "function", "function": {"name": "f", "arguments": {"x": 1}}}]}, {"role": "tool", "content": "7"},
         {"role": "assistant", "content": "seven"}], "tools": [{"type": "function", "function": {"name": "f"}}]},
    ],
    "tree": [{"text": "how?", "role": "prompter", "replies": [{"text": "so", "role": "assistant", "rank": 0}]}],
    "preference": [{"prompt": "q", "chosen": "good", "rejected": "bad"}],
}  # fmt: skip
FLAT = ("alpaca", "prompt_completion", "question_answer", "text", "preference")
ODD_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 10**18, 10**30, 1e308, "", " ", "\0", "\ud800", "\udc00x", "\ufeff", "\u2028", "\x85",
    "\x1b[2J", "</s>", [], {}, [[]], [None], [1, "a"], {"": ""}, {"role": "user"}, {"type": "image"},
    "x" * 20_000, "assistant",
)  # fmt: skip
ODD_BYTES = (
    b"\0", b"\0" * 50, b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"\r", b"\n", b"\xe2\x80\xa8", b"\xc2\x85",
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\t", b"\\ud800", b"\\u0000", b"\\x", b"1e999",
    b"NaN", b"-Infinity", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"a" * 40_000, b"null",
    b'{"text": "x", "text": "y"}', b'"a" "b"', b"\xed\xa0\x80",
)  # fmt: skip


# --- Mutations -----------------------------------------------------------------------------------------------------


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container with each of its keys, at any depth."""
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, inner in pairs:
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def swap_value(rows: Rows, chance: random.Random) -> None:
    container, key = chance.choice(list(places(rows)))
    container[key] = copy.deepcopy(chance.choice(ODD_VALUES))


def drop_value(rows: Rows, chance: random.Random) -> None:
    container, key = chance.choice(list(places(rows)))
    del container[key]


def exchange_values(rows: Rows, chance: random.Random) -> None:
    found = list(places(rows))
    (one, key), (other, other_key) = chance.choice(found), chance.choice(found)
    one[key] = copy.deepcopy(other[other_key])


def nest_deeply(rows: Rows, chance: random.Random) -> None:
    container, key = chance.choice(list(places(rows)))
    for _ in range(chance.choice((5, 63, 64, 65, 200))):
        container[key] = [container[key]] if chance.random() < 0.5 else {"a": container[key]}


def add_key(rows: Rows, chance: random.Random) -> None:
    container = chance.choice([container for container, _ in places(rows) if isinstance(container, dict)] or [{}])
    container[
        chance.choice(("", "\ud800", "text", "messages", "label", "tools", "role", "train", "weight", "x" * 300))
    ] = copy.deepcopy(chance.choice(ODD_VALUES))


def repeat_much(rows: Rows, chance: random.Random) -> None:
    container, key = chance.choice(list(places(rows)))
    if isinstance(container[key], str | list):
        container[key] = container[key] * chance.choice((0, 2, 300))


ROW_MUTATIONS = (swap_value, drop_value, exchange_values, nest_deeply, add_key, repeat_much)


def mutated_bytes(content: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(content) + 1)
        end = min(len(content), at + chance.choice((1, 1, 4, 30)))
        kind = chance.randrange(6)
        if kind == 0 and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            content = content[:at] + content[end:]
        elif kind == 3:
            content = content[:end] + content[at:end] * chance.choice((1, 2, 1000)) + content[end:]
        else:
            content = content[:at] + chance.choice(ODD_BYTES) + content[at:]
    return content


# --- Files ---------------------------------------------------------------------------------------------------------


def as_jsonl(rows: Rows, chance: random.Random) -> bytes:
    ascii_only = chance.random() < 0.5 or not encodes(rows)
    return chance.choice(("\n", "\r\n")).join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode()


def as_json(rows: Rows, chance: random.Random) -> bytes:
    held: Any = {"version": "1", "rows": rows} if chance.random() < 0.2 else rows
    return json.dumps(held, indent=chance.choice((None, 2)), ensure_ascii=not encodes(rows)).encode()


def encodes(rows: Rows) -> bool:
    try:
        json.dumps(rows, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def as_table(rows: Rows, delimiter: str) -> bytes:
    keys = list(rows[0])
    lines = [keys, *([row[key] for key in keys] for row in rows)]
    return "\n".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines).encode()


def as_parquet(rows: Rows, chance: random.Random) -> bytes:
    sink = io.BytesIO()
    packed = chance.choice(("none", "snappy", "zstd"))
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, compression=packed, use_dictionary=chance.random() < 0.5)
    return sink.getvalue()


def as_arrow(rows: Rows, chance: random.Random) -> bytes:
    sink = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    new = chance.choice((ipc.new_file, ipc.new_stream))
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def packed(content: bytes, ending: str) -> bytes:
    return gzip.compress(content, 1) if ending == ".gz" else pyarrow.compress(content, codec="zstd", asbytes=True)


def unpacked(content: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.decompress(content)
    return pyarrow.input_stream(pyarrow.py_buffer(content), compression="zstd").read()


def make_file(form: str, chance: random.Random) -> bytes:
    """A file of two rows, mutated as values, as bytes, packed or not, or not at all."""
    base, _, pack = form.partition("+")
    name = chance.choice(
        FLAT
        if base in ("csv", "tsv")
        else sorted(VALID.keys() - ({"messages"} if base in ("parquet", "arrow") else set()))
    )
    rows = copy.deepcopy(VALID[name])
    if base in ("jsonl", "json") and chance.random() < 0.5:
        for _ in range(chance.choice((1, 1, 3))):
            mutation = chance.choice(ROW_MUTATIONS)
            if list(places(rows)):
                mutation(rows, chance)
    writers: dict[str, Callable[[], bytes]] = {
        "jsonl": lambda: as_jsonl(rows, chance),
        "json": lambda: as_json(rows, chance),
        "csv": lambda: as_table(rows, ","),
        "tsv": lambda: as_table(rows, "\t"),
        "parquet": lambda: as_parquet(rows, chance),
        "arrow": lambda: as_arrow(rows, chance),
    }
    content = writers[base]()
    if chance.random() < 0.6:
        content = mutated_bytes(content, chance)
    if pack:
        content = packed(content, f".{pack}")
        if chance.random() < 0.5:
            content = mutated_bytes(content, chance)
    return content
