"""Result of an evaluation: what RUN/evaluation.json holds. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from packhorse.data.data_manifest import TestLook
from packhorse.evaluate.metrics.metric import Unit
from packhorse.evaluate.opinions import JudgeResult, PeopleResult, judge_notes, people_notes
from packhorse.evaluate.statistics.calibration import CalibrationBin
from packhorse.track.meter import perplexity

Verdict = Literal["better", "worse", "cannot tell", "too few", "not finite"]
"""`too few`: fewer than 10 clusters, or than 10 rows that differ; `not finite`: a model's loss is NaN or Inf."""
Decision = Literal["GO", "NO-GO", "INCONCLUSIVE"]


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


class MetricResult(_Frozen):
    """Base and tuned model by one metric on the same rows."""

    metric: str
    """Name of the metric."""
    unit: Unit
    """`%`: values from 0 to 1; `points`: 0 to 100; `nats`: a loss; `value`: any other number."""
    higher_is_better: bool
    """False for a loss."""
    test: str
    """Statistical test, fixed by the kind of the metric."""
    num_pairs: int
    """Rows that have a value of both models."""
    num_unscored: int
    """Rows without a value: the metric does not apply to them, or failed."""
    num_differing: int
    """Pairs whose two values differ."""
    num_clusters: int
    """Independent clusters among the pairs; near copies of a row are in its cluster."""
    base: float | None
    """Mean of the base; None without pairs."""
    tuned: float | None
    """Mean of the tuned model; None without pairs."""
    low: float | None
    """Lower end of the 95 % interval of tuned - base; None for fewer than 2 clusters."""
    high: float | None
    """Upper end of the 95 % interval of tuned - base."""
    p: float | None
    """Two-sided p of the test; None without pairs."""
    p_adjusted: float | None
    """p adjusted for the number of lines of the table (Holm); None for a line without a verdict."""
    verdict: Verdict
    """Whether the tuned model is better."""
    rows_needed: int | None
    """About how many rows would show a difference of `evaluation.smallest_effect`; None if not known."""
    signature: str | None = None
    """sacrebleu's signature of the metric."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def difference(self) -> float | None:
        """Return tuned - base; None without pairs."""
        return None if self.tuned is None or self.base is None else self.tuned - self.base


class CalibrationResult(_Frozen):
    """How well the probabilities of one model's labels agree with how often they are right."""

    error: float
    """Expected calibration error, 0 to 1: |accuracy - probability| of the bins, weighted by their rows."""
    accuracy: float
    """Share of rows whose likeliest label is right."""
    bins: tuple[CalibrationBin, ...]
    """Ten bins of equal width by the probability of the likeliest label, normalised over all labels."""


class LabelResult(_Frozen):
    """Answers of one model to rows whose answers are labels."""

    labels: tuple[str, ...]
    """Labels, the most frequent first."""
    confusion: tuple[tuple[int, ...], ...]
    """Rows by expected label (line) and answered label (column); the last column counts answers that are no label."""
    accuracy: float
    macro_f1: float
    """Mean of the F1 of each label."""
    weighted_f1: float
    """Mean of the F1 of each label, weighted by its rows."""
    macro_precision: float
    macro_recall: float
    calibration: CalibrationResult | None = None
    """From the probabilities of all labels; None if they were not measured."""


class ComparisonLine(_Frozen):
    """Results of base and tuned model on the same rows."""

    set: str
    group: str | None
    """Value of `evaluation.group_by`; None for the whole set."""
    num_rows: int
    base: Score
    tuned: Score
    metrics: tuple[MetricResult, ...] = ()
    """Metrics by row with their statistics; of a group only the loss and the first metric of answers."""
    base_labels: LabelResult | None = None
    """Classification by the base, if the answers are labels."""
    tuned_labels: LabelResult | None = None
    """Classification by the tuned model."""

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

    def result(self, metric: str) -> MetricResult | None:
        """Return the result of a metric; None if the rows have none."""
        return next((result for result in self.metrics if result.metric == metric), None)


class Sample(_Frozen):
    """One row and the answers of both models."""

    set: str
    group: str
    prompt: str
    """Last turn before the answer."""
    expected: str
    base: str
    tuned: str


class GateResult(_Frozen):
    """One condition of the gate and whether the tuned model meets it."""

    set: str
    metric: str
    role: Literal["critical", "advisory"]
    condition: str
    """The condition in words, with its bound."""
    outcome: Literal["met", "not met", "cannot tell", "not measured"]
    reason: str
    """The interval and the bound that it is compared with."""


class MetricFailure(_Frozen):
    """Rows on which a metric of the user raised an error; they have no value."""

    set: str
    metric: str
    num_rows: int
    first_row: str
    """Prompt of the first of them."""
    error: str


class Comparison(_Frozen):
    """Comparison of base and tuned model."""

    lines: tuple[ComparisonLine, ...]
    samples: tuple[Sample, ...]
    reference: str = "base"
    """Model that the fields `base` are about: the base, or the run or folder of `--against`."""
    notes: tuple[str, ...] = ()
    """What was not measured, and why."""
    smallest_effect: float = 0.03
    """Smallest difference that matters, from the recipe."""
    gate: tuple[GateResult, ...] = ()
    """Conditions of `evaluation.gate`; for retain rows also that nothing was forgotten."""
    failures: tuple[MetricFailure, ...] = ()
    judge: JudgeResult | None = None
    """What a judge said about the answers, after `packhorse evaluate RUN --judge`."""
    people: tuple[PeopleResult, ...] = ()
    """Ratings by `packhorse rate RUN`."""
    test_looks: tuple[TestLook, ...] = ()
    """All openings of the sealed test rows so far, by any run on the same data."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def decision(self) -> Decision | None:
        """Return the verdict of the gate: NO-GO if a critical condition is not met; None without critical ones."""
        outcomes = [result.outcome for result in self.gate if result.role == "critical"]
        if not outcomes:
            return None
        if "not met" in outcomes:
            return "NO-GO"
        return "GO" if set(outcomes) == {"met"} else "INCONCLUSIVE"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def num_test_looks(self) -> int:
        """Return how often the test rows were opened."""
        return len(self.test_looks)


def opinion_notes(comparison: Comparison) -> list[str]:
    """Return what a reader of the figures of the judge and of people must know, in sentences."""
    judge = judge_notes(comparison.judge) if comparison.judge is not None else ()
    return [*judge, *(note for people in comparison.people for note in people_notes(people))]


def shown_value(value: float | None, unit: str) -> str:
    """Return a figure without its unit; a dash for none."""
    if value is None:
        return "–"
    if unit == "%":
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if unit == "nats" else f"{value:.2f}"


def shown_change(value: float, unit: str) -> str:
    """Return a difference with its sign and without its unit; of shares in percentage points."""
    if unit == "%":
        return f"{100 * value:+.1f}"
    return f"{value:+.3f}" if unit == "nats" else f"{value:+.2f}"
