"""What `check` and `plan` report about the evaluation that the validation rows allow."""

import numpy as np
import pytest
from scipy.stats import binomtest

from packhorse.evaluate.statistics.sample_size import smallest_difference
from packhorse.recipe.evaluation import EvaluationSection
from packhorse.workflows.evaluation_power import evaluation_power


def test_the_smallest_difference_is_found_in_80_percent_of_simulated_evaluations():
    generator = np.random.default_rng(0)
    difference = smallest_difference(200)
    assert difference == pytest.approx(0.102, abs=0.001)  # the table in docs/evaluate.md
    gained, lost = (0.25 + difference) / 2, (0.25 - difference) / 2
    found = 0
    for _ in range(1500):
        wins, losses, _ = generator.multinomial(200, (gained, lost, 1 - gained - lost))
        found += wins + losses >= 10 and binomtest(wins, wins + losses).pvalue < 0.05
    assert found / 1500 == pytest.approx(0.8, abs=0.035)
    assert smallest_difference(9) is None


@pytest.mark.parametrize(
    ("settings", "num_rows", "words"),
    [
        (
            {},
            100,
            "100 of 100 validation rows are answered: they show a change of 14.4 points or more (80 % power); "
            "3 points need 2,240 validation rows",
        ),
        (
            {},
            5000,
            "200 of 5,000 validation rows are answered: they show a change of 10.2 points or more (80 % power); "
            "3 points need evaluation.max_answered_rows=2240",
        ),
        (
            {},
            300,
            "200 of 300 validation rows are answered: they show a change of 10.2 points or more (80 % power); "
            "3 points need 2,240 validation rows and evaluation.max_answered_rows=2240",
        ),
        (
            {"smallest_effect": 0.2},
            300,
            "55 of 300 validation rows are answered: they show a change of 20.0 points or more (80 % power)",
        ),
        (
            {},
            4,
            "4 of 4 validation rows are answered: too few to show any change of answers; 3 points need 2,240 valid",
        ),
        ({"max_answered_rows": 0}, 40, "40 validation rows, and none is answered: only losses are compared"),
        ({}, 0, "0 validation rows, and none is answered: only losses are compared"),
    ],
    ids=["few rows", "few answers", "both", "enough", "none shown", "no answers", "no rows"],
)
def test_the_line_names_what_is_missing(settings, num_rows, words):
    assert evaluation_power(EvaluationSection(**settings), num_rows).words.startswith(words)
