"""10,000 mutated rows and files: rows come out as they stand there, or an error in words does; nothing else ever."""

from __future__ import annotations

import io
import json
import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, product
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from fuzz_cases import VALID, as_jsonl, make_file, unpacked
from pyarrow import ipc, parquet

from packhorse.data.formats.example import Example, Message
from packhorse.data.formats.rows import convert_rows, resolve_format
from packhorse.data.gather.sources import read_rows
from packhorse.data.read.row import RowMistakes
from packhorse.errors import Mistake, UserError
from packhorse.recipe.schema import Source


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def over(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_examples(path: Path, mistakes: RowMistakes) -> list[Example]:
    """What prepare does with a source, up to rendering."""
    rows = read_rows(Source(path=str(path)), Path("runs"), mistakes)
    first = next(rows, None)
    if first is None:
        return []
    row_format = resolve_format("auto", first)
    return list(convert_rows(chain([first], rows), row_format, mistakes))


def turns_of(example: Example) -> Iterator[Message]:
    yield from example.messages or ()
    yield from example.rejected or ()


def texts_of(example: Example) -> set[str]:
    said = {text for turn in turns_of(example) for text in (turn.content, turn.thinking)}
    return {text for text in (*said, example.text) if text}


def strings(value: Any) -> Iterator[str]:
    """Each text of a value, and what parts of a turn or the halves of an Alpaca prompt say together."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int | float):
        yield json.dumps(value)  # a label may be a number
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
        for first, second in product(strings(value.get("instruction")), strings(value.get("input"))):
            yield f"{first}\n\n{second}"
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
        parts = [part.get("text", part.get("value")) for part in value if isinstance(part, dict)]
        yield "".join(part for part in parts if isinstance(part, str))


def rows_of_oracle(base: str, content: bytes) -> list[Any] | None:
    """The rows of a file that was read without an error, by another reader; None where there is no other."""
    if base == "jsonl" or (base == "json" and is_lines(content)):
        lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        return [lenient(line) for line in lines if line.strip(b" \t\r\n")]
    if base == "json":
        held = json.loads(content.decode("utf-8-sig"))
        return (
            held
            if isinstance(held, list)
            else next(
                inner for inner in held.values() if isinstance(inner, list) and inner and isinstance(inner[0], dict)
            )
        )
    return None


def is_lines(content: bytes) -> bool:
    head, _, rest = content.removeprefix(b"\xef\xbb\xbf").strip().partition(b"\n")
    return head.startswith(b"{") and head.rstrip().endswith(b"}") and rest.lstrip().startswith(b"{")


def lenient(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def check_texts(base: str, content: bytes, examples: list[Example], num_mistakes: int) -> None:
    rows = rows_of_oracle(base, content)
    if rows is not None:
        assert len(examples) + num_mistakes == len(rows), "a row was lost or made up"
        known = set(strings(rows))
        for example in examples:
            assert texts_of(example) <= known
    elif base in ("csv", "tsv"):
        plain = content.decode(errors="replace")
        for text in chain.from_iterable(map(texts_of, examples)):
            assert any(all(stands_in(plain, cell) for cell in cells) for cells in halves(text))
    else:
        table = parquet.read_table(io.BytesIO(content)) if base == "parquet" else read_arrow(content)
        known = {text for at in range(table.num_rows) for text in strings(row_or_nothing(table, at))}
        for example in examples:
            assert texts_of(example) <= known


def halves(text: str) -> Iterator[tuple[str, ...]]:
    """A text as one cell, and as the two cells that an Alpaca prompt is made of."""
    yield (text,)
    for at in range(len(text)):
        if text.startswith("\n\n", at):
            yield text[:at], text[at + 2 :]


def stands_in(plain: str, cell: str) -> bool:
    return cell in plain or cell.replace('"', '""') in plain


def read_arrow(content: bytes) -> pyarrow.Table:
    opened = ipc.open_file(content) if content.startswith(b"ARROW1") else ipc.open_stream(content)
    return opened.read_all()


def row_or_nothing(table: pyarrow.Table, at: int) -> Any:
    try:
        return table.slice(at, 1).to_pylist()
    except ValueError:
        return []


def check_words(mistake: Mistake) -> None:
    assert mistake.fact.strip()
    assert mistake.why.strip()
    assert mistake.fix.strip()
    # What cannot be encoded cannot be printed either.
    str(mistake).encode()


FORMS = {
    "jsonl": 3000, "json": 2000, "csv": 1200, "tsv": 800, "parquet": 800, "arrow": 800,
    "jsonl+gz": 500, "jsonl+zst": 500, "json+gz": 150, "csv+zst": 150, "parquet+gz": 50, "arrow+zst": 50,
}  # fmt: skip


@pytest.mark.parametrize(("form", "num_cases"), FORMS.items(), ids=FORMS)
def test_mutated_files_give_their_rows_or_words(tmp_path: Path, form: str, num_cases: int) -> None:
    chance = random.Random(f"packhorse {form}")
    base, _, pack = form.partition("+")
    path = tmp_path / f"rows.{form.replace('+', '.')}"
    seen: Counter[str] = Counter()
    for case in range(num_cases):
        content = make_file(form, chance)
        path.write_bytes(content)
        mistakes = RowMistakes("fuzz")
        try:
            with time_limit(20):
                examples = read_examples(path, mistakes)
            check_texts(base, unpacked(content, f".{pack}") if pack else content, examples, mistakes.num_rows)
            seen["rows" if examples else "no row"] += 1
        except UserError as error:
            seen["refused"] += 1
            for mistake in error.mistakes:
                check_words(mistake)
        except BaseException as error:
            error.add_note(f"case {case} of {form}: {content[:300]!r}")
            raise
        for mistake in mistakes.recorded:
            check_words(mistake)
            assert mistake.where.startswith((f"{path}:", f"{path} row "))
        seen["mistakes"] += mistakes.num_rows > 0
    # Both ends are reached: mutations that break nothing, or everything, would show nothing.
    assert seen["rows"] > num_cases // 10
    assert seen["refused"] + seen["mistakes"] > num_cases // 10


def test_ten_thousand_cases() -> None:
    assert sum(FORMS.values()) == 10_000


@pytest.mark.parametrize("name", VALID)
def test_rows_that_nothing_was_done_to_come_out(tmp_path: Path, name: str) -> None:
    """The fuzz starts from rows that are as they should be."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(as_jsonl(VALID[name], random.Random(1)))
    mistakes = RowMistakes("fuzz")
    examples = read_examples(path, mistakes)
    assert len(examples) + mistakes.num_rows == len(VALID[name])
