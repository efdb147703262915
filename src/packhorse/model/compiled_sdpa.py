"""SDPA per document as one operator of a compiled graph: the lengths are data, so other documents need no other graph.

Shapes: H query heads, K key/value heads, T tokens, E head width, D documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey, _SetExcludeDispatchKeyGuard


@torch.library.custom_op("packhorse::sdpa_by_document", mutates_args=())
def sdpa_by_document(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """Map query [1, H, T, E], key and value [1, K, T, E] to [1, T, H, E], within each document.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        ends: Cumulative lengths of the documents, int32 [D + 1], on the host.
        scale: Factor of the scores; None for 1 / sqrt(E).
        window: Number of tokens that a query sees; None for all before it.
    """
    parts = [_attend(q, k, v, scale, window) for q, k, v in _by_document(ends, query, key, value)]
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


@sdpa_by_document.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float | None, window: int | None) -> Tensor:
    rows, heads, tokens, _ = query.shape
    return query.new_empty(rows, tokens, heads, value.shape[3])


@torch.library.custom_op("packhorse::sdpa_by_document_backward", mutates_args=())
def _gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; attention is computed once more."""
    found = []
    for q, k, v, outer in _by_document(ends, query, key, value, gradient.transpose(1, 2)):
        inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        # torch runs operators below autograd; here it is used inside of one.
        with torch.enable_grad(), _SetExcludeDispatchKeyGuard(DispatchKey.AutogradFunctionality, False):
            out = _attend(inputs[0], inputs[1], inputs[2], scale, window)
        found.append(torch.autograd.grad(out, inputs, outer))
    query_gradient, key_gradient, value_gradient = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    return query_gradient, key_gradient, value_gradient


@_gradients.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return first, second, third


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    return (*_gradients(gradient, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None)


sdpa_by_document.register_autograd(_backward, setup_context=_keep)


def _by_document(ends: Tensor, *tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    lengths = ends.diff().tolist()
    return zip(*(torch.split(tensor, lengths, 2) for tensor in tensors), strict=True)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    mask = window_mask(query.shape[2], 0, window, query.device)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def window_mask(length: int, before: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return a mask [T, P + T], True where a query may look; None where it equals plain causal attention."""
    if before == 0 and (window is None or length <= window):
        return None
    query = torch.arange(before, before + length, device=device)
    distance = query[:, None] - torch.arange(before + length, device=device)[None, :]
    return (distance >= 0) & (distance < (window or before + length))
