"""What `packhorse check` shows of the data: formats, lengths, the first rows with what is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np

from packhorse.data.lengths import LengthCounts, check_lengths, fit_row
from packhorse.data.places import resolve_tokenizer, source_name
from packhorse.data.rendering.render import Rendered, Renderer, load_tokenizer, make_renderer
from packhorse.data.survey import SPLITS, render_survey, survey_rows
from packhorse.recipe.schema import Recipe

SHOWN_ROWS: Final = 2
PERCENTILES: Final = (0, 50, 90, 99, 100)


@dataclass(frozen=True)
class SourceAudit:
    """One source: how it is called, what its rows look like, how many there are, what they are for."""

    name: str
    row_format: str
    num_rows: int
    use: str


@dataclass(frozen=True)
class RowAudit:
    """A row as the model will see it: where it stands, and its text in pieces, each supervised or not."""

    where: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class AuditReport:
    """Figures over all rows that would be used.

    Attributes:
        sources: In the recipe's order.
        rows_by_split: Rows on each side, before over-long ones are left out.
        length_percentiles: Percentile (0, 50, 90, 99, 100) to tokens.
        num_tokens: Tokens of all rows, before anything is cut.
        supervised_share: Supervised tokens ÷ tokens.
        num_over_long: Rows longer than `batch.length`, dropped or cut as the recipe says.
        stop_token: Ends an answer.
        rows: The first rows.
    """

    sources: tuple[SourceAudit, ...]
    rows_by_split: dict[str, int]
    length_percentiles: dict[int, int]
    num_tokens: int
    supervised_share: float
    num_over_long: int
    stop_token: str
    rows: tuple[RowAudit, ...]


def audit(recipe: Recipe) -> AuditReport:
    """Read, render and check every row, and write nothing.

    Raises:
        UserError: The same as `prepare` would raise.
    """
    folder = resolve_tokenizer(recipe)
    survey = survey_rows(recipe)
    tokenizer = load_tokenizer(folder, recipe.data.template, recipe.model.trust_remote_code)
    renderer = make_renderer(tokenizer, folder, survey.has_chats)
    counts, num_supervised = LengthCounts(), 0
    by_split = dict.fromkeys(SPLITS, 0)
    shown: list[RowAudit] = []
    for batch in render_survey(survey, renderer):
        for split, example, row in batch:
            fit_row(row, recipe, counts)
            by_split[split] += 1
            num_supervised += int(row.supervised.sum())
            if len(shown) < SHOWN_ROWS:
                shown.append(RowAudit(example.where, tuple(_pieces(renderer, row))))
    check_lengths(counts, recipe)
    lengths = np.frombuffer(counts.lengths, np.uint32)
    at = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    return AuditReport(
        sources=tuple(
            SourceAudit(source_name(found.source), found.row_format, len(found.keys), found.use)
            for found in survey.sources
        ),
        rows_by_split={split: num for split, num in by_split.items() if num},
        length_percentiles=dict(zip(PERCENTILES, at.astype(int).tolist())),
        num_tokens=int(lengths.sum()),
        supervised_share=num_supervised / int(lengths.sum()),
        num_over_long=int(np.count_nonzero(lengths > recipe.batch.length)),
        stop_token=renderer.tokenizer.eos_token,
        rows=tuple(shown),
    )


def _pieces(renderer: Renderer, row: Rendered) -> Iterator[tuple[str, bool]]:
    for supervised, run in groupby(zip(row.ids, row.supervised.tolist()), key=lambda pair: pair[1]):
        yield renderer.tokenizer.decode([token for token, _ in run]), bool(supervised)
