"""List the files of a folder or a glob that hold rows, in the order in which they are read."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

from packhorse.errors import UserError

FORMS: Final = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS: Final = {".gz": "gzip", ".zst": "zstd"}
NUMBERS: Final = re.compile(r"([0-9]+)")
SAVED_STATE: Final = "state.json"
SAVED_SPLITS: Final = "dataset_dict.json"


def form_of(path: Path) -> tuple[str, str | None]:
    """Return a file's form, such as `.jsonl` (empty if unknown), and its compression: gzip, zstd or None."""
    *_, form, last = ("", "", *(suffix.lower() for suffix in path.suffixes))
    if last in COMPRESSIONS:
        return form if form in FORMS else "", COMPRESSIONS[last]
    return last if last in FORMS else "", None


def known_endings() -> str:
    """Return the file endings that can be read, for a message."""
    return f"{', '.join(FORMS)}, each also with {' or '.join(COMPRESSIONS)}"


def list_folder(folder: Path) -> list[Path]:
    """Return the files with a known ending below a folder, in natural order, without hidden files.

    A data set that `datasets` saved lists its files itself.

    Raises:
        UserError: There are no files, one is missing, a folder cannot be opened, or the folder holds several splits.
    """
    splits = _saved_splits(folder)
    if len(splits) > 1:
        raise UserError(
            f"{folder} is a saved data set with the splits {', '.join(splits)}.",
            "read together, rows that were set apart would become training rows.",
            f"name one of them, e.g. {folder / splits[0]}.",
        )
    return _readable(list(_walk(folder)), str(folder))


def list_glob(pattern: str) -> list[Path]:
    """Return the files with a known ending that match a glob, in natural order; `**` matches any folders.

    Raises:
        UserError: No file matches.
    """
    # Path.glob accepts no absolute pattern, and matches hidden files.
    # Path.glob takes no absolute pattern, and finds hidden files.
    return _readable(map(Path, glob.iglob(pattern, recursive=True)), pattern)  # noqa: PTH207


def _walk(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for name, folders, files in os.walk(folder, onerror=_cannot_open, followlinks=True):
        folder_path = os.path.realpath(name)
        if folder_path in seen:
            # A link to a parent folder would lead into an endless loop.
            folders.clear()
            continue
        seen.add(folder_path)
        here = Path(name)
        yield from _saved_files(here, files)
        # Hidden folders are yielded, so that a message can name them, but not opened.
        yield from (here / inner for inner in folders if inner.startswith("."))
        folders[:] = [inner for inner in folders if not inner.startswith(".")]


def _saved_splits(folder: Path) -> list[str]:
    if not (folder / SAVED_SPLITS).is_file():
        return []
    names = _saved(folder / SAVED_SPLITS).get("splits")
    return [str(name) for name in names] if isinstance(names, list) else []


def _saved_files(folder: Path, files: list[str]) -> list[Path]:
    """Return the files that a saved data set lists: `map` may have left other files in the same folder."""
    listed = _saved(folder / SAVED_STATE).get("_data_files") if SAVED_STATE in files else None
    if not isinstance(listed, list):
        return [folder / file for file in files]
    names = [str(entry["filename"]) for entry in listed if isinstance(entry, dict) and "filename" in entry]
    missing = sorted(set(names) - set(files), key=lambda name: _natural(Path(name)))
    if missing:
        raise UserError(
            f"{folder} lacks {_first(missing)}, which its {SAVED_STATE} lists.",
            "its rows would be missing from training, and no message would say so.",
            "copy or save the data set again.",
        )
    return [folder / name for name in names]


def _saved(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _readable(files: Iterable[Path], origin: str) -> list[Path]:
    paths = sorted(set(files), key=_natural)
    visible = [path for path in paths if not path.name.startswith(".")]
    if known := [path for path in visible if form_of(path)[0] and not path.is_dir()]:
        return known
    hidden = [path.name for path in paths if path.name.startswith(".")]
    others = [path.name for path in visible]
    kinds = (("hidden", hidden), ("with other endings", others))
    parts = [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds if names]
    raise UserError(
        f"the data source {origin} has no file of rows; it has {' and '.join(parts) or 'nothing'}.",
        "the ending of a file says how to read it, and hidden files are skipped.",
        f"name a folder or glob with files that end in {known_endings()}.",
    )


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Return a sort key that orders numbers inside names by value: shard-2 comes before shard-10."""
    words = NUMBERS.split("\0".join(path.parts))
    # Words and numbers alternate, so like is compared with like.
    return [int(word) if at % 2 else word for at, word in enumerate(words)], str(path)


def _cannot_open(error: OSError) -> NoReturn:
    raise UserError(
        f"the folder {error.filename} cannot be opened: {error.strerror}.",
        "its rows would be missing from training, and no message would say so.",
        "change its permissions so that you can read it, or name its files one by one.",
    ) from error
