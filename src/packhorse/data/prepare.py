"""Rows to packs on disk, once: the folder's name is a hash of all that decides its contents."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from packhorse.data.formats.rows import Example
from packhorse.data.identity import content_key, find_prepared, source_hash
from packhorse.data.ledger import Ledger
from packhorse.data.lengths import LengthCounts, check_lengths, fit_row
from packhorse.data.manifest import DataManifest, SourceFound, SplitCounts, read_manifest, write_manifest
from packhorse.data.packs.store import SplitWriter
from packhorse.data.places import data_root, resolve_tokenizer, source_name
from packhorse.data.rendering.render import Renderer, load_tokenizer, make_renderer
from packhorse.data.survey import SPLITS, Survey, render_survey, survey_rows
from packhorse.durable import sync_to_disk
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe

__all__ = ["PreparedData", "Progress", "content_key", "find_prepared", "prepare"]

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


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
    tokenizer_folder = resolve_tokenizer(recipe)
    survey = survey_rows(recipe)
    tokenizer = load_tokenizer(tokenizer_folder, recipe.data.template, recipe.model.trust_remote_code)
    renderer = make_renderer(tokenizer, tokenizer_folder, survey.has_chats)
    counts = LengthCounts()
    fields: set[str] | None = None
    with ExitStack() as files:
        writers = {
            split: files.enter_context(SplitWriter(draft / split, renderer.vocab_size, keep_rows=split != "train"))
            for split in SPLITS
        }
        for batch in render_survey(survey, renderer):
            for split, example, row in batch:
                kept = fit_row(row, recipe, counts)
                if kept is None:
                    continue
                writers[split].append(kept.ids, kept.supervised, _row(example))
                if split in ("validation", "retain"):
                    fields = set(example.fields) if fields is None else fields & example.fields.keys()
            if progress is not None:
                progress(len(counts.lengths), survey.num_rows - survey.num_unused)
        check_lengths(counts, recipe)
        splits = _finish(writers, recipe)
    _remove_empty(draft, splits)
    return _manifest(recipe, survey, renderer, splits, counts, tuple(sorted(fields or ())))


def _row(example: Example) -> dict[str, object]:
    said: dict[str, object] = {"messages": None, "text": example.text}
    if example.messages is not None:
        said = {"messages": [{"role": turn.role, "content": turn.content} for turn in example.messages]}
    return {**said, "fields": example.fields, "where": example.where}


def _finish(writers: dict[str, SplitWriter], recipe: Recipe) -> dict[str, SplitCounts]:
    if writers["train"].num_documents == 0:
        raise UserError(
            f"no row is left to train on: each is longer than batch.length, which is {recipe.batch.length}.",
            "data.over_long leaves them out.",
            "raise batch.length.",
        )
    return {split: writer.finish(recipe.batch.length) for split, writer in writers.items() if writer.num_documents > 0}


def _remove_empty(draft: Path, splits: dict[str, SplitCounts]) -> None:
    for split in SPLITS:
        if split not in splits:
            shutil.rmtree(draft / split)


def _manifest(
    recipe: Recipe,
    survey: Survey,
    renderer: Renderer,
    splits: dict[str, SplitCounts],
    counts: LengthCounts,
    fields: tuple[str, ...],
) -> DataManifest:
    rows = {split: splits[split].num_rows if split in splits else 0 for split in SPLITS}
    return DataManifest(
        content_hash=content_key(recipe),
        tokenizer=str(resolve_tokenizer(recipe)),
        vocab_size=renderer.vocab_size,
        template=recipe.data.template,
        stop_token=renderer.tokenizer.eos_token,
        length_tokens=recipe.batch.length,
        sources=tuple(
            SourceFound(
                path=source_name(found.source),
                sha256=source_hash(found.source, recipe),
                rows=len(found.keys),
                format=found.row_format,
                use=found.use,
            )
            for found in survey.sources
        ),
        splits=splits,
        fields=fields,
        ledger=Ledger(
            rows_in=survey.num_rows,
            over_long_dropped=counts.num_dropped,
            emptied_by_truncation=counts.num_emptied,
            retain_unused=survey.num_unused,
            truncated=counts.num_truncated,
            tokens_cut=counts.tokens_cut,
            **rows,
        ),
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
