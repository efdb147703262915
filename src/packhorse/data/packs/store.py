"""Store a split on disk, written once and memory-mapped: token ids, masks, document offsets, packs.

Shapes: N tokens of the split, D documents, P packs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from mmap import ACCESS_READ, MADV_WILLNEED, PAGESIZE, mmap
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from packhorse.data.data_manifest import FileRecord, SplitCounts, read_data_manifest
from packhorse.data.packs.packing import Packing
from packhorse.errors import UserError

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
VALUES_FOLDER: Final = "values"
SEALED_SPLIT: Final = "test"
BUFFER_BYTES: Final = 1 << 20


def token_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the smallest type that holds every token id."""
    return np.uint16 if vocab_size < 65536 else np.uint32


def write_split(
    folder: Path,
    *,
    ids: Iterable[NDArray[np.integer[Any]]],
    supervised: Iterable[NDArray[Any]],
    lengths: Int64,
    labels: Int64,
    rows: Iterable[bytes] | None,
    vocab_size: int,
    length_tokens: int,
    packing: Packing,
    documents_per_row: int = 1,
    values: Mapping[str, NDArray[np.float64]] | None = None,
) -> SplitCounts:
    """Write a split into a new folder; all of it is on disk when this returns. Memory grows with D, not with N.

    Args:
        folder: Folder of the split, created here with its parents.
        ids: Token ids of the documents end to end, in pieces of any size.
        supervised: 0 or 1 (or bool) for each token, in pieces of any size.
        lengths: int64 [D], tokens of each document.
        labels: int64 [D], supervised tokens of each document except the first token.
        rows: JSON lines with their line ends, in pieces of any size; None: rows are not stored.
        vocab_size: Highest id + 1.
        length_tokens: Tokens in a pack (T).
        packing: Packing of these lengths.
        documents_per_row: Documents of a row, which follow each other in a pack.
        values: float64 [D] by name: numbers of each document beside its tokens.

    Raises:
        ValueError: The number of ids or masks differs from the sum of the lengths.
    """
    folder.mkdir(parents=True)
    kind = token_type(vocab_size)
    num_tokens = int(lengths.sum())
    files = {
        TOKENS_FILE: write_pieces(folder / TOKENS_FILE, (piece.astype(kind, copy=False) for piece in ids)),
        SUPERVISED_FILE: write_pieces(
            folder / SUPERVISED_FILE, (piece.astype(np.uint8, copy=False) for piece in supervised)
        ),
    }
    num_bytes, num_masks = files[TOKENS_FILE].bytes, files[SUPERVISED_FILE].bytes
    if (num_bytes, num_masks) != (num_tokens * np.dtype(kind).itemsize, num_tokens):
        raise ValueError(f"{num_tokens} tokens by length, {num_bytes} bytes of ids, {num_masks} masks")
    if rows is not None:
        files[ROWS_FILE] = write_pieces(folder / ROWS_FILE, rows)
    arrays = {
        DOCUMENTS_FILE: np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        PACKS_FILE: packing.order,
        PACK_OFFSETS_FILE: packing.offsets,
        PACK_FIGURES_FILE: figures_of(packing, lengths, labels),
    }
    arrays |= {f"{VALUES_FOLDER}/{name}.npy": column for name, column in (values or {}).items()}
    if values:
        (folder / VALUES_FOLDER).mkdir()
    files |= {name: _save(folder / name, array) for name, array in arrays.items()}
    return SplitCounts(
        num_rows=len(lengths) // documents_per_row,
        num_tokens=num_tokens,
        num_supervised_tokens=int(labels.sum()),
        num_packs=packing.num_packs,
        fill=num_tokens / (packing.num_packs * length_tokens) if packing.num_packs else 0.0,
        files=files,
    )


class TeacherTokens(Protocol):
    """A teacher's most probable tokens at each supervised token of a split (`top_tokens.py`)."""

    def read(self, packs: Int64) -> tuple[Int64, NDArray[np.float16]]:
        """Return ids and log-probabilities [S, k] at the supervised tokens of these packs, in the loader's order."""
        ...


@dataclass(frozen=True, eq=False)
class PackStore:
    """A memory-mapped split: opening ten million rows costs as much as opening ten.

    Attributes:
        tokens: uint16 or uint32 [N].
        supervised: uint8 [N], 1 where the token is trained on.
        documents: int64 [D + 1] offsets into `tokens`.
        packs: int64 [D], documents in pack order.
        pack_offsets: int64 [P + 1] offsets into `packs`.
        pack_figures: int64 [3, P]: tokens, labels that are not -100, sum of squared document lengths.
        length_tokens: T.
        in_order: Whether packs are trained on in their order, for a curriculum.
        documents_per_row: Documents of a row, which follow each other in a pack.
        values: float64 [D] by name: numbers of each document beside its tokens, such as `verdict`.
        teacher: The teacher's tokens at each supervised token; None without a stored teacher.
        pages: Mappings behind `tokens` and `supervised`.
    """

    folder: Path
    tokens: Ids
    supervised: Mask
    documents: Int64
    packs: Int64
    pack_offsets: Int64
    pack_figures: Int64 = field(repr=False)
    length_tokens: int
    in_order: bool
    documents_per_row: int
    pages: tuple[mmap, mmap] = field(repr=False)
    values: Mapping[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    teacher: TeacherTokens | None = field(default=None, repr=False)

    @property
    def num_packs(self) -> int:
        """Number of packs (P)."""
        return len(self.pack_offsets) - 1

    @property
    def num_documents(self) -> int:
        """Number of documents (D)."""
        return len(self.documents) - 1

    @property
    def pack_tokens(self) -> Int64:
        """int64 [P], tokens of each pack."""
        return np.asarray(self.pack_figures[0])

    @property
    def pack_labels(self) -> Int64:
        """int64 [P], labels of each pack that are not -100."""
        return np.asarray(self.pack_figures[1])

    @property
    def pack_costs(self) -> Int64:
        """int64 [P], cost of attention: sum of squared document lengths."""
        return np.asarray(self.pack_figures[2])

    @property
    def pack_units(self) -> Int64:
        """int64 [P], units of each pack: rows where they have two documents, else labels that are not -100."""
        if self.documents_per_row == 1:
            return self.pack_labels
        return np.diff(self.pack_offsets) // self.documents_per_row

    @property
    def num_units(self) -> int:
        """Units of the split."""
        return int(self.pack_units.sum())

    def documents_of(self, pack: int) -> Int64:
        """Return the indices of the documents in a pack."""
        return self.packs[self.pack_offsets[pack] : self.pack_offsets[pack + 1]]

    def document(self, index: int) -> tuple[Ids, Mask]:
        """Return ids [length] and mask [length] of a document, as views of the files."""
        here = slice(int(self.documents[index]), int(self.documents[index + 1]))
        return self.tokens[here], self.supervised[here]

    def fetch(self, packs: Int64) -> None:
        """Start reading the documents of these packs from disk, without waiting (madvise(2)).

        They are spread over the file: read on access, 64 packs would wait for the disk a thousand times.
        """
        documents = np.concatenate([self.packs[:0], *(self.documents_of(pack) for pack in packs.tolist())])
        starts, ends = self.documents[documents], self.documents[documents + 1]
        for pages, width in zip(self.pages, (self.tokens.itemsize, self.supervised.itemsize), strict=True):
            first = starts * width // PAGESIZE * PAGESIZE
            for start, size in zip(first.tolist(), (ends * width - first).tolist(), strict=True):
                pages.madvise(MADV_WILLNEED, start, size)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows (messages or text, fields, where) in order of their documents; train stores none."""
        with (self.folder / ROWS_FILE).open("rb") as file:
            yield from map(json.loads, file)


def open_store(folder: Path, split: str, unsealed: bool = False) -> PackStore:
    """Map a split of a prepared data folder.

    Args:
        folder: Folder with data.json.
        split: train, validation, test or retain.
        unsealed: Whether the test split may be opened; only `data.seal` sets this, after recording the look.

    Raises:
        FileNotFoundError: The folder is not complete, or has no such split.
        ValueError: The test split is sealed.
        UserError: A file does not hold what was written.
    """
    if split == SEALED_SPLIT and not unsealed:
        raise ValueError(f"the {split} split in {folder} is sealed; data.seal opens it, and records that")
    manifest = read_data_manifest(folder)
    if manifest is None or split not in manifest.splits:
        raise FileNotFoundError(f"{folder} has no prepared split {split}")
    here = folder / split
    tokens, supervised = _pages(here / TOKENS_FILE), _pages(here / SUPERVISED_FILE)
    return PackStore(
        folder=here,
        tokens=_ids(tokens, manifest.vocab_size),
        supervised=np.frombuffer(supervised, np.uint8),
        documents=_mapped(here / DOCUMENTS_FILE),
        packs=_mapped(here / PACKS_FILE),
        pack_offsets=_mapped(here / PACK_OFFSETS_FILE),
        pack_figures=_mapped(here / PACK_FIGURES_FILE),
        length_tokens=manifest.length_tokens,
        in_order=split == "train" and manifest.packing == "in_order",
        documents_per_row=manifest.documents_per_row,
        values={file.stem: np.asarray(_mapped(file), np.float64) for file in sorted((here / VALUES_FOLDER).glob("*"))},
        pages=(tokens, supervised),
    )


def _pages(file: Path) -> mmap:
    with file.open("rb") as opened:
        return mmap(opened.fileno(), 0, access=ACCESS_READ)


def _ids(pages: mmap, vocab_size: int) -> Ids:
    return np.frombuffer(pages, np.uint16) if token_type(vocab_size) is np.uint16 else np.frombuffer(pages, np.uint32)


def _mapped(file: Path) -> Int64:
    try:
        # A plain array over the same pages: numpy's memmap class makes every slice ten times slower.
        return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{file} is not an array of numbers: {error}.",
            "it was replaced by something else, or cut short.",
            f"remove {file.parent.parent}, and prepare it again: packhorse prepare RECIPE.",
        ) from error


class _Hashing:
    """A file that is hashed while it is written, so that it need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def write(self, piece: Any) -> int:  # noqa: ANN401  # bytes, or an array's memory
        self._digest.update(piece)
        self._num_bytes += (written := self._file.write(piece))
        return written

    def finish(self) -> FileRecord:
        """Wait until everything is on disk, and return size and hash."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileRecord(bytes=self._num_bytes, sha256=self._digest.hexdigest())


def write_pieces(file: Path, pieces: Iterable[NDArray[Any] | bytes]) -> FileRecord:
    """Write the pieces one after another; they are on disk when this returns."""
    with file.open("wb", buffering=BUFFER_BYTES) as opened:
        out = _Hashing(opened)
        for piece in pieces:
            out.write(np.ascontiguousarray(piece).data if isinstance(piece, np.ndarray) else piece)
        return out.finish()


def _save(file: Path, values: NDArray[Any]) -> FileRecord:
    with file.open("wb") as opened:
        out = _Hashing(opened)
        np.save(out, values)
        return out.finish()


def figures_of(packing: Packing, lengths: Int64, labels: Int64) -> Int64:
    """Return int64 [3, P]: tokens, labels and sum of squared document lengths of each pack."""
    figures = np.zeros((3, packing.num_packs), np.int64)
    if packing.num_packs:
        for figure, of_document in zip(figures, (lengths, labels, lengths * lengths), strict=True):
            np.add.reduceat(of_document[packing.order], packing.offsets[:-1], out=figure)
    return figures
