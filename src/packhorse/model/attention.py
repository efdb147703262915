"""Attention that keeps packed documents apart, as one function registered with transformers.

Shapes: B rows (always 1: packs are flattened), H query heads, K key/value heads, T tokens, E head width, D documents.

A flattened row holds D documents one after another. Each attends only to itself:

    a a . . .
    a a . . .      `a` and `b` are two documents; `.` is never computed,
    . . b b b      instead of being computed and masked.
    . . b b b
    . . b b b      (each block causal)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from packhorse.errors import UserError
from packhorse.model.compiled_sdpa import sdpa_by_document, window_mask
from packhorse.model.sequence import SequenceGroup, to_own_tokens, to_whole_documents
from packhorse.model_spec.supported import refuse_dropout, uncomputed

Kernel = Literal["sdpa", "varlen"]


@dataclass(frozen=True)
class Documents:
    """Positions of the documents in a flattened row.

    Attributes:
        lengths: Tokens of each document, on the host: the SDPA path slices without waiting for the device.
        cu_seq_lens: Cumulative lengths, int32 [D + 1], on the device.
        max_length: Longest document in tokens.
        sequence: Ranks that share the row; None where this rank has all of it.
        prefixes: Keys and values of prefix tuning, each [1, K, P, E], put before every document, by layer.
    """

    lengths: tuple[int, ...]
    cu_seq_lens: Tensor
    max_length: int
    sequence: SequenceGroup | None = None
    prefixes: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def prefix_length(self) -> int:
        """P, the number of keys and values before each document that have no query."""
        return self.prefixes[0][0].shape[2] if self.prefixes else 0


class Attention(Protocol):
    """query [1, H, T, E], key and value [1, K, T + D P, E] -> [1, T, H, E], within each document and its prefix."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Documents,
        dropout: float,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """Compute attention."""


def register_attention(kernel: Kernel) -> str:
    """Register the attention function with transformers; the returned name goes into `attn_implementation`."""
    return register_kernel(kernel, _KERNELS[kernel])


def register_kernel(kernel: str, attention: Attention) -> str:
    """Register any attention function; see `register_attention`."""
    name = f"packhorse_{kernel}"
    AttentionInterface.register(name, partial(_attend, attention))
    return name


def _attend(
    kernel: Attention,
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
    """Map query [1, H, t, E], key and value [1, K, t, E] to ([1, t, H, E], None); t is this rank's part of the row."""
    documents = _check(attention_mask, other)
    sequence = documents.sequence
    if documents.prefixes:
        layer: int = module.layer_idx  # type: ignore[assignment]
        prefix = documents.prefixes[layer]
        key, value = (_before_each(part, tensor, documents) for part, tensor in zip(prefix, (key, value), strict=True))
    if sequence is None:
        return kernel(query, key, value, documents, dropout, scaling, sliding_window), None
    whole = to_whole_documents(query, key, value, sequence)
    return to_own_tokens(kernel(*whole, documents, dropout, scaling, sliding_window), sequence), None


def _before_each(prefix: Tensor, tensor: Tensor, documents: Documents) -> Tensor:
    """Put prefix [1, K, P, E] before each document of tensor [1, K, T, E]: [1, K, T + D P, E]."""
    cast = prefix.to(tensor.dtype)
    by_document = torch.split(tensor, list(documents.lengths), 2)
    return torch.cat([part for document in by_document for part in (cast, document)], 2)


def _check(attention_mask: Tensor | None, unsupported: dict[str, Any]) -> Documents:
    # A keyword, not a global: recomputed layers run in autograd's threads, long after the forward pass.
    documents = unsupported.get("documents")
    if not isinstance(documents, Documents):
        raise UserError(
            "this architecture does not hand keywords down to its attention layers.",
            "attention then cannot know where packed documents end, and would silently mix them.",
            "choose an architecture that transformers runs through its attention interface (Llama, Qwen, Mistral, …).",
        )
    if attention_mask is not None:
        raise RuntimeError("packed documents were passed with an attention mask, which would let them see each other")
    for name in ("softcap", "s_aux"):
        if unsupported.get(name) is not None:
            raise uncomputed(name)
    return documents


def _per_document_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attend to one document after another with torch's SDPA; exact on any device."""
    if torch.compiler.is_compiling():
        refuse_dropout(dropout)
        device = query.device.type
        # Autocast knows torch's SDPA and not this operator.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        out: Tensor = sdpa_by_document(query, key, value, documents.cu_seq_lens, scaling, window)
        return out
    grouped = query.shape[1] != key.shape[1]
    parts = []
    lengths, before = list(documents.lengths), documents.prefix_length
    key_lengths = [length + before for length in lengths]
    by_document = (
        torch.split(tensor, sizes, 2) for tensor, sizes in ((query, lengths), (key, key_lengths), (value, key_lengths))
    )
    for q, k, v in zip(*by_document, strict=True):
        mask = window_mask(q.shape[2], before, window, q.device)
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attend with torch's varlen kernel (CUDA, 16 bit), one launch for all documents."""
    refuse_dropout(dropout)
    # Under autocast rotary embeddings convert q and k to fp32, and autocast does not know this kernel.
    query, key = query.to(value.dtype), key.to(value.dtype)
    width = value.shape[3]
    scaling = scaling or query.shape[3] ** -0.5
    query, key, value = _of_one_width(query, key, value)
    ends, before = documents.cu_seq_lens, documents.prefix_length
    # With more keys than queries, the kernel's causal mask aligns the last query with the last key.
    key_ends = ends + before * torch.arange(len(ends), device=ends.device, dtype=ends.dtype) if before else ends
    out = varlen_attn(
        # A view both ways: the backward pass of query[0] would fill a tensor with zeros and copy.
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        ends,
        key_ends,
        documents.max_length,
        documents.max_length + before,
        scale=scaling,
        window_size=((window or 0) - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[..., :width].unsqueeze(0)


def _of_one_width(*tensors: Tensor) -> list[Tensor]:
    """Pad heads with zeros, which change no product, to the one width that the kernel takes: a multiple of 8."""
    width = -(-max(tensor.shape[3] for tensor in tensors) // 8) * 8
    return [F.pad(tensor, (0, width - tensor.shape[3])) if tensor.shape[3] < width else tensor for tensor in tensors]


_KERNELS: Mapping[Kernel, Attention] = {"sdpa": _per_document_sdpa, "varlen": _varlen}
