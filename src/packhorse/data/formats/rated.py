"""Answers with numbers: ranked lists become the pair of the best and the worst answer, ratings become verdicts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, names, shown
from packhorse.data.formats.content import one_of
from packhorse.data.formats.detect import NAMES_OF, RANK_KEYS, RATING_KEYS, SCORE_KEYS
from packhorse.data.formats.example import Example
from packhorse.data.formats.preference import from_kto, from_preference
from packhorse.data.read.row import Row

LOWER_IS_BETTER: Final = RANK_KEYS


def from_ranked(row: Row) -> Example:
    """Return the pair of the best and the worst of a row's `completions`, by its `scores`, `ratings` or `ranks`.

    One pair per row, so that a prompt with many answers weighs no more than others. The row keeps no other answer.
    """
    values = row.values
    answers_key = one_of(values, NAMES_OF["completions"]) or "completions"
    scores_key = one_of(values, SCORE_KEYS) or SCORE_KEYS[0]
    answers, scores = values.get(answers_key), values.get(scores_key)
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores) or len(scores) < 2:
        raise BadRowError(
            f"{answers_key} is {_size(answers)}, and {scores_key} is {_size(scores)}.",
            "each of two or more answers needs its number.",
            "write two lists of the same length.",
        )
    numbers = [_number(score, scores_key) for score in scores]
    low, high = numbers.index(min(numbers)), numbers.index(max(numbers))
    if numbers[low] == numbers[high]:
        raise BadRowError(
            f"all {scores_key} are {numbers[0]:g}.", "no answer is better than another.", "remove the row."
        )
    best, worst = (low, high) if scores_key in LOWER_IS_BETTER else (high, low)
    others = {key: value for key, value in values.items() if key not in (answers_key, scores_key)}
    pair = from_preference(Row(row.where, {**others, "chosen": answers[best], "rejected": answers[worst]}))
    return replace(pair, used=pair.used | {answers_key, scores_key})


def from_rated(row: Row, good_rating: float) -> Example:
    """Return the answer of a row with its verdict: whether its `rating` or `score` is at least `good_rating`."""
    values = row.values
    key = one_of(values, RATING_KEYS)
    if key is None:
        raise BadRowError(
            f"the row has no {' or '.join(RATING_KEYS)}; its keys are {names(values)}.",
            "it says how good the answer is.",
            "add it, or map it in the source's columns: {rating: …}.",
        )
    good = _number(values[key], key) >= good_rating
    others = {name: value for name, value in values.items() if name != key}
    judged = from_kto(Row(row.where, {**others, "label": good}))
    return replace(judged, used=judged.used | {key})


def _number(value: Any, key: str) -> float:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRowError(f"{key} has {shown(value)}.", "it is compared with other numbers.", "write a number.")
    return float(value)


def _size(value: object) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else shown(value)
