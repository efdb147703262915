"""Sequence parallelism: ranks share the tokens of one row, and trade them for heads inside attention.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509). Shapes: S ranks of a group, T tokens of the row, t = T / S of each rank,
H query heads, K key/value heads, E head width.

          tokens 0..t   t..2t                        tokens 0..t   t..2t
    head 0   rank 0     rank 1     all-to-all    head 0   rank 0     rank 0
    head 1   rank 0     rank 1    ----------->   head 1   rank 1     rank 1

Embeddings, norms and MLPs see one token at a time, so a part of the row is enough for them. Attention then runs over
whole documents, for a part of the heads, and a second exchange brings each token's heads home.
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
        rank: This process's place in the group; it holds part `rank` of the row.
        size: S.
        group: Their process group.
    """

    rank: int
    size: int
    group: dist.ProcessGroup

    def sum(self, value: Tensor) -> float:
        """Adds up a number over the group, in fp64; every rank gets the same."""
        total = value.detach().double()
        dist.all_reduce(total, group=self.group)
        return float(total)


def join_sequence_group(size: int, timeout: timedelta) -> SequenceGroup | None:
    """Makes groups of neighbours in rank, a collective over all ranks; None where each rank has whole rows.

    Args:
        size: S; divides the number of ranks.
        timeout: How long an exchange may wait for another rank.
    """
    if size == 1:
        return None
    group, _ = dist.new_subgroups(size, timeout=timeout)  # type: ignore[no-untyped-call]
    return SequenceGroup(dist.get_rank(group), size, group)


def to_whole_documents(
    query: Tensor, key: Tensor, value: Tensor, sequence: SequenceGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """From every head of this rank's tokens to this rank's heads of every token, in one exchange.

    Args:
        query: [1, H, t, E].
        key: [1, K, t, E].
        value: [1, K, t, Ev].
        sequence: The ranks that hold the other parts.

    Returns:
        query [1, H / S, T, E], key and value [1, lcm(K, S) / S, T, …]: key/value heads that S does not divide are
        repeated, and query heads find theirs by the same rule as before.

    Raises:
        UserError: S does not divide H.
    """
    size, heads = sequence.size, key.shape[1]
    if query.shape[1] % size:
        raise unshared_heads(size, query.shape[1], dist.get_world_size())
    repeats = lcm(heads, size) // heads
    key, value = (tensor.repeat_interleave(repeats, 1) if repeats > 1 else tensor for tensor in (key, value))
    # Under autocast rotary embeddings lift q and k to fp32, and attention itself is in 16 bit: half the traffic.
    by_rank = [_heads_by_rank(tensor.to(value.dtype), size) for tensor in (query, key, value)]
    received = _exchange(torch.cat(by_rank, 2), sequence)
    # Parts come in the order of ranks, which is that of the tokens.
    parts = torch.split(received.flatten(0, 1), [part.shape[2] for part in by_rank], 1)
    widths = (query.shape[3], key.shape[3], value.shape[3])
    q, k, v = (
        part.reshape(len(part), -1, width).transpose(0, 1)[None] for part, width in zip(parts, widths, strict=True)
    )
    return q, k, v


def _heads_by_rank(tensor: Tensor, size: int) -> Tensor:
    """[1, H, t, E] -> [S, t, H / S x E]: what each rank is sent, its heads side by side."""
    _, heads, tokens, width = tensor.shape
    return tensor.reshape(size, heads // size, tokens, width).transpose(1, 2).flatten(2)


def to_own_tokens(out: Tensor, sequence: SequenceGroup) -> Tensor:
    """Back again: this rank's heads of every token, [1, T, H / S, E], to all heads of its tokens, [1, t, H, E]."""
    _, tokens, heads, width = out.shape
    sent = out.reshape(sequence.size, tokens // sequence.size, heads, width).contiguous()
    return _exchange(sent, sequence).transpose(0, 1).flatten(1, 2)[None]


def _exchange(sent: Tensor, sequence: SequenceGroup) -> Tensor:
    """[S, …]: the j-th part goes to rank j, and the i-th that comes is from rank i; its gradient goes back that way."""
    # Waited for here: kernels and hooks on saved tensors then see a plain tensor, not a promise of one.
    received: Tensor = wait_tensor(all_to_all_single(sent, None, None, sequence.group))  # type: ignore[no-untyped-call]
    return received
