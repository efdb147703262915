"""Validation loss during training: every supervised token of the validation packs once, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from packhorse.data.packs.loader import make_micro_batch
from packhorse.data.packs.store import PackStore
from packhorse.model.sequence import SequenceGroup
from packhorse.train.engine.engine import Engine
from packhorse.train.objectives.forward import micro_batch_loss


def validation_loss(
    engine: Engine,
    model: nn.Module,
    store: PackStore,
    micro_packs: int,
    rank: int,
    world: int,
    sequence: SequenceGroup | None,
    go_on: Callable[[], None] = lambda: None,
) -> float:
    """Nats per supervised token over the whole store.

    Packs are dealt to the ranks in turn; ranks that run out take empty micro-batches, because a sharded model needs
    all ranks in every forward pass.

    Args:
        engine: Adds up over all processes.
        model: The wrapped model.
        store: Validation packs.
        micro_packs: Packs in one forward pass.
        rank: This process's number among those that take other packs than it does.
        world: How many such there are.
        sequence: The processes that share its packs.
        go_on: Called before each pass, on every rank as often; what it raises ends the evaluation.
    """
    per_pass = world * micro_packs
    total = 0.0
    with torch.no_grad(), _evaluating(model):
        for first in range(0, store.num_packs, per_pass):
            go_on()
            mine = np.arange(first + rank * micro_packs, first + (rank + 1) * micro_packs)
            packs = mine[mine < store.num_packs]
            store.fetch(packs)
            micro_batch = make_micro_batch(store, packs)
            total += float(micro_batch_loss(model, micro_batch, engine.device, sequence))
    (summed,) = engine.sum_over_ranks([total])
    return summed / int(store.pack_labels.sum())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()
