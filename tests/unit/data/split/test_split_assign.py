"""Sides of rows: whole groups, by content alone, in the shares asked for, against naive loops and hand counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packhorse.data.split import split
from packhorse.data.split.quotas import GroupClass, class_counts, largest_remainder, share_parts
from packhorse.data.split.split import assign, ranks, replayed, too_small

SHARES = (0.7, 0.15, 0.15)
PINNED = ("201000002010", "012000000021")
PINNED_REPLAY = [5, 6, 8, 9]


def keys_of(numbers: list[int]) -> np.ndarray:
    """128-bit keys that look like hashes, one for each number."""
    return np.array([[hash((n, 1)) % 2**64, hash((n, 2)) % 2**64] for n in numbers], np.uint64).reshape(-1, 2)


def single(num_rows: int, strata: list[int] | None = None, shares=SHARES, seed: int = 42) -> list[int]:
    """Sides of rows that have nothing to do with each other."""
    codes = np.array(strata if strata is not None else [0] * num_rows, np.int32)
    return assign(keys_of(list(range(num_rows))), np.arange(num_rows), codes, shares, seed).tolist()


def counts_of(strata: list[int], sides: list[int], num_sides: int = 3) -> dict[int, list[int]]:
    found = defaultdict(lambda: [0] * num_sides)
    for stratum, side in zip(strata, sides):
        found[stratum][side] += 1
    return found


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [
        pytest.param(10, (0.7, 0.3), [7, 3], id="whole"),
        pytest.param(10, SHARES, [7, 2, 1], id="a tie goes to the first"),
        pytest.param(7473, SHARES, [5231, 1121, 1121], id="gsm8k"),
        pytest.param(1, SHARES, [1, 0, 0], id="one row"),
        pytest.param(0, SHARES, [0, 0, 0], id="no row"),
        pytest.param(3, (1 / 3, 1 / 3, 1 / 3), [1, 1, 1], id="thirds"),
    ],
)
def test_one_stratum_of_single_rows_has_hamiltons_counts(total: int, shares: tuple[float, ...], counts: list[int]):
    assert largest_remainder(total, share_parts(shares)) == counts
    sides = single(total, shares=shares)
    assert [sides.count(side) for side in range(len(shares))] == counts


def test_single_rows_are_cut_in_the_order_of_their_ranks() -> None:
    keys = keys_of(list(range(1000)))
    sides = assign(keys, np.arange(1000), np.zeros(1000, np.int32), SHARES, 7)
    in_order = [side for _, side in sorted(zip(ranks(keys, 7).tolist(), sides.tolist()))]
    assert in_order == [0] * 700 + [1] * 150 + [2] * 150


def test_the_split_never_changes_between_versions() -> None:
    """Twelve rows of two strata, three in a group, written down once: data prepared again keeps its test set."""
    keys = np.array([[number * 0x9E3779B97F4A7C15 % 2**64, number] for number in range(12)], np.uint64)
    groups = np.array([0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 9])
    strata = np.array([0] * 7 + [1] * 5, np.int32)
    assert "".join(map(str, assign(keys, groups, strata, SHARES, 42).tolist())) == PINNED[0]
    assert "".join(map(str, assign(keys, groups, strata, SHARES, 43).tolist())) == PINNED[1]
    assert replayed(keys, 4, 42).tolist() == PINNED_REPLAY


def test_exact_shares_in_each_stratum() -> None:
    strata = [0] * 200 + [1] * 800
    assert counts_of(strata, single(1000, strata)) == {0: [140, 30, 30], 1: [560, 120, 120]}


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([3] * 1000, id="1,000 strata of 3"),
        pytest.param([1] * 1000, id="1,000 strata of 1"),
        pytest.param([35 + number * 2 for number in range(77)], id="77 strata of 35 to 187"),
        pytest.param([10] * 5 + [1] * 37 + [1001], id="large and small"),
    ],
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_small_strata_keep_the_shares_over_all(sizes: list[int], seed: int) -> None:
    strata = [stratum for stratum, size in enumerate(sizes) for _ in range(size)]
    sides = single(len(strata), strata, seed=seed)
    for stratum, counts in counts_of(strata, sides).items():
        assert all(abs(count - share * sizes[stratum]) < 1 for count, share in zip(counts, SHARES))
    total = Counter(sides)
    assert all(abs(total[side] - share * len(sides)) < 1 for side, share in enumerate(SHARES))


def test_the_odd_rows_of_small_strata_are_drawn() -> None:
    """Which of the strata gets a validation row hangs on the seed, not on the stratum's name."""
    strata = [number for number in range(100) for _ in range(3)]
    chosen = [counts_of(strata, single(300, strata, seed=seed)) for seed in range(20)]
    with_validation = Counter(stratum for found in chosen for stratum in found if found[stratum][1])
    assert len(with_validation) == 100
    assert max(with_validation.values()) < 20


ROWS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 25), st.integers(0, 3)), max_size=120)


def joined(rows: list[tuple[int, int, int]]) -> list[int]:
    """Labels under which rows of one key or one group stand together, by a naive loop."""
    labels = list(range(len(rows)))
    changed = True
    while changed:
        changed = False
        for at, (key, group, _) in enumerate(rows):
            for other in range(at):
                if (rows[other][0] == key or rows[other][1] == group < 20) and labels[at] != labels[other]:
                    labels[at] = labels[other] = min(labels[at], labels[other])
                    changed = True
    return labels


@settings(max_examples=150, deadline=None)
@given(
    ROWS,
    st.randoms(use_true_random=False),
    st.integers(-2, 5),
    st.sampled_from([SHARES, (0.85, 0.15, 0.0), (0.5, 0.5)]),
)
def test_groups_stay_whole_and_order_does_not_count(rows, random, seed, shares) -> None:
    labels = joined(rows)
    names = list(range(-7, len(rows) * 3, 3))
    columns = list(zip(rows, labels))

    def sides_of(order: list[int], named: list[int]) -> list[int]:
        groups = np.array([named[columns[at][1]] for at in order], np.int64)
        codes = np.array([columns[at][0][2] for at in order], np.int32)
        sides = assign(keys_of([columns[at][0][0] for at in order]), groups, codes, shares, seed)
        found = [0] * len(rows)
        for at, side in zip(order, sides.tolist()):
            found[at] = side
        return found

    straight = list(range(len(rows)))
    before = sides_of(straight, names)
    assert all(shares[side] > 0 for side in before)
    assert all(len({before[at] for at in straight if labels[at] == label}) == 1 for label in set(labels))
    shuffled = list(straight)
    random.shuffle(shuffled)
    random.shuffle(names)
    assert sides_of(shuffled, names) == before


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 8), max_size=300),
    st.integers(0, 10**6),
    st.lists(st.integers(1, 100), min_size=2, max_size=4),
)
def test_single_rows_keep_their_shares_to_the_row(strata: list[int], seed: int, weights: list[int]) -> None:
    shares = [weight / sum(weights) for weight in weights]
    sides = single(len(strata), strata, shares, seed)
    for stratum, counts in counts_of(strata, sides, len(shares)).items():
        exact = [share * strata.count(stratum) for share in shares]
        assert all(abs(count - one) < 1 + 1e-6 for count, one in zip(counts, exact))
    total = Counter(sides)
    assert all(abs(total[side] - share * len(sides)) < 1.5 for side, share in enumerate(shares))


def grouped(sizes: list[int]) -> tuple[np.ndarray, list[int]]:
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    return keys_of(list(range(len(groups)))), groups


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([2] * 100 + [1] * 700, id="pairs"),
        pytest.param([150, 80, 40, 20, 10, 5, 3, 2] + [1] * 690, id="a few large groups"),
        pytest.param([450] + [1] * 550, id="one of nearly half"),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_single_rows_mend_what_groups_upset(sizes: list[int], seed: int) -> None:
    keys, groups = grouped(sizes)
    sides = assign(keys, np.array(groups), np.zeros(len(groups), np.int32), SHARES, seed)
    exact = [len(groups) * share for share in SHARES]
    assert all(abs(count - one) < 1 for count, one in zip(np.bincount(sides, minlength=3), exact))


@pytest.mark.parametrize("sizes", [[2] * 200, [3] * 200, [7, 5, 5, 4] * 30], ids=["pairs", "threes", "mixed"])
def test_without_single_rows_the_shares_are_off_by_less_than_a_group(sizes: list[int]) -> None:
    keys, groups = grouped(sizes)
    sides = assign(keys, np.array(groups), np.zeros(len(groups), np.int32), SHARES, 42)
    exact = [len(groups) * share for share in SHARES]
    assert all(abs(count - one) < max(sizes) for count, one in zip(np.bincount(sides, minlength=3), exact))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_strata_that_are_one_group_each_still_share_the_whole(size: int) -> None:
    keys, groups = grouped([size] * 1000)
    sides = assign(keys, np.array(groups), np.array(groups, np.int32), SHARES, 42)
    shares = np.bincount(sides) / len(groups)
    assert np.abs(shares - SHARES).max() < 0.01


def test_a_pair_in_each_stratum_is_not_always_trained_on() -> None:
    """A test set without a single one of the rows that come in twos would measure other rows than are trained on."""
    sizes = ([2] + [1] * 38) * 77
    keys, groups = grouped(sizes)
    strata = [stratum for stratum in range(77) for _ in range(40)]
    sides = assign(keys, np.array(groups), np.array(strata, np.int32), SHARES, 42).tolist()
    of_pairs = Counter(side for one, other, side in zip(groups, groups[1:], sides) if one == other)
    assert of_pairs[0] < 70
    assert min(of_pairs[1], of_pairs[2]) >= 3


@pytest.mark.parametrize("smallest", [0, 1], ids=["lower stratum", "higher stratum"])
def test_a_group_counts_in_the_stratum_of_its_smallest_key(smallest: int) -> None:
    """A pair over two strata of 19 other rows each: its stratum is 21 rows, the other 19."""
    keys = keys_of(list(range(40)))
    keys[smallest] = (0, 0)
    groups = np.arange(40)
    groups[1] = 0
    strata = np.array([0, 1] + [0] * 19 + [1] * 19, np.int32)
    for seed in range(10):
        sides = assign(keys, groups, strata, (0.5, 0.5), seed).tolist()
        own, other = (sides[2:21], sides[21:]) if smallest == 0 else (sides[21:], sides[2:21])
        assert abs(other.count(0) - 9.5) <= 0.5
        assert abs([*own, *sides[:2]].count(0) - 10.5) <= 0.5


def test_small_strata_mend_what_a_stratum_of_one_group_upsets() -> None:
    """The thirty rows that stay together are all trained on; a hundred strata of three rows even that out."""
    groups = [0] * 30 + list(range(1, 301))
    strata = [50] * 30 + [number // 3 + (number >= 150) for number in range(300)]
    for seed in range(5):
        sides = assign(keys_of(list(range(330))), np.array(groups), np.array(strata, np.int32), SHARES, seed)
        assert all(abs(count - 330 * share) < 1 for count, share in zip(np.bincount(sides), SHARES))


def test_a_group_beyond_every_share_leaves_the_rest_to_the_others() -> None:
    keys, groups = grouped([90] + [1] * 10)
    sides = assign(keys, np.array(groups), np.zeros(100, np.int32), SHARES, 42).tolist()
    assert [sides[90:].count(side) for side in range(3)] == [0, 5, 5]


def test_parts_sum_to_the_whole() -> None:
    assert sum(share_parts((1 / 3, 1 / 3, 1 / 3))) == sum(share_parts(SHARES)) == 10**9


def test_growth_moves_few_rows() -> None:
    """A row keeps its place in the order of ranks, so a tenth more rows moves those near a border and no others."""
    keys = keys_of(list(range(11000)))
    nothing = np.zeros(11000, np.int32)
    before = assign(keys[:10000], np.arange(10000), nothing[:10000], SHARES, 42)
    after = assign(keys, np.arange(11000), nothing, SHARES, 42)[:10000]
    assert np.count_nonzero(before != after) < 200


def test_another_seed_shares_out_otherwise() -> None:
    assert single(100, seed=1) != single(100, seed=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"shares": (0.5,)}, r"sum to 0\.5", id="shares"),
        pytest.param({"shares": (1.5, -0.5)}, r"-0\.5", id="negative"),
        pytest.param({"strata": np.zeros(2, np.int32)}, "2 strata", id="numbers"),
        pytest.param({"groups": np.array([0, 1, 2])}, "1 keys are in several groups", id="torn copies"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(change, said: str) -> None:
    given = {
        "keys": keys_of([5, 6, 5]),
        "groups": np.array([0, 1, 0]),
        "strata": np.zeros(3, np.int32),
        "shares": SHARES,
        "seed": 1,
    }
    with pytest.raises(ValueError, match=said):
        assign(**{**given, **change})


def test_keys_that_share_a_rank_stand_in_the_order_of_the_keys(monkeypatch) -> None:
    """64 bits collide one day: then the whole key decides, not the order of the file."""
    keys = keys_of(list(range(100)))
    monkeypatch.setattr(split, "ranks", lambda keys, *_: keys[:, 0] % np.uint64(3))
    order = np.random.default_rng(0).permutation(100)
    rest = (np.arange(100), np.zeros(100, np.int32), SHARES, 42)
    assert assign(keys[order], *rest).tolist() == assign(keys, *rest)[order].tolist()
    again = order[replayed(keys[order], 50, 42)]
    assert sorted(again.tolist()) == replayed(keys, 50, 42).tolist()


def test_replayed_rows_are_drawn_by_content() -> None:
    keys = keys_of([*range(50), *range(10)])
    order = np.random.default_rng(0).permutation(60)
    chosen = replayed(keys, 20, 42)
    assert len(set(chosen.tolist())) == 20
    assert all(one < other for one, other in pairwise(chosen.tolist()))
    again = order[replayed(keys[order], 20, 42)]
    assert sorted(keys[again].tolist()) == sorted(keys[chosen].tolist())
    assert [len(replayed(keys, number, 42)) for number in range(61)] == list(range(61))
    assert replayed(keys, 60, 42).tolist() == list(range(60))
    assert replayed(keys, 61, 42) is None
    assert replayed(keys, 20, 43).tolist() != chosen.tolist()


def test_strata_without_a_side_are_named() -> None:
    strata = [0] * 100 + [1] * 3 + [2] * 2
    sides = [0] * 70 + [1] * 15 + [2] * 15 + [0, 0, 2] + [0, 0]
    assert too_small(["de", "en", "es"], np.array(strata, np.int32), np.array(sides, np.int8), SHARES) == [
        "stratum en has 3 rows, none in validation: too few to be on every side",
        "stratum es has 2 rows, none in validation and none in test: too few to be on every side",
    ]


def test_many_strata_without_a_side_are_counted() -> None:
    strata = np.arange(30, dtype=np.int32)
    said = too_small([f"s{n:02}" for n in range(30)], strata, np.zeros(30, np.int8), SHARES)
    assert said[0] == "stratum s00 has 1 row, none in validation and none in test: too few to be on every side"
    assert said[5:] == ["25 more strata have no row on some side"]


def test_shares_off_by_more_than_a_point_are_said_with_their_cause() -> None:
    strata = [0] * 35 + [1] * 200 + [2] * 1000
    sides = [0] * 25 + [1] * 5 + [2] * 5 + [0] * 150 + [1] * 25 + [2] * 25 + [0] * 700 + [1] * 150 + [2] * 150
    assert too_small(["a", "b", "c"], np.array(strata, np.int32), np.array(sides, np.int8), SHARES) == [
        "too few rows for shares within a hundredth: 1 stratum; the worst: stratum a has 35 rows "
        "(25 train, 5 validation, 5 test)",
        "too many rows that must stay together for shares within a hundredth: 1 stratum; the worst: stratum b has "
        "200 rows (150 train, 25 validation, 25 test)",
    ]


def test_a_split_without_strata_is_said_too() -> None:
    none = np.zeros(3, np.int32)
    said = too_small([""], none, np.array([0, 0, 1], np.int8), SHARES)
    assert said == ["data.split has 3 rows, none in test: too few to be on every side"]
    assert (
        too_small([""], np.zeros(1000, np.int32), np.repeat([0, 1, 2], [700, 150, 150]).astype(np.int8), SHARES) == []
    )
    assert too_small([""], np.zeros(20, np.int32), np.repeat([0, 1], [17, 3]).astype(np.int8), (0.85, 0.15, 0.0)) == []


def test_a_group_too_large_for_a_side_goes_where_there_is_room() -> None:
    """Of 100 rows, a group of 30 never fills the 15 of validation."""
    for chance in range(50):
        classes = [GroupClass(30, 1, chance * 2**58), GroupClass(1, 70, 0)]
        assert class_counts([classes], share_parts(SHARES)) == [[[1, 0, 0], [40, 15, 15]]]
