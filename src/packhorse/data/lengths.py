"""What a pack's length does to rows: fits, is cut, is dropped, or stops everything with the length that would fit."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from packhorse.data.rendering.render import Rendered
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe


@dataclass
class LengthCounts:
    """Counts over rows as they pass.

    Attributes:
        lengths: Tokens of every rendered row, before anything is cut.
    """

    lengths: array[int] = field(default_factory=lambda: array("I"))
    num_dropped: int = 0
    num_emptied: int = 0
    num_truncated: int = 0
    tokens_cut: int = 0


def fit_row(row: Rendered, recipe: Recipe, counts: LengthCounts) -> Rendered | None:
    """Count a row and return what of it is kept: the first T tokens under truncate; None if it is left out."""
    most = recipe.batch.length
    counts.lengths.append(len(row.ids))
    if len(row.ids) <= most:
        return row
    if recipe.data.over_long != "truncate":
        counts.num_dropped += 1
        return None
    kept = Rendered(row.ids[:most], row.supervised[:most])
    if not kept.supervised[1:].any():
        counts.num_emptied += 1
        return None
    counts.num_truncated += 1
    counts.tokens_cut += len(row.ids) - most
    return kept


def check_lengths(counts: LengthCounts, recipe: Recipe) -> None:
    """Refuse a length that no row fits, and, under raise, one that some row does not fit.

    Raises:
        UserError: Names the length that fits 99 % of the rows and the one that fits all.
    """
    most = recipe.batch.length
    lengths = np.frombuffer(counts.lengths, np.uint32)
    num_over = int(np.count_nonzero(lengths > most))
    if num_over == 0:
        return
    shortest, longest = int(lengths.min()), int(lengths.max())
    for_most = int(np.quantile(lengths, 0.99, method="inverted_cdf"))
    if num_over == len(lengths):
        raise UserError(
            f"batch.length is {most}, and every row is longer: {shortest} to {longest} tokens.",
            "no row would be left whole.",
            f"set batch.length to {for_most} (fits 99 % of the {len(lengths)} rows) or {longest} (fits all).",
        )
    if recipe.data.over_long == "raise":
        raise UserError(
            f"{num_over} of {len(lengths)} rows are longer than batch.length, which is {most}; the longest has "
            f"{longest} tokens.",
            "a row that is cut or left out without a word is lost.",
            f"set batch.length to {for_most} (fits 99 %) or {longest} (fits all), or data.over_long to drop or "
            "truncate, which is then counted.",
        )
