"""How good a model is on held-out rows: loss per supervised token, perplexity, exact match.

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
    """Tokenised rows; `data.store.PackStore` is one."""

    @property
    def num_documents(self) -> int:
        """Number of rows."""

    def document(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Returns ids [length] and supervised [length], 1 where the token is learnt."""


@dataclass(frozen=True)
class Loss:
    """Token losses added up; sums of rows are sums of these.

    Attributes:
        sum_nats: Sum over supervised tokens.
        num_supervised_tokens: How many.
    """

    sum_nats: float
    num_supervised_tokens: int

    @property
    def nats_per_token(self) -> float:
        """The mean, NaN where nothing is supervised."""
        return self.sum_nats / self.num_supervised_tokens if self.num_supervised_tokens else math.nan


def total_loss(losses: Iterable[Loss]) -> Loss:
    """Adds up, so that every supervised token has the same weight, whatever row it stands in."""
    found = tuple(losses)
    return Loss(math.fsum(loss.sum_nats for loss in found), sum(loss.num_supervised_tokens for loss in found))


def document_losses(model: Model, documents: Documents) -> list[Loss]:
    """Returns each document's loss under the model's own logits.

    Args:
        model: In eval mode.
        documents: Token t is predicted from those before it, and counts if it is supervised.
    """
    lengths = [len(documents.document(index)[0]) for index in range(documents.num_documents)]
    vocabulary = int(model.config.get_text_config().vocab_size)
    budget_tokens = min(MAX_BATCH_TOKENS, LOGITS_BYTES // (4 * vocabulary))
    losses: dict[int, Loss] = {}
    for rows in _batches(lengths, budget_tokens):
        losses.update(zip(rows, _batch_losses(model, [documents.document(row) for row in rows])))
    return [losses[index] for index in range(len(lengths))]


def is_exact(expected: str, answer: str) -> bool:
    """The answer is the expected one, character for character, but for white space at the ends."""
    return expected.strip() == answer.strip()


def _batches(lengths: Sequence[int], budget_tokens: int) -> Iterator[list[int]]:
    """Yields rows of like length whose padded size stays in the budget; a longer row goes alone."""
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
    # No mask is needed: padding stands behind every real token, where causal attention never looks.
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
    nats = torch.zeros(wanted.shape, dtype=torch.float64, device=model.device)
    nats[wanted] = F.cross_entropy(logits[wanted].float(), inputs[:, 1:][wanted], reduction="none").double()
    return [Loss(*pair) for pair in zip(nats.sum(1).tolist(), wanted.sum(1).tolist())]
