from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.data.split import assign, largest_remainder

SHARES = (0.7, 0.15, 0.15)


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [
        pytest.param(10, (0.7, 0.3), [7, 3], id="whole"),
        pytest.param(10, SHARES, [7, 2, 1], id="a tie goes to the first"),
        pytest.param(7473, SHARES, [5231, 1121, 1121], id="gsm8k"),
        pytest.param(1, SHARES, [1, 0, 0], id="one row"),
        pytest.param(0, SHARES, [0, 0, 0], id="no row"),
    ],
)
def test_largest_remainder(total: int, shares: tuple[float, ...], counts: list[int]) -> None:
    assert largest_remainder(total, shares) == counts


def test_exact_shares_in_each_stratum() -> None:
    keys = [f"{number:x}" for number in range(1000)]
    strata = ["es"] * 200 + ["en"] * 800
    sides = assign(keys, strata, SHARES, seed=42)
    assert Counter(zip(strata, sides.tolist())) == {
        ("es", 0): 140, ("es", 1): 30, ("es", 2): 30, ("en", 0): 560, ("en", 1): 120, ("en", 2): 120,
    }  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from("ab")), max_size=80), st.randoms(), st.integers(0, 3))
def test_neither_order_nor_copies_change_a_side(rows: list[tuple[int, str]], random: object, seed: int) -> None:
    def sides_of(rows: list[tuple[int, str]]) -> dict[int, set[int]]:
        sides = assign([str(key) for key, _ in rows], [stratum for _, stratum in rows], SHARES, seed)
        found: dict[int, set[int]] = {}
        for (key, _), side in zip(rows, sides.tolist()):
            found.setdefault(key, set()).add(side)
        return found

    before = sides_of(rows)
    assert all(len(sides) == 1 for sides in before.values())
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert sides_of(shuffled) == before


def test_another_seed_shares_out_otherwise() -> None:
    keys = [str(number) for number in range(100)]
    assert assign(keys, [""] * 100, SHARES, 1).tolist() != assign(keys, [""] * 100, SHARES, 2).tolist()


def test_shares_must_sum_to_one() -> None:
    with pytest.raises(ValueError, match=r"sum to 0\.5"):
        assign(["a"], [""], (0.5,), 1)
