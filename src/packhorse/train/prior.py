"""The pass before training: values of the training data that stay fixed, computed once and stored beside the packs.

DATA/prior/KEY/
    facts.json                  what the values depend on, for the reader; KEY is its hash
    block-000000-000128.npz     while the pass runs: values of packs 0 to 127
    NAME.npy                    finished values
    finished.json               size and sha256 of each finished file; written last

A killed pass continues after its last block. Runs with equal facts share the values, so a sweep computes them once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from packhorse.durable import replace_file, sync_to_disk
from packhorse.run_folder.checkpoints.manifest import sha256_of

PRIOR_FOLDER: Final = "prior"
FACTS_FILE: Final = "facts.json"
FINISHED_FILE: Final = "finished.json"
BLOCKS: Final = "block-*.npz"
BLOCK_PACKS: Final = 128
"""Packs in a block, rounded up to whole passes of all ranks: a killed pass repeats at most as many."""

Arrays = Mapping[str, NDArray[Any]]
"""Name to values."""


@dataclass(frozen=True)
class PriorFolder:
    """Files of one pass. Rank 0 writes, and every rank reads them once they are finished.

    Attributes:
        folder: Folder of these facts.
        facts: What the values depend on, as JSON.
    """

    folder: Path
    facts: Mapping[str, Any]

    @classmethod
    def beside(cls, data_folder: Path, facts: Mapping[str, Any]) -> PriorFolder:
        """Return the folder of these facts in the folder of the prepared data."""
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return cls(data_folder / PRIOR_FOLDER / key, facts)

    def is_finished(self) -> bool:
        """Return whether all values are there and have the bytes that were written."""
        record = self.folder / FINISHED_FILE
        if not record.is_file():
            return False
        files: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return all(_is_sound(self.folder / name, written) for name, written in files.items())

    def load(self, name: str) -> NDArray[Any]:
        """Return finished values, mapped from the file."""
        return np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))

    def blocks(self) -> Iterator[tuple[int, int, Arrays]]:
        """Yield first pack, end and values of the finished blocks, from pack 0 on, without a gap."""
        reached = 0
        for path in sorted(self.folder.glob(BLOCKS)):
            first, end = map(int, path.stem.split("-")[1:])
            if first == reached:
                reached = end
                with np.load(path, allow_pickle=False) as arrays:
                    yield first, end, dict(arrays)

    def write_block(self, first: int, end: int, arrays: Arrays) -> None:
        """Store the values of packs `first` to `end`, on disk when this returns."""
        if first == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.facts, indent=2, sort_keys=True) + "\n"
            replace_file(self.folder / FACTS_FILE, text, writer=f".{os.getpid()}")
        _write(self.folder / f"block-{first:09d}-{end:09d}.npz", partial(_save_block, arrays))

    def finish(self, arrays: Arrays) -> None:
        """Store all values and remove the blocks; the values of a run that was faster are kept."""
        if self.is_finished():
            return
        for name, values in arrays.items():
            _write(self.folder / f"{name}.npy", partial(np.save, arr=values))
        files = {f"{name}.npy": _record_of(self.folder / f"{name}.npy") for name in arrays}
        replace_file(self.folder / FINISHED_FILE, json.dumps(files) + "\n", writer=f".{os.getpid()}")
        for path in self.folder.glob(BLOCKS):
            path.unlink(missing_ok=True)


def packs_per_block(packs_per_pass: int) -> int:
    """Return the number of packs in a block: whole passes, so that a resumed pass runs the same micro-batches."""
    return -(-BLOCK_PACKS // packs_per_pass) * packs_per_pass


def _save_block(arrays: Arrays, file: BinaryIO) -> None:
    np.savez(file, allow_pickle=False, **arrays)


def _write(file: Path, save: Callable[[BinaryIO], None]) -> None:
    # Runs with equal facts may write at the same time.
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with draft.open("wb") as opened:
        save(opened)
    sync_to_disk(draft)
    draft.replace(file)
    sync_to_disk(file.parent)


def _record_of(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _is_sound(file: Path, written: dict[str, Any]) -> bool:
    return file.is_file() and file.stat().st_size == written["bytes"] and sha256_of(file) == written["sha256"]
