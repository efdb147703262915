"""Compare two models by a figure of a whole set, such as macro F1, which is no mean of one value per row.

The figure is a function of sums over rows, so a resample or an exchange of answers needs only the sums of each cluster.

Shapes: C clusters, S sums, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from packhorse.evaluate.statistics.paired import (
    NUM_FLIPS,
    NUM_RESAMPLES,
    SEED,
    Float,
    Int,
    PairedResult,
    bca_ends,
    blocks,
)

EXCHANGE = "exchange of answers"
Figure = Callable[[Float], Float]
"""Function of sums float64 [..., S] that returns the figure of each, float64 [...]."""


def compare_figures(
    base: Float, tuned: Float, clusters: Sequence[int] | Int, num_differing: int, figures: Sequence[Figure]
) -> list[PairedResult]:
    """Return difference, 95 % interval and p of tuned − base for each figure.

    The interval is a paired BCa bootstrap of clusters. p is that of a permutation test: if the models were equal, the
    answers of both to the rows of a cluster could be exchanged.

    Args:
        base: float64 [N, S], what each row adds to the sums of the base.
        tuned: float64 [N, S], likewise.
        clusters: Cluster of each row; rows of one cluster are resampled and exchanged together.
        num_differing: Rows on which the models differ.
        figures: Figures of the set, from its sums.
    """
    num_rows = len(base)
    _, index = np.unique(np.asarray(clusters, np.int64), return_inverse=True)
    count = int(index.max()) + 1
    of_base, of_tuned = (_by_cluster(index, values, count) for values in (base, tuned))
    total_base, total_tuned = of_base.sum(0), of_tuned.sum(0)
    drawn = _resampled(of_base, of_tuned, figures)
    p_values = _exchange(of_base, of_tuned, figures)
    results = []
    for figure, of_figure, p in zip(figures, drawn, p_values, strict=True):
        observed = float(_difference(total_base, total_tuned, figure))
        low = high = np.nan
        if count > 1:
            left_out = _difference(total_base - of_base, total_tuned - of_tuned, figure)
            low, high = bca_ends(of_figure, observed, left_out)
        results.append(
            PairedResult(
                test=f"{EXCHANGE}{' of clusters' if count < num_rows else ''}",
                num_pairs=num_rows,
                num_unscored=0,
                num_differing=num_differing,
                num_clusters=count,
                base=float(figure(total_base)),
                tuned=float(figure(total_tuned)),
                low=low,
                high=high,
                standard_error=float(of_figure.std(ddof=1)),
                p=p,
            )
        )
    return results


def _by_cluster(index: Int, values: Float, count: int) -> Float:
    """Return float64 [C, S]."""
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, index, values)
    return sums


def _difference(base: Float, tuned: Float, figure: Figure) -> Float:
    return figure(tuned) - figure(base)


def _resampled(base: Float, tuned: Float, figures: Sequence[Figure]) -> list[Float]:
    """Return the difference of each resample of clusters, float64 [R], for each figure."""
    generator, count, num_sums = np.random.default_rng(SEED), len(base), base.shape[1]
    both = np.concatenate([base, tuned], 1).astype(np.float32)
    drawn: list[list[Float]] = [[] for _ in figures]
    for size in blocks(NUM_RESAMPLES):
        chosen = generator.integers(0, count, (size, count)) + np.arange(size)[:, None] * count
        times = np.bincount(chosen.ravel(), minlength=size * count).reshape(size, count).astype(np.float32)
        sums = (times @ both).astype(np.float64)
        for found, figure in zip(drawn, figures, strict=True):
            found.append(_difference(sums[:, :num_sums], sums[:, num_sums:], figure))
    return [np.concatenate(found) for found in drawn]


def _exchange(base: Float, tuned: Float, figures: Sequence[Figure]) -> list[float]:
    """Return the two-sided p of exchanging the answers of both models in a random half of the clusters."""
    changes = tuned - base
    moved = changes[(changes != 0).any(1)].astype(np.float32)
    if not len(moved):
        return [1.0 for _ in figures]
    total_base, total_tuned = base.sum(0), tuned.sum(0)
    # float32 sums in another order differ in the last bits, and must count as equal.
    limits = [abs(float(_difference(total_base, total_tuned, figure))) * (1 - 1e-5) for figure in figures]
    num_extreme = [0 for _ in figures]
    generator = np.random.default_rng(SEED)
    for size in blocks(NUM_FLIPS):
        packed = generator.integers(0, 256, (size, -(-len(moved) // 8)), np.uint8)
        exchanged = np.unpackbits(packed, axis=1, count=len(moved)).astype(np.float32) @ moved
        for at, figure in enumerate(figures):
            found = _difference(total_base + exchanged, total_tuned - exchanged, figure)
            num_extreme[at] += int((np.abs(found) >= limits[at]).sum())
    return [(1 + extreme) / (1 + NUM_FLIPS) for extreme in num_extreme]
