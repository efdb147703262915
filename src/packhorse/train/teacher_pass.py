"""The pass before training: the teacher's most probable tokens at each supervised token, stored beside the packs.

Shapes: S supervised tokens of a micro-batch, G hidden width of the teacher, V vocabulary, k kept tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from packhorse.data.packs.loader import make_micro_batch
from packhorse.data.packs.store import Int64, PackStore
from packhorse.data.packs.top_tokens import BLOCK_PACKS, TopTokens
from packhorse.durable import disk_error
from packhorse.train.engine.process_group import own_rank, world_size
from packhorse.train.objectives.divergence import CHUNK_TOKENS
from packhorse.train.objectives.forward import model_inputs
from packhorse.train.objectives.token_loss import head_loss


def missing_blocks(tokens: TopTokens, group: dist.ProcessGroup | None) -> list[int]:
    """Return the blocks that are absent or damaged, equal on every rank, each of which reads a share; a collective.

    Args:
        tokens: Stored tokens.
        group: Group of all ranks on the CPU; None for one process.
    """
    found = torch.zeros(tokens.num_blocks, dtype=torch.int64)
    for block in range(own_rank(), tokens.num_blocks, world_size()):
        found[block] = tokens.is_intact(block)
    if group is not None:
        dist.all_reduce(found, group=group)
    return (found == 0).nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class Passes:
    """Forward passes of a teacher over a split.

    Attributes:
        store: Packs of the split.
        micro_packs: Packs in one forward pass.
        device: Device of the teacher.
        temperature: Temperature of the divergence.
        before_pass: Called before each forward pass; an exception from it ends the passes.
    """

    store: PackStore
    micro_packs: int
    device: torch.device
    temperature: float
    before_pass: Callable[[], None]


def teacher_pass(teacher: nn.Module, tokens: TopTokens, blocks: list[int], passes: Passes) -> None:
    """Store the teacher's most probable tokens in these blocks; each rank takes every n-th block.

    Ranks without a block take empty micro-batches, because a sharded teacher needs all ranks in every forward pass.

    Args:
        teacher: Model with its loss head installed.
        tokens: Where they are stored.
        blocks: Missing blocks, equal on every rank; a later call continues what an exception has ended.
        passes: How the teacher runs over the packs.

    Raises:
        UserError: The disk refuses a block.
    """
    ranks = world_size()
    for first in range(0, len(blocks), ranks):
        own = blocks[first + own_rank() : first + own_rank() + 1]
        packs = np.array(tokens.packs_of(own[0]) if own else (), np.int64)
        # Equally many passes for every block.
        parts = [
            _top_tokens(teacher, tokens, packs[at : at + passes.micro_packs], passes)
            for at in range(0, BLOCK_PACKS, passes.micro_packs)
        ]
        if own:
            ids, log_probabilities = (np.concatenate(column) for column in zip(*parts, strict=True))
            try:
                tokens.write(own[0], ids, log_probabilities)
            except OSError as error:
                raise disk_error(tokens.folder, error) from error
        done = min(first + ranks, len(blocks))
        logging.info("teacher, %s: %d of %d blocks of packs", passes.store.folder.name, done, len(blocks))


def _top_tokens(
    teacher: nn.Module, tokens: TopTokens, packs: Int64, passes: Passes
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return ids and log-probabilities of the most probable tokens, [S, k] each."""
    passes.before_pass()
    passes.store.fetch(packs)
    micro_batch = make_micro_batch(passes.store, packs)
    with torch.no_grad():
        top = head_loss(
            teacher,
            model_inputs(micro_batch, passes.device),
            micro_batch.predicting.to(passes.device),
            partial(top_of_head, kept=tokens.top, vocab_size=tokens.vocab_size, temperature=passes.temperature),
        )
    ids, log_probabilities = top.cpu().numpy()
    return ids.astype(np.int64), log_probabilities


def top_of_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, kept: int, vocab_size: int, temperature: float
) -> Tensor:
    """Return ids and log-probabilities of the most probable tokens, fp32 [2, S, k], without [S, V] logits at once.

    Args:
        hidden: [S, G].
        weight: [V or more, G] of the output head.
        bias: [V or more] or None.
        kept: Tokens to keep at each position (k).
        vocab_size: Ids of the tokenizer (V); rows of the head beyond them belong to no token.
        temperature: Divisor of the logits.
    """
    found = []
    weight, bias = weight[:vocab_size].to(hidden.dtype), None if bias is None else bias[:vocab_size].to(hidden.dtype)
    for part in torch.split(hidden, CHUNK_TOKENS):
        logits = F.linear(part, weight, bias).float()
        top = (logits / temperature).log_softmax(-1).topk(kept)
        found.append(torch.stack([top.indices.float(), top.values]))  # fp32 holds every id below 2^24
    return torch.cat(found, 1)
