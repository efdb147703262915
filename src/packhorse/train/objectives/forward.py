"""Runs one micro-batch through the model: from the loader's tensors to the sum of its token losses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from packhorse.data.packs.loader import PAD_TOKEN, MicroBatch
from packhorse.model.attention import Documents
from packhorse.model.sequence import SequenceGroup
from packhorse.train.objectives.token_loss import loss_sum


def micro_batch_loss(
    model: nn.Module, micro_batch: MicroBatch, device: torch.device, sequence: SequenceGroup | None = None
) -> Tensor:
    """Return the sum of token losses over the micro-batch's supervised tokens, nats, scalar fp32.

    Args:
        model: The (wrapped) model with its loss head installed.
        micro_batch: Micro-batch of this rank, or of the whole group.
        device: The model's device.
        sequence: Ranks that share the micro-batch; the sum then covers this rank's part only.
    """
    own = micro_batch if sequence is None else part_of_row(micro_batch, sequence.rank, sequence.size)
    inputs = model_inputs(own, device, sequence)
    predicting = own.predicting.to(device, non_blocking=True)
    return loss_sum(model, inputs, predicting, own.targets.to(device, non_blocking=True))


def model_inputs(
    micro_batch: MicroBatch, device: torch.device, sequence: SequenceGroup | None = None
) -> dict[str, Tensor | Documents]:
    """Return the keywords of the model's forward; never an attention mask, which would let documents see each other."""
    return {
        "input_ids": micro_batch.input_ids.to(device, non_blocking=True),
        "position_ids": micro_batch.position_ids.to(device, non_blocking=True),
        "documents": Documents(
            lengths=micro_batch.document_lengths,
            cu_seq_lens=micro_batch.cu_seq_lens.to(device, non_blocking=True),
            max_length=micro_batch.max_length,
            sequence=sequence,
        ),
    }


def part_of_row(micro_batch: MicroBatch, rank: int, size: int) -> MicroBatch:
    """Return the tokens of one of `size` ranks, which hold equal parts; documents stay those of the whole row.

    A row that cannot be cut into equal parts gets one more document, without supervised tokens.
    """
    missing = -micro_batch.num_tokens % size
    row = _with_null_document(micro_batch, missing) if missing else micro_batch
    length = row.num_tokens // size
    first, end = rank * length, (rank + 1) * length
    low, high = np.searchsorted(row.predicting.numpy(), (first, end)).tolist()
    return replace(
        row,
        input_ids=row.input_ids[:, first:end],
        position_ids=row.position_ids[:, first:end],
        predicting=row.predicting[low:high] - first,
        targets=row.targets[low:high],
    )


def _with_null_document(micro_batch: MicroBatch, length: int) -> MicroBatch:
    ids = torch.full((1, length), PAD_TOKEN)
    positions = torch.arange(length)[None]
    return replace(
        micro_batch,
        input_ids=torch.cat([micro_batch.input_ids, ids], 1),
        position_ids=torch.cat([micro_batch.position_ids, positions], 1),
        cu_seq_lens=torch.cat([micro_batch.cu_seq_lens, micro_batch.cu_seq_lens[-1:] + length]),
        max_length=max(micro_batch.max_length, length),
        document_lengths=(*micro_batch.document_lengths, length),
    )
