"""Prepare the rows of a recipe as packs on disk, once: the folder's name is a hash of all that decides its contents."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
from filelock import FileLock

from packhorse.data.content_key import SOURCE_LISTS, content_key, source_hash
from packhorse.data.data_manifest import (
    DataManifest,
    FileRecord,
    SourceRecord,
    SplitCounts,
    read_data_manifest,
    write_data_manifest,
)
from packhorse.data.decide import KEPT, REASONS, TRAIN
from packhorse.data.formats.example import Example
from packhorse.data.gather.source_pass import GatheredSource
from packhorse.data.gather.spool import json_line
from packhorse.data.pack_rows import PackedRows, check_group_field, pack_rows
from packhorse.data.packs.store import write_pieces, write_split
from packhorse.data.render.render import Rendered
from packhorse.data.render.teacher_tokenizer import check_teacher_tokenizer
from packhorse.data.resolve import data_root, resolve_tokenizer
from packhorse.durable import sync_to_disk
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe
from packhorse.version import VERSION

DROPPED_FILE: Final = "dropped.jsonl"

Progress = Callable[[int], None]
"""Callback with the number of rows done so far."""


@dataclass(frozen=True)
class PreparedData:
    """Folder of prepared data, its manifest, and whether it existed before."""

    folder: Path
    manifest: DataManifest
    was_warm: bool


def prepare(recipe: Recipe, progress: Progress | None = None) -> PreparedData:
    """Return the recipe's prepared data; make it first if it does not exist.

    Two processes that prepare the same data do the work once. A killed process leaves a folder with a draft name, which
    the next process removes.

    Raises:
        UserError: Anything about rows, tokenizer, template, lengths or the disk that the user can fix.
    """
    check_teacher_tokenizer(recipe, downloads=True)
    key = content_key(recipe)
    folder = data_root(recipe) / key
    manifest = read_data_manifest(folder)
    was_warm = manifest is not None
    if manifest is None:
        with _locked(folder):
            manifest = read_data_manifest(folder)
            was_warm = manifest is not None
            if manifest is None:
                manifest = _make(recipe, folder, progress)
    check_group_field(recipe, manifest.splits, manifest.fields)
    return PreparedData(folder, manifest, was_warm)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"{folder.parent} cannot be written: {error.strerror}.",
            "prepared data is kept there, so that it is made only once.",
            "set runs_folder to a folder where you may write.",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _make(recipe: Recipe, folder: Path, progress: Progress | None) -> DataManifest:
    for leftover in folder.parent.glob(f"{folder.name}.draft-*"):
        shutil.rmtree(leftover)
    draft = folder.with_suffix(f".draft-{os.getpid()}")
    try:
        manifest = _fill(recipe, draft, progress)
        _check_unchanged(recipe, folder.name)
        write_data_manifest(manifest, draft)
        sync_to_disk(draft)
        draft.rename(folder)
        sync_to_disk(folder.parent)
    except OSError as error:
        raise UserError(
            f"prepared data cannot be written to {draft}: {error.strerror}.",
            "packs are made once and kept on disk.",
            "free space there, or set runs_folder to another folder.",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def _fill(recipe: Recipe, draft: Path, progress: Progress | None) -> DataManifest:
    num_done = 0

    def watch(_: GatheredSource, examples: Sequence[Example], __: Sequence[Rendered]) -> None:
        nonlocal num_done
        num_done += len(examples)
        if progress is not None:
            progress(num_done)

    spool_folder = draft / "spool"
    packed = pack_rows(recipe, spool_folder, watch)
    splits = {side: _write_side(packed, side, draft, recipe) for side in packed.packings}
    files = _write_dropped(packed, draft)
    shutil.rmtree(spool_folder)
    return _manifest(recipe, packed, splits, files)


def _write_side(packed: PackedRows, side: str, draft: Path, recipe: Recipe) -> SplitCounts:
    documents, spool = packed.side(side), packed.gathered.spool
    rows = None if side == "train" else spool.lines(documents.item_rows.tolist())
    return write_split(
        draft / side,
        ids=documents.pieces(spool.tokens(), spool.columns),
        supervised=documents.pieces(spool.supervised(), spool.columns),
        lengths=documents.lengths,
        labels=documents.labels,
        rows=rows,
        vocab_size=packed.gathered.renderer.vocab_size,
        length_tokens=recipe.batch.length,
        packing=packed.packings[side],
        documents_per_row=documents.per_row,
        values=documents.values(spool.columns),
    )


def _write_dropped(packed: PackedRows, draft: Path) -> dict[str, FileRecord]:
    """Write each dropped row with its reason to a file, and return the file's record; no file if no row is dropped."""
    losses = packed.decision.losses
    lost = np.flatnonzero(losses != KEPT)
    bad = [mistake for source in packed.gathered.sources for mistake in source.mistakes.recorded]
    if not bad and len(lost) == 0:
        return {}
    unread = ({"where": mistake.where, "reason": "bad", "fact": mistake.fact} for mistake in bad)
    dropped = (
        {"where": row["where"], "reason": REASONS[loss]}
        for loss, row in zip(losses[lost].tolist(), packed.gathered.spool.texts(lost.tolist()))
    )
    return {DROPPED_FILE: write_pieces(draft / DROPPED_FILE, map(json_line, chain(unread, dropped)))}


def _manifest(
    recipe: Recipe, packed: PackedRows, splits: dict[str, SplitCounts], files: dict[str, FileRecord]
) -> DataManifest:
    gathered, decision = packed.gathered, packed.decision
    return DataManifest(
        version=VERSION,
        content_hash=content_key(recipe),
        tokenizer=str(resolve_tokenizer(recipe)),
        vocab_size=gathered.renderer.vocab_size,
        template=recipe.data.template,
        stop_token=gathered.renderer.tokenizer.eos_token,
        length_tokens=recipe.batch.length,
        documents_per_row=recipe.objective.documents_per_row,
        packing=recipe.data.packing,
        settings=recipe.data.model_dump(exclude={*SOURCE_LISTS, "decontaminate"}),
        shares=decision.shares,
        shares_reason=decision.shares_reason,
        sources=tuple(_source_record(packed, number, recipe) for number in range(len(gathered.sources))),
        splits=splits,
        fields=gathered.fields_of_all(decision.sides > TRAIN),
        ledger=packed.fitted.ledger,
        findings=decision.findings,
        notes=packed.notes,
        test_rows=packed.test_rows,
        files=files,
    )


def _source_record(packed: PackedRows, number: int, recipe: Recipe) -> SourceRecord:
    source = packed.gathered.sources[number]
    here = packed.gathered.spool.columns.source == number
    losses = Counter(packed.decision.losses[here].tolist())
    by_reason = {REASONS[loss]: count for loss, count in sorted(losses.items()) if loss != KEPT}
    num_bad = source.mistakes.num_rows
    return SourceRecord(
        path=source.name,
        sha256=source_hash(source.declared, recipe),
        rows=int(np.count_nonzero(here)) + num_bad,
        format=source.row_format,
        use=source.use,
        losses={"bad": num_bad, **by_reason} if num_bad else by_reason,
        removed_nulls=source.removed_nulls.num_nulls,
    )


def _check_unchanged(recipe: Recipe, key: str) -> None:
    if content_key(recipe) != key:
        raise UserError(
            "a source, the tokenizer or the template changed while the data was prepared.",
            "the packs would hold rows that no longer exist.",
            "run the command again when the files are complete.",
        )
