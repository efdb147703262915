"""Paired statistics beside statsmodels and scipy, and what their verdicts are worth on simulated models."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from packhorse.evaluate.statistics import paired
from packhorse.evaluate.statistics.paired import (
    Pairs,
    bca_interval,
    holm,
    mcnemar,
    newcombe_interval,
    paired_test,
    sign_flip,
)
from packhorse.evaluate.statistics.sample_size import rows_for_shares, rows_needed


def of_table(both, gained, lost, neither):
    """0/1 values of base and tuned with these counts."""
    base = np.repeat([1.0, 0.0, 1.0, 0.0], [both, gained, lost, neither])
    tuned = np.repeat([1.0, 1.0, 0.0, 0.0], [both, gained, lost, neither])
    return base, tuned


def test_mcnemar_is_that_of_statsmodels_on_1000_tables():
    generator = np.random.default_rng(0)
    for both, gained, lost, neither in generator.integers(0, 30, (1000, 4)):
        expected = statsmodels_mcnemar([[both, lost], [gained, neither]], exact=True).pvalue
        assert mcnemar(*of_table(both, gained, lost, neither)) == pytest.approx(expected, rel=1e-9)


def test_holm_is_that_of_statsmodels():
    generator = np.random.default_rng(1)
    for _ in range(5):
        p_values = generator.uniform(0, 0.2, generator.integers(1, 12))
        assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert holm([0.03, math.nan, 0.02]) == pytest.approx([0.04, math.nan, 0.04], nan_ok=True)


def test_the_interval_of_two_paired_shares_is_a_published_one():
    # Approval of a prime minister in two surveys of the same people: Agresti, Categorical Data Analysis, table 11.1
    # (.04 with the interval .02 to .06), here tuned - base.
    low, high = newcombe_interval(*of_table(794, 86, 150, 570))
    assert (low, high) == pytest.approx((-0.0587, -0.0213), abs=5e-4)
    # Without a difference, and with all of it.
    assert newcombe_interval(*of_table(50, 0, 0, 50)) == pytest.approx((0, 0), abs=0.04)
    low, high = newcombe_interval(*of_table(0, 100, 0, 0))
    assert 0.9 < low < high <= 1


def test_bootstrap_and_permutation_are_those_of_scipy():
    generator = np.random.default_rng(2)
    for size in (8, 40, 150):
        differences = generator.gamma(1.0, size=size) - 0.8
        wanted = stats.bootstrap(
            (differences,), np.mean, method="BCa", n_resamples=paired.NUM_RESAMPLES, rng=0
        ).confidence_interval
        assert bca_interval(differences, np.ones(size)) == pytest.approx((wanted.low, wanted.high), rel=0.05, abs=0.01)
        p = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=9999, rng=0).pvalue
        assert sign_flip(differences) == pytest.approx(p, abs=1e-12 if size == 8 else 0.02)


def rejections(draw, num_simulated, kind):
    generator = np.random.default_rng(3)
    return np.mean([paired_test(draw(generator), kind).p < 0.05 for _ in range(num_simulated)])


@pytest.fixture
def quick(monkeypatch):
    """Only p: 2,000 intervals take minutes."""
    monkeypatch.setattr(paired, "bca_interval", lambda sums, weights: (math.nan, math.nan))


def binary(generator, effect, size, discordance=0.3):
    draws = generator.uniform(size=size)
    tuned_only = draws < (discordance + effect) / 2
    base_only = (draws >= (discordance + effect) / 2) & (draws < discordance)
    both = generator.uniform(size=size) < 0.5
    agreed = ~(tuned_only | base_only) & both
    return Pairs.of((base_only | agreed).astype(float), (tuned_only | agreed).astype(float))


def graded(generator, effect, size):
    base = generator.uniform(size=size)
    return Pairs.of(base, base + effect + generator.normal(0, 0.2, size=size))


def clustered(generator, effect, size, num_clusters):
    """Rows whose change is mostly that of their cluster; sizes of clusters differ."""
    clusters = generator.integers(0, num_clusters, size)
    of_cluster = generator.normal(effect, 0.2, num_clusters)
    base = generator.uniform(size=size)
    return Pairs.of(base, base + of_cluster[clusters] + generator.normal(0, 0.1, size=size), clusters=clusters)


def test_equal_models_are_told_apart_in_at_most_5_percent(quick):
    assert rejections(lambda generator: binary(generator, 0, 200), 2000, "binary") <= 0.055
    assert rejections(lambda generator: graded(generator, 0, 60), 2000, "graded") <= 0.055


def test_near_copies_fool_a_test_that_takes_them_for_independent_rows(quick):
    def naive(generator):
        found = clustered(generator, 0, 300, 40)
        return Pairs.of(found.base, found.tuned)

    assert rejections(naive, 300, "graded") > 0.2
    assert rejections(lambda generator: clustered(generator, 0, 300, 40), 1000, "graded") <= 0.065


def test_the_promised_number_of_rows_has_the_promised_power(quick):
    size = rows_for_shares(0.1, 0.3)
    assert rejections(lambda generator: binary(generator, 0.1, size), 2000, "binary") == pytest.approx(0.8, abs=0.03)
    pilot = paired_test(graded(np.random.default_rng(8), 0.05, 5000), "graded")
    size = rows_needed(pilot, 0.05)
    assert rejections(lambda generator: graded(generator, 0.05, size), 2000, "graded") == pytest.approx(0.8, abs=0.03)


def test_the_table_of_the_documentation_is_this():
    page = (Path(__file__).parents[3] / "docs" / "evaluate.md").read_text()
    rows, points = (
        next(line for line in page.splitlines() if line.startswith(head)) for head in ("| rows | 1", "| smallest")
    )
    for count, effect in zip(rows.split("|")[2:-1], points.split("|")[2:-1], strict=True):
        assert rows_for_shares(float(effect) / 100) == pytest.approx(int(count.replace(",", "")), rel=0.03)


def test_the_weighted_mean_is_that_of_all_tokens():
    result = paired_test(Pairs.of([1.0, 3.0], [0.0, 3.0], weights=[3, 1]), "graded")
    assert (result.base, result.tuned, result.difference) == (1.5, 0.75, -0.75)


def test_missing_values_are_counted_and_not_zero():
    result = paired_test(Pairs.of([1, math.nan, 0, 1], [1, 1, math.nan, 0]), "binary")
    assert (result.num_pairs, result.num_unscored, result.num_differing, result.base) == (2, 2, 1, 1.0)
    empty = paired_test(Pairs.of([math.nan], [1.0]), "graded")
    assert empty.num_pairs == 0
    assert math.isnan(empty.p)
    assert math.isnan(empty.base)
