"""Open the sealed test split, and record each opening ("look") before a row is read.

A test set that is looked at again and again is selected for, run after run, until it shows no more than validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from filelock import FileLock
from pydantic import ValidationError

from packhorse.data.data_manifest import DATA_MANIFEST_FILE, DataManifest, TestLook, read_data_manifest
from packhorse.data.packs.store import SEALED_SPLIT, PackStore, open_store
from packhorse.durable import replace_file
from packhorse.errors import UserError

LOCK_FILE: Final = ".test-looks.lock"


def open_test(
    data_folder: Path, run_name: str, when: str, again: bool = False
) -> tuple[PackStore, tuple[TestLook, ...]]:
    """Open the test split and record the look.

    Args:
        data_folder: Folder of prepared data, with data.json.
        run_name: Name of the run that looks.
        when: Time in UTC, ISO 8601.
        again: Open the split although it was opened before.

    Returns:
        The test rows, and all looks so far with this one as the last.

    Raises:
        UserError: There is no test split, it was opened before, or the look cannot be recorded.
    """
    looks = record_look(data_folder, run_name, when, again)
    return open_store(data_folder, SEALED_SPLIT, unsealed=True), looks


def record_look(data_folder: Path, run_name: str, when: str, again: bool = False) -> tuple[TestLook, ...]:
    """Record a look at the test split in data.json, on disk when this returns; return all looks so far.

    Args:
        data_folder: Folder of prepared data, with data.json.
        run_name: Name of the run that looks.
        when: Time in UTC, ISO 8601.
        again: Look although others have looked before.

    Raises:
        UserError: There is no test split, it was opened before, or data.json cannot be written.
    """
    _with_test(data_folder)
    try:
        # Of two processes that look at the same time, one is the second.
        with FileLock(data_folder.parent / LOCK_FILE):
            manifest, before, look = _with_test(data_folder), looks_at(data_folder), TestLook(run=run_name, at=when)
            if before and not again:
                raise _opened_before(data_folder, before)
            _rewrite(data_folder, manifest.model_copy(update={"test_looks": (*manifest.test_looks, look)}))
    except OSError as error:
        raise UserError(
            f"{data_folder / DATA_MANIFEST_FILE} cannot be written: {error.strerror or error}.",
            "a look at the test set is recorded there before a row is read.",
            "free space there, or get permission to write in this folder.",
        ) from error
    return (*before, look)


def looks_at(data_folder: Path) -> tuple[TestLook, ...]:
    """Return all looks at these test rows in the order of time.

    Looks recorded in sibling folders with the same test rows count: another `batch.length` does not reset the seal.
    """
    mine = read_data_manifest(data_folder)
    if mine is None:
        return ()
    looks = list(mine.test_looks)
    for file in sorted(data_folder.parent.glob(f"*/{DATA_MANIFEST_FILE}")):
        other = _readable_manifest(file.parent)
        if other is not None and other.content_hash != mine.content_hash and other.test_rows == mine.test_rows != "":
            looks += other.test_looks
    return tuple(sorted(looks, key=lambda look: look.at))


def _readable_manifest(folder: Path) -> DataManifest | None:
    """Return the manifest; None if an earlier version of Packhorse wrote it with other fields (and another split)."""
    try:
        return read_data_manifest(folder)
    except ValidationError:
        return None


def describe_looks(looks: Sequence[TestLook]) -> str:
    """Return how often the test set was opened, by whom and when; empty if it is still sealed."""
    if not looks:
        return ""
    times = "once" if len(looks) == 1 else f"{len(looks)} times"
    return f"the test set was opened {times}: {', '.join(f'{look.run} ({look.at})' for look in looks)}"


def _with_test(data_folder: Path) -> DataManifest:
    manifest = read_data_manifest(data_folder)
    if manifest is None or SEALED_SPLIT not in manifest.splits:
        shares = " / ".join(f"{share:g}" for share in manifest.shares) if manifest else "unknown"
        raise UserError(
            f"{data_folder} has no test rows; its shares of train, validation and test are {shares}.",
            "only rows that were used neither for training nor to choose between runs can give a final measurement.",
            "give data.split.test a share, or name rows in data.test, and train again; or remove --test to measure the "
            "validation rows.",
        )
    if not (data_folder / SEALED_SPLIT).is_dir():
        raise UserError(
            f"{data_folder / SEALED_SPLIT} does not exist, although data.json lists test rows.",
            "the test rows cannot be measured, so the look is not recorded.",
            "restore the folder, or remove all of the prepared data and prepare it again.",
        )
    return manifest


def _rewrite(data_folder: Path, manifest: DataManifest) -> None:
    """Replace data.json in one step: a reader sees the old or the new one, also after a power cut."""
    replace_file(data_folder / DATA_MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")


def _opened_before(data_folder: Path, looks: Sequence[TestLook]) -> UserError:
    return UserError(
        f"{describe_looks(looks)}; its rows are in {data_folder}.",
        "a test set that is opened again and again is selected for, and no longer predicts results on new rows.",
        "report the first result, or look again with --again, which every later report counts.",
    )
