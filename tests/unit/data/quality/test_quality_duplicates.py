"""Groups of rows, against plain loops and hand-made signatures of which the similarity is known to the slot."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from packhorse.data.checks.duplicates import NearGroups, band_slots, equal_groups, near_groups

SLOTS = 64
Rows = NDArray[np.uint32]


def keys_of(rows: Rows) -> NDArray[np.uint64]:
    """Equal rows have equal keys; the order of the keys has nothing to do with that of the rows."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
    return np.frombuffer(bytearray().join(digests), np.uint64).reshape(-1, 2)


def fresh(num_rows: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).integers(0, 2**32, (num_rows, SLOTS), dtype=np.uint32)


def like(row: Rows, num_equal: int, seed: int) -> Rows:
    """A row with exactly so many slots of another, spread evenly, so that it shares bands with it."""
    out = fresh(1, seed)[0]
    kept = np.random.default_rng(seed).permutation(SLOTS)[:num_equal]
    out[kept] = row[kept]
    return out


def found(rows: Rows, threshold: float = 0.8, answers: Rows | None = None) -> NearGroups:
    return near_groups(rows, keys_of(rows), threshold, answers)


def sets(labels: NDArray[np.int64]) -> set[frozenset[int]]:
    groups = [frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]
    assert all(min(group) == labels[next(iter(group))] for group in groups)
    return {group for group in groups if len(group) > 1}


def test_equal_groups_are_those_of_a_plain_loop() -> None:
    keys = np.random.default_rng(1).integers(0, 12, (200, 2)).astype(np.uint64)
    rows = [tuple(key) for key in keys.tolist()]
    assert equal_groups(keys).tolist() == [rows.index(row) for row in rows]


def test_both_halves_of_a_key_count() -> None:
    keys = np.array([[1, 5], [2, 5], [1, 5], [2, 6]], np.uint64)
    assert equal_groups(keys).tolist() == [0, 1, 0, 3]


@pytest.mark.parametrize(("num_equal", "joined"), [(64, True), (58, True), (52, True), (51, False), (32, False)])
def test_rows_from_the_threshold_on_are_near(num_equal: int, joined: bool) -> None:
    # .8 × 64 = 51.2, so 52 equal slots are needed.
    seen = 0
    for seed in range(40):
        rows = fresh(30, 1000 + seed)
        rows[17] = like(rows[4], num_equal, seed)
        seen += sets(found(rows).labels) == {frozenset({4, 17})}
    assert seen >= 38 if joined else seen == 0


def test_near_is_handed_on() -> None:
    rows = fresh(10)
    rows[7] = like(rows[2], 60, 1)
    rows[5] = like(rows[7], 60, 2)
    assert sets(found(rows).labels) == {frozenset({2, 5, 7})}


def test_equal_keys_share_a_group_whatever_the_signatures() -> None:
    rows = fresh(5)
    keys = keys_of(rows)
    keys[3] = keys[1]
    assert sets(near_groups(rows, keys, 0.8).labels) == {frozenset({1, 3})}


def test_order_of_the_rows_changes_nothing(tmp_path: Path) -> None:
    rows = fresh(600)
    for at in range(0, 500, 3):
        rows[at + 1] = like(rows[at], 45 + at % 20, at)
    rows[40:60] = rows[20]
    expected = sets(found(rows).labels)
    assert len(expected) > 50
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(rows))
        stored = np.memmap(tmp_path / "signatures", np.uint32, "w+", shape=rows.shape)
        stored[:] = rows[order]
        shuffled = sets(near_groups(stored, keys_of(rows)[order], 0.8).labels)
        assert {frozenset(order[list(group)].tolist()) for group in shuffled} == expected


def frame(num_rows: int, num_equal: int = 56) -> Rows:
    """Rows that all share most slots with one, as texts within one long instruction do."""
    base = fresh(1, 99)[0]
    return np.stack([like(base, num_equal, seed) for seed in range(num_rows)])


@pytest.mark.parametrize(
    ("num_alike", "num_other", "is_frame"),
    [(20, 80, False), (21, 79, True), (40, 960, False), (50, 950, False), (51, 949, True)],
)
def test_many_alike_rows_are_a_frame_and_no_copies(num_alike: int, num_other: int, is_frame: bool) -> None:
    rows = np.concatenate([fresh(num_other), frame(num_alike, 62)])
    groups = found(rows)
    if is_frame:
        assert (sets(groups.labels), groups.frames, groups.frame_rows) == (set(), (num_alike,), (num_other,))
    else:
        assert (len(sets(groups.labels)), groups.frames) == (1, ())


def test_a_frame_is_more_than_a_thousand_rows_however_many_there_are() -> None:
    rows = np.concatenate([frame(1001, 62), fresh(30_000)])
    assert found(rows).frames == (1001,)


def test_exact_copies_within_a_frame_are_grouped() -> None:
    rows = np.concatenate([fresh(50), frame(30, 62)])
    rows[61] = rows[75]
    rows[3] = rows[75]
    groups = found(rows)
    assert sets(groups.labels) == {frozenset({3, 61, 75})}
    assert (groups.frames, groups.frame_rows) == ((31,), (3,))


def test_copies_of_one_text_are_no_frame() -> None:
    rows = fresh(200)
    rows[50:150] = rows[50]
    groups = found(rows)
    assert (sets(groups.labels), groups.frames) == ({frozenset(range(50, 150))}, ())


def test_a_bucket_of_many_rows_is_found_whole() -> None:
    # Each row has 7 slots of its own, and so 50 to 57 in common with any other: many pairs pass, many do not.
    groups = found(np.concatenate([fresh(300), frame(5000, 57)]))
    assert groups.frames[0] > 4900


def test_alike_rows_with_other_answers_are_no_copies() -> None:
    rows, answers = fresh(12), fresh(12, 7)
    rows[5] = like(rows[2], 62, 1)
    rows[9] = like(rows[2], 62, 2)
    answers[9] = like(answers[2], 62, 3)
    assert sets(found(rows).labels) == {frozenset({2, 5, 9})}
    assert sets(found(rows, answers=answers).labels) == {frozenset({2, 9})}


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_make_candidates_of_nearly_all_pairs_above_the_threshold(threshold: float) -> None:
    slots = band_slots(threshold, SLOTS)
    draw = np.random.default_rng(2)
    equal = draw.random((20_000, SLOTS)) < min(1, threshold + 0.05)
    bands = equal[:, : SLOTS // slots * slots].reshape(len(equal), -1, slots)
    assert bands.all(axis=2).any(axis=1).mean() > 0.985


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_few_rows(num_rows: int) -> None:
    rows = fresh(num_rows)
    groups = found(rows)
    assert groups.labels.tolist() == list(range(num_rows))
    assert groups.frames == ()
