"""Rows to packs on disk, once: the folder's name is a hash of all that decides its contents."""

from __future__ import annotations

import json
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

from packhorse.data.decide import KEPT, REASONS
from packhorse.data.formats.example import Example
from packhorse.data.identity import content_key, find_prepared, source_hash
from packhorse.data.manifest import (
    DataManifest,
    FileRecord,
    SourceFound,
    SplitCounts,
    read_manifest,
    write_manifest,
)
from packhorse.data.packs.store import write_pieces, write_split
from packhorse.data.render.render import Rendered
from packhorse.data.resolve import data_root, resolve_tokenizer
from packhorse.data.settle import Settled, settle
from packhorse.data.source_pass import SourceGathered
from packhorse.data.spool import stretches
from packhorse.durable import sync_to_disk
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe
from packhorse.version import VERSION

__all__ = ["PreparedData", "Progress", "content_key", "find_prepared", "prepare"]

DROPPED_FILE: Final = "dropped.jsonl"

Progress = Callable[[int], None]
"""Called with the rows done so far."""


@dataclass(frozen=True)
class PreparedData:
    """Prepared data: its folder, what is in it, and whether it was there before."""

    folder: Path
    manifest: DataManifest
    was_warm: bool


def prepare(recipe: Recipe, progress: Progress | None = None) -> PreparedData:
    """Return the recipe's prepared data, and make it first where it is not there.

    Two processes that prepare the same do the work once. What a killed process leaves has another name than
    finished data, and is removed by the next one.

    Raises:
        UserError: Anything about rows, tokenizer, template, lengths or the disk that the user can mend.
    """
    key = content_key(recipe)
    folder = data_root(recipe) / key
    manifest = read_manifest(folder)
    was_warm = manifest is not None
    if manifest is None:
        with _alone(folder):
            manifest = read_manifest(folder)
            was_warm = manifest is not None
            if manifest is None:
                manifest = _make(recipe, folder, progress)
    _check_group_field(recipe, manifest)
    return PreparedData(folder, manifest, was_warm)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"{folder.parent} cannot be written: {error.strerror}.",
            "prepared data is kept there, so that it is made once.",
            "set runs_folder to a folder that you may write.",
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
        write_manifest(manifest, draft)
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

    def watch(_: SourceGathered, examples: Sequence[Example], __: Sequence[Rendered]) -> None:
        nonlocal num_done
        num_done += len(examples)
        if progress is not None:
            progress(num_done)

    spool_folder = draft / "spool"
    settled = settle(recipe, spool_folder, watch)
    splits = {side: _write_side(settled, side, draft, recipe) for side in settled.packings}
    files = _write_dropped(settled, draft)
    shutil.rmtree(spool_folder)
    return _manifest(recipe, settled, splits, files)


def _write_side(settled: Settled, side: str, draft: Path, recipe: Recipe) -> SplitCounts:
    documents, spool = settled.side(side), settled.gathered.spool
    rows = None if side == "train" else (_line(row) for row in spool.texts(documents.rows.tolist()))
    return write_split(
        draft / side,
        ids=stretches(spool.tokens(), documents.starts, documents.lengths),
        supervised=stretches(spool.supervised(), documents.starts, documents.lengths),
        lengths=documents.lengths,
        labels=documents.labels,
        rows=rows,
        vocab_size=settled.gathered.renderer.vocab_size,
        length_tokens=recipe.batch.length,
        packing=settled.packings[side],
    )


def _write_dropped(settled: Settled, draft: Path) -> dict[str, FileRecord]:
    """List every row that was left out, with the reason; no file where there is none."""
    losses = settled.decision.losses
    lost = np.flatnonzero(losses != KEPT)
    bad = [mistake for found in settled.gathered.sources for mistake in found.mistakes.recorded]
    if not bad and len(lost) == 0:
        return {}
    unread = ({"where": mistake.where, "reason": "bad", "fact": mistake.fact} for mistake in bad)
    left_out = (
        {"where": row["where"], "reason": REASONS[loss]}
        for loss, row in zip(losses[lost].tolist(), settled.gathered.spool.texts(lost.tolist()))
    )
    return {DROPPED_FILE: write_pieces(draft / DROPPED_FILE, map(_line, chain(unread, left_out)))}


def _line(value: dict[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _manifest(
    recipe: Recipe, settled: Settled, splits: dict[str, SplitCounts], files: dict[str, FileRecord]
) -> DataManifest:
    gathered, decision = settled.gathered, settled.decision
    return DataManifest(
        version=VERSION,
        content_hash=content_key(recipe),
        tokenizer=str(resolve_tokenizer(recipe)),
        vocab_size=gathered.renderer.vocab_size,
        template=recipe.data.template,
        stop_token=gathered.renderer.tokenizer.eos_token,
        length_tokens=recipe.batch.length,
        packing=recipe.data.packing,
        settings=recipe.data.model_dump(exclude={"sources", "validation", "retain", "decontaminate"}),
        shares=decision.shares,
        shares_reason=decision.shares_reason,
        sources=tuple(_source_found(settled, number, recipe) for number in range(len(gathered.sources))),
        splits=splits,
        fields=gathered.measured_fields,
        ledger=settled.fitted.ledger,
        findings=decision.findings,
        notes=settled.notes,
        test_rows=settled.test_rows,
        files=files,
    )


def _source_found(settled: Settled, number: int, recipe: Recipe) -> SourceFound:
    found = settled.gathered.sources[number]
    here = settled.gathered.spool.columns.source == number
    losses = Counter(settled.decision.losses[here].tolist())
    by_reason = {REASONS[loss]: count for loss, count in sorted(losses.items()) if loss != KEPT}
    num_bad = found.mistakes.num_rows
    return SourceFound(
        path=found.name,
        sha256=source_hash(found.source, recipe),
        rows=int(np.count_nonzero(here)) + num_bad,
        format=found.row_format,
        use=found.use,
        losses={"bad": num_bad, **by_reason} if num_bad else by_reason,
    )


def _check_unchanged(recipe: Recipe, key: str) -> None:
    if content_key(recipe) != key:
        raise UserError(
            "a source, the tokenizer or the template changed while the data was prepared.",
            "the packs would be of rows that are no longer there.",
            "run the command again when the files are complete.",
        )


def _check_group_field(recipe: Recipe, manifest: DataManifest) -> None:
    name = recipe.evaluation.group_by
    measured = {"validation", "retain"} & manifest.splits.keys()
    if name is not None and measured and name not in manifest.fields:
        raise UserError(
            f"evaluation.group_by is {name}, and not every row that is evaluated has this field.",
            "it makes the lines of the evaluation table.",
            f"set it to one that every row has: {', '.join(manifest.fields) or 'there is none, so remove it'}.",
        )
