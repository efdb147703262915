"""Rows drawn from sources: the number or the proportion asked for, by content, none twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.data.split.draw import draw
from packhorse.errors import UserError
from packhorse.recipe.schema import Source


def source(name: str = "a.jsonl", **fields) -> Source:
    return Source(path=name, **fields)


def keys_of(num_rows: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 2**64, (num_rows, 2), np.uint64)


def numbers(available: list[int], sources: list[Source]) -> list[int]:
    of_row = np.repeat(np.arange(len(available)), available).astype(np.int16)
    used = draw(keys_of(len(of_row)), of_row, sources)
    return np.bincount(of_row[used], minlength=len(available)).tolist()


@pytest.mark.parametrize(
    ("available", "fields", "drawn"),
    [
        pytest.param([10, 10], [{}, {}], [10, 10], id="all"),
        pytest.param([10, 10], [{"rows": 4}, {}], [4, 10], id="rows"),
        pytest.param([10, 10], [{"rows": 9}, {}], [9, 10], id="all but one"),
        pytest.param([10, 10], [{"rows": 10}, {"rows": 1}], [10, 1], id="rows of both"),
        pytest.param([100, 100], [{"weight": 0.3}, {"weight": 0.7}], [43, 100], id="weights"),
        pytest.param([30, 100], [{"weight": 0.3}, {"weight": 0.7}], [30, 70], id="the small one limits"),
        pytest.param([1000, 50, 70], [{"weight": 2.0}, {"weight": 1.0}, {"weight": 1.0}], [100, 50, 50], id="three"),
        pytest.param([5, 5], [{"weight": 1.0}, {"weight": 1.0}], [5, 5], id="equal weights"),
        pytest.param([90, 30, 7], [{"weight": 0.1}, {"weight": 0.1}, {}], [30, 30, 7], id="one without a weight"),
    ],
)
def test_as_many_rows_as_asked_for(available: list[int], fields: list[dict], drawn: list[int]) -> None:
    assert numbers(available, [source(**field) for field in fields]) == drawn


# With so many rows each weight, up to 20, gives two rows or more.
@given(st.lists(st.tuples(st.integers(40, 400), st.integers(1, 20)), min_size=1, max_size=5))
def test_weights_take_as_many_rows_as_they_can(found: list[tuple[int, int]]) -> None:
    available, weights = [one for one, _ in found], [one for _, one in found]
    drawn = numbers(available, [source(weight=float(weight)) for weight in weights])
    assert all(one <= there for one, there in zip(drawn, available))
    # One row more of the proportions, and a source would be short.
    limit = min(there / weight for there, weight in zip(available, weights))
    assert all(abs(one - limit * weight) <= 0.5 + 1e-9 for one, weight in zip(drawn, weights))
    assert any(one == there for one, there in zip(drawn, available))


def test_the_same_rows_are_drawn_whatever_their_order() -> None:
    keys = keys_of(300)
    keys[200:210] = keys[0]
    of_row = np.repeat([0, 1], [250, 50]).astype(np.int16)
    sources = [source(rows=100), source("b.jsonl", rows=20)]
    order = np.random.default_rng(0).permutation(300)
    one = draw(keys, of_row, sources)
    other = draw(keys[order], of_row[order], sources)
    assert sorted(map(tuple, keys[one].tolist())) == sorted(map(tuple, keys[order][other].tolist()))
    assert np.count_nonzero(draw(keys, of_row, sources, seed=1) != one) > 50


def test_more_rows_take_the_same_and_others() -> None:
    keys, of_row = keys_of(300), np.zeros(300, np.int16)
    few, many = (draw(keys, of_row, [source(rows=number)]) for number in (50, 200))
    assert np.all(many[few])


def test_which_rows_are_drawn_says_nothing_of_their_side() -> None:
    """Drawn by the order that the split cuts, a smaller draw would be of training rows only."""
    from packhorse.data.split.split import assign

    keys = keys_of(10000)
    drawn = draw(keys, np.zeros(10000, np.int16), [source(rows=5000)])
    sides = assign(keys, np.arange(10000), np.zeros(10000, np.int32), (0.7, 0.15, 0.15), 0)
    assert abs(np.mean(sides[drawn] == 0) - 0.7) < 0.03


@pytest.mark.parametrize(
    ("available", "fields", "said"),
    [
        pytest.param(
            [7, 9], [{"rows": 8}, {}], ["rows is 8 for a.jsonl, which has 7 usable rows", "7 or less"], id="too few"
        ),
        pytest.param(
            [7, 9], [{"rows": 8}, {"rows": 10}], ["has 7 usable rows", "has 9 usable rows"], id="both at once"
        ),
        pytest.param([9, 5], [{"weight": 0.001}, {"weight": 1.0}], ["weight 0.001 of a.jsonl"], id="a tiny weight"),
        pytest.param(
            [9, 0], [{"weight": 1.0}, {"weight": 1.0}], ["of b.jsonl, which has 0 rows"], id="an empty source"
        ),
    ],
)
def test_what_cannot_be_drawn_is_a_users_mistake(available, fields, said) -> None:
    with pytest.raises(UserError) as error:
        numbers(available, [source(name, **field) for name, field in zip(("a.jsonl", "b.jsonl"), fields)])
    assert all(text in str(error.value) for text in said)
