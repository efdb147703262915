"""The test split is sealed: opened here and nowhere else, once, and each look is written down before a row is read.

What is looked at again and again is chosen for, run after run, until it shows no more than the validation rows do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from filelock import FileLock
from pydantic import ValidationError

from packhorse.data.manifest import MANIFEST_FILE, DataManifest, TestLook, read_manifest
from packhorse.data.packs.store import SEALED_SPLIT, PackStore, open_store
from packhorse.durable import replace_file
from packhorse.errors import UserError

LOCK_FILE: Final = ".test-looks.lock"


def open_test(
    data_folder: Path, run_name: str, when: str, again: bool = False
) -> tuple[PackStore, tuple[TestLook, ...]]:
    """Open the test split, and count that.

    Args:
        data_folder: Prepared data, with data.json.
        run_name: Who looks.
        when: Time in UTC, ISO 8601.
        again: Open it although it was opened before.

    Returns:
        The test rows, and all looks so far with this one as the last.

    Raises:
        UserError: There is no test split, it was opened before, or the look cannot be written down.
    """
    looks = record_look(data_folder, run_name, when, again)
    return open_store(data_folder, SEALED_SPLIT, unsealed=True), looks


def record_look(data_folder: Path, run_name: str, when: str, again: bool = False) -> tuple[TestLook, ...]:
    """Write a look at the test split into data.json; on disk when this returns.

    Args:
        data_folder: Prepared data, with data.json.
        run_name: Who looks.
        when: Time in UTC, ISO 8601.
        again: Look although others have.

    Returns:
        All looks so far, this one included.

    Raises:
        UserError: There is no test split, it was opened before, or data.json cannot be written.
    """
    _with_test(data_folder)
    try:
        # Two that look at once: one of them is the second.
        with FileLock(data_folder.parent / LOCK_FILE):
            manifest, before, look = _with_test(data_folder), looks_at(data_folder), TestLook(run=run_name, at=when)
            if before and not again:
                raise _opened_before(data_folder, before)
            _rewrite(data_folder, manifest.model_copy(update={"test_looks": (*manifest.test_looks, look)}))
    except OSError as error:
        raise UserError(
            f"{data_folder / MANIFEST_FILE} cannot be written: {error.strerror or error}.",
            "a look at the test set is written down there before a row is read.",
            "free space there, or ask for the right to write in this folder.",
        ) from error
    return (*before, look)


def looks_at(data_folder: Path) -> tuple[TestLook, ...]:
    """Return all looks at these test rows in the order of time, those at them under another T among them.

    Prepared data beside this one that holds the same test rows counts: another `batch.length` breaks no seal.
    """
    mine = read_manifest(data_folder)
    if mine is None:
        return ()
    looks = list(mine.test_looks)
    for file in sorted(data_folder.parent.glob(f"*/{MANIFEST_FILE}")):
        other = _manifest_of_today(file.parent)
        if other is not None and other.content_hash != mine.content_hash and other.test_rows == mine.test_rows != "":
            looks += other.test_looks
    return tuple(sorted(looks, key=lambda look: look.at))


def _manifest_of_today(folder: Path) -> DataManifest | None:
    """What an earlier version of Packhorse prepared is split otherwise, and its manifest may have other fields."""
    try:
        return read_manifest(folder)
    except ValidationError:
        return None


def describe_looks(looks: Sequence[TestLook]) -> str:
    """Return how often the test set was opened, by whom and when; empty where it is still sealed."""
    if not looks:
        return ""
    times = "once" if len(looks) == 1 else f"{len(looks)} times"
    return f"the test set was opened {times}: {', '.join(f'{look.run} ({look.at})' for look in looks)}"


def _with_test(data_folder: Path) -> DataManifest:
    manifest = read_manifest(data_folder)
    if manifest is None or SEALED_SPLIT not in manifest.splits:
        shares = " / ".join(f"{share:g}" for share in manifest.shares) if manifest else "unknown"
        raise UserError(
            f"{data_folder} has no test rows; its shares of train, validation and test are {shares}.",
            "only rows that neither training nor a choice between runs has seen can be a last measurement.",
            "give data.split.test a share and train again, or leave out --test: the validation rows are measured then.",
        )
    if not (data_folder / SEALED_SPLIT).is_dir():
        raise UserError(
            f"{data_folder / SEALED_SPLIT} is gone, and data.json says that it holds test rows.",
            "what is not there cannot be measured, and a look is not counted for nothing.",
            "put the folder back, or remove all of the prepared data and prepare it again.",
        )
    return manifest


def _rewrite(data_folder: Path, manifest: DataManifest) -> None:
    """Replace data.json in one step: a reader sees the old one or the new one, also after a power cut."""
    replace_file(data_folder / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")


def _opened_before(data_folder: Path, looks: Sequence[TestLook]) -> UserError:
    return UserError(
        f"{describe_looks(looks)}; its rows are in {data_folder}.",
        "a test set that is opened again and again is chosen for, and no longer shows how new rows would go.",
        "report the first result, or look again with --again, which is counted in every later report.",
    )
