"""Changes of metrics as dot-and-whisker rows: one scale per unit, right of zero is better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from packhorse.evaluate.results import ComparisonLine, LabelResult, MetricResult
from packhorse.report.evaluation_words import change_words, interval_words, value_words, verdict_words

MOST_GROUPS: Final = 50
MARGIN: Final = 6
"""Percent of the plot's width that stays free on each side, so that no dot is cut."""


@dataclass(frozen=True)
class Effect:
    """One metric; `zero`, `at`, `low` and `high` are positions in percent of the width, None if there is no value."""

    name: str
    pairs: int
    base: str
    tuned: str
    change: str
    interval: str
    verdict: str
    kind: str
    zero: float
    at: float | None
    low: float | None
    high: float | None

    @property
    def label(self) -> str:
        """The row in words, for readers who do not see it."""
        return f"{self.name}: change {self.change}, 95 % interval {self.interval or 'not defined'}, {self.verdict}"


@dataclass(frozen=True)
class EffectTable:
    """Rows that share a table, and the heading of their first column."""

    first: str
    caption: str
    rows: tuple[Effect, ...]


@dataclass(frozen=True)
class SetView:
    """One evaluated set: its metrics, its groups, its confusion matrices."""

    title: str
    first: str
    caption: str
    rows: tuple[Effect, ...]
    groups: EffectTable
    num_groups_more: int
    labels: tuple[tuple[str, LabelResult], ...]


def set_views(lines: Sequence[ComparisonLine]) -> list[SetView]:
    """Return one view per evaluated set."""
    return [
        _view(line, [each for each in lines if each.set == line.set and each.group is not None])
        for line in lines
        if line.group is None
    ]


def _view(line: ComparisonLine, groups: Sequence[ComparisonLine]) -> SetView:
    measured = [result for result in line.metrics if result.num_pairs or result.num_unscored]
    # Of a group only the metric of answers, or the loss if none was answered.
    of_groups = [
        (str(group.group), results[-1])
        for group in groups
        if (results := [result for result in group.metrics if result.num_pairs or result.num_unscored])
    ]
    labels = (("base", line.base_labels), ("tuned model", line.tuned_labels))
    return SetView(
        title=f"{line.set}, {line.num_rows:,} rows",
        first="Metric",
        caption="Tests: " + ", ".join(sorted({result.test for result in measured})) + "; p adjusted (Holm).",
        rows=_effects((result.metric, result) for result in measured),
        groups=EffectTable("Group", "One metric per group.", _effects(of_groups[:MOST_GROUPS])),
        num_groups_more=max(0, len(of_groups) - MOST_GROUPS),
        labels=tuple((name, found) for name, found in labels if found is not None),
    )


def _effects(named: Iterable[tuple[str, MetricResult]]) -> tuple[Effect, ...]:
    given = list(named)
    reach: dict[str, tuple[float, float]] = {}
    for _, result in given:
        ends = [_gain(result, value) for value in (result.difference, result.low, result.high) if value is not None]
        low, high = reach.get(_scale(result), (0.0, 0.0))
        reach[_scale(result)] = (min([low, *ends]), max([high, *ends]))
    return tuple(_effect(name, result, *reach[_scale(result)]) for name, result in given)


def _scale(result: MetricResult) -> str:
    """Return what shares a scale: shares and points do; a value without a unit has a separate one."""
    return {"%": "points", "value": result.metric}.get(result.unit, result.unit)


def _gain(result: MetricResult, value: float) -> float:
    """Return a difference so that more is better, in points for shares."""
    return value * (1 if result.higher_is_better else -1) * (100 if result.unit == "%" else 1)


def _effect(name: str, result: MetricResult, low: float, high: float) -> Effect:
    def position(value: float | None) -> float | None:
        if value is None:
            return None
        return _position(_gain(result, value), low, high)

    ends = [end for end in (position(result.low), position(result.high)) if end is not None]
    return Effect(
        name=name,
        pairs=result.num_pairs,
        base=value_words(result.base, result.unit),
        tuned=value_words(result.tuned, result.unit),
        change=change_words(result.difference, result.unit),
        interval=interval_words(result),
        verdict=verdict_words(result),
        kind=result.verdict if result.verdict in ("better", "worse") else "unclear",
        zero=_position(0.0, low, high),
        at=position(result.difference),
        low=min(ends, default=None),
        high=max(ends, default=None),
    )


def _position(value: float, low: float, high: float) -> float:
    return MARGIN + (100 - 2 * MARGIN) * (value - low) / (high - low) if high > low else 50.0
