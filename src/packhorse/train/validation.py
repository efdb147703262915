"""Passes over a whole store outside the step loop, and the validation loss: every unit of its packs once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from packhorse.data.packs.loader import MicroBatch, make_micro_batch
from packhorse.data.packs.store import PackStore
from packhorse.model.sequence import SequenceGroup
from packhorse.track.meter import Figures, evaluation_figures
from packhorse.train.engine.engine import Engine
from packhorse.train.objectives.objective import Objective, Tally


@dataclass(frozen=True)
class StorePasses:
    """This rank's passes over a store.

    Ranks take packs in turn; ranks that run out take empty micro-batches, because a sharded model needs all ranks in
    every forward pass.

    Attributes:
        store: Packs of a split.
        micro_packs: Packs in one forward pass.
        data_rank: Number of this process among those that take different packs.
        data_ranks: How many such processes there are.
        before_pass: Called before each pass, equally often on every rank; an exception from it ends the passes.
    """

    store: PackStore
    micro_packs: int
    data_rank: int
    data_ranks: int
    before_pass: Callable[[], None]

    @property
    def packs_per_pass(self) -> int:
        """Packs of all ranks in one forward pass."""
        return self.data_ranks * self.micro_packs

    def micro_batches(self, first: int = 0, end: int | None = None) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of packs `first` to `end`."""
        end = self.store.num_packs if end is None else end
        for at in range(first, end, self.packs_per_pass):
            self.before_pass()
            own = np.arange(at + self.data_rank * self.micro_packs, at + (self.data_rank + 1) * self.micro_packs)
            packs = own[own < end]
            self.store.fetch(packs)
            yield make_micro_batch(self.store, packs)


def validate(engine: Engine, objective: Objective, passes: StorePasses, sequence: SequenceGroup | None) -> Figures:
    """Return the loss per unit over the whole store, and the objective's figures, as `evaluation/...`.

    Perplexity belongs to a loss per token, which has no figures.

    Args:
        engine: The engine with the wrapped model; sums over all processes.
        objective: Computes the loss of a micro-batch.
        passes: Passes over the validation packs.
        sequence: Processes that share each pack with this one.
    """
    total, tally = 0.0, Tally()
    with torch.no_grad(), evaluating(engine.model):
        objective = objective.for_step(engine, passes.micro_batches(), sequence)
        for micro_batch in passes.micro_batches():
            loss, sums = objective(engine.model, micro_batch, engine.device, sequence)
            total += float(loss)
            tally.add(sums)
    (summed,) = engine.sum_over_ranks([total])
    figures = {f"evaluation/{name.rpartition('/')[2]}": value for name, value in tally.take(engine).items()}
    mean = summed / passes.store.num_units
    return (figures | {"evaluation/loss": mean}) if figures else evaluation_figures(mean)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    model.eval()
    try:
        yield
    finally:
        model.train()
