"""Assign packs to optimizer steps: a pure function of (pack costs, packs per step, seed, order, step)."""

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
COUNTED_STEPS: Final = 2000


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Order of the packs, independent of the world size.

    In each epoch the packs are shuffled, sorted by cost within windows of 32 steps and cut into steps, and the steps
    are shuffled: packs of similar cost share a step, so that no device waits for another. Packs that do not fill a step
    come last in the epoch, together with null packs. With `in_order`, packs are not shuffled: every epoch takes them in
    their order, and only within a step they are dealt by cost.

    Attributes:
        pack_costs: int64 [P], sum of squared document lengths of each pack.
        packs_per_step: Packs in one optimizer step, over all devices.
        seed: Seed of the order.
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
        """Number of packs (P)."""
        return len(self.pack_costs)

    @property
    def num_steps_per_epoch(self) -> int:
        """Number of steps that consume each pack once."""
        return -(-self.num_packs // self.packs_per_step)

    def packs(self, step: int) -> Int64:
        """Return int64 [packs_per_step], the packs of a step counted from the start of training; -1 is a null pack."""
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
        """Deal the packs of a step to ranks and micro-steps, balanced by cost; null packs fill the rest.

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
        # Cached for one epoch only, so that a step needs no new shuffle; the function stays pure.
        shuffled = self._epochs.get(epoch)
        if shuffled is None:
            shuffled = _shuffles(self.seed, epoch, self.num_packs, self.num_packs // self.packs_per_step)
            self._epochs.clear()
            self._epochs[epoch] = shuffled
        return shuffled

    def _deal(self, packs: Int64, hands: int, most: int) -> list[Int64]:
        """Deal packs to hands of at most `most` packs, of nearly equal cost; return the most expensive first."""
        costs = self.pack_costs[packs]
        dealt: list[list[int]] = [[] for _ in range(hands)]
        totals = [0] * hands
        cheapest = [(0, hand) for hand in range(hands)]
        # Greedy (longest processing time first): the expensive packs go first, while later cheap ones can still even
        # out the totals. Ties are broken by pack and hand number, so that every rank computes the same result.
        for at in np.lexsort((packs, -costs)).tolist():
            total, hand = heapq.heappop(cheapest)
            dealt[hand].append(at)
            totals[hand] = total + int(costs[at])
            # A full hand leaves the heap, although it may be the cheapest: all hands have equally many slots.
            if len(dealt[hand]) < most:
                heapq.heappush(cheapest, (totals[hand], hand))
        # Sorted by cost, micro-step n has a similar cost on every rank, so that no rank waits long for another.
        return [packs[dealt[hand]] for hand in sorted(range(hands), key=lambda hand: (-totals[hand], hand))]


def step_notes(num_packs: int, packs_per_step: int) -> tuple[str, ...]:
    """Return a sentence for the user if a step takes more packs than there are."""
    if num_packs >= packs_per_step:
        return ()
    return (
        f"a step is larger than an epoch: batch.packs is {packs_per_step}, and the train rows fill {num_packs} packs, "
        f"so every step takes all rows once; set batch.packs to {num_packs} or less",
    )


def units_of_steps(plan: BatchPlan, pack_units: Int64) -> tuple[float, int, int]:
    """Return the mean, the least and the most units (rows of two documents) of the full steps of the first epoch.

    Args:
        plan: Order of the packs.
        pack_units: int64 [P], units of each pack.
    """
    num_steps = max(1, min(plan.num_packs // plan.packs_per_step, COUNTED_STEPS))
    packs = (plan.packs(step) for step in range(num_steps))
    counts = [int(pack_units[of_step[of_step != NULL_PACK]].sum()) for of_step in packs]
    return sum(counts) / num_steps, min(counts), max(counts)


def unit_note(unit: str, units: tuple[float, int, int]) -> str:
    """Return a sentence about the units of a step, from `units_of_steps`."""
    mean, least, most = units
    return f"{mean:.3g} {unit}s per step on average, {least:,} to {most:,}; each weighs the same in an epoch"


def _filled_up(packs: Int64, size: int) -> Int64:
    return np.concatenate([packs, np.full(size - len(packs), NULL_PACK, np.int64)])


def _shuffles(seed: int, epoch: int, num_packs: int, num_steps: int) -> tuple[Int64, Int64]:
    stream = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return random_order(stream.random_raw(num_packs)), random_order(stream.random_raw(num_steps))
