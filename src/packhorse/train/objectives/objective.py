"""What a run minimises: a sum of losses per micro-batch, and figures that explain it.

    loss of a step = sum of unit losses over all ranks and micro-batches / divisor of the step

A unit is a supervised token (sft), a preference pair or an answer. The documents of a pair lie in the same pack, so
each unit is complete in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from packhorse.data.packs.loader import MicroBatch
from packhorse.model.sequence import SequenceGroup
from packhorse.track.meter import Figures
from packhorse.train.engine.engine import Engine
from packhorse.train.objectives.forward import micro_batch_loss


class MicroBatchLoss(NamedTuple):
    """Result of one forward pass.

    Attributes:
        total: Sum of unit losses, scalar fp32, with a gradient to every trained weight. Where ranks share a
            micro-batch, the sum over these ranks counts.
        figures: Metric key to sum and number of the figure, float64 [2]; an objective has equal keys in every pass.
    """

    total: Tensor
    figures: Mapping[str, Tensor]


class Objective(Protocol):
    """Computes the loss of micro-batches."""

    def __call__(
        self, model: nn.Module, micro_batch: MicroBatch, device: torch.device, sequence: SequenceGroup | None = None
    ) -> MicroBatchLoss:
        """Run the model on one micro-batch; `sequence`: ranks that share it."""
        ...

    def for_step(
        self, engine: Engine, micro_batches: Iterable[MicroBatch], sequence: SequenceGroup | None
    ) -> Objective:
        """Return the objective with what it needs to know of this rank's micro-batches and all others; a collective."""
        ...


class OfMicroBatch:
    """Base of objectives that need to know nothing beyond a micro-batch."""

    def for_step(self, engine: Engine, micro_batches: Iterable[MicroBatch], sequence: SequenceGroup | None) -> Self:
        """Return the objective itself."""
        return self


class TokenObjective(OfMicroBatch):
    """Cross-entropy of each supervised token (sft)."""

    def __call__(
        self, model: nn.Module, micro_batch: MicroBatch, device: torch.device, sequence: SequenceGroup | None = None
    ) -> MicroBatchLoss:
        """Return the sum of token losses, without figures."""
        return MicroBatchLoss(micro_batch_loss(model, micro_batch, device, sequence), {})


class Tally:
    """Adds up figures of micro-batches on the device, until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Add the figures of one micro-batch; does not wait for the device."""
        for name, value in figures.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self, engine: Engine) -> Figures:
        """Return the mean of each figure over all ranks, and start again; a collective where there are figures.

        A figure without units, such as the reward of desirable answers where there was none, is absent.
        """
        if not self._sums:
            return {}
        names, own = list(self._sums), torch.stack(list(self._sums.values())).flatten().tolist()
        self._sums = {}
        sums = engine.sum_over_ranks(own)
        return {name: total / number for name, total, number in zip(names, sums[::2], sums[1::2]) if number}
