"""Rows whose answers are a few labels: F1 and calibration of base and tuned model, with paired tests.

Shapes: N rows, K labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from transformers import PreTrainedTokenizerBase

from packhorse.evaluate.generate import answer_ids, prompt_ids
from packhorse.evaluate.held_out import Question
from packhorse.evaluate.metrics.choose import kinds_of
from packhorse.evaluate.metrics.labels import (
    answered_labels,
    classification,
    confusion_matrix,
    f1_sums,
    labels_of,
    macro_f1,
    weighted_f1,
)
from packhorse.evaluate.metrics.metric import Expected, Metric, Reply
from packhorse.evaluate.metrics.text import normalised
from packhorse.evaluate.results import CalibrationResult, LabelResult, MetricResult
from packhorse.evaluate.score import Loss
from packhorse.evaluate.statistics.calibration import calibration_bins, calibration_error, calibration_sums
from packhorse.evaluate.statistics.paired import Float, Int
from packhorse.evaluate.statistics.whole_set import compare_figures
from packhorse.evaluate.verdict import result_of


def _figure(name: str, higher_is_better: bool = True) -> Metric:
    return Metric(name, "graded", "%", lambda *_: math.nan, higher_is_better)


MACRO_F1: Final = _figure("macro_f1")
WEIGHTED_F1: Final = _figure("weighted_f1")
ECE: Final = _figure("ece", higher_is_better=False)
"""Expected calibration error."""


@dataclass(frozen=True)
class LabelRows:
    """Rows of one set whose answers are labels.

    Attributes:
        labels: Labels without case and punctuation, the most frequent first.
        written: The labels as most rows write them.
        expected: Index of the label of each row, int64 [N].
    """

    labels: tuple[str, ...]
    written: tuple[str, ...]
    expected: Int


@dataclass(frozen=True)
class LabelDocuments:
    """Each prompt with each label as its answer, as documents to score: N × K, the labels of one row together."""

    prompts: Sequence[list[int]]
    answers: Sequence[list[int]]

    @property
    def num_documents(self) -> int:
        """Return N × K."""
        return len(self.prompts) * len(self.answers)

    def document(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return ids [length] and supervised [length], 1 for a token of the label or its stop token."""
        prompt, answer = self.prompts[index // len(self.answers)], self.answers[index % len(self.answers)]
        return np.array([*prompt, *answer]), np.array([0] * len(prompt) + [1] * len(answer))


def label_rows(expected: Sequence[Expected]) -> LabelRows | None:
    """Return the labels of a set; None if its answers are no labels."""
    texts = [answer.text for answer in expected]
    labels = labels_of(texts) if expected and kinds_of(expected) == ["label"] else None
    if labels is None:
        return None
    forms: dict[str, Counter[str]] = {label: Counter() for label in labels}
    for text in texts:
        forms[normalised(text)][text] += 1
    written = tuple(forms[label].most_common(1)[0][0] for label in labels)
    column = {label: index for index, label in enumerate(labels)}
    return LabelRows(labels, written, np.array([column[normalised(text)] for text in texts], np.int64))


def label_documents(
    tokenizer: PreTrainedTokenizerBase, rows: LabelRows, questions: Sequence[Question]
) -> LabelDocuments | None:
    """Return what has to be scored for calibration; None if the chat template writes no answer behind a prompt."""
    first = questions[0]
    answers = [
        answer_ids(tokenizer, first.prompt, {"role": "assistant", "content": text}, first.tools)
        for text in rows.written
    ]
    known = [answer for answer in answers if answer]
    if len(known) < len(answers):
        return None
    return LabelDocuments([prompt_ids(tokenizer, each.prompt, each.tools) for each in questions], known)


def label_result(rows: LabelRows, replies: Sequence[Reply], losses: Sequence[Loss] | None) -> LabelResult:
    """Return the classification by one model, and its calibration if its labels were scored."""
    matrix = confusion_matrix(rows.labels, rows.expected, replies)
    return LabelResult(
        labels=rows.labels,
        confusion=tuple(tuple(line) for line in matrix.tolist()),
        calibration=None if losses is None else _calibration(*_confidence(rows, losses)),
        **asdict(classification(matrix)),
    )


def label_metrics(
    rows: LabelRows,
    replies: tuple[Sequence[Reply], Sequence[Reply]],
    losses: tuple[Sequence[Loss] | None, Sequence[Loss] | None],
    clusters: Sequence[int],
    smallest_effect: float,
) -> list[MetricResult]:
    """Return F1 and calibration error of base and tuned model, before the adjustment for the number of lines.

    Args:
        rows: Rows with labels.
        replies: Answers of base and tuned model.
        losses: Losses of `label_documents` under base and tuned model; None where they were not measured.
        clusters: Cluster of each row.
        smallest_effect: `evaluation.smallest_effect`.
    """

    answered = [answered_labels(rows.labels, of_model) for of_model in replies]
    base, tuned = (f1_sums(rows.expected, each, len(rows.labels)) for each in answered)
    num_differing = int((answered[0] != answered[1]).sum())
    tested = compare_figures(base, tuned, clusters, num_differing, [macro_f1, weighted_f1])
    metrics = [MACRO_F1, WEIGHTED_F1]
    if losses[0] is not None and losses[1] is not None:
        confidence = [_confidence(rows, of_model) for of_model in (losses[0], losses[1])]
        base, tuned = (calibration_sums(*of_model) for of_model in confidence)
        num_differing = int((confidence[0][0] != confidence[1][0]).sum())
        tested += compare_figures(base, tuned, clusters, num_differing, [calibration_error])
        metrics.append(ECE)
    return [result_of(metric, result, smallest_effect) for metric, result in zip(metrics, tested, strict=True)]


def _confidence(rows: LabelRows, losses: Sequence[Loss]) -> tuple[Float, Float]:
    """Return the probability of the likeliest label among all labels, and whether it is right, float64 [N] each."""
    nats = np.array([loss.sum_nats for loss in losses]).reshape(len(rows.expected), len(rows.labels))
    probabilities = softmax(-nats, axis=1)
    return probabilities.max(1), (probabilities.argmax(1) == rows.expected).astype(np.float64)


def _calibration(confidence: Float, right: Float) -> CalibrationResult:
    return CalibrationResult(
        error=float(calibration_error(calibration_sums(confidence, right).sum(0))),
        accuracy=float(right.mean()),
        bins=calibration_bins(confidence, right),
    )
