"""Result of an evaluation: what RUN/evaluation.json holds. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, computed_field

from packhorse.data.data_manifest import TestLook
from packhorse.track.meter import perplexity


class _Frozen(BaseModel):
    # JSON has no NaN and no infinity; written as strings, they are read back unchanged.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Score(_Frozen):
    """Result of one model on some rows."""

    loss: float
    """Nats per supervised token; NaN if no token is supervised."""
    num_supervised_tokens: int
    """Number of supervised tokens."""
    num_exact: int
    """Number of rows answered with exactly the expected text."""
    num_answered: int
    """Number of rows that were answered."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return perplexity(self.loss)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def exact_match(self) -> float | None:
        """Return the share of exact answers, 0 to 1; None if no row was answered."""
        return self.num_exact / self.num_answered if self.num_answered else None


class ComparisonLine(_Frozen):
    """Results of base and tuned model on the same rows."""

    set: str
    group: str | None
    """Value of `evaluation.group_by`; None for the whole set."""
    num_rows: int
    base: Score
    tuned: Score

    @computed_field  # type: ignore[prop-decorator]
    @property
    def loss_change(self) -> float:
        """Return the loss of tuned − base, in nats per supervised token."""
        return self.tuned.loss - self.base.loss

    @computed_field  # type: ignore[prop-decorator]
    @property
    def exact_match_change(self) -> float | None:
        """Return the exact match of tuned − base, from −1 to 1; None if no row was answered."""
        if self.tuned.exact_match is None or self.base.exact_match is None:
            return None
        return self.tuned.exact_match - self.base.exact_match


class Sample(_Frozen):
    """One row and the answers of both models."""

    set: str
    group: str
    prompt: str
    """Last turn before the answer."""
    expected: str
    base: str
    tuned: str


class Comparison(_Frozen):
    """Comparison of base and tuned model."""

    lines: tuple[ComparisonLine, ...]
    samples: tuple[Sample, ...]
    test_looks: tuple[TestLook, ...] = ()
    """All openings of the sealed test rows so far, by any run on the same data."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def num_test_looks(self) -> int:
        """Return how often the test rows were opened."""
        return len(self.test_looks)
