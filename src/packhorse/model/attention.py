"""Attention that keeps packed documents apart, as one function registered with transformers.

Shapes: B rows (always 1: packs are flattened), H query heads, K key/value heads, T tokens, E head width, D documents.

A flattened row holds D documents one after another. Each attends to itself alone:

    a a . . .
    a a . . .      `a` and `b` are two documents; `.` is never computed,
    . . b b b      rather than computed and masked away.
    . . b b b
    . . b b b      (each block causal)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from packhorse.errors import UserError

Kernel = Literal["sdpa", "varlen"]


@dataclass(frozen=True)
class Documents:
    """Where the documents of a flattened row lie.

    Attributes:
        lengths: Tokens of each document, on the host: the SDPA path slices without asking the device.
        cu_seq_lens: Cumulative lengths, int32 [D + 1], on the device.
        max_length: Longest document in tokens.
    """

    lengths: tuple[int, ...]
    cu_seq_lens: Tensor
    max_length: int


def register_attention(kernel: Kernel) -> str:
    """Registers the attention function with transformers; the returned name goes into `attn_implementation`."""
    name = f"packhorse_{kernel}"
    AttentionInterface.register(name, _per_document_sdpa if kernel == "sdpa" else _varlen)
    return name


def _check(attention_mask: Tensor | None, unsupported: dict[str, Any]) -> Documents:
    # A keyword, not a global: recomputed layers run in autograd's own threads, long after the forward pass.
    documents = unsupported.get("documents")
    if not isinstance(documents, Documents):
        raise UserError(
            "this architecture does not hand keywords down to its attention layers.",
            "attention then cannot know where packed documents end, and would mix them without a word.",
            "choose an architecture that transformers runs through its attention interface (Llama, Qwen, Mistral, …).",
        )
    if attention_mask is not None:
        raise RuntimeError("an attention mask came with packed documents; it would say that they see each other")
    for name in ("softcap", "s_aux"):
        if unsupported.get(name) is not None:
            raise UserError(
                f"this architecture's attention uses {name}, which Packhorse's packed attention does not compute.",
                "leaving it out would train another model without a word.",
                "choose a model without it (Llama, Qwen, Mistral, Phi and most others).",
            )
    return documents


def _per_document_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **other: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """query [1, H, T, E], key and value [1, K, T, E] -> ([1, T, H, E], None); exact on any device."""
    documents = _check(attention_mask, other)
    grouped = query.shape[1] != key.shape[1]
    parts = []
    lengths = list(documents.lengths)
    by_document = (torch.split(tensor, lengths, 2) for tensor in (query, key, value))
    for q, k, v in zip(*by_document, strict=True):
        mask = _window_mask(q.shape[2], sliding_window, q.device)
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where a query may look, [T, T]; None where plain causal attention is the same."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _varlen(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **other: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """As above through torch's varlen kernel (CUDA, 16 bit): one launch for all documents."""
    documents = _check(attention_mask, other)
    if dropout:
        raise UserError(
            f"the model's attention_dropout is {dropout}, which the varlen kernel does not have.",
            "leaving it out would train another model without a word.",
            "set model.attention to sdpa, or attention_dropout to 0 in the model's config.json.",
        )
    # Under autocast rotary embeddings lift q and k to fp32, and this kernel is not one that autocast knows.
    query, key = query.to(value.dtype), key.to(value.dtype)
    ends = documents.cu_seq_lens
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        ends,
        ends,
        documents.max_length,
        documents.max_length,
        scale=scaling,
        window_size=((sliding_window or 0) - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0), None
