"""Convert the rows of a file to another form, all of them or none (`packhorse convert`)."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, Literal

from packhorse.data.convert.prices import TokenCount
from packhorse.data.formats.bad_row import BadRowError, names
from packhorse.data.formats.example import Example
from packhorse.data.formats.judged_writing import to_chosen, to_kto, to_preference
from packhorse.data.formats.key_counts import KeyCounts
from packhorse.data.formats.openai import LARGEST_FILE_BYTES, LEAST_EXAMPLES, to_openai
from packhorse.data.formats.rows import renamed_rows, resolve_format, row_converter
from packhorse.data.formats.writing import to_alpaca, to_messages
from packhorse.data.gather.bad_rows import MISTAKES_FILE, BadRowList
from packhorse.data.gather.sources import read_rows
from packhorse.data.read.arrow_values import RemovedNulls
from packhorse.data.read.row import Row, RowMistakes
from packhorse.durable import sync_to_disk
from packhorse.errors import UserError
from packhorse.recipe.objectives import RowFormat
from packhorse.recipe.schema import Source

Target = Literal["messages", "alpaca", "openai", "preference", "kto", "chosen"]
Writer = Callable[[Example, Mapping[str, Any]], list[dict[str, Any]]]

WRITERS: Final[Mapping[Target, Writer]] = {
    "messages": lambda example, others: [to_messages(example, others)],
    "alpaca": lambda example, others: [to_alpaca(example, others)],
    "openai": lambda example, others: [to_openai(example, others)],
    "preference": to_preference,
    "kto": to_kto,
    "chosen": to_chosen,
}
KEEPS_CONTEXT: Final = ("messages", "preference", "kto", "chosen")
FIRST_ROWS: Final = 10
CONTEXT_MARK: Final = "train: false of turns that are not the assistant's"


@dataclass
class Conversion:
    """Result of the conversion of a file.

    Attributes:
        row_format: Format of the rows that were read.
        num_rows: Rows written.
        dropped: Field that the form cannot hold, and the number of rows without it.
        tokens: Estimate of the tokens, for `openai`.
        removed_nulls: Nulls that Arrow added and that were removed.
    """

    row_format: RowFormat
    num_rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: TokenCount = field(default_factory=TokenCount)
    removed_nulls: RemovedNulls = field(default_factory=RemovedNulls)


def convert_file(source: Source, target: Path, to: Target, force: bool, runs_folder: Path) -> Conversion:
    """Write all rows of a source in another form.

    The target appears only after all rows were converted; until then an earlier file stays unchanged.

    Args:
        source: Source of the rows.
        target: A .jsonl file.
        to: Name of the form.
        force: Whether to replace an existing file.
        runs_folder: Folder of runs, for `builtin:` files.

    Raises:
        UserError: All rows that cannot be read, converted or used by the service; or the target cannot be written.
    """
    _check_target(target, force)
    # In the folder of the target, so that the rename stays within one file system.
    draft = target.with_name(f".{target.name}.draft-{os.getpid()}")
    bad_rows = BadRowList(target.with_suffix(f".{MISTAKES_FILE}"))
    mistakes, removed = bad_rows.of(source), RemovedNulls()
    rows = read_rows(source, runs_folder, mistakes, removed)
    first = list(islice(rows, FIRST_ROWS))
    if not first:
        bad_rows.write(mistakes.to_show())
    conversion = Conversion(resolve_format(source.format, first, source), removed_nulls=removed)
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            for line in _lines(chain(first, rows), source, to, conversion, mistakes):
                file.write(line)
        bad_rows.write(mistakes.to_show())
        if to == "openai":
            _check_file(conversion, draft.stat().st_size)
        sync_to_disk(draft)
        draft.replace(target)
        sync_to_disk(target.parent)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror}.",
            "the rows are written to a file next to it, which is then renamed.",
            "name a file in a folder where you may write, on a disk with enough space.",
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    return conversion


def _lines(
    rows: Iterator[Row], source: Source, to: Target, conversion: Conversion, mistakes: RowMistakes
) -> Iterator[str]:
    convert = row_converter(conversion.row_format, source, keeps_others=True)
    for row in renamed_rows(rows, conversion.row_format, mistakes, source, KeyCounts()):
        try:
            example = convert(row)
            others = _others(row.values, example)
            written = WRITERS[to](example, others)
            lines = [_json_line(row) for row in written]
        except BadRowError as error:
            mistakes.add(error.at(row.where))
            continue
        conversion.num_rows += len(lines)
        for new in written:
            conversion.dropped.update(_dropped(example, others, new, to))
            if to == "openai":
                conversion.tokens.add(new)
        yield from lines


def _others(values: dict[str, Any], example: Example) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in example.used or key in example.fields}


def _dropped(example: Example, others: Mapping[str, Any], written: Mapping[str, Any], to: Target) -> list[str]:
    dropped = [*(key for key in others if key not in written), *example.unused]
    context = any(not turn.trained and turn.role != "assistant" for turn in example.messages or ())
    return [*dropped, CONTEXT_MARK] if context and to not in KEEPS_CONTEXT else dropped


def _json_line(row: dict[str, Any]) -> str:
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        line.encode()
    except (TypeError, ValueError, RecursionError) as error:
        # Only after a failure, as it costs as much as writing the row again.
        bad = [key for key, value in row.items() if not _is_json(value)]
        raise BadRowError(
            f"the field {names(bad)} cannot be written as JSON ({type(error).__name__}).",
            "a date, bytes, NaN, infinity and half a surrogate pair are not JSON.",
            "remove the field, or write it as text or a number.",
        ) from error
    return f"{line}\n"


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _check_target(target: Path, force: bool) -> None:
    if not target.name:
        raise UserError(
            f"{target} is a folder.", "the rows are written to one file.", "name a file, such as out.jsonl."
        )
    if target.suffix != ".jsonl":
        raise UserError(
            f"{target} ends in {target.suffix or 'no extension'}.",
            "rows are written one per line, as .jsonl.",
            f"name it {target.with_suffix('.jsonl').name}.",
        )
    if target.is_dir():
        raise UserError(f"{target} is a folder.", "the rows are written to one file.", "name a file.")
    if target.exists() and not force:
        raise UserError(f"{target} exists.", "it would be replaced.", "name another file, or add --force.")
    if not target.parent.is_dir():
        raise UserError(f"the folder {target.parent} does not exist.", "the file is written there.", "create it first.")


def _check_file(conversion: Conversion, size_bytes: int) -> None:
    if conversion.num_rows < LEAST_EXAMPLES:
        raise UserError(
            f"the file has {conversion.num_rows} examples.",
            f"the service accepts files with {LEAST_EXAMPLES} or more.",
            "add rows.",
        )
    if size_bytes > LARGEST_FILE_BYTES:
        raise UserError(
            f"the file would have {size_bytes / 1024**2:,.0f} MB.",
            f"the service accepts files of up to {LARGEST_FILE_BYTES // 1024**2} MB.",
            "split the rows into several files.",
        )
