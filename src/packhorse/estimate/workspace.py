"""Memory inside one decoder layer while it computes, which is free again when the layer is done.

Shapes: t tokens of the row on this rank, T of the whole row, H query heads, E head width, D documents.
"""

from __future__ import annotations

from collections.abc import Mapping

from packhorse.estimate.saved_tensors import FP32, PassSettings
from packhorse.estimate.weights import WeightTensor
from packhorse.model_spec.parameters import Shape

ROWS_PER_DOCUMENT = 128
"""Rows that FlashAttention-2 adds for each document to its sum of the queries' gradient (torch, flash_api.cpp)."""


def layer_workspace(
    settings: PassSettings, shape: Shape, weights: tuple[WeightTensor, ...], kept: Mapping[str, int]
) -> int:
    """Return the fullest moment of a layer's backward pass.

    Args:
        settings: How the pass runs.
        shape: Shape of the model.
        weights: Weights of the model.
        kept: Bytes that the layer keeps, by part; those of its MLP are free when attention's gradient is computed.
    """
    in_attention = _attention_workspace(settings, shape) - kept.get("mlp", 0)
    return max(_mlp_workspace(settings, shape, weights), in_attention) + _dequantised(settings, weights)


def _mlp_workspace(settings: PassSettings, shape: Shape, weights: tuple[WeightTensor, ...]) -> int:
    """Return the bytes of the gradients of the gated product and of one weight."""
    width, t = settings.compute, settings.tokens
    mlp = max(shape.mlp_width, shape.expert_width * shape.active_experts)
    hidden = t * shape.hidden * (FP32 if settings.autocast else width)
    trained = [weight for weight in weights if weight.trained and weight.unit.startswith("layer")]
    own = max((weight.size for weight in trained), default=0) * (width if width != FP32 else 0)
    adapted = any(weight.kind == "adapter" and "mlp." in weight.name for weight in trained)
    copies = 0
    if adapted and settings.adapter > width:
        # The gradient of an adapter's input, beside that of the base; a cast copies both input and gradient.
        copies = t * mlp * (2 * settings.adapter if settings.casts_inputs else width)
    return 2 * hidden + 2 * t * mlp * width + own + copies


def _attention_workspace(settings: PassSettings, shape: Shape) -> int:
    """Return the bytes of FlashAttention-2's backward pass: (T + 128 D) H E in float32, and the gradients."""
    if not settings.varlen:
        return 0
    heads, width = -(-shape.heads // settings.sequence), shape.head_width
    shared = -(-max(shape.key_value_heads, settings.sequence) // settings.sequence)
    # The sum's rows are as wide as the kernel's tiles.
    tile = 32 if width <= 128 else 64
    padded = -(-width // tile) * tile
    summed = (settings.row_tokens + ROWS_PER_DOCUMENT * settings.most_documents) * heads * padded * FP32
    # Of queries, output, keys and values; keys and values that heads share also have gradients for each query head.
    by_head = heads * 2 + shared * 2 + (heads * 2 if heads != shared else 0)
    hidden = settings.tokens * shape.hidden * (FP32 if settings.autocast else settings.compute)
    return summed + settings.row_tokens * by_head * width * settings.compute + hidden


def forward_workspace(
    settings: PassSettings, shape: Shape, weights: tuple[WeightTensor, ...], hidden_width: int
) -> int:
    """Return the fullest moment of a layer without a backward pass: hidden states, gate, up and their product."""
    mlp = max(shape.mlp_width, shape.expert_width * shape.active_experts)
    inside = settings.tokens * (2 * shape.hidden * max(hidden_width, FP32) + 3 * mlp * settings.compute)
    return inside + _dequantised(settings, weights)


def _dequantised(settings: PassSettings, weights: tuple[WeightTensor, ...]) -> int:
    """Return the bytes of the largest quantised weight in 16 bits: bitsandbytes dequantises one at a time."""
    return max((weight.size for weight in weights if weight.storage != "plain"), default=0) * settings.compute
