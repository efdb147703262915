"""Sequence parallelism: ranks share the tokens of one row, and exchange them for heads inside attention.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509). Shapes: S ranks of a group, T tokens of the row, t = T / S of each rank,
H query heads, K key/value heads, E head width.

          tokens 0..t   t..2t                        tokens 0..t   t..2t
    head 0   rank 0     rank 1     all-to-all    head 0   rank 0     rank 0
    head 1   rank 0     rank 1    ----------->   head 1   rank 1     rank 1

Embeddings, norms and MLPs see one token at a time, so a part of the row is enough for them. Attention runs over whole
documents, for a part of the heads, and a second exchange returns each token's heads to its rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from math import lcm

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

from packhorse.recipe.rules.model import unshared_heads


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share each row.

    Attributes:
        rank: Rank of this process in the group; it holds part `rank` of the row.
        size: S, the number of ranks.
        group: Process group of these ranks.
    """

    rank: int
    size: int
    group: dist.ProcessGroup

    def sum(self, value: Tensor) -> float:
        """Sum a scalar over the group, in fp64; equal on every rank."""
        total = value.detach().double()
        dist.all_reduce(total, group=self.group)
        return float(total)


def join_sequence_group(size: int, timeout: timedelta) -> SequenceGroup | None:
    """Group neighbouring ranks, a collective over all ranks; return None where each rank has whole rows."""
    if size == 1:
        return None
    group, _ = dist.new_subgroups(size, timeout=timeout)  # type: ignore[no-untyped-call]
    return SequenceGroup(dist.get_rank(group), size, group)


def to_whole_documents(
    query: Tensor, key: Tensor, value: Tensor, sequence: SequenceGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange every head of this rank's tokens for this rank's heads of every token, in one all-to-all.

    Args:
        query: [1, H, t, E].
        key: [1, K, t, E].
        value: [1, K, t, Ev].
        sequence: Ranks that hold the other parts.

    Returns:
        query [1, H / S, T, E], key and value [1, lcm(K, S) / S, T, …]: key/value heads are repeated where S does not
        divide them, so that each query head still finds its own by the usual rule.

    Raises:
        UserError: S does not divide H.
    """
    size, heads = sequence.size, key.shape[1]
    if query.shape[1] % size:
        raise unshared_heads(size, query.shape[1], dist.get_world_size())
    repeats = lcm(heads, size) // heads
    key, value = (tensor.repeat_interleave(repeats, 1) if repeats > 1 else tensor for tensor in (key, value))
    # Under autocast rotary embeddings convert q and k to fp32; attention runs in 16 bit, which is half the traffic.
    by_rank = [_heads_by_rank(tensor.to(value.dtype), size) for tensor in (query, key, value)]
    received = _exchange(torch.cat(by_rank, 2), sequence)
    # Parts arrive in the order of ranks, which is that of the tokens.
    parts = torch.split(received.flatten(0, 1), [part.shape[2] for part in by_rank], 1)
    widths = (query.shape[3], key.shape[3], value.shape[3])
    q, k, v = (
        part.reshape(len(part), -1, width).transpose(0, 1)[None] for part, width in zip(parts, widths, strict=True)
    )
    return q, k, v


def _heads_by_rank(tensor: Tensor, size: int) -> Tensor:
    """Reorder [1, H, t, E] to [S, t, H / S x E]: the part for each rank, its heads next to each other."""
    _, heads, tokens, width = tensor.shape
    return tensor.reshape(size, heads // size, tokens, width).transpose(1, 2).flatten(2)


def to_own_tokens(out: Tensor, sequence: SequenceGroup) -> Tensor:
    """Exchange this rank's heads of every token, [1, T, H / S, E], for all heads of its tokens, [1, t, H, E]."""
    _, tokens, heads, width = out.shape
    sent = out.reshape(sequence.size, tokens // sequence.size, heads, width).contiguous()
    return _exchange(sent, sequence).transpose(0, 1).flatten(1, 2)[None]


def _exchange(sent: Tensor, sequence: SequenceGroup) -> Tensor:
    """Send part j of [S, …] to rank j and receive part i from rank i; the gradient takes the opposite direction."""
    # Wait here, so that kernels and hooks on saved tensors see a plain tensor and not an asynchronous one.
    received: Tensor = wait_tensor(all_to_all_single(sent, None, None, sequence.group))  # type: ignore[no-untyped-call]
    return received
