"""Temporary storage of rows between the pass over the sources and the packs: tokens, masks, texts, columns.

Rows are read, rendered and hashed once; the decision about them needs all rows. What grows with the text is on disk; in
memory a row costs about 60 bytes.

Shapes: R rows, N tokens, P permutations of a MinHash signature.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.checks.duplicates import release_pages
from packhorse.data.formats.example import Example, Message
from packhorse.data.packs.store import token_type
from packhorse.data.render.render import Rendered

TOKENS_FILE: Final = "tokens.bin"
SUPERVISED_FILE: Final = "supervised.bin"
SIGNATURES_FILE: Final = "signatures-{}.bin"
ROWS_FILE: Final = "rows.jsonl"
TOKENS_AT_ONCE: Final = 1 << 22

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Columns:
    """Facts about each row, in the order of reading.

    Attributes:
        keys: uint64 [R, 2], 128-bit hash of the row's content.
        prompt_keys: uint64 [R, 2], hash of the text before the last answer; [0, 2] if not requested.
        answer_keys: uint64 [R, 2], hash of the last answer; [0, 2] if not requested.
        normalised_prompt_keys: uint64 [R, 2], hash of the normalised prompt; [0, 2] if not requested.
        normalised_answer_keys: uint64 [R, 2], hash of the normalised last answer; [0, 2] if not requested.
        source: int16 [R], index of the source.
        stratum: int32 [R], code of the values to stratify by.
        conversation: uint64 [R], hash of the value of `data.split.group_by`; 0 without it.
        contaminated: bool [R], whether the row contains text of an evaluation.
        tokens: int64 [R], length of the rendered row.
        labels: int64 [R], supervised tokens of the row except its first token.
        cuts: int64 [R], tokens of a pair's first document, or of the prompt before an answer with a verdict; [0] for
            rows of one document.
        cut_labels: int64 [R], supervised tokens before the cut; [0] for rows of one document.
        verdicts: float64 [R], 1 for a good answer, 0 for a bad one; [0] for rows without a verdict.
        margins: float64 [R], field `margin` of a pair, NaN without it; [0] for other rows.
        text_bytes: int64 [R], size of the row in the file of rows.
    """

    keys: UInt64
    prompt_keys: UInt64
    answer_keys: UInt64
    normalised_prompt_keys: UInt64
    normalised_answer_keys: UInt64
    source: NDArray[np.int16]
    stratum: NDArray[np.int32]
    conversation: UInt64
    contaminated: NDArray[np.bool_]
    tokens: Int64
    labels: Int64
    cuts: Int64
    cut_labels: Int64
    verdicts: NDArray[np.float64]
    margins: NDArray[np.float64]
    text_bytes: Int64

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def starts(self) -> Int64:
        """int64 [R + 1], position of each row's first token in the spool."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.tokens)])


class SpoolWriter:
    """Writes batches of rendered rows."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._type = token_type(vocab_size)
        self._tokens = (folder / TOKENS_FILE).open("wb")
        self._supervised = (folder / SUPERVISED_FILE).open("wb")
        self._rows = (folder / ROWS_FILE).open("wb")
        self._signatures: dict[str, BinaryIO] = {}
        self._columns: dict[str, list[NDArray[Any]]] = {name: [] for name in Columns.__dataclass_fields__}

    def __enter__(self) -> SpoolWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._tokens, self._supervised, self._rows, *self._signatures.values()):
            file.close()

    def append(
        self,
        examples: Sequence[Example],
        rendered: Sequence[Rendered],
        signatures: dict[str, NDArray[np.uint32]],
        columns: dict[str, NDArray[Any]],
    ) -> None:
        """Append a batch: rows, tokens, signatures uint32 [rows, P] by name, and columns except tokens and labels."""
        lengths = np.fromiter((len(row.ids) for row in rendered), np.int64, len(rendered))
        supervised = np.concatenate([row.supervised for row in rendered])
        starts = np.cumsum(lengths) - lengths
        labels = np.add.reduceat(supervised, starts, dtype=np.int64) - supervised[starts]
        cut_rows = [row for row in rendered if row.cut]
        cuts = np.array([row.cut for row in cut_rows], np.int64)
        cut_labels = np.array([np.count_nonzero(row.supervised[: row.cut]) for row in cut_rows], np.int64)
        # array.array converts a list of ints three times as fast as numpy.
        self._tokens.writelines(array(self._type().dtype.char, row.ids) for row in rendered)
        self._supervised.write(supervised.tobytes())
        for name, values in signatures.items():
            if name not in self._signatures:
                self._signatures[name] = (self.folder / SIGNATURES_FILE.format(name)).open("wb")
            self._signatures[name].write(values.tobytes())
        lines = [json_line(_row(example)) for example in examples]
        self._rows.writelines(lines)
        text_bytes = np.fromiter(map(len, lines), np.int64, len(lines))
        figures = {"tokens": lengths, "labels": labels, "cuts": cuts, "cut_labels": cut_labels}
        for name, values in {**columns, **figures, "text_bytes": text_bytes}.items():
            self._columns[name].append(values)

    def finish(self) -> Spool:
        """Close the files and return the spool for reading."""
        self.__exit__(None, None, None)
        columns = Columns(**{name: _concatenated(name, parts) for name, parts in self._columns.items()})
        return Spool(self.folder, columns, self._type)


Mapped = NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Spool:
    """All rows on disk, and their columns."""

    folder: Path
    columns: Columns
    token_type: type[np.uint16] | type[np.uint32]

    def tokens(self) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """Return the token ids [N] of all rows, memory-mapped."""
        return np.memmap(self.folder / TOKENS_FILE, self.token_type, mode="r")

    def supervised(self) -> NDArray[np.uint8]:
        """Return the masks uint8 [N] of all rows, memory-mapped."""
        return np.memmap(self.folder / SUPERVISED_FILE, np.uint8, mode="r")

    def signatures(self, name: str) -> NDArray[np.uint32]:
        """Return the MinHash signatures uint32 [R, P] of `rows` or of their `answers`, memory-mapped."""
        file = self.folder / SIGNATURES_FILE.format(name)
        num_rows = len(self.columns)
        return np.memmap(file, np.uint32, mode="r", shape=(num_rows, file.stat().st_size // 4 // num_rows))

    def lines(self, indices: Iterable[int]) -> Iterator[bytes]:
        """Yield the rows of these indices as JSON lines: messages or text, fields, where."""
        ends = np.cumsum(self.columns.text_bytes)
        with (self.folder / ROWS_FILE).open("rb") as file:
            for index in indices:
                size = int(self.columns.text_bytes[index])
                file.seek(int(ends[index]) - size)
                yield file.read(size)

    def texts(self, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield the rows of these indices: messages or text, fields, where."""
        return map(json.loads, self.lines(indices))


def selected_pieces(values: Mapped, starts: Int64, lengths: Int64) -> Iterator[Mapped]:
    """Yield `values[starts[i] : starts[i] + lengths[i]]` (starts rising) of a mapped file, in large pieces."""
    ends = starts + lengths
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + TOKENS_AT_ONCE, side="right")))
        begin, end = int(starts[first]), int(ends[last - 1])
        border = np.zeros(end - begin + 1, np.int8)
        # Where one part ends and the next begins, the two cancel out.
        np.add.at(border, starts[first:last] - begin, 1)
        np.add.at(border, ends[first:last] - begin, -1)
        yield values[begin:end][np.cumsum(border[:-1], dtype=np.int8).view(np.bool_)]
        release_pages(values)
        first = last


def text_of(row: dict[str, Any]) -> str:
    """Return the text of a row of the spool, one turn per line."""
    return row["text"] or "\n".join(turn["content"] for turn in row["messages"])


def json_line(value: dict[str, Any]) -> bytes:
    """Return an object as one line of JSON."""
    return _encode(value).encode() + b"\n"


_encode: Final = json.JSONEncoder(ensure_ascii=False).encode


def _concatenated(name: str, parts: list[NDArray[Any]]) -> NDArray[Any]:
    # The batches are freed at once: with two copies of all columns the memory would double.
    if not parts:
        return np.empty((0, 2) if name.endswith("keys") else 0, np.int64)
    joined = np.concatenate(parts)
    parts.clear()
    return joined


def _row(example: Example) -> dict[str, Any]:
    messages = example.messages and [_turn(turn) for turn in example.messages]
    row: dict[str, Any] = {"messages": messages, "text": example.text, "fields": example.fields, "where": example.where}
    if example.rejected is not None:
        row |= {"rejected": [_turn(turn) for turn in example.rejected]}
    if example.desirable is not None:
        row |= {"desirable": example.desirable}
    return {**row, "tools": example.tools} if example.tools else row


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        turn["reasoning_content"] = message.thinking
    if message.tool_calls:
        turn["tool_calls"] = message.tool_calls
    if message.name:
        turn["name"] = message.name
    if message.call_id:
        turn["tool_call_id"] = message.call_id
    return turn
