"""From values by row to verdicts: which rows are compared, the test of each metric, Holm over a table, the gate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.evaluate.metrics.metric import Metric
from packhorse.evaluate.metrics.text import signature
from packhorse.evaluate.results import ComparisonLine, GateResult, MetricResult, Verdict, shown_change
from packhorse.evaluate.statistics.paired import PairedResult, Pairs, holm, paired_test
from packhorse.evaluate.statistics.sample_size import ALPHA, MIN_PAIRS, rows_needed
from packhorse.recipe.evaluation import EvaluationSection, GateCriterion

FORGETTING_METRICS: Final = ("loss", "exact_match")


@dataclass(frozen=True, eq=False)
class MetricValues:
    """Values of one metric on one set.

    Attributes:
        metric: The metric.
        documents: int64 [N], index of each row's document in the set.
        base: float64 [N]; NaN: no value.
        tuned: float64 [N].
        weights: float64 [N], weight in the mean.
    """

    metric: Metric
    documents: NDArray[np.int64]
    base: NDArray[np.float64]
    tuned: NDArray[np.float64]
    weights: NDArray[np.float64]

    def tested(self, clusters: Sequence[int], documents: NDArray[np.bool_]) -> PairedResult:
        """Return the paired test on some documents.

        Args:
            clusters: Cluster of each document of the set.
            documents: bool by document of the set: whether it is compared.
        """
        keep = documents[self.documents]
        chosen = np.asarray(clusters, np.int64)[self.documents[keep]]
        return paired_test(Pairs(self.base[keep], self.tuned[keep], self.weights[keep], chosen), self.metric.kind)


def metric_result(values: MetricValues, tested: PairedResult, smallest_effect: float) -> MetricResult:
    """Return the result of a metric by row before the adjustment for the number of lines; see `adjusted`."""
    return result_of(values.metric, tested, smallest_effect)


def result_of(metric: Metric, tested: PairedResult, smallest_effect: float) -> MetricResult:
    """Return the result of a metric before the adjustment for the number of lines; see `adjusted`."""
    effect = 100 * smallest_effect if metric.unit == "points" else smallest_effect
    return MetricResult(
        metric=metric.name,
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        test=tested.test,
        num_pairs=tested.num_pairs,
        num_unscored=tested.num_unscored,
        num_differing=tested.num_differing,
        num_clusters=tested.num_clusters,
        base=_known(tested.base),
        tuned=_known(tested.tuned),
        low=_known(tested.low),
        high=_known(tested.high),
        p=_known(tested.p),
        p_adjusted=None,
        verdict=_verdict(tested, metric, tested.p),
        rows_needed=None if metric.unit == "value" else rows_needed(tested, effect),
        signature=signature(metric.name),
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _verdict(tested: PairedResult, metric: Metric, p: float) -> Verdict:
    if metric.unit == "nats" and tested.num_unscored:
        return "not finite"
    # Pairs whose values are equal carry no information, and neither do further rows of a cluster.
    if min(tested.num_differing, tested.num_clusters) < MIN_PAIRS:
        return "too few"
    if not p < ALPHA:
        return "cannot tell"
    return "better" if (tested.difference > 0) == metric.higher_is_better else "worse"


def adjusted(lines: Sequence[ComparisonLine]) -> tuple[ComparisonLine, ...]:
    """Return the lines with p adjusted for their number (Holm), and verdicts by it.

    Whole sets are one family and groups another: a set's verdict does not depend on how finely it is divided.
    """
    whole = _adjusted([line for line in lines if line.group is None])
    groups = _adjusted([line for line in lines if line.group is not None])
    return tuple(next(whole) if line.group is None else next(groups) for line in lines)


def _adjusted(lines: Sequence[ComparisonLine]) -> Iterator[ComparisonLine]:
    results = iter(adjusted_results([result for line in lines for result in line.metrics]))
    for line in lines:
        yield line.model_copy(update={"metrics": tuple(next(results) for _ in line.metrics)})


def adjusted_results(results: Sequence[MetricResult]) -> list[MetricResult]:
    """Return the results of one family with p adjusted for their number (Holm), and verdicts by it."""
    found = []
    for result, p in zip(results, holm([_testable(result) for result in results]), strict=True):
        # Decided again from p: the results may have been adjusted before, for another number of them.
        verdict = _direction(result) if p < ALPHA else "cannot tell" if _is_tested(result) else result.verdict
        found.append(result.model_copy(update={"p_adjusted": _known(p), "verdict": verdict}))
    return found


def _testable(result: MetricResult) -> float:
    """Return p, or NaN for a line that gets no verdict and therefore does not count."""
    return result.p if result.p is not None and _is_tested(result) else math.nan


def _is_tested(result: MetricResult) -> bool:
    return result.verdict not in ("too few", "not finite")


def _direction(result: MetricResult) -> Verdict:
    return "better" if ((result.difference or 0.0) > 0) == result.higher_is_better else "worse"


def gate_results(lines: Sequence[ComparisonLine], settings: EvaluationSection) -> tuple[GateResult, ...]:
    """Return the outcome of each condition of `evaluation.gate`, and for retain rows that nothing was forgotten.

    A condition is met, or not met, only if the whole 95 % interval is on one side of its bound.
    """
    whole = {line.set: line for line in lines if line.group is None}
    criteria = [criterion for criterion in settings.gate if criterion.set in whole]
    given = {(criterion.set, criterion.metric) for criterion in criteria}
    kept = [
        GateCriterion(metric=metric, set="retain", role="advisory", max_drop=settings.smallest_effect)
        for metric in FORGETTING_METRICS
        if "retain" in whole and ("retain", metric) not in given and whole["retain"].result(metric)
    ]
    return tuple(_gate_result(criterion, whole[criterion.set]) for criterion in [*criteria, *kept])


def _gate_result(criterion: GateCriterion, line: ComparisonLine) -> GateResult:
    gain, drop = criterion.min_gain, criterion.max_drop
    bound = gain if gain is not None else -float(drop or 0)
    result = line.result(criterion.metric)
    head = GateResult(
        set=criterion.set, metric=criterion.metric, role=criterion.role, condition="", outcome="not measured", reason=""
    )
    if result is None or result.low is None or result.high is None:
        shown = f"gain above {gain:g}" if gain is not None else f"drop below {drop:g}"
        reason = (
            "the rows have no value of this metric." if result is None else "there are fewer than 2 independent rows."
        )
        return head.model_copy(update={"condition": shown, "reason": reason})
    low, high = (result.low, result.high) if result.higher_is_better else (-result.high, -result.low)
    outcome = "met" if low > bound else "not met" if high < bound else "cannot tell"
    low_shown, high_shown = shown_change(low, result.unit), shown_change(high, result.unit)
    amount = shown_change(abs(bound), result.unit).lstrip("+")
    return head.model_copy(
        update={
            "condition": f"gain above {amount}" if gain is not None else f"drop below {amount}",
            "outcome": outcome,
            "reason": f"gain {low_shown} to {high_shown} on {result.num_pairs} rows.",
        }
    )
