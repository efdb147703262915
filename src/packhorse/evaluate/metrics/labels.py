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


def confusion_matrix(labels: Sequence[str], expected: Sequence[str], replies: Sequence[Reply]) -> NDArray[np.int64]:
    """Return int64 [K, K + 1]: expected label by answered label. An answer that did not end is no label."""
    column = {label: index for index, label in enumerate(labels)}
    matrix = np.zeros((len(labels), len(labels) + 1), np.int64)
    for text, reply in zip(expected, replies, strict=True):
        answered = column.get(normalised(reply.text), len(labels)) if reply.ended else len(labels)
        matrix[column[normalised(text)], answered] += 1
    return matrix


def classification(matrix: NDArray[np.int64]) -> Classification:
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
