"""CUDA kernels that the CPU build of torch lacks, computed in float32 on the host: varlen attention, mixed products.

T tokens, H query heads, K key/value heads, E head width, D documents; queries [T, H, E], keys and values [T, K, E].

Proves that operands are what FlashAttention-2 and cuBLAS accept, and the numbers to the rounding of the result. Cannot
prove the kernels' own rounding, their memory, or that they give equal bits twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

host = torch.ops.soft_cuda.host_view
device = torch.ops.soft_cuda.device_view


def register() -> torch.library.Library:
    """Register the kernels; they live as long as the result."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash_forward, "CUDA")
    library.impl("_flash_attention_backward", flash_backward, "CUDA")
    library.impl("mm.dtype", mm, "CUDA")
    library.impl("mm.dtype_out", mm_out, "CUDA")
    return library


def check(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor, longest: int, longest_key: int):
    """Refuse what mha_varlen_fwd of torch's flash_api.cpp refuses, and lengths that would read beyond a tensor."""
    assert query.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
    assert query.dtype == key.dtype == value.dtype, "query, key and value must have the same dtype"
    assert query.device == key.device == value.device == ends.device == key_ends.device
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value)), "last dimension must be contiguous"
    width = query.shape[-1]
    assert width % 8 == 0, "head_size should be a multiple of 8"
    assert width <= 256, "FlashAttention forward only supports head dimension at most 256"
    assert key.shape[1:] == value.shape[1:], "key and value must have one shape"
    assert key.shape[-1] == width, "key and value must have the head size of query"
    assert query.shape[1] % key.shape[1] == 0, "num_heads of query must be a multiple of those of key"
    for cumulated, tensor, limit in ((ends, query, longest), (key_ends, key, longest_key)):
        assert cumulated.dtype == torch.int32, "cu_seqlens must have dtype int32"
        assert cumulated.is_contiguous()
        assert type(limit) is int
        on_host = host(cumulated)
        assert int(on_host[-1]) == len(tensor)
        assert int(on_host.diff().max()) <= limit


def documents(ends: Tensor, key_ends: Tensor) -> Iterator[tuple[slice, slice]]:
    """Tokens of each document, of its queries and of its keys."""
    queries, keys = host(ends).tolist(), host(key_ends).tolist()
    for number in range(len(queries) - 1):
        yield slice(*queries[number : number + 2]), slice(*keys[number : number + 2])


def probabilities(
    query: Tensor, key: Tensor, causal: bool, scale: float, left: int | None, right: int | None
) -> tuple[Tensor, Tensor]:
    """Softmax [H, T, Tk] of one document and its logarithmic sums [H, T]; heads come first in query and key."""
    scores = query @ key.transpose(1, 2) * scale
    num_queries, num_keys = scores.shape[1:]
    # Queries are the last of the keys; a window counts from the key of the query's own position.
    ahead = torch.arange(num_keys)[None] - (torch.arange(num_queries)[:, None] + num_keys - num_queries)
    hidden = ahead > (0 if causal else right if right is not None and right >= 0 else num_keys)
    if left is not None and left >= 0:
        hidden |= ahead < -left
    sums = scores.masked_fill_(hidden, -math.inf).logsumexp(-1)
    return (scores - sums[..., None]).exp(), sums


def heads_first(tensor: Tensor, part: slice, times: int = 1) -> Tensor:
    """Tokens of a document as [H, T, E] in float32, each key/value head repeated for the query heads that share it."""
    return tensor[part].float().transpose(0, 1).repeat_interleave(times, 0)


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **_: Any,
) -> tuple[Tensor, ...]:
    check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    assert dropout_p == 0, "not written here: Packhorse refuses dropout in attention"
    q, k, v = host(query), host(key), host(value)
    out, sums = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
    times, scale = q.shape[1] // k.shape[1], scale or q.shape[-1] ** -0.5
    for rows, columns in documents(cum_seq_q, cum_seq_k):
        chances, sums[:, rows] = probabilities(
            heads_first(q, rows), heads_first(k, columns, times), is_causal, scale, window_size_left, window_size_right
        )
        out[rows] = (chances @ heads_first(v, columns, times)).transpose(0, 1).to(out.dtype)
    random = torch.zeros(2, dtype=torch.uint64)
    return tuple(device(each, query) for each in (out, sums, random, random[0].clone(), torch.empty(0)))


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    assert grad_out.dtype == query.dtype, "dout must have the same dtype as query"
    assert grad_out.stride(-1) == 1 or not grad_out.is_contiguous(), "torch makes dout contiguous"
    q, k, v, grad = (host(tensor) for tensor in (query, key, value, grad_out))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    times, scale = q.shape[1] // k.shape[1], scale or q.shape[-1] ** -0.5

    def shared(gradient: Tensor) -> Tensor:
        """Sum of the query heads [H, T, E] that share a key/value head, as [T, K, E]."""
        return gradient.unflatten(0, (-1, times)).sum(1).transpose(0, 1)

    for rows, columns in documents(cum_seq_q, cum_seq_k):
        queries, keys, values = heads_first(q, rows), heads_first(k, columns, times), heads_first(v, columns, times)
        chances, _ = probabilities(queries, keys, is_causal, scale, window_size_left, window_size_right)
        of_out = heads_first(grad, rows)
        of_chances = of_out @ values.transpose(1, 2)
        of_scores = chances * (of_chances - (of_chances * chances).sum(-1, keepdim=True)) * scale
        dq[rows] = (of_scores @ keys).transpose(0, 1).to(dq.dtype)
        dk[columns] = shared(of_scores.transpose(1, 2) @ queries).to(dk.dtype)
        dv[columns] = shared(chances.transpose(1, 2) @ of_out).to(dv.dtype)
    return device(dq, query), device(dk, query), device(dv, query)


def mm(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Product of 16-bit matrices with a sum in float32, rounded to `out_dtype`."""
    assert self.dtype == mat2.dtype
    assert out_dtype == self.dtype or (out_dtype == torch.float32 and self.dtype in (torch.float16, torch.bfloat16))
    return (self.float() @ mat2.float()).to(out_dtype)


def mm_out(self: Tensor, mat2: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    assert out.dtype == out_dtype
    return out.copy_(mm(self, mat2, out_dtype))
