"""Values of an audit of a recipe's data, which the terminal and data.html show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from packhorse.data.checks.scorecard import ScoreCard
from packhorse.data.ledger import Ledger


@dataclass(frozen=True)
class SourceAudit:
    """One source.

    Attributes:
        name: Path or hub name.
        row_format: Format of its rows.
        num_rows: Number of its rows.
        use: train, validation or retain.
        keys: `used`, `kept` or `ignored` to keys of its rows, each with the number of rows that have a value for it.
    """

    name: str
    row_format: str
    num_rows: int
    use: str
    keys: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class RowAudit:
    """A row as the model sees it.

    Attributes:
        where: `file:line`.
        split: Side of the split, or `dropped`.
        pieces: Text in pieces, each with whether it is supervised.
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
    """Rows with equal or nearly equal text.

    Attributes:
        where: Locations of the first rows, `file:line`.
        text: Beginning of the first row.
        equal: Whether all rows are equal.
        num_rows: Number of rows in the group.
    """

    where: tuple[str, ...]
    text: str
    equal: bool
    num_rows: int


@dataclass(frozen=True)
class AuditReport:
    """Figures over all rows.

    Attributes:
        name: Name of the recipe.
        tokenizer: Name of the tokenizer's folder.
        template: `data.template`.
        stop_token: Token that ends an answer.
        length_tokens: Tokens in a pack (T).
        sources: Sources in the order of the recipe.
        ledger: What `prepare` would do with every row.
        splits: Name of the side to its figures.
        shares: Shares of train, validation and test, given or automatic.
        shares_reason: Where the shares come from.
        length_percentiles: Percentile (0, 50, 90, 99, 100) to tokens.
        length_histogram: (upper bound in tokens, rows) of each bin, in order.
        num_tokens: Tokens of all rows, before anything is cut.
        supervised_share: Supervised tokens ÷ tokens.
        cards: Score card of each source.
        duplicates: Largest groups of duplicates.
        num_contaminated: Rows that contain text of an evaluation.
        contaminated: Locations of the first of them, `file:line`.
        notes: Findings in sentences: strata too small, lengths that pack badly, a dropped row.
        rows: First rows of the data.
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
