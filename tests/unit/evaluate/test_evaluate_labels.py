"""Rows with labels: F1 with a paired test beside scipy, calibration beside scikit-learn and the model's own logits."""

import io

import numpy as np
import pytest
import torch
from evaluate_cases import chat_of
from rich.console import Console
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score
from transformers import LlamaForCausalLM

from packhorse.evaluate.compare import compare
from packhorse.evaluate.held_out import read_sets
from packhorse.evaluate.metrics.labels import f1_sums, macro_f1
from packhorse.evaluate.models import Subject
from packhorse.evaluate.results import Comparison
from packhorse.evaluate.show import render
from packhorse.evaluate.statistics.calibration import calibration_bins, calibration_error, calibration_sums
from packhorse.evaluate.statistics.paired import Pairs, paired_test
from packhorse.evaluate.statistics.whole_set import compare_figures
from packhorse.recipe.evaluation import EvaluationSection

LABELS = 4


def answers(num_rows, right_shares, seed=0):
    """Expected labels, and those of two models that are right in these shares of rows."""
    generator = np.random.default_rng(seed)
    expected = generator.choice(LABELS, num_rows, p=(0.5, 0.3, 0.1, 0.1))
    models = []
    for share in right_shares:
        wrong = generator.integers(0, LABELS + 1, num_rows)
        models.append(np.where(generator.random(num_rows) < share, expected, wrong))
    return expected, *models


def macro_f1_compared(expected, base, tuned, clusters):
    sums = [f1_sums(expected, model, LABELS) for model in (base, tuned)]
    return compare_figures(*sums, clusters, int((base != tuned).sum()), [macro_f1])[0]


def test_macro_f1_has_the_interval_and_the_p_of_scipy():
    expected, base, tuned = answers(150, (0.5, 0.65))
    found = macro_f1_compared(expected, base, tuned, range(150))

    def difference(expected, base, tuned):
        """Macro F1 by its definition; scikit-learn's takes 2 ms."""
        of = []
        for model in (base, tuned):
            hits = [((model == label) & (expected == label)).sum() for label in range(LABELS)]
            sizes = [(model == label).sum() + (expected == label).sum() for label in range(LABELS)]
            of.append(np.mean([2 * hit / size for hit, size in zip(hits, sizes)]))
        return of[1] - of[0]

    scores = [f1_score(expected, model, labels=range(LABELS), average="macro") for model in (base, tuned)]
    assert found.difference == pytest.approx(scores[1] - scores[0])
    assert found.difference == pytest.approx(difference(expected, base, tuned))
    data = {"data": (expected, base, tuned), "statistic": difference, "paired": True, "vectorized": False}
    interval = stats.bootstrap(**data, n_resamples=800, method="BCa", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.02)
    exchanged = stats.permutation_test(
        (base, tuned),
        lambda base, tuned: difference(expected, base, tuned),
        permutation_type="samples",
        vectorized=False,
        n_resamples=800,
        rng=1,
    )
    assert found.p == pytest.approx(exchanged.pvalue, abs=0.02)


def test_a_mean_over_rows_has_the_p_of_the_tests_by_row():
    """Accuracy as a figure of the set is a mean of one value per row, for which the other tests hold."""
    _, base, tuned = ((model == 0).astype(float) for model in answers(300, (0.4, 0.5), seed=1))
    clusters = np.repeat(np.arange(100), 3)
    by_row = paired_test(Pairs.of(base, tuned, clusters=clusters), "graded")
    sums = [np.stack([model, np.ones(300)], 1) for model in (base, tuned)]
    (found,) = compare_figures(*sums, clusters, 1, [lambda total: total[..., 0] / total[..., 1]])
    assert (found.num_clusters, found.test) == (100, "exchange of answers of clusters")
    assert found.p == pytest.approx(by_row.p, abs=0.02)
    assert (found.low, found.high) == pytest.approx((by_row.low, by_row.high), abs=0.005)
    assert found.standard_error == pytest.approx(by_row.standard_error, rel=0.05)


def test_equal_models_are_rarely_called_different():
    wrong = sum(macro_f1_compared(*answers(60, (0.6, 0.6), seed), range(60)).p < 0.05 for seed in range(1000, 1100))
    assert wrong <= 11  # 5 expected; more than 11 in 1 of 200 such tests


def test_the_calibration_error_is_that_of_scikit_learn_and_of_a_count_by_hand():
    generator = np.random.default_rng(3)
    confidence = np.concatenate([generator.random(500), [0.1, 1.0, 0.0]])
    right = (generator.random(503) < confidence**2).astype(float)
    share, mean = calibration_curve(right, confidence, n_bins=10, strategy="uniform")
    bins = [each for each in calibration_bins(confidence, right) if each.num_rows]
    assert [each.accuracy for each in bins] == pytest.approx(share)
    assert [each.confidence for each in bins] == pytest.approx(mean)
    weights = np.array([each.num_rows for each in bins]) / 503
    error = calibration_error(calibration_sums(confidence, right).sum(0))
    assert error == pytest.approx(weights @ np.abs(share - mean))
    # By hand: four answers given with 80 %, half of them right: 0.3; two with 60 %, both right: 0.4.
    sums = calibration_sums(np.array([0.8] * 4 + [0.6] * 2), np.array([1.0, 1, 0, 0, 1, 1])).sum(0)
    assert calibration_error(sums) == pytest.approx((4 * 0.3 + 2 * 0.4) / 6)


@pytest.fixture
def label_rows():
    words = [f"{first} {second}" for first in ("red", "blue", "old") for second in "abcdefgh"]
    texts = ("Yes, it is.", "no", "perhaps")
    return [
        {"messages": chat_of(word, texts[at % 3]), "fields": {"language": "en"}, "where": f"f:{at}"}
        for at, word in enumerate(words)
    ]


def test_label_rows_get_f1_and_calibration(tmp_path, tiny, tokenizer, write_data, request_of, form, label_rows):
    data = write_data(validation=label_rows)
    tiny.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        tiny.lm_head.weight.mul_(8)  # the same likeliest tokens, with too much certainty
    tiny.save_pretrained(tmp_path / "model")
    subject = Subject(request_of(tmp_path / "base"), tmp_path / "model", len(tokenizer))
    settings = EvaluationSection(max_new_tokens=6)
    comparison = compare(subject, tokenizer, read_sets(data, settings, form), settings).comparison
    (line,) = comparison.lines
    names = [result.metric for result in line.metrics]
    assert names == [
        *("loss", "exact_match", "normalised_match", "stopped"),
        *("macro_f1", "weighted_f1", "ece"),
    ]
    assert line.result("macro_f1").tuned == line.tuned_labels.macro_f1
    assert line.result("ece").base == pytest.approx(line.base_labels.calibration.error)
    assert line.result("ece").verdict == "worse"
    # The probability of each label from the model's own logits, behind the prompt and up to the stop token.
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    confidence, right = [], []
    for row in label_rows:
        scores = {}
        for text in ("Yes, it is.", "no", "perhaps"):
            encoded = tokenizer.apply_chat_template(
                [row["messages"][0], {"role": "assistant", "content": text}],
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            ids, mask = torch.tensor([encoded["input_ids"]]), encoded["assistant_masks"]
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(-1)
            scores[text] = sum(float(logs[at - 1, ids[0, at]]) for at, inside in enumerate(mask) if inside)
        best = max(scores, key=scores.get)
        confidence.append(np.exp(scores[best]) / sum(np.exp(score) for score in scores.values()))
        right.append(float(best == row["messages"][1]["content"]))
    found = line.base_labels.calibration
    assert sum(each.num_rows for each in found.bins) == 24
    assert found.accuracy == np.mean(right)
    by_hand = calibration_error(calibration_sums(np.array(confidence), np.array(right)).sum(0))
    assert found.error == pytest.approx(by_hand, abs=1e-4)
    assert Comparison.model_validate_json(comparison.model_dump_json()) == comparison
    out = io.StringIO()
    Console(file=out, width=80).print(render(comparison))
    assert "ece %" in out.getvalue()
    # Metrics that are named get no calibration, whose cost is a pass for each label.
    named = compare(subject, tokenizer, read_sets(data, settings, form), EvaluationSection(metrics=["exact_match"]))
    assert named.comparison.lines[0].base_labels.calibration is None
