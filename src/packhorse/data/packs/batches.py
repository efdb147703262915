"""Which packs each optimizer step consumes: a pure function of (pack costs, packs per step, seed, order, step)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.packs.order import random_order

Int64 = NDArray[np.int64]

NULL_PACK: Final = -1
WINDOW_STEPS: Final = 32


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The order of packs, whatever the world size.

    Each epoch the packs are shuffled, sorted by cost within windows of 32 steps and cut into steps, and the
    steps are shuffled: packs of like cost share a step, so no device waits for another. Packs that do not
    fill a step come last in the epoch, beside null packs. Packs in order are not shuffled: every epoch takes them as
    they come, and only within a step are they dealt by cost.

    Attributes:
        pack_costs: int64 [P], sum of squared document lengths of each pack.
        packs_per_step: Packs in one optimizer step, over all devices.
        seed: Another seed gives another order.
        in_order: Whether the order of steps is the order of packs.
    """

    pack_costs: Int64
    packs_per_step: int
    seed: int
    in_order: bool = False
    _epochs: dict[int, tuple[Int64, Int64]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.pack_costs) == 0 or self.packs_per_step < 1:
            raise ValueError(f"{len(self.pack_costs)} packs, {self.packs_per_step} in a step")

    @property
    def num_packs(self) -> int:
        """P."""
        return len(self.pack_costs)

    @property
    def num_steps_per_epoch(self) -> int:
        """Steps that see each pack once."""
        return -(-self.num_packs // self.packs_per_step)

    def packs(self, step: int) -> Int64:
        """Return int64 [packs_per_step]: the packs of a step counted from the start of training, -1 for null packs."""
        epoch, step_of_epoch = divmod(step, self.num_steps_per_epoch)
        size = self.packs_per_step
        if self.in_order:
            return _filled_up(np.arange(step_of_epoch * size, min((step_of_epoch + 1) * size, self.num_packs)), size)
        shuffled, shuffled_steps = self._shuffled(epoch)
        if step_of_epoch == len(shuffled_steps):
            return _filled_up(shuffled[len(shuffled_steps) * size :], size)
        window, step_of_window = divmod(int(shuffled_steps[step_of_epoch]), WINDOW_STEPS)
        end = min((window + 1) * WINDOW_STEPS, len(shuffled_steps)) * size
        packs = shuffled[window * WINDOW_STEPS * size : end]
        by_cost = np.argsort(self.pack_costs[packs], kind="stable")
        return packs[by_cost[step_of_window * size : (step_of_window + 1) * size]]

    def share(self, step: int, world_size: int, accumulation_steps: int) -> Int64:
        """Deal the packs of a step to ranks and micro-steps, balanced by cost.

        Null packs fill up where the packs cannot be shared equally.

        Returns:
            int64 [world_size, accumulation_steps, micro].
        """
        packs = self.packs(step)
        packs = packs[packs != NULL_PACK]
        micro = -(-self.packs_per_step // (world_size * accumulation_steps))
        shared = np.full((world_size, accumulation_steps, micro), NULL_PACK, np.int64)
        for rank, of_rank in enumerate(self._deal(packs, world_size, accumulation_steps * micro)):
            for micro_step, of_micro_step in enumerate(self._deal(of_rank, accumulation_steps, micro)):
                shared[rank, micro_step, : len(of_micro_step)] = of_micro_step
        return shared

    def _shuffled(self, epoch: int) -> tuple[Int64, Int64]:
        """Return the packs, int64 [P], and the full steps, int64 [P // packs_per_step], in shuffled order."""
        # Kept for one epoch only: a cache of a pure function, so that a step costs no new shuffle.
        found = self._epochs.get(epoch)
        if found is None:
            found = _shuffles(self.seed, epoch, self.num_packs, self.num_packs // self.packs_per_step)
            self._epochs.clear()
            self._epochs[epoch] = found
        return found

    def _deal(self, packs: Int64, hands: int, most: int) -> list[Int64]:
        """Deal the dearest pack first, to the cheapest hand that holds fewer than `most`; dearest hand first."""
        costs = self.pack_costs[packs]
        dealt: list[list[int]] = [[] for _ in range(hands)]
        totals = [0] * hands
        cheapest = [(0, hand) for hand in range(hands)]
        for at in np.lexsort((packs, -costs)).tolist():
            total, hand = heapq.heappop(cheapest)
            dealt[hand].append(at)
            totals[hand] = total + int(costs[at])
            if len(dealt[hand]) < most:
                heapq.heappush(cheapest, (totals[hand], hand))
        return [packs[dealt[hand]] for hand in sorted(range(hands), key=lambda hand: (-totals[hand], hand))]


def _filled_up(packs: Int64, size: int) -> Int64:
    return np.concatenate([packs, np.full(size - len(packs), NULL_PACK, np.int64)])


def _shuffles(seed: int, epoch: int, num_packs: int, num_steps: int) -> tuple[Int64, Int64]:
    stream = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return random_order(stream.random_raw(num_packs)), random_order(stream.random_raw(num_steps))
