"""Verdicts and the gate: what is called better, worse or not known, and what ends with NO-GO."""

import numpy as np
import pytest

from packhorse.evaluate.metrics.metric import Metric
from packhorse.evaluate.metrics.text import EXACT
from packhorse.evaluate.results import Comparison, ComparisonLine, Score
from packhorse.evaluate.verdict import MetricValues, adjusted, gate_results, metric_result
from packhorse.recipe.evaluation import EvaluationSection, GateCriterion

LOSS = Metric("loss", "graded", "nats", lambda *_: 0.0, higher_is_better=False)
SCORE = Score(loss=1.0, num_supervised_tokens=1, num_exact=0, num_answered=1)


def line_of(*values, name="validation", group=None):
    def result(metric, base, tuned):
        base, tuned = np.asarray(base, float), np.asarray(tuned, float)
        documents = np.arange(len(base))
        held = MetricValues(metric, documents, base, tuned, np.ones(len(base)))
        return metric_result(held, held.tested(documents, np.ones(len(base), bool)), 0.03)

    results = tuple(result(*of_metric) for of_metric in values)
    return ComparisonLine(set=name, group=group, num_rows=9, base=SCORE, tuned=SCORE, metrics=results)


def exact(gained, lost, same):
    return EXACT, [0] * gained + [1] * lost + [1] * same, [1] * gained + [0] * lost + [1] * same


def verdicts(*lines):
    return [result.verdict for line in adjusted(lines) for result in line.metrics]


def test_the_readmes_old_change_was_no_change():
    # Units: 3 rows net of 40, shown as -7.5.
    (line,) = adjusted([line_of(exact(2, 5, 33))])
    (result,) = line.metrics
    assert 100 * result.difference == pytest.approx(-7.5)
    assert result.p > 0.25
    assert result.verdict == "too few"
    (line,) = adjusted([line_of(exact(6, 9, 25))])
    assert line.metrics[0].verdict == "cannot tell"
    assert line.metrics[0].rows_needed > 1000


def test_better_and_worse_follow_the_direction_of_the_metric():
    base = np.linspace(1, 2, 30)
    assert verdicts(line_of(exact(30, 2, 60), (LOSS, base, base - 0.1))) == ["better", "better"]
    assert verdicts(line_of(exact(2, 30, 60), (LOSS, base, base + 0.1))) == ["worse", "worse"]


def test_a_loss_that_is_not_finite_is_neither_better_nor_worse():
    base = np.linspace(1, 2, 30)
    assert verdicts(line_of((LOSS, base, np.where(base > 1.9, np.nan, base - 0.5)))) == ["not finite"]
    assert verdicts(line_of((LOSS, base[:9], base[:9] - 0.5))) == ["too few"]


def test_many_lines_need_more_evidence_and_groups_do_not_weaken_a_set():
    weak = line_of(exact(17, 5, 100))  # p = .017
    assert verdicts(weak) == ["better"]
    assert verdicts(weak, *[line_of(exact(10, 10, 9), name=f"set {n}") for n in range(3)])[0] == "cannot tell"
    assert verdicts(weak, *[line_of(exact(10, 10, 9), group=f"{n}") for n in range(30)])[0] == "better"


def gate(settings, *lines):
    return Comparison(lines=lines, samples=(), gate=gate_results(lines, EvaluationSection(gate=settings)))


@pytest.mark.parametrize(
    ("change", "condition", "decision"),
    [
        ((40, 2, 60), {"min_gain": 0.1}, "GO"),
        ((12, 2, 400), {"min_gain": 0.1}, "NO-GO"),
        ((30, 15, 100), {"min_gain": 0.1}, "INCONCLUSIVE"),
        ((10, 11, 900), {"max_drop": 0.03}, "GO"),
        ((2, 60, 400), {"max_drop": 0.03}, "NO-GO"),
        ((10, 11, 60), {"max_drop": 0.03}, "INCONCLUSIVE"),
    ],
)
def test_the_gate_decides_by_the_interval(change, condition, decision):
    found = gate([GateCriterion(metric="exact_match", **condition)], line_of(exact(*change)))
    assert found.decision == decision
    assert (
        gate([GateCriterion(metric="exact_match", role="advisory", **condition)], line_of(exact(*change))).decision
        is None
    )


def test_a_loss_gains_when_it_falls():
    base = np.linspace(1, 2, 50)
    line = line_of((LOSS, base, base - 0.2 + np.resize([0.01, -0.01], 50)))
    found = gate([GateCriterion(metric="loss", min_gain=0.1)], line)
    assert found.decision == "GO"
    assert "+0.19" in found.gate[0].reason
    assert gate([GateCriterion(metric="loss", min_gain=0.3)], line).decision == "NO-GO"


def test_a_condition_that_was_not_measured_is_no_go_ahead():
    found = gate([GateCriterion(metric="rouge_l", min_gain=0.0)], line_of(exact(40, 2, 60)))
    assert (found.gate[0].outcome, found.decision) == ("not measured", "INCONCLUSIVE")


def test_retain_rows_are_always_tested_for_forgetting():
    found = gate([], line_of(exact(2, 60, 400), name="retain"))
    assert [(result.role, result.outcome, result.condition) for result in found.gate] == [
        ("advisory", "not met", "drop below 3.0")
    ]
    assert found.decision is None


def test_a_metric_more_or_less_changes_what_the_others_have_to_show():
    # Exact p of 10 to 2 discordant rows: 0.039; twice that is above 5 %.
    pair = adjusted([line_of(exact(10, 2, 20), exact(2, 10, 20))])
    assert verdicts(*pair) == ["cannot tell", "cannot tell"]
    for alone, verdict in zip(pair[0].metrics, ("better", "worse"), strict=True):
        assert verdicts(pair[0].model_copy(update={"metrics": (alone,)})) == [verdict]
