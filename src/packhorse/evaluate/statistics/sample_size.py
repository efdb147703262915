"""Number of rows that a difference needs."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from scipy.stats import binom, norm

from packhorse.evaluate.statistics.paired import PairedResult
from packhorse.recipe.evaluation import EvaluationSection

ALPHA: Final = 0.05
POWER: Final = 0.8
MIN_PAIRS: Final = 10
"""Fewer pairs, or fewer discordant pairs of 0/1 values, give no verdict."""
EXPECTED_DISCORDANCE: Final = 0.25
"""Share of rows on which two models differ, assumed before anything is measured."""
MAX_ROWS: Final = 10_000_000


def mcnemar_power(num_rows: int, effect: float, discordance: float) -> float:
    """Return the probability that exact McNemar finds a difference at the 5 % level.

    Args:
        num_rows: Rows answered by both models.
        effect: True difference of the two shares, 0 to `discordance`.
        discordance: Share of rows on which exactly one model is right.
    """
    spread = 8 * math.sqrt(num_rows * discordance * (1 - discordance)) + 1
    low = max(MIN_PAIRS, math.floor(num_rows * discordance - spread))
    discordant = np.arange(low, min(num_rows, math.ceil(num_rows * discordance + spread)) + 1)
    if not len(discordant):
        return 0.0
    critical = binom.ppf(ALPHA / 2, discordant, 0.5)
    critical -= binom.cdf(critical, discordant, 0.5) > ALPHA / 2
    share = (1 + effect / discordance) / 2
    rejected = binom.cdf(critical, discordant, share) + binom.sf(discordant - critical - 1, discordant, share)
    return float(binom.pmf(discordant, num_rows, discordance) @ rejected)


def rows_for_shares(effect: float, discordance: float = EXPECTED_DISCORDANCE) -> int:
    """Return the rows with which exact McNemar finds a difference of two shares with 80 % power.

    Args:
        effect: True difference of the two shares, above 0.
        discordance: Share of rows on which exactly one model is right; at least `effect`.
    """
    discordance = min(max(discordance, effect), 1.0)
    low, high = 1, 2
    while mcnemar_power(high, effect, discordance) < POWER:
        if high >= MAX_ROWS:
            return MAX_ROWS
        low, high = high, 2 * high
    while high - low > max(1, high // 500):
        middle = (low + high) // 2
        low, high = (low, middle) if mcnemar_power(middle, effect, discordance) >= POWER else (middle, high)
    return high


def smallest_difference(num_rows: int, discordance: float = EXPECTED_DISCORDANCE) -> float | None:
    """Return the smallest difference of two shares that exact McNemar finds with 80 % power.

    Args:
        num_rows: Rows answered by both models.
        discordance: Share of rows on which exactly one model is right; at least the difference.

    Returns:
        Difference, 0 to 1; None if these rows show none.
    """
    low, high = 0.0, 1.0
    if mcnemar_power(num_rows, high, high) < POWER:
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        is_found = mcnemar_power(num_rows, middle, max(discordance, middle)) >= POWER
        low, high = (low, middle) if is_found else (middle, high)
    return high


def num_answered(settings: EvaluationSection) -> int:
    """Return how many rows of a set are answered: those that the smallest effect needs, within the budget."""
    return min(settings.max_answered_rows, rows_for_shares(settings.smallest_effect))


def rows_needed(result: PairedResult, effect: float) -> int | None:
    """Return about how many rows would show a difference of `effect` with 80 % power, judged by the rows measured.

    Args:
        result: Result on the rows measured; their spread is taken as that of further rows.
        effect: Smallest difference that matters, in units of the metric.

    Returns:
        Number of rows; None if the rows measured say nothing about the spread.
    """
    if result.num_pairs < MIN_PAIRS or not result.standard_error > 0:
        return None
    if result.test.startswith("exact"):
        return rows_for_shares(effect, result.num_differing / result.num_pairs)
    z = float(norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER))
    return math.ceil(result.num_pairs * (z * result.standard_error / effect) ** 2) + 2
