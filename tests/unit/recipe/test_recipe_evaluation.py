"""Mistakes in metrics and the gate are found as the recipe is loaded."""

import pytest

from packhorse.recipe.load import load_recipe


def test_known_metrics_and_conditions_load(good, tmp_path):
    (tmp_path / "mine.py").write_text("def score(row, answer):\n    return 1\n")
    recipe = load_recipe(
        good,
        (
            "evaluation.metrics=[exact_match, mine.py:score]",
            "evaluation.gate=[{metric: loss, max_drop: 0.1}, {metric: 'mine.py:score', min_gain: 0}]",
        ),
    )
    assert recipe.evaluation.metrics == ["exact_match", "mine.py:score"]
    assert recipe.evaluation.gate[1].min_gain == 0


@pytest.mark.parametrize(
    ("override", "fact", "fix"),
    [
        ("evaluation.metrics=[rouge]", "has `rouge`", "write rouge_l"),
        ("evaluation.metrics=[f1]", "has `f1`", "write token_f1"),
        ("evaluation.metrics=['mine.py:score']", "no file mine.py", "correct the path"),
        ("evaluation.metrics=['mine.py:a b']", "has `mine.py:a b`", "write metrics.py:score"),
        ("evaluation.gate=[{metric: exact, min_gain: 0}]", "is `exact`", "write exact_match"),
        ("evaluation.gate=[{metric: loss}]", "has neither of min_gain and max_drop", "max_drop: 0.02"),
        ("evaluation.gate=[{metric: loss, min_gain: 0, max_drop: 1}]", "has both of", "min_gain: 0 or"),
        ("evaluation.exact_match_rows=10", "exact_match_rows", "evaluation.max_answered_rows"),
    ],
)
def test_mistakes(good, mistakes_of, override, fact, fix):
    (mistake,) = mistakes_of(good, override)
    assert fact in mistake.fact
    assert fix in mistake.fix
    assert ".." not in mistake.fix
