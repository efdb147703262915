"""The teacher's most probable tokens at each supervised token of a split, stored beside the packs.

DATA/teacher/SPLIT-KEY/
    facts.json            what the tokens depend on, for the reader; KEY is its hash
    packs-000000.bin      16 packs from pack 0 on: ids uint16 or uint32 [S, k], then log-probabilities fp16 [S, k]
    packs-000000.json     size and sha256 of that file; written last

Blocks do not depend on the number of processes: a killed pass continues with the missing ones, on any number. Runs with
equal facts share them.

Shapes: P packs, S supervised tokens of some packs in the order of the loader, k kept tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.data_manifest import FileRecord
from packhorse.data.packs.store import Ids, Int64, PackStore, token_type, write_pieces
from packhorse.durable import replace_file, sync_to_disk

TEACHER_FOLDER: Final = "teacher"
FACTS_FILE: Final = "facts.json"
# 25 MB with 64 kept tokens, T 4,096 and every token supervised: what a killed pass computes again on each process.
BLOCK_PACKS: Final = 16

Float16 = NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class TopTokens:
    """Stored tokens of one split for one teacher.

    Attributes:
        folder: Folder of the blocks.
        facts: What the tokens depend on: JSON values, with the number of kept tokens as `top`.
        pack_labels: int64 [P], supervised tokens of each pack.
        top: Tokens that are kept at each supervised token (k).
        vocab_size: Highest token id + 1.
    """

    folder: Path
    facts: dict[str, Any]
    pack_labels: Int64
    top: int
    vocab_size: int
    _maps: dict[int, tuple[Ids, Float16]] = field(default_factory=dict, repr=False)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return -(-len(self.pack_labels) // BLOCK_PACKS)

    def packs_of(self, block: int) -> range:
        """Return the packs of a block."""
        return range(block * BLOCK_PACKS, min((block + 1) * BLOCK_PACKS, len(self.pack_labels)))

    def is_intact(self, block: int) -> bool:
        """Return whether a block is complete and holds what was written; reads all of it."""
        try:
            record = FileRecord.model_validate_json(self._record(block).read_text(encoding="utf-8"))
            with self._file(block).open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
        except (OSError, ValueError):
            return False
        return (self._file(block).stat().st_size, found) == (record.bytes, record.sha256)

    def write_facts(self) -> None:
        """Write what the tokens depend on, for the reader."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / FACTS_FILE, json.dumps(self.facts, indent=2) + "\n", writer=f".{os.getpid()}")

    def write(self, block: int, ids: NDArray[np.integer[Any]], log_probabilities: NDArray[np.floating[Any]]) -> None:
        """Store a block, [S, k] each; on disk when this returns.

        Raises:
            OSError: The disk refuses.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(block)
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        pieces = [ids.astype(token_type(self.vocab_size)), log_probabilities.astype(np.float16)]
        try:
            record = write_pieces(draft, pieces)
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)
        sync_to_disk(self.folder)
        replace_file(self._record(block), record.model_dump_json() + "\n", writer=f".{os.getpid()}")

    def read(self, packs: Int64) -> tuple[Int64, Float16]:
        """Return ids and log-probabilities of these packs, [S, k] each."""
        parts = [self._of_pack(pack) for pack in packs.tolist()]
        if not parts:
            return np.zeros((0, self.top), np.int64), np.zeros((0, self.top), np.float16)
        return np.concatenate([ids for ids, _ in parts], dtype=np.int64), np.concatenate([logps for _, logps in parts])

    def _of_pack(self, pack: int) -> tuple[Ids, Float16]:
        block = pack // BLOCK_PACKS
        if block not in self._maps:
            self._maps[block] = self._mapped(block)
        first = int(self.pack_labels[block * BLOCK_PACKS : pack].sum())
        here = slice(first, first + int(self.pack_labels[pack]))
        ids, log_probabilities = self._maps[block]
        return ids[here], log_probabilities[here]

    def _mapped(self, block: int) -> tuple[Ids, Float16]:
        packs = self.packs_of(block)
        shape = (int(self.pack_labels[packs.start : packs.stop].sum()), self.top)
        kind = np.dtype(token_type(self.vocab_size))
        if shape[0] == 0:
            return np.zeros(shape, kind), np.zeros(shape, np.float16)
        ids = np.memmap(self._file(block), kind, "r", 0, shape)
        return ids, np.memmap(self._file(block), np.float16, "r", ids.nbytes, shape)

    def _file(self, block: int) -> Path:
        return self.folder / f"packs-{block * BLOCK_PACKS:06d}.bin"

    def _record(self, block: int) -> Path:
        return self._file(block).with_suffix(".json")


def top_tokens_of(store: PackStore, facts: dict[str, Any], vocab_size: int) -> TopTokens:
    """Return the stored tokens of a split with these facts, of which any number of blocks may exist."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = store.folder.parent / TEACHER_FOLDER / f"{store.folder.name}-{key}"
    return TopTokens(folder, facts, store.pack_labels, min(facts["top"], vocab_size), vocab_size)


def num_bytes_of(num_supervised_tokens: int, top: int, vocab_size: int) -> int:
    """Return the size of the stored tokens on disk."""
    return num_supervised_tokens * top * (np.dtype(token_type(vocab_size)).itemsize + np.dtype(np.float16).itemsize)
