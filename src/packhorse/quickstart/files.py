"""The quickstart's rows and tokenizer, which are shipped with Packhorse (`tools/quickstart_corpus` makes them)."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from pathlib import Path
from typing import Final

DATA: Final = Path(__file__).parent / "data"
TOKENIZER: Final = "tokenizer"
VOCABULARY_SIZE: Final = 2048
CORPUS_VERSION: Final = 1
"""Raised when a shipped file changes, so that no copy that an older Packhorse wrote is reused."""
BUILTIN_NAMES: Final[tuple[str, ...]] = (
    "core.messages.jsonl",
    "core.alpaca.jsonl",
    "tickets.messages.jsonl",
    "tickets.alpaca.jsonl",
    TOKENIZER,
)


def materialise(name: str, folder: Path) -> Path:
    """Write one shipped file (or the tokenizer's folder) into `folder` unless it exists; return its path.

    Two processes may do so at once: each writes under its own name first, then renames.

    Args:
        name: One of `BUILTIN_NAMES`.
        folder: Folder of the result; created if absent.

    Raises:
        ValueError: No shipped file has this name.
    """
    if name not in BUILTIN_NAMES:
        raise ValueError(f"no built-in file {name!r}; known are {', '.join(BUILTIN_NAMES)}")
    target = folder / name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as scratch:
        written = Path(scratch) / name
        write_builtin(name, written)
        put_in_place(written, target)
    return target


def write_builtin(name: str, path: Path) -> None:
    """Write one shipped file or folder to a path that does not exist yet."""
    if name == TOKENIZER:
        shutil.copytree(DATA / TOKENIZER, path)
    else:
        path.write_bytes(gzip.decompress((DATA / f"{name}.gz").read_bytes()))


def put_in_place(written: Path, target: Path) -> None:
    """Rename to the final name; where another process was faster, keep its equal result."""
    try:
        written.replace(target)
    except OSError:
        # A folder cannot replace a folder that is not empty: the other process has won the race.
        if not target.is_dir():
            raise
        shutil.rmtree(written)
