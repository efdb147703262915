"""The ledger: what happened to every row. Its entries add up, so no row is lost silently."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, NonNegativeInt, model_validator

# In the order in which rows are removed: a row is counted under its first reason.
LOSSES: Final = {
    "bad": "could not be read or rendered",
    "not_drawn": "not drawn: data.sources[].rows or weight",
    "duplicate": "duplicate of a row that is kept",
    "leaked": "also in given held-out rows",
    "contaminated": "contain text of data.decontaminate",
    "masked_out": "nothing to train on",
    "over_long": "longer than batch.length",
    "retain_unused": "of data.retain, neither evaluated nor trained on again",
}
SIDES: Final = ("train", "validation", "test", "retain")


class Entry(BaseModel):
    """Rows and their tokens; bad rows have no tokens, as they could not be rendered."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: NonNegativeInt = 0
    tokens: NonNegativeInt = 0


class Ledger(BaseModel):
    """Number of rows read, and where each of them went; validation fails if rows or tokens do not add up."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rows_in: Entry
    """Rows read from all sources."""
    losses: dict[str, Entry]
    """Dropped rows, by the reasons in `LOSSES`."""
    kept: dict[str, Entry]
    """Rows of each side of the split, with the tokens that are in packs."""
    truncated: NonNegativeInt = 0
    """Kept rows that were cut to `batch.length` tokens."""
    tokens_cut: NonNegativeInt = 0
    """Tokens that truncation removed from kept rows."""
    split_rows: NonNegativeInt = 0
    """Kept rows that were split into several documents because they were longer than `batch.length`."""

    @property
    def rows_kept(self) -> int:
        """Number of rows on any side of the split."""
        return sum(entry.rows for entry in self.kept.values())

    @model_validator(mode="after")
    def _adds_up(self) -> Ledger:
        if unknown := [*self.losses.keys() - LOSSES.keys(), *self.kept.keys() - set(SIDES)]:
            raise ValueError(f"unknown entry: {', '.join(unknown)}")
        entries = [*self.losses.values(), *self.kept.values()]
        rows, tokens = sum(entry.rows for entry in entries), sum(entry.tokens for entry in entries) + self.tokens_cut
        if rows != self.rows_in.rows:
            raise ValueError(f"{self.rows_in.rows} rows were read and {rows} are accounted for")
        if tokens != self.rows_in.tokens:
            raise ValueError(f"{self.rows_in.tokens} tokens were read and {tokens} are accounted for")
        return self
