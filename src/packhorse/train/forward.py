"""One micro-batch through the model: from the loader's tensors to the sum of its token losses."""

from __future__ import annotations

from torch import Tensor, device, nn

from packhorse.data.packs.loader import MicroBatch
from packhorse.model.attention import Documents
from packhorse.train.objective import loss_sum


def micro_batch_loss(model: nn.Module, micro_batch: MicroBatch, where: device) -> Tensor:
    """Sum of token losses over the micro-batch's supervised tokens, nats, scalar fp32."""
    inputs = model_inputs(micro_batch, where)
    predicting = micro_batch.predicting.to(where, non_blocking=True)
    return loss_sum(model, inputs, predicting, micro_batch.targets.to(where, non_blocking=True))


def model_inputs(micro_batch: MicroBatch, where: device) -> dict[str, Tensor | Documents]:
    """Keywords of the model's forward; never an attention mask, which would let documents see each other."""
    return {
        "input_ids": micro_batch.input_ids.to(where, non_blocking=True),
        "position_ids": micro_batch.position_ids.to(where, non_blocking=True),
        "documents": Documents(
            lengths=micro_batch.document_lengths,
            cu_seq_lens=micro_batch.cu_seq_lens.to(where, non_blocking=True),
            max_length=micro_batch.max_length,
        ),
    }
