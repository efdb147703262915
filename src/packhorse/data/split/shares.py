"""Shares of train, validation and test: from the recipe, or by the number of rows."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from packhorse.data.split.quotas import PARTS, largest_remainder, share_parts
from packhorse.errors import UserError
from packhorse.recipe.schema import DataSection, SplitSection

Shares = tuple[float, float, float]

MANY_ROWS: Final = 100_000
SOME_ROWS: Final = 50_000
TOLERANCE: Final = 1e-6
NAMES: Final = ("train", "validation", "test")


def recommended_shares(num_rows: int) -> tuple[Shares, str]:
    """Return the shares for a number of rows, and the reason.

    Raises:
        UserError: There is one row, which cannot be both trained on and evaluated.
    """
    if num_rows >= MANY_ROWS:
        return (0.7, 0.15, 0.15), f"{num_rows:,} rows, {MANY_ROWS:,} or more: enough for a sealed test set of 15 %"
    if num_rows >= SOME_ROWS:
        return (0.8, 0.1, 0.1), f"{num_rows:,} rows, {SOME_ROWS:,} or more: enough for a sealed test set of 10 %"
    if num_rows < 2:
        raise UserError(
            f"there is {num_rows} row to split, and data.split gives no shares.",
            "a row that is trained on cannot measure what the model learned.",
            "add rows, give separate rows in data.validation, or train on all: data.split.train: 1.",
        )
    if largest_remainder(num_rows, share_parts((0.85, 0.15)))[1] == 0:
        share = round(1 / num_rows, 9)
        return (1 - share, share, 0.0), f"{num_rows} rows: one of them is evaluated"
    return (0.85, 0.15, 0.0), f"{num_rows:,} rows, fewer than {SOME_ROWS:,}: no test set, so that more is trained on"


def resolve_shares(split: SplitSection, num_rows: int, given: Collection[str] = ()) -> tuple[Shares, str]:
    """Return the shares of train, validation and test, which sum to 1, and where they come from.

    Without given shares they follow the number of rows. An absent share is the rest if it is the only one absent, and 0
    if the others sum to 1. A split with separate rows gets no share: it is part of train. Beside given validation rows,
    a test share is drawn only if `split.test` says so.

    Args:
        split: Shares in the recipe.
        num_rows: Number of rows to split.
        given: Splits with separate rows: validation, test.

    Raises:
        UserError: The given shares leave others open, do not sum to 1, or leave nothing to train on.
    """
    if "validation" in given:
        return _beside_validation(split.test or 0.0, "test" in given)
    known = {name: share for name in NAMES if (share := getattr(split, name)) is not None}
    if known and "test" in given:
        known.setdefault("test", 0.0)
    shares, reason = _of_known(known) if known else recommended_shares(num_rows)
    if "test" in given:
        return (shares[0] + shares[2], shares[1], 0.0), f"{reason}; data.test is given, so its share is in train"
    return shares, reason


def given_splits(data: DataSection) -> tuple[str, ...]:
    """Return the held-out splits that have separate rows in the recipe."""
    return tuple(name for name in ("validation", "test") if getattr(data, name))


def _beside_validation(test: float, is_test_given: bool) -> tuple[Shares, str]:
    if is_test_given:
        return (1.0, 0.0, 0.0), "data.validation and data.test are given, so every row of data.sources is in train"
    if test == 0:
        return (1.0, 0.0, 0.0), "data.validation is given, so every row of data.sources is in train"
    if (1 - test) * PARTS < 1:
        raise _nothing_to_train_on(1 - test)
    return (1 - test, 0.0, test), "data.validation is given, test is as given in data.split, and train is the rest"


def _of_known(known: dict[str, float]) -> tuple[Shares, str]:
    rest = round(1 - sum(known.values()), 9)
    absent = [name for name in NAMES if name not in known]
    if abs(rest) > TOLERANCE and (rest < 0 or len(absent) != 1):
        raise _not_whole(known, absent, rest)
    shares = {**dict.fromkeys(absent, rest if len(absent) == 1 and rest > TOLERANCE else 0.0), **known}
    if shares["train"] * PARTS < 1:
        raise _nothing_to_train_on(shares["train"])
    return (shares["train"], shares["validation"], shares["test"]), _reason(absent, rest)


def _nothing_to_train_on(share: float) -> UserError:
    return UserError(
        f"data.split gives train a share of {share:g}.", "no row would be trained on.", "set data.split.train above 0."
    )


def _reason(absent: list[str], rest: float) -> str:
    if not absent:
        return "as given in data.split"
    left = "the rest" if rest > TOLERANCE else "0, as nothing is left"
    return f"as given in data.split; {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} {left}"


def _not_whole(known: dict[str, float], absent: list[str], rest: float) -> UserError:
    shares = " + ".join(f"{name} {share:g}" for name, share in known.items())
    largest = max(known, key=lambda name: known[name])
    if rest > 0 and absent:
        fix = f"{rest:g} is left: give {' or '.join(absent)} too, for example data.split.{absent[0]}: {rest:g}."
    elif known[largest] + rest > 0:
        fix = f"change one of them, for example data.split.{largest}: {known[largest] + rest:g}."
    else:
        fix = "change them, for example data.split: {train: 0.7, validation: 0.15, test: 0.15}."
    return UserError(
        f"the shares of data.split are {shares} = {sum(known.values()):g}.",
        "each row is on one side, so the shares of all sides sum to 1.",
        fix,
    )
