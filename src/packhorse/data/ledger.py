"""What became of every row: the ledger adds up, so nothing is lost without a word."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, NonNegativeInt, model_validator


class Ledger(BaseModel):
    """Rows in, and where each of them went; refuses to exist when it does not add up."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rows_in: NonNegativeInt
    """Rows read from all sources."""
    over_long_dropped: NonNegativeInt = 0
    """Rows of more than `batch.length` tokens, left out because `data.over_long` is drop."""
    emptied_by_truncation: NonNegativeInt = 0
    """Rows left out because truncation left nothing to train on."""
    retain_unused: NonNegativeInt = 0
    """Rows of `data.retain` that are neither evaluated nor trained on again."""
    train: NonNegativeInt = 0
    """Rows trained on."""
    validation: NonNegativeInt = 0
    """Rows for evaluation."""
    test: NonNegativeInt = 0
    """Rows sealed."""
    retain: NonNegativeInt = 0
    """Rows that show what was forgotten."""
    truncated: NonNegativeInt = 0
    """Of the kept rows, those cut to `batch.length` tokens."""
    tokens_cut: NonNegativeInt = 0
    """Tokens that truncation took from kept rows."""

    @property
    def rows_kept(self) -> int:
        """Rows in some split."""
        return self.train + self.validation + self.test + self.retain

    @model_validator(mode="after")
    def _adds_up(self) -> Ledger:
        out = self.rows_kept + self.over_long_dropped + self.emptied_by_truncation + self.retain_unused
        if out != self.rows_in:
            raise ValueError(f"{self.rows_in} rows came in and {out} are accounted for")
        if self.truncated > self.rows_kept:
            raise ValueError(f"{self.truncated} rows were cut and {self.rows_kept} kept")
        return self
