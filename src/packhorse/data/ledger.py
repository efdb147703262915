"""What became of every row: the ledger adds up, so nothing is lost without a word."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, NonNegativeInt, model_validator

# In the order in which rows are taken out: a row is counted where it is first lost.
LOSSES: Final = {
    "bad": "could not be read as meant",
    "not_drawn": "not drawn: data.sources[].rows or weight",
    "duplicate": "a copy of a row that is kept",
    "contaminated": "hold what data.decontaminate asks",
    "masked_out": "nothing to train on",
    "over_long": "longer than batch.length",
    "retain_unused": "of data.retain, neither evaluated nor trained on again",
}
SIDES: Final = ("train", "validation", "test", "retain")


class Entry(BaseModel):
    """Rows and their tokens; a bad row, which could not be rendered, has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: NonNegativeInt = 0
    tokens: NonNegativeInt = 0


class Ledger(BaseModel):
    """Rows in, and where each of them went; refuses to exist when rows or tokens do not add up."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rows_in: Entry
    """Rows read from all sources."""
    losses: dict[str, Entry]
    """Rows left out, by the reasons of `LOSSES`."""
    kept: dict[str, Entry]
    """Rows of each side of the split, with the tokens that are in packs."""
    truncated: NonNegativeInt = 0
    """Of the kept rows, those cut to `batch.length` tokens."""
    tokens_cut: NonNegativeInt = 0
    """Tokens that truncation took from kept rows."""
    split_rows: NonNegativeInt = 0
    """Of the kept rows, those that became several documents because they were longer than `batch.length`."""

    @property
    def rows_kept(self) -> int:
        """Rows on some side of the split."""
        return sum(entry.rows for entry in self.kept.values())

    @model_validator(mode="after")
    def _adds_up(self) -> Ledger:
        if unknown := [*self.losses.keys() - LOSSES.keys(), *self.kept.keys() - set(SIDES)]:
            raise ValueError(f"no such entry: {', '.join(unknown)}")
        entries = [*self.losses.values(), *self.kept.values()]
        rows, tokens = sum(entry.rows for entry in entries), sum(entry.tokens for entry in entries) + self.tokens_cut
        if rows != self.rows_in.rows:
            raise ValueError(f"{self.rows_in.rows} rows came in and {rows} are accounted for")
        if tokens != self.rows_in.tokens:
            raise ValueError(f"{self.rows_in.tokens} tokens came in and {tokens} are accounted for")
        return self
