"""Metrics of rows whose answer is one of a few labels: macro and weighted F1, and the confusion matrix.

Shapes: N rows, K labels; the last column of a confusion matrix counts answers that are no label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.evaluate.metrics.metric import Reply
from packhorse.evaluate.metrics.text import normalised

Float = NDArray[np.float64]
Int = NDArray[np.int64]

MAX_LABELS: Final = 100
MAX_LABEL_WORDS: Final = 5
MIN_ROWS_PER_LABEL: Final = 2


def labels_of(expected: Sequence[str]) -> tuple[str, ...] | None:
    """Return the labels in the order of their frequency, or None if the answers are no labels.

    Answers are labels if they are short, few, and most of them come more than once.
    """
    counts = Counter(normalised(text) for text in expected)
    repeated = sum(count for count in counts.values() if count >= MIN_ROWS_PER_LABEL)
    is_short = all(len(label.split()) <= MAX_LABEL_WORDS for label in counts)
    if len(counts) < 2 or len(counts) > MAX_LABELS or not is_short or repeated < 0.9 * len(expected):
        return None
    return tuple(label for label, _ in counts.most_common()) if len(counts) <= len(expected) / 2 else None


@dataclass(frozen=True)
class Classification:
    """Result of one model on label rows.

    Attributes:
        accuracy: Share of right labels; equal to the micro-averaged F1 if every answer is a label.
        macro_f1: Mean of the F1 of each label.
        weighted_f1: Mean weighted by the rows of each label.
        macro_precision: Mean of the precision of each label; 0 where a label was never answered.
        macro_recall: Mean of the recall of each label.
    """

    accuracy: float
    macro_f1: float
    weighted_f1: float
    macro_precision: float
    macro_recall: float


def answered_labels(labels: Sequence[str], replies: Sequence[Reply]) -> Int:
    """Return the index of the label of each answer, int64 [N]; K for no label, as an answer that did not end."""
    column = {label: index for index, label in enumerate(labels)}
    found = [column.get(normalised(reply.text), len(labels)) if reply.ended else len(labels) for reply in replies]
    return np.array(found, np.int64)


def confusion_matrix(labels: Sequence[str], expected: Int, replies: Sequence[Reply]) -> Int:
    """Return int64 [K, K + 1]: expected label by answered label.

    Args:
        labels: The labels.
        expected: Index of the label of each row, int64 [N].
        replies: Answers.
    """
    matrix = np.zeros((len(labels), len(labels) + 1), np.int64)
    np.add.at(matrix, (expected, answered_labels(labels, replies)), 1)
    return matrix


def f1_sums(expected: Int, answered: Int, num_labels: int) -> Float:
    """Return what each row adds to the sums of the F1: right answers, rows + answers, and rows of each label, [N, 3K].

    Args:
        expected: Index of the label of each row, int64 [N].
        answered: Index of the answered label, int64 [N]; K for no label.
        num_labels: K.
    """
    truth = np.eye(num_labels)[expected]
    given = np.eye(num_labels + 1)[answered][:, :-1]
    return np.concatenate([truth * given, truth + given, truth], 1)


def macro_f1(sums: Float) -> Float:
    """Return the mean F1 of the labels that occur, from sums float64 [..., 3K]."""
    f1, both, _ = _f1(sums)
    mean: Float = f1.sum(-1) / (both > 0).sum(-1)
    return mean


def weighted_f1(sums: Float) -> Float:
    """Return the mean F1 of the labels weighted by their rows, from sums float64 [..., 3K]."""
    f1, _, rows = _f1(sums)
    mean: Float = (f1 * rows).sum(-1) / rows.sum(-1)
    return mean


def _f1(sums: Float) -> tuple[Float, Float, Float]:
    """Return the F1, rows + answers, and rows of each label."""
    right, both, rows = np.split(sums, 3, axis=-1)
    return np.divide(2 * right, both, out=np.zeros_like(right), where=both > 0), both, rows


def classification(matrix: Int) -> Classification:
    """Return the figures of a confusion matrix [K, K + 1]; a label without rows or answers counts as 0."""
    right = np.diagonal(matrix).astype(np.float64)
    rows, answered = matrix.sum(1).astype(np.float64), matrix[:, :-1].sum(0).astype(np.float64)
    recall = np.divide(right, rows, out=np.zeros_like(right), where=rows > 0)
    precision = np.divide(right, answered, out=np.zeros_like(right), where=answered > 0)
    both = rows + answered
    f1 = np.divide(2 * right, both, out=np.zeros_like(right), where=both > 0)
    return Classification(
        accuracy=float(right.sum() / rows.sum()),
        macro_f1=float(f1.mean()),
        weighted_f1=float(f1 @ rows / rows.sum()),
        macro_precision=float(precision.mean()),
        macro_recall=float(recall.mean()),
    )
