"""A split on disk, written once and memory-mapped: token ids, mask, document offsets, packs.

Shapes: N tokens of the split, D documents, P packs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.manifest import SplitCounts, read_manifest
from packhorse.data.packs.packing import Packing, pack_mixed

Int64 = NDArray[np.int64]
Ids = NDArray[np.uint16] | NDArray[np.uint32]
Mask = NDArray[np.uint8]

TOKENS_FILE: Final = "tokens.bin"
SUPERVISED_FILE: Final = "supervised.bin"
DOCUMENTS_FILE: Final = "documents.npy"
PACKS_FILE: Final = "packs.npy"
PACK_OFFSETS_FILE: Final = "pack_offsets.npy"
PACK_FIGURES_FILE: Final = "pack_figures.npy"
ROWS_FILE: Final = "rows.jsonl"
# The packs are part of the prepared data, whatever seed a run has.
PACKING_SEED: Final = 0


def token_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the smallest type that holds every id."""
    return np.uint16 if vocab_size < 65536 else np.uint32


class SplitWriter:
    """Appends documents to a split's folder; `finish` packs them and makes the files last."""

    def __init__(self, folder: Path, vocab_size: int, keep_rows: bool) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._type = token_type(vocab_size)
        self._tokens = (folder / TOKENS_FILE).open("wb")
        self._supervised = (folder / SUPERVISED_FILE).open("wb")
        self._rows = (folder / ROWS_FILE).open("wb") if keep_rows else None
        self._lengths: list[int] = []
        self._labels: list[int] = []

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files():
            file.close()

    @property
    def num_documents(self) -> int:
        """D so far."""
        return len(self._lengths)

    def append(self, ids: Sequence[int], supervised: Mask, row: dict[str, Any]) -> None:
        """Add a document: ids [length], supervised [length] of 0 and 1, and the row that it was made from."""
        # Not ndarray.tofile: it goes past the file's buffer, three system calls for each document.
        self._tokens.write(np.asarray(ids, self._type).tobytes())
        self._supervised.write(supervised.tobytes())
        if self._rows is not None:
            self._rows.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._lengths.append(len(ids))
        self._labels.append(int(np.count_nonzero(supervised[1:])))

    def finish(self, length_tokens: int) -> SplitCounts:
        """Pack what was appended, write the index and wait until all of it is on disk."""
        lengths = np.array(self._lengths, np.int64)
        labels = np.array(self._labels, np.int64)
        packing = pack_mixed(lengths, length_tokens, PACKING_SEED)
        self._save(DOCUMENTS_FILE, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
        self._save(PACKS_FILE, packing.order)
        self._save(PACK_OFFSETS_FILE, packing.offsets)
        self._save(PACK_FIGURES_FILE, _figures(packing, lengths, labels))
        for file in self._files():
            file.flush()
            os.fsync(file.fileno())
        return SplitCounts(
            num_rows=len(lengths),
            num_tokens=int(lengths.sum()),
            num_supervised_tokens=int(labels.sum()),
            num_packs=packing.num_packs,
            fill=float(lengths.sum() / (packing.num_packs * length_tokens)) if packing.num_packs else 0.0,
        )

    def _files(self) -> list[BinaryIO]:
        files: list[BinaryIO] = [self._tokens, self._supervised]
        return files if self._rows is None else [*files, self._rows]

    def _save(self, name: str, values: Int64) -> None:
        with (self._folder / name).open("wb") as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True, eq=False)
class PackStore:
    """A split, memory-mapped: opening costs the same for ten rows and for ten million.

    Attributes:
        tokens: uint16 or uint32 [N].
        supervised: uint8 [N], 1 where the token is trained on.
        documents: int64 [D + 1] offsets into `tokens`.
        packs: int64 [D], documents in pack order.
        pack_offsets: int64 [P + 1] offsets into `packs`.
        pack_figures: int64 [3, P]: tokens, labels that are not -100, sum of squared document lengths.
        length_tokens: T.
    """

    folder: Path
    tokens: Ids
    supervised: Mask
    documents: Int64
    packs: Int64
    pack_offsets: Int64
    pack_figures: Int64 = field(repr=False)
    length_tokens: int

    @property
    def num_packs(self) -> int:
        """P."""
        return len(self.pack_offsets) - 1

    @property
    def num_documents(self) -> int:
        """D."""
        return len(self.documents) - 1

    @property
    def pack_tokens(self) -> Int64:
        """int64 [P], tokens of each pack."""
        return np.asarray(self.pack_figures[0])

    @property
    def pack_labels(self) -> Int64:
        """int64 [P], supervised tokens of each pack: its labels that are not -100."""
        return np.asarray(self.pack_figures[1])

    @property
    def pack_costs(self) -> Int64:
        """int64 [P], what attention costs: sum of squared document lengths."""
        return np.asarray(self.pack_figures[2])

    def documents_of(self, pack: int) -> Int64:
        """Return the documents of a pack."""
        return self.packs[self.pack_offsets[pack] : self.pack_offsets[pack + 1]]

    def document(self, index: int) -> tuple[Ids, Mask]:
        """Return ids [length] and mask [length] of a document, as views of the file."""
        here = slice(int(self.documents[index]), int(self.documents[index + 1]))
        return self.tokens[here], self.supervised[here]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield each document's row (messages or text, fields, where) in their order; not kept for train."""
        with (self.folder / ROWS_FILE).open("rb") as file:
            yield from map(json.loads, file)


def open_store(folder: Path, split: str) -> PackStore:
    """Map a split of a prepared data folder.

    Raises:
        FileNotFoundError: The folder is not complete, or has no such split.
    """
    manifest = read_manifest(folder)
    if manifest is None or split not in manifest.splits:
        raise FileNotFoundError(f"{folder} has no prepared split {split}")
    here = folder / split
    return PackStore(
        folder=here,
        tokens=np.memmap(here / TOKENS_FILE, token_type(manifest.vocab_size), mode="r"),
        supervised=np.memmap(here / SUPERVISED_FILE, np.uint8, mode="r"),
        documents=np.load(here / DOCUMENTS_FILE, mmap_mode="r"),
        packs=np.load(here / PACKS_FILE, mmap_mode="r"),
        pack_offsets=np.load(here / PACK_OFFSETS_FILE, mmap_mode="r"),
        pack_figures=np.load(here / PACK_FIGURES_FILE, mmap_mode="r"),
        length_tokens=manifest.length_tokens,
    )


def _figures(packing: Packing, lengths: Int64, labels: Int64) -> Int64:
    if packing.num_packs == 0:
        return np.zeros((3, 0), np.int64)
    per_document = np.stack([lengths, labels, lengths * lengths])[:, packing.order]
    return np.add.reduceat(per_document, packing.offsets[:-1], axis=1)
