from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.data.packs.packing import pack_lengths, pack_mixed


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The textbook loop, one document at a time: rooms left."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=None)
        if room is None:
            rooms.append(capacity - length)
        else:
            rooms[rooms.index(room)] = room - length
    return sorted(rooms)


def packs_of(lengths: list[int], capacity: int) -> list[list[int]]:
    packing = pack_lengths(np.array(lengths, np.int64), capacity)
    return [part.tolist() for part in np.split(packing.order, packing.offsets[1:-1])] if lengths else []


def test_drawn_example() -> None:
    packing = pack_lengths(np.array([5, 4, 3, 3, 2, 1]), 6)
    assert packing.order.tolist() == [0, 5, 1, 4, 2, 3]
    assert packing.offsets.tolist() == [0, 2, 4, 6]


@given(st.integers(1, 40).flatmap(lambda t: st.tuples(st.just(t), st.lists(st.integers(1, t), max_size=80))))
def test_each_document_once_and_as_full_as_the_textbook(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    packs = packs_of(lengths, capacity)
    assert sorted(document for pack in packs for document in pack) == list(range(len(lengths)))
    rooms = [capacity - sum(lengths[document] for document in pack) for pack in packs]
    assert min(rooms, default=0) >= 0
    assert sorted(rooms) == best_fit_decreasing(lengths, capacity)


@given(st.lists(st.integers(1, 30), max_size=60))
def test_same_lengths_same_packing(lengths: list[int]) -> None:
    assert packs_of(lengths, 32) == packs_of(lengths, 32)


@pytest.mark.parametrize("capacity", [2048, 4096, 8192])
def test_fill_of_real_looking_lengths(capacity: int) -> None:
    drawn = np.random.default_rng(0).lognormal(np.log(350), 0.9, 200_000)
    lengths = np.clip(drawn, 8, min(capacity, 4096)).astype(np.int64)
    packing = pack_lengths(lengths, capacity)
    assert lengths.sum() / (packing.num_packs * capacity) >= 0.9995


@pytest.mark.parametrize("lengths", [[0], [9], [-1, 3]], ids=["empty", "too long", "negative"])
def test_lengths_that_cannot_be_packed(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="outside 1 to 8"):
        pack_lengths(np.array(lengths), 8)


@given(
    st.integers(1, 40).flatmap(lambda t: st.tuples(st.just(t), st.lists(st.integers(1, t), max_size=80))),
    st.integers(0, 5),
)
def test_mixed_packs_hold_each_document_once_and_never_too_much(case: tuple[int, list[int]], seed: int) -> None:
    capacity, lengths = case
    given_lengths = np.array(lengths, np.int64)
    packing = pack_mixed(given_lengths, capacity, seed)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    for pack in np.split(packing.order, packing.offsets[1:-1]):
        assert given_lengths[pack].sum() <= capacity
    assert (pack_mixed(given_lengths, capacity, seed).order == packing.order).all()


def test_mixed_packs_are_samples_of_the_rows_and_nearly_as_full() -> None:
    """Rows of four kinds, each of one length: a pack must not hold one kind alone."""
    kinds = np.tile([20, 30, 40, 50], 500)
    mixed, sorted_ = pack_mixed(kinds, 256, 0), pack_lengths(kinds, 256)

    def of_one_kind(packing) -> float:
        packs = np.split(kinds[packing.order], packing.offsets[1:-1])
        return sum(len(set(pack.tolist())) == 1 for pack in packs) / len(packs)

    assert of_one_kind(sorted_) > 0.4
    assert of_one_kind(mixed) < 0.15
    assert mixed.num_packs <= sorted_.num_packs * 1.002
