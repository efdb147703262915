"""From a forward pass to one value per document, and from losses of documents back to one scalar.

Shapes: S supervised tokens of this rank's part, D documents of the micro-batch, n documents whose last token this rank
holds, H hidden width, V vocabulary.

Losses need a document's value whole, while ranks that share a row hold parts of its tokens. So they are computed from
values that are summed over these ranks without a gradient, and give each document a coefficient, the derivative of the
sum of losses; each rank then differentiates coefficient x own part. That is the exact gradient, without a collective in
the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from packhorse.data.packs.loader import MicroBatch, part_of_row
from packhorse.model.sequence import SequenceGroup
from packhorse.train.objectives.forward import model_inputs
from packhorse.train.objectives.token_loss import head_loss, token_losses


@dataclass(frozen=True, eq=False)
class DocumentValues:
    """Values of the documents of a micro-batch, float64 [D].

    Attributes:
        own: Part of each value that this rank computed, with a gradient.
        whole: Values over the ranks that share the micro-batch, without a gradient.
        num_tokens: Supervised tokens of each document, over these ranks.
        num_ranks: Number of these ranks.
    """

    own: Tensor
    whole: Tensor
    num_tokens: Tensor
    num_ranks: int

    def differentiable(self, losses_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sum of the losses as a scalar fp32; over the ranks that share the micro-batch it is the whole sum.

        Args:
            losses_of: Function of values [D] that returns losses of any shape.
        """
        if not torch.is_grad_enabled():
            return (losses_of(self.whole).sum() / self.num_ranks).float()
        leaf = self.whole.clone().requires_grad_()
        total = losses_of(leaf).sum()
        (coefficients,) = torch.autograd.grad(total, leaf) if len(leaf) else (leaf,)
        # The first summand is 0 and has the gradient; without documents it still reaches every weight of the model.
        parts = coefficients.detach() * (self.own - self.own.detach())
        return (parts.sum() + total.detach() / self.num_ranks).float()


def log_probabilities(
    model: nn.Module, micro_batch: MicroBatch, device: torch.device, sequence: SequenceGroup | None
) -> DocumentValues:
    """Return the log-probability of each document's supervised tokens; summed in fp64, as 900 nats need."""
    own = _own_part(micro_batch, sequence)
    labels = own.targets.to(device, non_blocking=True)
    losses = head_loss(
        model,
        model_inputs(own, device, sequence),
        own.predicting.to(device, non_blocking=True),
        partial(token_losses, labels=labels),
    )
    assert own.document_of is not None
    return _per_document(-losses, own.document_of.to(device, non_blocking=True), len(own.documents), sequence)


def document_scores(
    model: nn.Module, micro_batch: MicroBatch, device: torch.device, sequence: SequenceGroup | None
) -> DocumentValues:
    """Return the score that a reward model gives to each document, read at its last token."""
    own = _own_part(micro_batch, sequence)
    first = own.num_tokens * sequence.rank if sequence else 0
    last = own.cu_seq_lens[1 : len(own.documents) + 1].long() - 1 - first
    here = ((last >= 0) & (last < own.num_tokens)).nonzero()[:, 0]
    inputs, positions = model_inputs(own, device, sequence), last[here].to(device, non_blocking=True)
    found = head_loss(model, inputs, positions, score_head)[0]
    return _per_document(found, here.to(device, non_blocking=True), len(own.documents), sequence)


def score_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the scores of hidden states [n, H], fp32 [n]."""
    return F.linear(hidden, weight.to(hidden.dtype), bias).float()[:, 0]


def _own_part(micro_batch: MicroBatch, sequence: SequenceGroup | None) -> MicroBatch:
    if sequence is not None and micro_batch.num_parts == 1:
        return part_of_row(micro_batch, sequence.rank, sequence.size)
    return micro_batch


def _per_document(
    values: Tensor, document_of: Tensor, num_documents: int, sequence: SequenceGroup | None
) -> DocumentValues:
    """Add up values of tokens by document.

    Args:
        values: [S].
        document_of: int64 [S].
        num_documents: D, without documents that only fill a row.
        sequence: Ranks that share the documents.
    """
    zeros = values.new_zeros(num_documents, dtype=torch.float64)
    own = zeros.index_add(0, document_of, values.double())
    whole = torch.stack([own.detach(), zeros.index_add(0, document_of, torch.ones_like(values, dtype=torch.float64))])
    if sequence is not None:
        dist.all_reduce(whole, group=sequence.group)
    return DocumentValues(own, whole[0], whole[1], sequence.size if sequence else 1)
