"""The quickstart's built-in files by name: written once into a folder, then reused."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

from packhorse.quickstart.corpus import Row, core_rows, ticket_rows, to_jsonl
from packhorse.quickstart.tokenizer import save_tokenizer, train_tokenizer

TOKENIZER: Final = "tokenizer"
CORPUS_VERSION: Final = 1
"""Raised when a built-in file changes, so that none of an older Packhorse is reused."""
BUILTIN_NAMES: Final[tuple[str, ...]] = (
    "core.messages.jsonl",
    "core.alpaca.jsonl",
    "tickets.messages.jsonl",
    "tickets.alpaca.jsonl",
    TOKENIZER,
)


def materialise(name: str, folder: Path) -> Path:
    """Write one built-in file (or the tokenizer's folder) under `folder` if it is not there yet.

    Two processes may do so at once: each writes under a name of its own and renames it at the end.

    Args:
        name: one of `BUILTIN_NAMES`.
        folder: where the file belongs; created if absent.

    Returns:
        The path of the file or folder.

    Raises:
        ValueError: the name is not a built-in one.
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
    """Write one built-in file or folder at a path that does not exist yet."""
    if name == TOKENIZER:
        write_tokenizer(path)
    else:
        path.write_text(jsonl_text(name), encoding="utf-8", newline="\n")


def jsonl_text(name: str) -> str:
    """Return the text of `SOURCE.FORM.jsonl`, as in `core.messages.jsonl`."""
    source, form, _ = name.split(".")
    rows = core_rows() if source == "core" else ticket_rows()
    as_form = Row.as_messages if form == "messages" else Row.as_alpaca
    return to_jsonl(as_form(row) for row in rows)


def write_tokenizer(folder: Path) -> None:
    """Train the tokenizer on both corpora and write its folder."""
    folder.mkdir()
    save_tokenizer(train_tokenizer(tokenizer_texts()), folder)


def tokenizer_texts() -> list[str]:
    """Return every turn of both corpora as the chat template writes it, role first."""
    return [
        f"{message['role']}\n{message['content']}" for row in core_rows() + ticket_rows() for message in row.messages()
    ]


def put_in_place(written: Path, target: Path) -> None:
    """Rename to the final name; where another process was first, keep its equal result."""
    try:
        written.replace(target)
    except OSError:
        # A folder cannot replace a folder that is not empty: the other process has won the race.
        if not target.is_dir():
            raise
        shutil.rmtree(written)
