"""What an audit of a recipe's data found: the values that the terminal and data.html show."""

from __future__ import annotations

from dataclasses import dataclass

from packhorse.data.checks.scorecard import ScoreCard
from packhorse.data.ledger import Ledger


@dataclass(frozen=True)
class SourceAudit:
    """One source: how it is called, what its rows look like, how many there are, what they are for."""

    name: str
    row_format: str
    num_rows: int
    use: str


@dataclass(frozen=True)
class RowAudit:
    """A row as the model will see it.

    Attributes:
        where: `file:line`.
        split: Side of the split.
        pieces: Its text in pieces, each supervised or not.
    """

    where: str
    split: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class SplitAudit:
    """One side of the split: rows, tokens, packs, fill (0 to 1), and rows of each stratum."""

    num_rows: int
    num_tokens: int
    num_packs: int
    fill: float
    strata: dict[str, int]


@dataclass(frozen=True)
class DuplicateGroup:
    """Rows that say the same, or nearly.

    Attributes:
        where: Where the first of them stand, `file:line`.
        text: The beginning of the first.
        equal: Whether all are equal.
        num_rows: Rows in all.
    """

    where: tuple[str, ...]
    text: str
    equal: bool
    num_rows: int


@dataclass(frozen=True)
class AuditReport:
    """Figures over all rows.

    Attributes:
        name: Of the recipe.
        tokenizer: Its folder's name.
        template: `data.template`.
        stop_token: Ends an answer.
        length_tokens: T.
        sources: In the recipe's order.
        ledger: What would become of every row.
        splits: Name of the side to its figures.
        shares: Asked for or chosen: train, validation, test.
        shares_reason: Why the shares are what they are.
        length_percentiles: Percentile (0, 50, 90, 99, 100) to tokens.
        length_histogram: (upper bound in tokens, rows) of each bin, in order.
        num_tokens: Tokens of all rows, before anything is cut.
        supervised_share: Supervised tokens ÷ tokens.
        cards: Score card of each source.
        duplicates: The largest groups.
        num_contaminated: Rows that hold what an evaluation asks.
        contaminated: Where the first of them stand, `file:line`.
        notes: Findings in words: strata too small, lengths that pack badly, a row that was dropped.
        rows: The first rows.
    """

    name: str
    tokenizer: str
    template: str
    stop_token: str
    length_tokens: int
    sources: tuple[SourceAudit, ...]
    ledger: Ledger
    splits: dict[str, SplitAudit]
    shares: tuple[float, float, float]
    shares_reason: str
    length_percentiles: dict[int, int]
    length_histogram: tuple[tuple[int, int], ...]
    num_tokens: int
    supervised_share: float
    cards: tuple[ScoreCard, ...]
    duplicates: tuple[DuplicateGroup, ...]
    num_contaminated: int
    contaminated: tuple[str, ...]
    notes: tuple[str, ...]
    rows: tuple[RowAudit, ...]
