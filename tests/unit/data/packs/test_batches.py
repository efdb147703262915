from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from packhorse.data.packs.batches import BatchPlan

PLANS = st.builds(
    lambda costs, size, seed, in_order: BatchPlan(np.array(costs), size, seed, in_order),
    st.lists(st.integers(1, 10_000), min_size=1, max_size=300),
    st.integers(1, 9),
    st.integers(0, 5),
    st.booleans(),
)


def epoch_steps(plan: BatchPlan, epoch: int) -> list[list[int]]:
    first = epoch * plan.num_steps_per_epoch
    return [plan.packs(first + step).tolist() for step in range(plan.num_steps_per_epoch)]


@given(PLANS, st.integers(0, 3))
def test_each_pack_once_in_an_epoch_and_null_packs_only_in_its_last_step(plan: BatchPlan, epoch: int) -> None:
    steps = epoch_steps(plan, epoch)
    packs = [pack for step in steps for pack in step if pack >= 0]
    assert sorted(packs) == list(range(plan.num_packs))
    assert all(len(step) == plan.packs_per_step for step in steps)
    assert all(-1 not in step for step in steps[:-1])


@given(PLANS, st.integers(0, 40), st.sampled_from([1, 2, 3, 8]), st.integers(1, 4))
def test_same_packs_for_any_world(plan: BatchPlan, step: int, world: int, accumulation: int) -> None:
    shared = plan.share(step, world, accumulation)
    assert shared.shape == (world, accumulation, -(-plan.packs_per_step // (world * accumulation)))
    expected = plan.packs(step)
    assert sorted(shared[shared >= 0].tolist()) == sorted(expected[expected >= 0].tolist())


@given(PLANS, st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_step_does_not_depend_on_what_was_asked_before(plan: BatchPlan, steps: list[int]) -> None:
    fresh = [
        BatchPlan(plan.pack_costs, plan.packs_per_step, plan.seed, plan.in_order).packs(step).tolist() for step in steps
    ]
    walked = [plan.packs(step).tolist() for step in range(max(steps) + 1)]
    assert [walked[step] for step in steps] == fresh
    assert [plan.packs(step).tolist() for step in steps] == fresh


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=100), st.integers(1, 9), st.integers(0, 3))
def test_packs_in_order_are_taken_in_order_in_every_epoch(costs: list[int], size: int, epoch: int) -> None:
    plan = BatchPlan(np.array(costs), size, 3, in_order=True)
    packs = [pack for step in epoch_steps(plan, epoch) for pack in step]
    assert packs[: len(costs)] == list(range(len(costs)))
    assert set(packs[len(costs) :]) <= {-1}


def test_epochs_and_seeds_differ() -> None:
    plan = BatchPlan(np.arange(1, 101), 4, 1)
    other = BatchPlan(np.arange(1, 101), 4, 2)
    assert epoch_steps(plan, 0) != epoch_steps(plan, 1)
    assert epoch_steps(plan, 0) != epoch_steps(other, 0)


def test_order_is_the_same_on_every_machine() -> None:
    # Written down once: a changed order would make a resumed run see packs twice.
    assert [BatchPlan(np.array([5, 1, 4, 2, 3]), 2, 7).packs(step).tolist() for step in range(3)] == PINNED


def test_packs_of_like_cost_share_a_step() -> None:
    costs = np.random.default_rng(0).lognormal(10, 1.5, 2048).astype(np.int64)
    plan = BatchPlan(costs, 64, 0)

    def imbalance(steps: list[np.ndarray]) -> float:
        per_rank = [costs[step].reshape(8, 8).sum(1) for step in steps]
        return float(np.mean([of_step.max() / of_step.mean() for of_step in per_rank]))

    dealt = [plan.share(step, 8, 2).reshape(8, 8).ravel() for step in range(32)]
    at_random = list(np.random.default_rng(1).permutation(2048).reshape(32, 64))
    assert imbalance(dealt) < 1.05
    assert imbalance(at_random) > 1.5


PINNED = [[4, 2], [1, 3], [0, -1]]
