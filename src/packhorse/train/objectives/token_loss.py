"""The loss: chunked linear cross-entropy, and the one place that undoes the engines' averaging.

Shapes: T tokens of a flattened micro-batch, H hidden width, V vocabulary, S supervised tokens.

    loss of a step = sum of token losses / supervised tokens of the whole step, over all ranks and micro-batches

DDP, FSDP2 and DeepSpeed average gradients over ranks, and DeepSpeed also over accumulation steps; a rank's share is
therefore multiplied by exactly these numbers. The divisor is known from the batch plan and costs no communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions

from packhorse.model.units import score_name

# Rows of logits in memory at once. Measured: 256 to 1,024 are equally fast, and 512 x 151,936 in fp32 is 311 MB.
CHUNK_TOKENS: Final = 512
# CUDA adds up a trained head's 16-bit gradient chunk by chunk, with an error that grows with the root of their number:
# 2,048 halves that of 512 (docs/lab-log.md), for 1.2 GB with a vocabulary of 128,256. A CPU adds up in fp32.
TRAINED_CHUNK_TOKENS: Final = 2048

HeadLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Function of hidden states [S, H] and the head's weight [V, H] and bias [V] that takes the place of logits."""

_request: ContextVar[tuple[Tensor, HeadLoss] | None] = ContextVar("request", default=None)


def token_loss_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropy of each supervised token, without [S, V] logits at once.

    Args:
        hidden: [S, H], only the supervised positions.
        weight: [V, H] of the output head.
        bias: [V] or None.
        labels: [S] next-token ids.

    Returns:
        Scalar in fp32. Without supervised tokens, a zero with a gradient to every parameter: a null pack must take
        part in the backward pass of every rank.
    """
    # torch returns the sum in the dtype of its inputs: 8 bits in bf16, and infinite from 65,504 on in fp16. Losses by
    # token cost a second pass over the logits in the backward pass (measured: 1.3 times the loss's own time).
    if hidden.dtype != torch.float32 or torch.is_autocast_enabled(hidden.device.type):
        return token_losses(hidden, weight, bias, labels).sum()
    return _cross_entropy(hidden, weight, bias, labels, "sum")


def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each supervised token, fp32 [S]; arguments as of `token_loss_sum`."""
    return _cross_entropy(hidden, weight, bias, labels, "none")


def _cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, reduction: str) -> Tensor:
    if labels.numel() == 0:
        reached = [hidden, weight] if bias is None else [hidden, weight, bias]
        zero = torch.stack([tensor.sum().float() for tensor in reached]).sum() * 0.0
        return zero if reduction == "sum" else zero.expand(0)
    # Autocast does not know this operator and would leave it in fp32, while the plain head's matmul runs in 16 bit.
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    rows = chunk_tokens(device, hidden.dtype, weight.requires_grad)
    options = LinearCrossEntropyOptions(batch_chunk_size=rows)
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    losses = F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, reduction=reduction, options=options)
    return losses.float()


def chunk_tokens(device: str, dtype: torch.dtype, is_trained: bool) -> int:
    """Return the rows of logits in memory at once, for a head of this type on this kind of device."""
    return TRAINED_CHUNK_TOKENS if device == "cuda" and dtype != torch.float32 and is_trained else CHUNK_TOKENS


def install_loss_head(model: nn.Module) -> None:
    """Make the model's output head return a loss instead of logits while one is requested.

    The head's own forward is replaced, not the model's: ZeRO-3 and FSDP2 gather the head's weight only while the
    head itself runs. An adapter may wrap the head: the copy that is trained whole gets the loss too, and so does the
    head with trained rows for new tokens.

    Args:
        model: The model that trains, adapters attached, before it is sharded.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if hasattr(head, "token_adapter"):
        head.token_adapter.forward = MethodType(_merged_forward, head.token_adapter)
        return
    forward = _head_forward
    score = score_name(model)
    if score is not None:
        head, forward = model.get_submodule(score), _score_forward
    copies = head.modules_to_save.values() if hasattr(head, "modules_to_save") else ()
    for module in (getattr(head, "original_module", head), *copies):
        module.forward = MethodType(forward, module)


def _head_forward(self: Any, hidden: Tensor) -> Tensor:  # noqa: ANN401
    """Map hidden [1, T, H] to logits [1, T, V], or to the requested loss."""
    request = _request.get()
    if request is None:
        return type(self).forward(self, hidden)  # type: ignore[no-any-return]
    return _head_loss(hidden, self.weight, getattr(self, "bias", None), request)


def _score_forward(self: Any, hidden: Tensor) -> Tensor:  # noqa: ANN401
    """Map hidden [1, T, H] to scores [1, T, 1], or to n requested values as [1, T, n].

    transformers' classification models return one token's values of what their head returns: here all n.
    """
    request = _request.get()
    if request is None:
        return type(self).forward(self, hidden)  # type: ignore[no-any-return]
    found = _head_loss(hidden, self.weight, getattr(self, "bias", None), request)
    return found.expand(1, hidden.shape[1], -1)


def _merged_forward(self: Any, hidden: Tensor) -> Tensor:  # noqa: ANN401
    """Do what `_head_forward` does, for a head with some trained rows (peft's `TrainableTokensLayer`)."""
    request = _request.get()
    if request is None:
        return type(self).forward(self, hidden)  # type: ignore[no-any-return]
    weight = self.get_merged_weights(self.active_adapters)
    return _head_loss(hidden, weight, getattr(self.base_layer, "bias", None), request)


def _head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, request: tuple[Tensor, HeadLoss]) -> Tensor:
    positions, loss = request
    return loss(hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions), weight, bias)


@contextmanager
def _requesting(positions: Tensor, loss: HeadLoss) -> Iterator[None]:
    token = _request.set((positions, loss))
    try:
        yield
    finally:
        _request.reset(token)


def head_loss(model: nn.Module, inputs: dict[str, Any], positions: Tensor, loss: HeadLoss) -> Tensor:
    """Return what the loss makes of the hidden states at some positions of one micro-batch.

    Args:
        model: The (wrapped) model with its loss head installed.
        inputs: Keywords of its forward: `input_ids` [1, T], `position_ids` [1, T], `documents`.
        positions: [S] positions of the flattened row.
        loss: Runs inside the head, where its weight is whole.
    """
    with _requesting(positions, loss):
        # With a cache, transformers ignores restarting positions, and documents see each other.
        result = model(**inputs, use_cache=False).logits
    assert isinstance(result, torch.Tensor)
    return result


def loss_sum(model: nn.Module, inputs: dict[str, Any], positions: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of token losses of one micro-batch, scalar, fp32.

    Args:
        model: The (wrapped) model with its loss head installed.
        inputs: Keywords of its forward: `input_ids` [1, T], `position_ids` [1, T], `documents`.
        positions: [S] positions of the flattened row whose next token is supervised.
        labels: [S] next tokens at these positions.
    """
    return head_loss(model, inputs, positions, partial(token_loss_sum, labels=labels))
