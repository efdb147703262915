"""From rows in nine formats to one `Example`; a row that cannot be meant as declared is a mistake, never a guess."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, names
from packhorse.data.formats.chats import from_messages, from_sharegpt
from packhorse.data.formats.columns import Renaming, check_columns, formats_of, renaming_of
from packhorse.data.formats.detect import (
    KEYS_OF,
    RIVALS_OF,
    RowFormat,
    detect_format,
    known_formats,
    missing_keys,
    resembles,
)
from packhorse.data.formats.example import Example
from packhorse.data.formats.preference import from_kto, from_preference
from packhorse.data.formats.single_turn import (
    from_alpaca,
    from_prompt_completion,
    from_question_answer,
    from_text,
    from_text_label,
)
from packhorse.data.read.mistakes import RowMistakes
from packhorse.data.read.sources import Row
from packhorse.errors import Mistake, UserError
from packhorse.recipe.schema import Format, Source

__all__ = ["KEYS_OF", "RowFormat", "convert_rows", "detect_format", "renamed_rows", "resolve_format", "row_converter"]

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
}
NO_RIVALS: Final[frozenset[str]] = frozenset()


def resolve_format(declared: Format, first: Row | Sequence[Row], source: Source | None = None) -> RowFormat:
    """Return the declared format, or the one that the first rows show.

    Args:
        declared: The source's `format`.
        first: The first row, or the first few; the first of them that shows a format decides.
        source: For its `columns` and `roles`.

    Raises:
        UserError: The format is `auto` and no row shows one; or columns or roles name what is not there.
    """
    rows = [first] if isinstance(first, Row) else list(first)
    renaming = renaming_of(source)
    if renaming is not None:
        check_columns(renaming, rows)
    if declared != "auto":
        return declared
    found = next((shown for shown in formats_of(renaming, rows) if shown is not None), None)
    if found is None:
        raise UserError(
            f"the row has the keys {names(rows[0].values)}, which is no known format{resembles(rows[0].values)}.",
            "the keys say which part is the prompt and which the answer.",
            "say in the source's columns which key is which, such as {question: …, answer: …}, or {text: …} where "
            f"there is no answer; the formats are {known_formats()}.",
            rows[0].where,
        )
    return found


def convert_rows(
    rows: Iterable[Row], row_format: RowFormat, mistakes: RowMistakes, source: Source | None = None
) -> Iterator[Example]:
    """Yield an example for each row that is as it should be, and collect what is wrong with the others.

    Args:
        rows: As they were read.
        row_format: From `resolve_format`.
        mistakes: Takes the rows that cannot be converted.
        source: For its `columns` and `roles`; and where its `format` is auto, a row that shows another format than
            the first ones is a mistake.

    Raises:
        UserError: The source's columns or roles name what no format has.
    """
    convert = row_converter(row_format, source)
    for row in renamed_rows(rows, source):
        try:
            example = convert(row)
        except BadRowError as error:
            mistakes.add(Mistake(error.fact, error.why, error.fix, row.where))
        else:
            yield example


def renamed_rows(rows: Iterable[Row], source: Source | None) -> Iterable[Row]:
    """Return the rows under the names of their format, where the source's columns or roles say others.

    Raises:
        UserError: The source's columns or roles name what no format has.
    """
    renaming = renaming_of(source)
    return rows if renaming is None else _renamed(rows, renaming)


def _renamed(rows: Iterable[Row], renaming: Renaming) -> Iterator[Row]:
    for row in rows:
        for places, each in renaming.spread(row.values):
            yield Row(row.where + places, each.apply(row.values))


def row_converter(row_format: RowFormat, source: Source | None = None) -> Callable[[Row], Example]:
    """Return the function that makes an example of one row of `renamed_rows`; it raises `BadRowError` for others."""
    convert = CONVERTERS[row_format]
    called = source.columns if source is not None else {}
    is_found = source is not None and source.format == "auto"
    # A declared format is meant, whatever other keys its rows have.
    rivals = RIVALS_OF.get(row_format, NO_RIVALS) if is_found else NO_RIVALS
    required = () if row_format in ("text_label", "kto") else KEYS_OF[row_format]

    def make(row: Row) -> Example:
        values = row.values
        for key in required:
            if key not in values:
                raise _missing(values, row_format, called)
        # These two have several keys for one thing.
        if not required and missing_keys(values, row_format):
            raise _missing(values, row_format, called)
        if rivals and not rivals.isdisjoint(values):
            _refuse_rival(values, row_format)
        return convert(row)

    return make


def _missing(values: dict[str, Any], row_format: RowFormat, called: Mapping[str, str]) -> BadRowError:
    missing = missing_keys(values, row_format)
    said = [f"{key} (columns: {called[key]})" if key in called else key for key in missing]
    other = detect_format(values)
    looks = f"it looks like {other}" if other else f"its keys are {names(values)}{resembles(values)}"
    return BadRowError(
        f"the row has no {' and no '.join(said)}, so it is not {row_format}; {looks}.",
        f"rows of this source are read as {row_format}, by declaration or by its first row.",
        f"set the source's format to {other}, or mend the row." if other else f"mend the row: {known_formats()}.",
    )


def _refuse_rival(values: dict[str, Any], row_format: RowFormat) -> None:
    other = detect_format(values)
    if other != row_format:
        raise BadRowError(
            f"the row looks like {other}, and the first rows of this source are {row_format}.",
            "read as the others, it would teach something else than it says.",
            f"give rows of the two forms as two sources, or set the source's format to {row_format} if that is meant.",
        )
