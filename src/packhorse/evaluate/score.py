"""Loss of a model on held-out rows, per supervised token.

Shapes: B rows of a batch, T tokens (padded right), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from packhorse.evaluate.models import Model

LOGITS_BYTES: Final = 2**29
MAX_BATCH_TOKENS: Final = 16384


class Documents(Protocol):
    """Tokenised rows; `data.packs.store.PackStore` is one."""

    @property
    def num_documents(self) -> int:
        """Return the number of rows."""

    def document(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return ids [length] and supervised [length], 1 for a supervised token."""


@dataclass(frozen=True)
class Loss:
    """Sum of token losses.

    Attributes:
        sum_nats: Sum over supervised tokens.
        num_supervised_tokens: Number of supervised tokens.
    """

    sum_nats: float
    num_supervised_tokens: int

    @property
    def nats_per_token(self) -> float:
        """Return the mean loss; NaN if no token is supervised."""
        return self.sum_nats / self.num_supervised_tokens if self.num_supervised_tokens else math.nan


def total_loss(losses: Iterable[Loss]) -> Loss:
    """Return the sum of losses. Every supervised token has the same weight, whatever its row."""
    parts = tuple(losses)
    return Loss(math.fsum(loss.sum_nats for loss in parts), sum(loss.num_supervised_tokens for loss in parts))


def document_losses(model: Model, documents: Documents) -> list[Loss]:
    """Return the loss of each document under the model's logits.

    Args:
        model: Model in eval mode.
        documents: Documents; token t is predicted from the tokens before it, and counts if it is supervised.
    """
    lengths = [len(documents.document(index)[0]) for index in range(documents.num_documents)]
    vocabulary = int(model.config.get_text_config().vocab_size)
    budget_tokens = min(MAX_BATCH_TOKENS, LOGITS_BYTES // (4 * vocabulary))
    losses: dict[int, Loss] = {}
    for rows in _batches(lengths, budget_tokens):
        losses.update(zip(rows, _batch_losses(model, [documents.document(row) for row in rows])))
    return [losses[index] for index in range(len(lengths))]


def _batches(lengths: Sequence[int], budget_tokens: int) -> Iterator[list[int]]:
    """Yield rows of similar length whose padded size is within the budget; a longer row is a batch alone."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batch and (len(batch) + 1) * lengths[row] > budget_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def _batch_losses(model: Model, documents: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> list[Loss]:
    length = max(len(ids) for ids, _ in documents)
    ids = np.zeros((len(documents), length), np.int64)
    supervised = np.zeros((len(documents), length), bool)
    for row, (document, mask) in enumerate(documents):
        ids[row, : len(document)] = document
        supervised[row, : len(mask)] = mask
    inputs = torch.from_numpy(ids).to(model.device)
    wanted = torch.from_numpy(supervised[:, 1:]).to(model.device)
    # No mask is needed: the padding follows every real token, and causal attention does not look ahead.
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
    nats = torch.zeros(wanted.shape, dtype=torch.float64, device=model.device)
    nats[wanted] = F.cross_entropy(logits[wanted].float(), inputs[:, 1:][wanted], reduction="none").double()
    return [Loss(*pair) for pair in zip(nats.sum(1).tolist(), wanted.sum(1).tolist())]
