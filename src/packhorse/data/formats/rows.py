"""Convert rows in ten formats to `Example`; a row that does not fit its format is a mistake, never guessed at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, names
from packhorse.data.formats.chats import from_messages, from_sharegpt
from packhorse.data.formats.columns import Renaming, check_columns, formats_of, renaming_of
from packhorse.data.formats.detect import (
    KEYS_OF,
    NAMES_OF,
    RIVALS_OF,
    detect_format,
    known_formats,
    missing_keys,
    resembles,
)
from packhorse.data.formats.example import Example
from packhorse.data.formats.key_counts import KeyCounts
from packhorse.data.formats.preference import from_kto, from_preference
from packhorse.data.formats.rated import from_ranked, from_rated
from packhorse.data.formats.single_turn import (
    from_alpaca,
    from_prompt_completion,
    from_question_answer,
    from_text,
    from_text_label,
)
from packhorse.data.formats.tree import OTHER_REPLIES, from_tree, tree_paths
from packhorse.data.formats.unread import check_unread
from packhorse.data.read.row import Row, RowMistakes
from packhorse.errors import UserError
from packhorse.recipe.objectives import RowFormat
from packhorse.recipe.schema import Format, Source

__all__ = ["KEYS_OF", "convert_rows", "detect_format", "renamed_rows", "resolve_format", "row_converter"]

CONVERTERS: Final[Mapping[RowFormat, Callable[[Row], Example]]] = {
    "messages": from_messages,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
    "prompt_completion": from_prompt_completion,
    "question_answer": from_question_answer,
    "text_label": from_text_label,
    "text": from_text,
    "preference": from_preference,
    "kto": from_kto,
    "ranked": from_ranked,
    "tree": from_tree,
}
NO_RENAMING: Final = Renaming({}, {}, {})
NO_RIVALS: Final[frozenset[str]] = frozenset()


def resolve_format(declared: Format, first: Row | Sequence[Row], source: Source | None = None) -> RowFormat:
    """Return the declared format, or the format of the first rows.

    Args:
        declared: `format` of the source.
        first: First row or rows; the first one with a known format decides.
        source: Source with its `columns` and `roles`.

    Raises:
        UserError: The format is `auto` and no row has a known format; or columns or roles name absent keys.
    """
    rows = [first] if isinstance(first, Row) else list(first)
    renaming = renaming_of(source)
    if renaming is not None:
        check_columns(renaming, rows)
    if declared != "auto":
        return declared
    row_format = next((shown for shown in formats_of(renaming, rows) if shown is not None), None)
    if row_format is None:
        raise UserError(
            f"the row has the keys {names(rows[0].values)}, which is no known format{resembles(rows[0].values)}.",
            "the keys say which part is the prompt and which is the answer.",
            "map the keys in the source's columns, such as {question: …, answer: …}, or {text: …} if "
            f"there is no answer; the formats are {known_formats()}.",
            rows[0].where,
        )
    return row_format


def convert_rows(
    rows: Iterable[Row],
    row_format: RowFormat,
    mistakes: RowMistakes,
    source: Source | None = None,
    counts: KeyCounts | None = None,
) -> Iterator[Example]:
    """Yield an example for each valid row, and collect the mistakes of the others.

    Args:
        rows: Rows as they were read.
        row_format: Format from `resolve_format`.
        mistakes: Collects the rows that cannot be converted.
        source: Source with its `columns`, `roles` and `ignore`; if its `format` is auto, a row of another format than
            the first rows is a mistake.
        counts: Counts the keys of the rows.

    Raises:
        UserError: The source's columns or roles name what no format has.
    """
    convert = row_converter(row_format, source)
    counts = KeyCounts() if counts is None else counts
    for row in renamed_rows(rows, row_format, mistakes, source, counts):
        try:
            example = convert(row)
        except BadRowError as error:
            mistakes.add(error.at(row.where))
        else:
            counts.add(row.values, example)
            yield example


def renamed_rows(
    rows: Iterable[Row], row_format: RowFormat, mistakes: RowMistakes, source: Source | None, counts: KeyCounts
) -> Iterable[Row]:
    """Return the rows under the names of their format, renamed by the source's columns and roles.

    One row becomes several if a path of `columns` has a `*`, or if it is a message tree.

    Raises:
        UserError: The source's columns or roles name what no format has.
    """
    renaming = renaming_of(source)
    renamed = rows if renaming is None else _renamed(rows, renaming, mistakes, counts)
    if row_format != "tree":
        return renamed
    select = "best" if source is None else source.paths
    return _paths(renamed, select, renaming or NO_RENAMING, mistakes, counts)


def _renamed(rows: Iterable[Row], renaming: Renaming, mistakes: RowMistakes, counts: KeyCounts) -> Iterator[Row]:
    counts.ignored.update(dict.fromkeys(renaming.ignored, 0))
    for row in rows:
        counts.ignored.update(renaming.ignored_in(row.values))
        for indices, one in renaming.spread(row.values):
            try:
                one.refuse_hidden(row.values)
            except BadRowError as error:
                mistakes.add(error.at(row.where + indices))
            else:
                yield Row(row.where + indices, one.apply(row.values))


def _paths(
    rows: Iterable[Row], select: str, renaming: Renaming, mistakes: RowMistakes, counts: KeyCounts
) -> Iterator[Row]:
    for row in rows:
        # A row without replies is refused with all its keys by the converter.
        if missing_keys(row.values, "tree"):
            yield row
            continue
        try:
            paths = list(tree_paths(row, select, renaming.turn))
        except BadRowError as error:
            mistakes.add(error.at(row.where))
            continue
        for path, has_others in paths:
            counts.ignored.update([OTHER_REPLIES] if has_others else [])
            yield path


def row_converter(
    row_format: RowFormat, source: Source | None = None, keeps_others: bool = False
) -> Callable[[Row], Example]:
    """Return the function that converts one row of `renamed_rows` to an example, or raises `BadRowError`.

    Args:
        row_format: Format from `resolve_format`.
        source: Source of the rows.
        keeps_others: Whether the caller writes the keys that the format does not read, so that none is lost.
    """
    convert = _rated(source) if row_format == "rated" else CONVERTERS[row_format]
    columns = source.columns if source is not None else {}
    is_found = source is not None and source.format == "auto"
    # A declared format is intended, whatever other keys its rows have.
    rivals = RIVALS_OF.get(row_format, NO_RIVALS) if is_found else NO_RIVALS
    required = () if row_format in ("text_label", "kto", "rated") else KEYS_OF[row_format]
    is_declared = source is not None and source.format != "auto"

    def make(row: Row) -> Example:
        values = row.values
        for key in required:
            if key not in values and values.keys().isdisjoint(NAMES_OF.get(key, ())):
                raise _missing(values, row_format, columns)
        # Formats without required keys accept several keys for one thing.
        if not required and missing_keys(values, row_format):
            raise _missing(values, row_format, columns)
        if rivals and not rivals.isdisjoint(values):
            _refuse_rival(values, row_format)
        example = convert(row)
        if not keeps_others and not values.keys() <= example.used:
            check_unread(values, example, row_format, is_declared)
        return example

    return make


def _rated(source: Source | None) -> Callable[[Row], Example]:
    if source is None or source.good_rating is None:
        raise UserError(
            "the rows have the format rated, and the source has no good_rating.",
            "a rating becomes a verdict: good from this number on, else bad.",
            "set the source's good_rating, such as good_rating: 4.",
        )
    return partial(from_rated, good_rating=source.good_rating)


def _missing(values: dict[str, Any], row_format: RowFormat, columns: Mapping[str, str]) -> BadRowError:
    missing = [f"{k} (columns: {columns[k]})" if k in columns else k for k in missing_keys(values, row_format)]
    other = detect_format(values)
    looks = f"it looks like {other}" if other else f"its keys are {names(values)}{resembles(values)}"
    return BadRowError(
        f"the row has no {' and no '.join(missing)}, so it is not {row_format}; {looks}.",
        f"rows of this source are read as {row_format}, by declaration or by its first row.",
        f"set the source's format to {other}, or fix the row." if other else f"fix the row: {known_formats()}.",
    )


def _refuse_rival(values: dict[str, Any], row_format: RowFormat) -> None:
    other = detect_format(values)
    if other != row_format:
        raise BadRowError(
            f"the row looks like {other}, and the first rows of this source are {row_format}.",
            "read in the wrong format, it would teach something else.",
            f"give the rows of each format as a separate source, or set the source's format to {row_format}.",
        )
