"""Held-out rows of two documents: the first is measured as any row, the second against it.

The loss of chosen answers shows whether they became less likely while the margin grew (likelihood displacement:
Razin et al. 2024, arXiv 2410.08847), and `prefers_chosen` how often a model gives the chosen answer more probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.packs.store import PackStore
from packhorse.evaluate.metrics.metric import Metric
from packhorse.evaluate.score import Documents, Loss
from packhorse.evaluate.verdict import MetricValues

PREFERS: Final = Metric("prefers_chosen", "binary", "%", lambda *_: math.nan)
"""1 where the chosen answer is more probable than the rejected one; measured, and not computed from an answer."""
VERDICT: Final = "verdict"


@dataclass(frozen=True)
class OneOfEachRow:
    """One document of each row of a store, as its documents.

    Attributes:
        store: Store with several documents per row.
        role: Which document of the row, from 0.
    """

    store: PackStore
    role: int

    @property
    def num_documents(self) -> int:
        """Number of rows."""
        return self.store.num_documents // self.store.documents_per_row

    def document(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return ids and mask of the row's document."""
        return self.store.document(self.store.documents_per_row * index + self.role)


def documents_and_rejected(store: PackStore) -> tuple[Documents, Documents | None]:
    """Return the documents to measure, and the rejected answers of preference pairs; None for other rows."""
    if store.documents_per_row == 1:
        return store, None
    # The second document of an answer with a verdict is another row's answer, which says nothing about the model.
    return OneOfEachRow(store, 0), None if VERDICT in store.values else OneOfEachRow(store, 1)


def preferences(chosen: Sequence[Sequence[Loss]], rejected: Sequence[Sequence[Loss]]) -> MetricValues:
    """Return which answer base and tuned model prefer, from the losses of both answers of each row.

    Args:
        chosen: Losses under the base, then under the tuned model.
        rejected: Losses under the base, then under the tuned model.
    """
    base, tuned = (
        np.array([float(one.sum_nats < other.sum_nats) for one, other in zip(*of_model, strict=True)])
        for of_model in zip(chosen, rejected, strict=True)
    )
    return MetricValues(PREFERS, np.arange(len(base)), base, tuned, np.ones(len(base)))
