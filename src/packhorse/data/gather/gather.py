"""Read, render, prove and hash the rows of all sources in one pass, and store them in the spool."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.checks.contamination import EvaluationIndex
from packhorse.data.checks.texts import prompt_text
from packhorse.data.formats.example import Example
from packhorse.data.formats.rows import convert_rows, resolve_format
from packhorse.data.formats.wrong_rows import wrong_rows
from packhorse.data.gather.bad_rows import MISTAKES_FILE, BadRowList
from packhorse.data.gather.source_pass import BatchCallback, GatheredSource, SourcePass, SourceUse, Strata
from packhorse.data.gather.sources import read_rows
from packhorse.data.gather.spool import Spool, SpoolWriter
from packhorse.data.read.arrow_values import RemovedNulls
from packhorse.data.read.row import RowMistakes
from packhorse.data.render.render import Renderer, make_renderer
from packhorse.data.render.serving import saved_form
from packhorse.data.render.tokenizer import tokenizer_of
from packhorse.data.resolve import check_folder, resolve_tokenizer, runs_folder_of, source_name
from packhorse.errors import Mistake, UserError
from packhorse.recipe.objectives import row_kind
from packhorse.recipe.schema import DataSection, Recipe, Source

FIRST_ROWS: Final = 10
"""Rows that decide the format: a null in Parquet may hide a key of the first row."""
Opened = tuple[GatheredSource, Iterator[Example]]


@dataclass(frozen=True, eq=False)
class GatheredRows:
    """All rows that can be trained on, and the renderer that made them.

    Attributes:
        sources: Sources in the order train, validation, test, retain.
        renderer: Renderer with the proven tokenizer.
        spool: Rows on disk.
        strata: Name of each stratum; a row's code is an index into it.
        fields: For each source, the plain fields that all its rows have.
    """

    sources: tuple[GatheredSource, ...]
    renderer: Renderer
    spool: Spool
    strata: tuple[str, ...]
    fields: tuple[frozenset[str], ...]

    def fields_of_all(self, rows: NDArray[np.bool_]) -> tuple[str, ...]:
        """Return the names of the fields that all rows of these rows' sources have (bool [R])."""
        numbers = np.unique(self.spool.columns.source[rows]).tolist()
        return tuple(sorted(frozenset.intersection(*(self.fields[number] for number in numbers)))) if numbers else ()

    @property
    def is_chat(self) -> NDArray[np.bool_]:
        """bool [R], whether each row is a chat."""
        chats = np.array([source.row_format != "text" for source in self.sources])
        return np.asarray(chats[self.spool.columns.source])

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the sources that the user should read."""
        notes = (source.removed_nulls.note(source.name) for source in self.sources)
        return tuple(note for note in notes if note)

    @property
    def num_bad(self) -> int:
        """Number of rows that could not be read or rendered."""
        return sum(source.mistakes.num_rows for source in self.sources)


def gather(
    recipe: Recipe, folder: Path, watch: BatchCallback | None = None, with_prompts: bool = False
) -> GatheredRows:
    """Read every row of every source once, into a spool in `folder`.

    Args:
        recipe: Recipe with the sources, the tokenizer and the `data` section.
        folder: Folder of the spool, created here.
        watch: Called with each batch of rows that can be trained on.
        with_prompts: Whether to hash prompts and answers too, to find contradictions.

    Raises:
        UserError: All bad rows; under `data.on_bad_row: drop`, only if there are too many.
    """
    with _collector_paused():
        return _gather(recipe, folder, watch, with_prompts)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause Python's cycle collector: its scans of the tokenizer's vocabulary would take a third of the time.

    The pass over the sources collects the youngest generation after each batch.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def _gather(recipe: Recipe, folder: Path, watch: BatchCallback | None, with_prompts: bool) -> GatheredRows:
    tokenizer_folder = resolve_tokenizer(recipe)
    bad_rows = BadRowList(check_folder(recipe) / MISTAKES_FILE)
    opened = _open_all(recipe, bad_rows)
    tokenizer = tokenizer_of(recipe, tokenizer_folder)
    has_chats = any(source.row_format != "text" for source, _ in opened)
    renderer = make_renderer(tokenizer, tokenizer_folder, recipe.data, has_chats)
    served = saved_form(tokenizer, recipe.model.trust_remote_code)
    evaluated = _evaluation_index(recipe)
    strata = Strata()
    fields: list[frozenset[str]] = []
    mistakes: list[Mistake] = []
    # The vocabularies live until the end, so the collector need not scan them.
    gc.freeze()
    with SpoolWriter(folder, renderer.vocab_size) as spool:
        for number, (source, examples) in enumerate(opened):
            source_pass = SourcePass(recipe.data, source, number, renderer, served, evaluated, strata, with_prompts)
            shared, num_rows = source_pass.run(examples, spool, watch)
            fields.append(shared)
            mistakes += _bad_row_mistakes(source, recipe.data, num_rows)
        bad_rows.write(mistakes)
        done = spool.finish()
    columns = replace(done.columns, stratum=strata.sorted_codes(done.columns.stratum))
    sources = tuple(source for source, _ in opened)
    return GatheredRows(sources, renderer, replace(done, columns=columns), strata.names(), tuple(fields))


def _open_all(recipe: Recipe, bad_rows: BadRowList) -> list[Opened]:
    """Detect the format of each source from its first rows, and raise the mistakes of all sources together."""
    runs_folder = runs_folder_of(recipe)
    uses: list[tuple[SourceUse, Sequence[Source]]] = [
        ("train", recipe.data.sources),
        ("validation", recipe.data.validation),
        ("test", recipe.data.test),
        ("retain", recipe.data.retain),
    ]
    mistakes: list[Mistake] = []
    opened: list[Opened] = []
    for use, sources in uses:
        for source in sources:
            try:
                opened.append(_open(source, use, runs_folder, bad_rows.of(source)))
            except UserError as error:
                mistakes += error.mistakes
    mistakes += [
        wrong_rows(source.name, source.row_format, recipe.objective)
        for source, _ in opened
        if row_kind(source.row_format) != recipe.objective.takes
    ]
    if mistakes:
        bad_rows.write(mistakes)
    return opened


def may_have_chats(recipe: Recipe) -> bool:
    """Return whether a source to train on has chats, as declared or as the first rows of its files say.

    Sources of the hub are not opened: whether they have chats is not known before they are downloaded.
    """
    return any(_may_be_chats(source, runs_folder_of(recipe)) for source in recipe.data.sources)


def _may_be_chats(source: Source, runs_folder: Path) -> bool:
    if source.format != "auto" or source.path is None:
        return source.format not in ("auto", "text")
    try:
        return _open(source, "train", runs_folder, RowMistakes(source_name(source)))[0].row_format != "text"
    except UserError:
        return False  # the preparation reports what is wrong with the rows


def _open(source: Source, use: SourceUse, runs_folder: Path, mistakes: RowMistakes) -> Opened:
    removed = RemovedNulls()
    rows = read_rows(source, runs_folder, mistakes, removed)
    first = list(islice(rows, FIRST_ROWS))
    if not first:
        raise UserError.of(mistakes.to_show())
    row_format = resolve_format(source.format, first, source)
    opened = GatheredSource(source, use, row_format, mistakes, removed)
    return opened, convert_rows(chain(first, rows), row_format, mistakes, source, opened.key_counts)


def read_examples(source: Source, runs_folder: Path) -> Iterator[Example]:
    """Yield the rows of one source; raise all its bad rows together at the end.

    Raises:
        UserError: All rows that cannot be read.
    """
    opened, examples = _open(source, "train", runs_folder, RowMistakes(source_name(source)))
    yield from examples
    opened.mistakes.raise_if_any()


def _evaluation_index(recipe: Recipe) -> EvaluationIndex | None:
    decontaminate = recipe.data.decontaminate
    if decontaminate is None:
        return None
    runs_folder = runs_folder_of(recipe)
    texts = [prompt_text(row) for source in decontaminate.against for row in read_examples(source, runs_folder)]
    return EvaluationIndex(texts, decontaminate.ngram)


def _bad_row_mistakes(source: GatheredSource, data: DataSection, num_good: int) -> list[Mistake]:
    """Return the mistakes to raise for a source: all, or, under `on_bad_row: drop`, that there are too many."""
    num_bad = source.mistakes.num_rows
    if data.on_bad_row == "raise" or num_good == 0:
        return source.mistakes.to_show()
    share = num_bad / (num_bad + num_good)
    if share <= data.most_bad_rows:
        return []
    too_many = Mistake(
        f"{source.name} has {num_bad} bad rows of {num_bad + num_good}, {share:.1%}; data.most_bad_rows is "
        f"{data.most_bad_rows:.1%}.",
        "this is seldom an accident: the source may have another format than declared or detected.",
        f"fix them, or set data.most_bad_rows to {math.ceil(share * 1000) / 1000:g}.",
    )
    return [*source.mistakes.to_show(), too_many]
