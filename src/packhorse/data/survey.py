"""The first pass over all rows: formats, mistakes, content, and the side of the split that each row is on.

Only hashes and sides are kept, so memory does not grow with the text; the second pass reads the rows again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Final, Literal

import numpy as np

from packhorse.data.formats.rows import Example, RowFormat, convert_rows, resolve_format
from packhorse.data.places import source_name
from packhorse.data.reading.mistakes import RowMistakes
from packhorse.data.reading.sources import Row, read_rows
from packhorse.data.rendering.render import BATCH_ROWS, Rendered, Renderer, render_examples
from packhorse.data.split import Sides, assign, rank
from packhorse.errors import Mistake, UserError
from packhorse.recipe.locate import expand
from packhorse.recipe.schema import Recipe, RetainSource, Source

Use = Literal["train", "validation", "retain"]
SPLITS: Final = ("train", "validation", "test", "retain")
TRAIN: Final = 0
VALIDATION: Final = 1
RETAIN: Final = 3
UNUSED: Final = -1


@dataclass(frozen=True, eq=False)
class SourceSurvey:
    """One source after the first pass.

    Attributes:
        source: As the recipe has it.
        use: What its rows are for.
        row_format: Found or declared.
        has_chats: Whether its rows are chats.
        keys: [rows] hash of each row's content.
        strata: [rows] values of the fields to stratify by.
        sides: int8 [rows] index into `SPLITS`, or -1 for a row that is not used.
    """

    source: Source
    use: Use
    row_format: RowFormat
    has_chats: bool
    keys: list[str]
    strata: list[str]
    sides: Sides


@dataclass(frozen=True, eq=False)
class Survey:
    """All sources after the first pass."""

    runs_folder: Path
    sources: list[SourceSurvey]

    @property
    def num_rows(self) -> int:
        """Rows of all sources."""
        return sum(len(found.keys) for found in self.sources)

    @property
    def num_unused(self) -> int:
        """Rows of `data.retain` that are neither evaluated nor trained on again."""
        return sum(int(np.count_nonzero(found.sides == UNUSED)) for found in self.sources)

    @property
    def has_chats(self) -> bool:
        """Whether any row is a chat, so that a template is needed."""
        return any(found.has_chats for found in self.sources)


def survey_rows(recipe: Recipe) -> Survey:
    """Read every row once.

    Raises:
        UserError: All rows that are not as they should be, or too few rows for the split.
    """
    runs_folder = Path(expand(recipe.runs_folder)).expanduser()
    uses: list[tuple[Use, Sequence[Source]]] = [
        ("train", recipe.data.sources),
        ("validation", recipe.data.validation),
        ("retain", recipe.data.retain),
    ]
    stratify = recipe.data.split.stratify
    mistakes: list[Mistake] = []
    found: list[SourceSurvey] = []
    for use, sources in uses:
        for source in sources:
            try:
                found.append(_survey_source(source, use, runs_folder, stratify))
            except UserError as error:
                mistakes += error.mistakes
    if mistakes:
        raise UserError.of(mistakes)
    return Survey(runs_folder, _with_sides(found, recipe))


def render_survey(survey: Survey, renderer: Renderer) -> Iterator[list[tuple[str, Example, Rendered]]]:
    """Read every used row again and yield batches of (split, row, tokens).

    Raises:
        UserError: All rows that render into something that cannot be trained on.
    """
    mistakes: list[Mistake] = []
    for found in survey.sources:
        of_source = RowMistakes(source_name(found.source))
        for batch in _batches(found, survey.runs_folder):
            rendered = render_examples(renderer, [example for _, example in batch], of_source)
            yield [(split, example, row) for (split, example), row in zip(batch, rendered) if row is not None]
        mistakes += of_source.told()
    if mistakes:
        raise UserError.of(mistakes)


def _survey_source(source: Source, use: Use, runs_folder: Path, stratify: Sequence[str]) -> SourceSurvey:
    mistakes = RowMistakes(source_name(source))
    keys: list[str] = []
    strata: list[str] = []
    row_format, examples = _read_examples(source, runs_folder, mistakes)
    for example in examples:
        missing = [name for name in stratify if name not in example.fields]
        if missing:
            mistakes.add(_no_stratum(example, missing))
            continue
        keys.append(content_hash(example))
        strata.append("\0".join(f"{example.fields[name]}" for name in stratify))
    mistakes.raise_if_any()
    return SourceSurvey(source, use, row_format, row_format != "text", keys, strata, np.zeros(len(keys), np.int8))


def _read_examples(source: Source, runs_folder: Path, mistakes: RowMistakes) -> tuple[RowFormat, Iterator[Example]]:
    rows = read_rows(source, runs_folder, mistakes)
    first: Row | None = next(rows, None)
    if first is None:
        raise UserError.of(mistakes.told())
    row_format = resolve_format(source.format, first)
    return row_format, convert_rows(chain([first], rows), row_format, mistakes)


def content_hash(example: Example) -> str:
    """Return 32 hex digits over what a row says; its other fields do not count."""
    said = example.text or "\0".join(f"{turn.role}\0{turn.content}" for turn in example.messages or ())
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


def _no_stratum(example: Example, missing: Sequence[str]) -> Mistake:
    return Mistake(
        f"the row has no {' and no '.join(missing)}; its other fields are {', '.join(example.fields) or 'none'}.",
        "data.split.stratify keeps the shares of these fields equal on each side.",
        "add the field, or take it out of data.split.stratify.",
        example.where,
    )


def _with_sides(found: list[SourceSurvey], recipe: Recipe) -> list[SourceSurvey]:
    split = recipe.data.split
    placed: list[SourceSurvey] = []
    for use in ("train", "validation", "retain"):
        group = [source for source in found if source.use == use]
        keys = [key for source in group for key in source.keys]
        strata = [stratum for source in group for stratum in source.strata]
        if use == "retain":
            sides = assign(keys, strata, (split.train, split.validation, split.test), split.seed)
            sides = _retained(sides, group, split.seed)
        elif recipe.data.validation:
            sides = np.full(len(keys), TRAIN if use == "train" else VALIDATION, np.int8)
        else:
            sides = assign(keys, strata, (split.train, split.validation, split.test), split.seed)
        if group:
            _check_sides(sides, use, recipe)
        borders = np.cumsum([len(source.keys) for source in group])[:-1]
        placed += [replace(source, sides=part) for source, part in zip(group, np.split(sides, borders))]
    return placed


def _retained(sides: Sides, group: Sequence[SourceSurvey], seed: int) -> Sides:
    """Old skills: what was held out is evaluated, and of what was trained on, `replay_rows` are trained on again.

    A run that trained on these very sources with the same split has seen none of what is evaluated here.
    """
    out = np.where(sides == VALIDATION, np.int8(RETAIN), np.int8(UNUSED))
    start = 0
    for found in group:
        wanted = found.source.replay_rows if isinstance(found.source, RetainSource) else 0
        trained = [at for at in range(start, start + len(found.keys)) if sides[at] == TRAIN]
        if wanted > len(trained):
            raise UserError(
                f"data.retain asks for {wanted} replay_rows of {source_name(found.source)}, whose train share has"
                f" {len(trained)} rows.",
                "only rows of the train share are trained on again; the others are held out.",
                f"set replay_rows to {len(trained)} or less.",
            )
        trained.sort(key=lambda at, first=start, keys=found.keys: rank(seed, keys[at - first]))  # type: ignore[misc]
        out[trained[:wanted]] = TRAIN
        start += len(found.keys)
    return out


def _check_sides(sides: Sides, use: Use, recipe: Recipe) -> None:
    split = recipe.data.split
    wanted = {TRAIN: ("train", split.train), VALIDATION: ("validation", split.validation)}
    if use == "retain":
        wanted = {RETAIN: ("validation", split.validation)}
    elif recipe.data.validation:
        return
    for side, (name, share) in wanted.items():
        if share > 0 and not np.any(sides == side):
            what = "data.retain" if use == "retain" else "data.sources"
            raise UserError(
                f"{what} has {len(sides)} rows, and data.split.{name} of {share:g} gives 0 of them.",
                "equal rows stay on one side, and a share of no rows can be neither trained on nor measured.",
                f"add rows, raise data.split.{name}, or name rows of their own in data.validation.",
            )


def _batches(found: SourceSurvey, runs_folder: Path) -> Iterator[list[tuple[str, Example]]]:
    mistakes = RowMistakes(source_name(found.source))
    _, examples = _read_examples(found.source, runs_folder, mistakes)
    batch: list[tuple[str, Example]] = []
    for side, example in zip(found.sides.tolist(), examples, strict=True):
        if side == UNUSED:
            continue
        batch.append((SPLITS[side], example))
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
