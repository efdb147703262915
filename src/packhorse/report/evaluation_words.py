"""An evaluation in words: one sentence for its headline metric, what it rests on, and figures with their units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from packhorse.evaluate.results import Comparison, ComparisonLine, MetricResult, shown_change, shown_value

MINUS: Final = "\u2212"
RATHER: Final = {"better": "The tuned model is better than its base", "worse": "The tuned model is worse than its base"}


@dataclass(frozen=True)
class Headline:
    """Verdict on a run.

    Attributes:
        kind: `better`, `worse`, `unclear` or `none`; chooses the colour, which the sentence never depends on.
        sentence: One sentence.
        basis: What it rests on: set, rows, test; empty without an evaluation.
        gate: The gate's decision with the conditions that decided it; empty without a gate.
        command: What to type next; empty if nothing is missing.
    """

    kind: str
    sentence: str
    basis: str = ""
    gate: str = ""
    command: str = ""


def headline_line(comparison: Comparison) -> tuple[ComparisonLine, MetricResult] | None:
    """Return the set and the metric that the verdict is about: the first metric of answers, else the loss."""
    for line in comparison.lines:
        measured = [result for result in line.metrics if result.num_pairs or result.num_unscored]
        answered = [result for result in measured if result.unit != "nats" and result.num_pairs]
        if line.group is None and measured:
            return line, (answered or measured)[0]
    return None


def headline_of(comparison: Comparison) -> Headline | None:
    """Return the verdict of an evaluation; None if nothing was measured."""
    found = headline_line(comparison)
    if found is None:
        return None
    line, result = found
    family = sum(len(other.metrics) for other in comparison.lines if other.group is None)
    rows = f"{result.num_pairs:,} rows of {line.set}"
    if result.num_clusters < result.num_pairs:
        rows += f" ({result.num_clusters:,} independent)"
    p = "" if result.p_adjusted is None else f", p = {result.p_adjusted:.2g} adjusted for {family} metrics (Holm)"
    kind = result.verdict if result.verdict in RATHER else "unclear"
    kind = "worse" if comparison.decision == "NO-GO" else kind
    return Headline(kind, _sentence(result), f"It rests on {rows}: {result.test}{p}.", _gate(comparison))


def _sentence(result: MetricResult) -> str:
    if result.verdict == "not finite":
        return f"There is no verdict: the {result.metric} of a model is NaN or Inf on {result.num_unscored:,} rows."
    interval = interval_words(result)
    moved = (
        f"{result.metric} is {value_words(result.tuned, result.unit)}, against {value_words(result.base, result.unit)}"
    )
    if interval:
        moved += f": {change_words(result.difference, result.unit)} (95 % interval {interval})"
    if result.verdict in RATHER:
        return f"{RATHER[result.verdict]}: {moved}."
    if result.verdict == "too few":
        return f"There are too few rows for a verdict: {moved}."
    more = ""
    if result.rows_needed and result.rows_needed > result.num_pairs:
        more = f"; about {result.rows_needed:,} rows would show a change of evaluation.smallest_effect"
    return f"These rows show no difference between the tuned model and its base: {moved}{more}."


def _gate(comparison: Comparison) -> str:
    critical = [result for result in comparison.gate if result.role == "critical"]
    if comparison.decision is None:
        return ""
    wanted = {"GO": "met", "NO-GO": "not met"}.get(comparison.decision)
    decided = [each for each in critical if (each.outcome == wanted if wanted else each.outcome != "met")]
    named = "; ".join(f"{each.set} {each.metric}, {each.condition}: {each.outcome}" for each in decided)
    return f"{comparison.decision}: {named}."


def value_words(value: float | None, unit: str) -> str:
    """Return a figure with its unit: shares in percent, a loss in nats with three decimals; a dash for none."""
    return _signed(shown_value(value, unit)) + (" %" if unit == "%" and value is not None else "")


def change_words(value: float | None, unit: str, with_unit: bool = True) -> str:
    """Return a difference with its sign; of shares in percentage points."""
    if value is None:
        return "–"
    words = {"%": " points", "nats": " nats"}.get(unit, "") if with_unit else ""
    return _signed(shown_change(value, unit)) + words


def interval_words(result: MetricResult) -> str:
    """Return the ends of the 95 % interval; empty if it is not defined."""
    if result.low is None or result.high is None:
        return ""
    low, high = (change_words(end, result.unit, with_unit=False) for end in (result.low, result.high))
    return f"{low} to {high}"


def verdict_words(result: MetricResult) -> str:
    """Return the verdict with what would change it."""
    if result.verdict == "cannot tell" and result.rows_needed and result.rows_needed > result.num_pairs:
        return f"cannot tell (about {result.rows_needed:,} rows would)"
    if result.verdict == "too few" and result.num_pairs >= 10:
        return f"too few ({result.num_differing:,} differ)"
    return result.verdict


def _signed(number: str) -> str:
    return number.replace("-", MINUS)
