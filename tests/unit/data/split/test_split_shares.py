"""Shares that the recipe leaves out: by the number of rows, or what is left."""

from __future__ import annotations

import numpy as np
import pytest

from packhorse.data.split.shares import recommended_shares, resolve_shares
from packhorse.data.split.split import assign
from packhorse.errors import UserError
from packhorse.recipe.schema import SplitSection


@pytest.mark.parametrize(
    ("num_rows", "shares"),
    [
        (10**7, (0.7, 0.15, 0.15)),
        (100_000, (0.7, 0.15, 0.15)),
        (99_999, (0.8, 0.1, 0.1)),
        (50_000, (0.8, 0.1, 0.1)),
        (49_999, (0.85, 0.15, 0.0)),
        (4, (0.85, 0.15, 0.0)),
    ],
)
def test_the_shares_follow_the_number_of_rows(num_rows: int, shares: tuple[float, ...]) -> None:
    found, reason = recommended_shares(num_rows)
    assert found == shares
    assert f"{num_rows:,}" in reason
    assert resolve_shares(SplitSection(stratify=["language"], seed=7), num_rows) == (found, reason)


@pytest.mark.parametrize("num_rows", range(2, 20))
@pytest.mark.parametrize("has_strata", [False, True])
def test_the_smallest_data_has_a_validation_row_and_a_training_row(num_rows: int, has_strata: bool) -> None:
    shares, _ = recommended_shares(num_rows)
    keys = np.random.default_rng(num_rows).integers(0, 2**64, (num_rows, 2), np.uint64)
    strata = np.arange(num_rows) * has_strata
    sides = assign(keys, np.arange(num_rows), strata.astype(np.int32), shares, 42).tolist()
    assert sides.count(0) > 0
    assert sides.count(1) > 0
    assert sides.count(2) == 0


@pytest.mark.parametrize(
    ("given", "shares", "reason"),
    [
        ({"train": 0.6, "validation": 0.3, "test": 0.1}, (0.6, 0.3, 0.1), "as given in data.split"),
        ({"train": 0.8, "validation": 0.2}, (0.8, 0.2, 0.0), "test is 0, as nothing is left"),
        ({"train": 0.7, "validation": 0.2}, (0.7, 0.2, 0.1), "test is the rest"),
        ({"validation": 0.15, "test": 0.15}, (0.7, 0.15, 0.15), "train is the rest"),
        ({"train": 1.0}, (1.0, 0.0, 0.0), "validation and test are 0"),
        ({"train": 0.9, "test": 0.1}, (0.9, 0.0, 0.1), "validation is 0"),
    ],
)
def test_an_absent_share_is_what_is_left(given, shares, reason: str) -> None:
    found, said = resolve_shares(SplitSection(**given), 10)
    assert found == pytest.approx(shares, abs=1e-12)
    assert reason in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train": 0.7}, ["train 0.7 = 0.7", "0.3 is left", "data.split.validation: 0.3"]),
        ({"validation": 0.15}, ["validation 0.15 = 0.15", "give train or test too", "data.split.train: 0.85"]),
        ({"train": 0.7, "validation": 0.2, "test": 0.2}, ["= 1.1", "data.split.train: 0.6"]),
        ({"train": 0.7, "validation": 0.1, "test": 0.1}, ["= 0.9", "data.split.train: 0.8"]),
        ({"train": 0.9, "validation": 0.9}, ["= 1.8", "data.split.train: 0.1"]),
        ({"train": 1.0, "validation": 1.0, "test": 1.0}, ["= 3", "train: 0.7, validation: 0.15, test: 0.15"]),
        ({"validation": 0.5, "test": 0.5}, ["train a share of 0", "above 0"]),
    ],
)
def test_shares_that_say_too_little_or_too_much_are_refused(given, said) -> None:
    with pytest.raises(UserError) as error:
        resolve_shares(SplitSection(**given), 1000)
    assert all(text in str(error.value) for text in said)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_one_row_cannot_be_trained_on_and_measured(num_rows: int) -> None:
    with pytest.raises(UserError, match=rf"there is {num_rows} row"):
        recommended_shares(num_rows)
