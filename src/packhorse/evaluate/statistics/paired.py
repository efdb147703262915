"""Compare two models on the same rows: difference, interval and p. Pure functions over one value per row.

Shapes: N rows, C clusters, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Kind = Literal["binary", "graded"]

CONFIDENCE: Final = 0.95
NUM_RESAMPLES: Final = 4_999
NUM_FLIPS: Final = 9_999
MAX_EXACT_CLUSTERS: Final = 12
"""Up to 2^12 = 4,096 sign patterns are enumerated; above that they are drawn."""
BLOCK: Final = 500
SEED: Final = 0
MCNEMAR: Final = "exact McNemar"
SIGN_FLIP: Final = "sign-flip permutation"


@dataclass(frozen=True, eq=False)
class Pairs:
    """One value per row of base and tuned model.

    Attributes:
        base: float64 [N]; NaN: the row has no value.
        tuned: float64 [N], likewise.
        weights: float64 [N], weight of each row in the mean, e.g. its supervised tokens; all 1 for a mean over rows.
        clusters: int64 [N]; rows of one cluster are not independent, e.g. near copies of one question.
    """

    base: Float
    tuned: Float
    weights: Float
    clusters: Int

    @classmethod
    def of(
        cls,
        base: Sequence[float] | Float,
        tuned: Sequence[float] | Float,
        weights: Sequence[float] | Float | None = None,
        clusters: Sequence[int] | Int | None = None,
    ) -> Pairs:
        """Return pairs from sequences; weights default to 1 and each row is a cluster alone."""
        count = len(base)
        return cls(
            np.asarray(base, np.float64),
            np.asarray(tuned, np.float64),
            np.ones(count) if weights is None else np.asarray(weights, np.float64),
            np.arange(count) if clusters is None else np.asarray(clusters, np.int64),
        )

    def scored(self) -> Pairs:
        """Return the rows that have both values and a weight."""
        keep = np.isfinite(self.base) & np.isfinite(self.tuned) & (self.weights > 0)
        return Pairs(self.base[keep], self.tuned[keep], self.weights[keep], self.clusters[keep])


@dataclass(frozen=True)
class PairedResult:
    """Result of a paired test.

    Attributes:
        test: Name of the test, fixed by the kind of the metric and by whether rows are clustered.
        num_pairs: Rows with a value of both models.
        num_unscored: Rows without a value of one model or of both.
        num_differing: Pairs whose two values differ (discordant pairs).
        num_clusters: Independent clusters of rows.
        base: Weighted mean of the base; NaN without pairs.
        tuned: Weighted mean of the tuned model.
        low: Lower end of the 95 % interval of tuned − base; NaN if it is not defined.
        high: Upper end.
        standard_error: Of the difference, robust to clusters.
        p: Two-sided probability of a difference at least as large if the models were equal; NaN without pairs.
    """

    test: str
    num_pairs: int
    num_unscored: int
    num_differing: int
    num_clusters: int
    base: float
    tuned: float
    low: float
    high: float
    standard_error: float
    p: float

    @property
    def difference(self) -> float:
        """Return tuned − base."""
        return self.tuned - self.base


def paired_test(pairs: Pairs, kind: Kind) -> PairedResult:
    """Return difference, 95 % interval and p of tuned − base.

    The test depends on the kind alone: exact McNemar for 0/1 values with Newcombe's interval for paired proportions
    (Newcombe 1998, Statistics in Medicine 17:2635, method 10); sign-flip permutation with a BCa bootstrap interval
    (Efron 1987) for graded values. Where rows are clustered, both flip and resample whole clusters.

    Args:
        pairs: Values of both models.
        kind: `binary` for values 0 and 1.
    """
    scored = pairs.scored()
    count = len(scored.base)
    num_unscored = len(pairs.base) - count
    if not count:
        nan = math.nan
        return PairedResult(_test_name(kind, False), 0, num_unscored, 0, 0, nan, nan, nan, nan, nan, nan)
    sums, weights = _by_cluster(scored)
    is_clustered = len(sums) < count
    if kind == "binary" and not is_clustered:
        low, high = newcombe_interval(scored.base, scored.tuned)
        p = mcnemar(scored.base, scored.tuned)
    else:
        low, high = bca_interval(sums, weights)
        p = sign_flip(sums)
    total = scored.weights.sum()
    return PairedResult(
        test=_test_name(kind, is_clustered),
        num_pairs=count,
        num_unscored=num_unscored,
        num_differing=int((scored.base != scored.tuned).sum()),
        num_clusters=len(sums),
        base=float(scored.base @ scored.weights / total),
        tuned=float(scored.tuned @ scored.weights / total),
        low=low,
        high=high,
        standard_error=standard_error(sums, weights),
        p=p,
    )


def _test_name(kind: Kind, is_clustered: bool) -> str:
    if is_clustered:
        return f"{SIGN_FLIP} of clusters"
    return MCNEMAR if kind == "binary" else SIGN_FLIP


def _by_cluster(pairs: Pairs) -> tuple[Float, Float]:
    """Return the weighted sum of differences and the weight of each cluster, float64 [C]."""
    _, index = np.unique(pairs.clusters, return_inverse=True)
    differences = (pairs.tuned - pairs.base) * pairs.weights
    sums = np.bincount(index, differences).astype(np.float64)
    return sums, np.bincount(index, pairs.weights).astype(np.float64)


def mcnemar(base: Float, tuned: Float) -> float:
    """Return the exact two-sided p of McNemar's test: a binomial test of the discordant pairs.

    Args:
        base: 0 or 1 [N].
        tuned: 0 or 1 [N].
    """
    gained, lost = int((tuned > base).sum()), int((tuned < base).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def newcombe_interval(base: Float, tuned: Float) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two paired proportions (Newcombe 1998, method 10)."""
    count = len(base)
    both, gained = int((base * tuned).sum()), int((tuned > base).sum())
    lost = int((tuned < base).sum())
    neither = count - both - gained - lost
    p_tuned, p_base = (both + gained) / count, (both + lost) / count
    low_tuned, high_tuned = _wilson(p_tuned, count)
    low_base, high_base = _wilson(p_base, count)
    product = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    agreement: float = both * neither - gained * lost
    if agreement > 0:
        agreement = max(agreement - count / 2, 0.0)
    phi = agreement / math.sqrt(product) if product else 0.0

    def distance(first: float, second: float) -> float:
        return math.sqrt(max(first**2 - 2 * phi * first * second + second**2, 0.0))

    difference = p_tuned - p_base
    return (
        difference - distance(p_tuned - low_tuned, high_base - p_base),
        difference + distance(high_tuned - p_tuned, p_base - low_base),
    )


def _wilson(share: float, count: int) -> tuple[float, float]:
    z = float(norm.ppf((1 + CONFIDENCE) / 2))
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


def sign_flip(sums: Float) -> float:
    """Return the two-sided p of the sign-flip permutation test: under the null each cluster's sign is a coin toss.

    Args:
        sums: Sum of differences of each cluster, float64 [C].
    """
    moved = sums[sums != 0]
    if not len(moved):
        return 1.0
    # Equal sums that are added in another order differ in the last bits, and must count as equal.
    observed = abs(moved.sum()) * (1 - 1e-9)
    if len(moved) <= MAX_EXACT_CLUSTERS:
        patterns = (np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1
        return float((np.abs((2.0 * patterns - 1) @ moved) >= observed).mean())
    generator = np.random.default_rng(SEED)
    num_extreme = 0
    for size in blocks(NUM_FLIPS):
        packed = generator.integers(0, 256, (size, -(-len(moved) // 8)), np.uint8)
        signs = np.unpackbits(packed, axis=1, count=len(moved)).astype(np.float32)
        flipped = 2 * (signs @ moved.astype(np.float32)).astype(np.float64) - moved.sum()
        num_extreme += int((np.abs(flipped) >= observed).sum())
    return (1 + num_extreme) / (1 + NUM_FLIPS)


def bca_interval(sums: Float, weights: Float) -> tuple[float, float]:
    """Return the 95 % BCa bootstrap interval of the weighted mean difference, by resampling clusters.

    Args:
        sums: Weighted sum of differences of each cluster, float64 [C].
        weights: Weight of each cluster, float64 [C].

    Returns:
        Lower and upper end; NaN for fewer than two clusters.
    """
    count = len(sums)
    if count < 2:
        return math.nan, math.nan
    observed = sums.sum() / weights.sum()
    generator = np.random.default_rng(SEED)
    drawn = np.empty(NUM_RESAMPLES)
    at = 0
    for size in blocks(NUM_RESAMPLES):
        rows = generator.integers(0, count, (size, count))
        drawn[at : at + size] = sums[rows].sum(1) / weights[rows].sum(1)
        at += size
    left_out = (sums.sum() - sums) / (weights.sum() - weights)  # [C], jackknife
    return bca_ends(drawn, float(observed), left_out)


def bca_ends(drawn: Float, observed: float, left_out: Float) -> tuple[float, float]:
    """Return the ends of the 95 % BCa interval (Efron 1987).

    Args:
        drawn: Value of each resample, float64 [R].
        observed: Value of all clusters.
        left_out: Value without one cluster (jackknife), float64 [C].
    """
    below = ((drawn < observed).mean() + (drawn <= observed).mean()) / 2
    if not 0 < below < 1:  # every resample is on one side, or all are equal: nothing to correct
        return float(drawn.min()), float(drawn.max())
    shift = norm.ppf(below)
    deviations = left_out.mean() - left_out
    spread = float((deviations**2).sum())
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5) if spread else 0.0
    z = norm.ppf([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    levels = norm.cdf(shift + (shift + z) / (1 - acceleration * (shift + z)))
    low, high = np.quantile(drawn, levels)
    return float(low), float(high)


def blocks(count: int) -> list[int]:
    """Return the sizes of blocks of resamples, which bound memory."""
    whole, rest = divmod(count, BLOCK)
    return [BLOCK] * whole + [rest] * bool(rest)


def standard_error(sums: Float, weights: Float) -> float:
    """Return the cluster-robust standard error of the weighted mean difference; NaN for fewer than two clusters."""
    count = len(sums)
    if count < 2:
        return math.nan
    mean = sums.sum() / weights.sum()
    return float(math.sqrt(((sums - mean * weights) ** 2).sum() * count / (count - 1)) / weights.sum())


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation (n - 1 in the denominator) of two values or more."""
    return float(np.mean(values)), float(np.std(values, ddof=1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number, so that one wrong finding in all has a probability of at most 5 %.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65. NaN stays NaN and is not counted.
    """
    finite = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(finite):
        largest = max(largest, min(1.0, (len(finite) - rank) * p))
        adjusted[index] = largest
    return adjusted
