from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.data.packing import pack_lengths


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
