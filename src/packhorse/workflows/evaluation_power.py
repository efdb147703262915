"""What an evaluation can show with the validation rows at hand, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from packhorse.data.audit_report import SplitAudit
from packhorse.data.data_manifest import SplitCounts
from packhorse.evaluate.statistics.sample_size import num_answered, rows_for_shares, smallest_difference
from packhorse.recipe.evaluation import EvaluationSection
from packhorse.recipe.schema import Recipe


@dataclass(frozen=True)
class EvaluationPower:
    """Smallest change of a share, such as exact match, that exact McNemar finds with 80 % power.

    Attributes:
        num_rows: Validation rows.
        num_answered: Rows of them that base and tuned model answer at most.
        smallest_difference: Smallest change that they show, 0 to 1; None if they show none.
        smallest_effect: `evaluation.smallest_effect`.
        rows_needed: Answered rows that show `smallest_effect`.
    """

    num_rows: int
    num_answered: int
    smallest_difference: float | None
    smallest_effect: float
    rows_needed: int

    @property
    def is_enough(self) -> bool:
        """Return whether the answered rows show `evaluation.smallest_effect`."""
        return self.num_answered >= self.rows_needed

    @property
    def words(self) -> str:
        """Return the figures in words, and what is missing."""
        if not self.num_answered:
            return f"{self.num_rows:,} validation rows, and none is answered: only losses are compared"
        shown = "too few to show any change of answers"
        if self.smallest_difference is not None:
            shown = f"they show a change of {100 * self.smallest_difference:.1f} points or more (80 % power)"
        words = f"{self.num_answered:,} of {self.num_rows:,} validation rows are answered: {shown}"
        if self.is_enough:
            return words
        missing = [f"{self.rows_needed:,} validation rows"] * (self.num_rows < self.rows_needed)
        missing += [f"evaluation.max_answered_rows={self.rows_needed}"] * (self.num_answered < self.num_rows)
        return f"{words}; {100 * self.smallest_effect:g} points need {' and '.join(missing)}"


def evaluation_power(settings: EvaluationSection, num_rows: int) -> EvaluationPower:
    """Return what the evaluation of a run can show, if the models differ on a quarter of the rows.

    Args:
        settings: Section of the recipe.
        num_rows: Validation rows.
    """
    answered = min(num_rows, num_answered(settings))
    return EvaluationPower(
        num_rows=num_rows,
        num_answered=answered,
        smallest_difference=smallest_difference(answered),
        smallest_effect=settings.smallest_effect,
        rows_needed=rows_for_shares(settings.smallest_effect),
    )


def power_of(recipe: Recipe, splits: Mapping[str, SplitCounts] | Mapping[str, SplitAudit]) -> EvaluationPower:
    """Return what the evaluation of a run can show with its splits."""
    validation = splits.get("validation")
    return evaluation_power(recipe.evaluation, 0 if validation is None else validation.num_rows)
