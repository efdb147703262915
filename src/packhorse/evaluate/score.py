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
from torch import Tensor

from packhorse.evaluate.models import Model
from packhorse.evaluate.ranks import ALONE, Ranks

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


@torch.inference_mode()
def document_losses(model: Model, documents: Documents, ranks: Ranks = ALONE) -> list[Loss]:
    """Return the loss of each document under the model's logits, equal on every rank.

    Args:
        model: Model in eval mode.
        documents: Documents; token t is predicted from the tokens before it, and counts if it is supervised.
        ranks: Processes that share the documents; with sharded weights they make equally many passes.
    """
    lengths = [len(documents.document(index)[0]) for index in range(documents.num_documents)]
    vocabulary = int(model.config.get_text_config().vocab_size)
    share_tokens = len(lengths) * max(lengths, default=0) // ranks.size
    batches = list(_batches(lengths, min(MAX_BATCH_TOKENS, LOGITS_BYTES // (4 * vocabulary), share_tokens)))
    losses = torch.zeros(len(lengths), 2, dtype=torch.float64)  # nats and supervised tokens
    for start in range(0, len(batches), ranks.size):
        own = batches[start + ranks.rank : start + ranks.rank + 1]
        for rows in own:
            losses[rows] = _batch_losses(model, [documents.document(row) for row in rows], ranks.device_of(model))
        if ranks.in_step and not own:
            ranks.idle_pass(model)
    return [Loss(nats, int(count)) for nats, count in ranks.total(losses).tolist()]


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


def _batch_losses(model: Model, documents: Sequence[tuple[NDArray[Any], NDArray[Any]]], device: torch.device) -> Tensor:
    """Return float64 [B, 2] on the CPU: sum of the token losses in nats, and number of supervised tokens."""
    length = max(len(ids) for ids, _ in documents)
    ids = np.zeros((len(documents), length), np.int64)
    supervised = np.zeros((len(documents), length), bool)
    for row, (document, mask) in enumerate(documents):
        ids[row, : len(document)] = document
        supervised[row, : len(mask)] = mask
    inputs = torch.from_numpy(ids).to(device)
    wanted = torch.from_numpy(supervised[:, 1:]).to(device)
    # No mask is needed: the padding follows every real token, and causal attention does not look ahead.
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
    nats = torch.zeros(wanted.shape, dtype=torch.float64, device=device)
    nats[wanted] = F.cross_entropy(logits[wanted].float(), inputs[:, 1:][wanted], reduction="none").double()
    return torch.stack([nats.sum(1), wanted.sum(1).double()], 1).cpu()
