"""Where rows wait between the one pass over the sources and the packs: tokens, masks, texts and columns of figures.

Rows are read, rendered and hashed once; which of them are kept, and on which side, is decided when all have been seen.
What grows with the text stands on disk; in memory a row costs some 60 bytes.

Shapes: R rows, N tokens, P permutations of a MinHash signature.
"""

from __future__ import annotations

import marshal
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.formats.example import Example
from packhorse.data.mapped import release
from packhorse.data.packs.store import token_type
from packhorse.data.render.render import Rendered

TOKENS_FILE: Final = "tokens.bin"
SUPERVISED_FILE: Final = "supervised.bin"
SIGNATURES_FILE: Final = "signatures-{}.bin"
TEXTS_FILE: Final = "texts.bin"
TOKENS_AT_ONCE: Final = 1 << 22

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Columns:
    """What is known of each row, in the order of reading.

    Attributes:
        keys: uint64 [R, 2], 128-bit hash of what a row says.
        prompt_keys: uint64 [R, 2], of what comes before the last answer; [0, 2] where it was not asked for.
        answer_keys: uint64 [R, 2], of the last answer; likewise.
        source: int16 [R], index of the source.
        stratum: int32 [R], code of the values to stratify by.
        conversation: uint64 [R], hash of `data.split.group_by`'s value; 0 without it.
        contaminated: bool [R].
        tokens: int64 [R], length of the rendered row.
        labels: int64 [R], supervised tokens of the row but its first token.
        text_bytes: int64 [R], size of the row in the file of texts.
    """

    keys: UInt64
    prompt_keys: UInt64
    answer_keys: UInt64
    source: NDArray[np.int16]
    stratum: NDArray[np.int32]
    conversation: UInt64
    contaminated: NDArray[np.bool_]
    tokens: Int64
    labels: Int64
    text_bytes: Int64

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def starts(self) -> Int64:
        """int64 [R + 1], where each row's tokens begin in the spool."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.tokens)])


class SpoolWriter:
    """Takes batches of rendered rows."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._type = token_type(vocab_size)
        self._tokens = (folder / TOKENS_FILE).open("wb")
        self._supervised = (folder / SUPERVISED_FILE).open("wb")
        self._texts = (folder / TEXTS_FILE).open("wb")
        self._signatures: dict[str, BinaryIO] = {}
        self._columns: dict[str, list[NDArray[Any]]] = {name: [] for name in Columns.__dataclass_fields__}

    def __enter__(self) -> SpoolWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._tokens, self._supervised, self._texts, *self._signatures.values()):
            file.close()

    def append(
        self,
        examples: Sequence[Example],
        rendered: Sequence[Rendered],
        signatures: dict[str, NDArray[np.uint32]],
        columns: dict[str, NDArray[Any]],
    ) -> None:
        """Add a batch: rows, tokens, signatures uint32 [rows, P] by name, and the columns but tokens and labels."""
        lengths = np.fromiter((len(row.ids) for row in rendered), np.int64, len(rendered))
        supervised = np.concatenate([row.supervised for row in rendered])
        starts = np.cumsum(lengths) - lengths
        labels = np.add.reduceat(supervised, starts, dtype=np.int64) - supervised[starts]
        # array.array reads a list of ints three times as fast as numpy.
        self._tokens.writelines(array(self._type().dtype.char, row.ids) for row in rendered)
        self._supervised.write(supervised.tobytes())
        for name, values in signatures.items():
            if name not in self._signatures:
                self._signatures[name] = (self.folder / SIGNATURES_FILE.format(name)).open("wb")
            self._signatures[name].write(values.tobytes())
        texts = [marshal.dumps(_plain(example)) for example in examples]
        self._texts.writelines(texts)
        text_bytes = np.fromiter(map(len, texts), np.int64, len(texts))
        for name, values in {**columns, "tokens": lengths, "labels": labels, "text_bytes": text_bytes}.items():
            self._columns[name].append(values)

    def finish(self) -> Spool:
        """Return what was appended, ready to be read."""
        self.__exit__(None, None, None)
        columns = Columns(**{name: _joined(name, parts) for name, parts in self._columns.items()})
        return Spool(self.folder, columns, self._type)


Mapped = NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Spool:
    """Rows that wait, and their columns."""

    folder: Path
    columns: Columns
    token_type: type[np.uint16] | type[np.uint32]

    def tokens(self) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """Token ids [N] of all rows, mapped."""
        return np.memmap(self.folder / TOKENS_FILE, self.token_type, mode="r")

    def supervised(self) -> NDArray[np.uint8]:
        """Masks uint8 [N] of all rows, mapped."""
        return np.memmap(self.folder / SUPERVISED_FILE, np.uint8, mode="r")

    def signatures(self, name: str) -> NDArray[np.uint32]:
        """MinHash signatures uint32 [R, P] of all rows, mapped: of `rows` or of their `answers`."""
        file = self.folder / SIGNATURES_FILE.format(name)
        num_rows = len(self.columns)
        return np.memmap(file, np.uint32, mode="r", shape=(num_rows, file.stat().st_size // 4 // num_rows))

    def texts(self, wanted: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield the rows of these indices: messages or text, fields, where."""
        ends = np.cumsum(self.columns.text_bytes)
        with (self.folder / TEXTS_FILE).open("rb") as file:
            for index in wanted:
                file.seek(int(ends[index] - self.columns.text_bytes[index]))
                yield _row(marshal.load(file))  # noqa: S302  # written by this process, a moment ago


def stretches(values: Mapped, starts: Int64, lengths: Int64) -> Iterator[Mapped]:
    """Yield, in large pieces, what stands at these places of a mapped file: `lengths[i]` from `starts[i]`, rising."""
    ends = starts + lengths
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + TOKENS_AT_ONCE, side="right")))
        begin, end = int(starts[first]), int(ends[last - 1])
        border = np.zeros(end - begin + 1, np.int8)
        # Where one place ends and the next begins, the two cancel out.
        np.add.at(border, starts[first:last] - begin, 1)
        np.add.at(border, ends[first:last] - begin, -1)
        yield values[begin:end][np.cumsum(border[:-1], dtype=np.int8).view(np.bool_)]
        release(values)
        first = last


def text_of(row: dict[str, Any]) -> str:
    """Return what a row of the spool says, a turn a line."""
    return row["text"] or "\n".join(turn["content"] for turn in row["messages"])


def _joined(name: str, parts: list[NDArray[Any]]) -> NDArray[Any]:
    # A list of batches is freed as it is joined: two copies of all columns at once would double the memory.
    if not parts:
        return np.empty((0, 2) if name.endswith("keys") else 0, np.int64)
    joined = np.concatenate(parts)
    parts.clear()
    return joined


def _plain(example: Example) -> tuple[Any, ...]:
    """The row in types that `marshal` writes, ten times faster than JSON."""
    turns = example.messages
    messages = turns and [
        (turn.role, turn.content, turn.thinking, turn.tool_calls, turn.name, turn.call_id) for turn in turns
    ]
    return example.where, example.fields, example.text, messages, example.tools


def _row(plain: tuple[Any, ...]) -> dict[str, Any]:
    where, fields, text, turns, tools = plain
    messages = turns and [_turn(*turn) for turn in turns]
    row = {"messages": messages, "text": text, "fields": fields, "where": where}
    return {**row, "tools": list(tools)} if tools else row


def _turn(
    role: str,
    content: str,
    thinking: str | None,
    tool_calls: tuple[dict[str, Any], ...],
    name: str | None,
    call_id: str | None,
) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": role, "content": content}
    optional = {"reasoning_content": thinking, "tool_calls": list(tool_calls), "name": name, "tool_call_id": call_id}
    return turn | {key: value for key, value in optional.items() if value}
