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
    store: PackStore,
    micro_packs: int,
    data_rank: int,
    data_ranks: int,
    sequence: SequenceGroup | None,
    before_pass: Callable[[], None],
) -> float:
    """Return nats per supervised token over the whole store.

    Ranks take packs in turn; ranks that run out take empty micro-batches, because a sharded model needs all ranks in
    every forward pass.

    Args:
        engine: The engine with the wrapped model; sums over all processes.
        store: Validation packs.
        micro_packs: Packs in one forward pass.
        data_rank: Number of this process among those that take different packs.
        data_ranks: How many such processes there are.
        sequence: Processes that share each pack with this one.
        before_pass: Called before each pass, equally often on every rank; an exception from it ends the evaluation.
    """
    per_pass = data_ranks * micro_packs
    total = 0.0
    with torch.no_grad(), evaluating(engine.model):
        for first in range(0, store.num_packs, per_pass):
            before_pass()
            own = np.arange(first + data_rank * micro_packs, first + (data_rank + 1) * micro_packs)
            packs = own[own < store.num_packs]
            store.fetch(packs)
            micro_batch = make_micro_batch(store, packs)
            total += float(micro_batch_loss(engine.model, micro_batch, engine.device, sequence))
    (summed,) = engine.sum_over_ranks([total])
    return summed / int(store.pack_labels.sum())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    model.eval()
    try:
        yield
    finally:
        model.train()
