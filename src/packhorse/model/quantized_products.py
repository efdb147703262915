"""Products with frozen quantised weights that keep the parameter alone for the backward pass.

bitsandbytes' own products keep more, which neither recomputation nor an engine frees: in 4 bits a view of the weight,
with which each rank holds the whole gathered model under ZeRO-3; in 8 bits the input. On a GPU they also round that
input to 8 bits, too few for the outlier features of larger models (arXiv 2208.07339, section 4).
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import MatmulLtState, matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import Tensor, nn


def replace_products() -> None:
    """Let bitsandbytes' linear layers of this process use the products of this module."""
    bnb.matmul_4bit = _multiply_4bit
    bnb.matmul = _multiply_8bit


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: QuantState | MatmulLtState) -> Tensor:  # noqa: ANN401
        """x [..., inputs] -> [..., outputs]."""
        # The parameter itself: between the passes an engine frees its data, and gathers it again.
        ctx.weight, ctx.state, ctx.dtype = weight, state, x.dtype
        if isinstance(state, QuantState):
            out: Tensor = matmul_4bit(x, weight, state, bias=bias)
            return out
        return nn.functional.linear(x, _dequantised(weight, state, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        """Gradient [..., outputs] -> [..., inputs]."""
        return gradient.to(ctx.dtype) @ _dequantised(ctx.weight, ctx.state, ctx.dtype), None, None, None


def _dequantised(weight: Tensor, state: QuantState | MatmulLtState, dtype: torch.dtype) -> Tensor:
    """Return the weight [outputs, inputs]."""
    if isinstance(state, QuantState):
        values: Tensor = dequantize_4bit(weight, state).to(dtype)
        return values
    scaled: Tensor = state.CB.to(dtype, copy=True).mul_(state.SCB[:, None] * (1 / 127))
    return scaled


def _multiply_4bit(
    x: Tensor, weight: Tensor, quant_state: QuantState, out: None = None, bias: Tensor | None = None
) -> Tensor:
    product: Tensor = _FrozenProduct.apply(x, weight, bias, quant_state)  # type: ignore[no-untyped-call]
    return product


def _multiply_8bit(
    x: Tensor,
    weight: Tensor,
    out: None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    device = x.device.type
    # As a plain linear layer does: autocast reaches no backward pass.
    given = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    product: Tensor = _FrozenProduct.apply(given, weight, bias, state)  # type: ignore[no-untyped-call]
    return product
