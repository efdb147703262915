"""Runs one micro-batch through the model: from the loader's tensors to the sum of its token losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from packhorse.data.packs.loader import MicroBatch, part_of_row
from packhorse.model.attention import Documents
from packhorse.model.sequence import SequenceGroup
from packhorse.train.objectives.token_loss import loss_sum


def micro_batch_loss(
    model: nn.Module, micro_batch: MicroBatch, device: torch.device, sequence: SequenceGroup | None = None
) -> Tensor:
    """Return the sum of token losses over the micro-batch's supervised tokens, nats, scalar fp32.

    Args:
        model: The (wrapped) model with its loss head installed.
        micro_batch: Micro-batch of this rank, or of the whole group, which is then cut here.
        device: The model's device.
        sequence: Ranks that share the micro-batch; the sum then covers this rank's part only.
    """
    own = micro_batch
    if sequence is not None and own.num_parts == 1:
        own = part_of_row(own, sequence.rank, sequence.size)
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
