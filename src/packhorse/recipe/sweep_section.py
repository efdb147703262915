"""The recipe's section on sweeps, and the draws of random search."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from random import Random
from typing import Annotated, Any, Final

from pydantic import Field, PositiveInt

from packhorse.errors import UserError
from packhorse.yaml_source.schema import Section

RANGE_KEYS: Final = {"low", "high", "log"}
MOST_REPEATS: Final = 100_000
"""Repeated draws in a row after which the ranges are taken to hold no further run."""


class RandomSearch(Section):
    """Runs with values drawn at random; equal seeds give equal runs."""

    draws: PositiveInt
    """Number of runs; no two are equal."""
    fields: dict[str, Any]
    """For each dotted field a list of values, or a range, e.g. `{low: 1e-6, high: 1e-4, log: true}`."""
    seed: int = 0
    """Another seed gives other runs."""


class SweepSection(Section):
    """Several runs of one recipe. At most one of `grid`, `runs` and `random`; `folds` may be combined with each."""

    grid: dict[str, Any] = {}
    """Lists of values for dotted fields, e.g. `optimizer.learning_rate: [1e-4, 3e-4]`; one run per combination."""
    runs: list[dict[str, Any]] = []
    """The changed fields of each run, e.g. `{optimizer.learning_rate: 1e-4, seed: 1}`."""
    random: RandomSearch | None = None
    """Random search (Bergstra & Bengio 2012): a number of draws from lists and ranges of values."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """K-fold cross-validation: K runs, each validated on another Kth of the rows outside the test split."""


def searched_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the list or range of each dotted field, whether it is written `a.b: …` or as nested sections."""
    fields: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value and not RANGE_KEYS.intersection(value):
            fields |= {f"{key}.{below}": deeper for below, deeper in searched_fields(value).items()}
        else:
            fields[key] = value
    return fields


def drawn_fields(search: RandomSearch) -> list[Mapping[str, Any]]:
    """Return the changed fields of each run. Equal seeds give equal runs, and more draws only add runs.

    Raises:
        UserError: The lists and ranges hold fewer different runs than `draws`.
    """
    # Python keeps the sequence of `random()` for a seed over all versions, and of no other method.
    uniform, fields = Random(search.seed).random, searched_fields(search.fields)  # noqa: S311
    found: dict[str, Mapping[str, Any]] = {}
    repeats = 0
    while len(found) < search.draws:
        point = {name: _drawn(value, uniform()) for name, value in fields.items()}
        text = json.dumps(point)
        repeats = repeats + 1 if text in found else 0
        if repeats > MOST_REPEATS:
            raise UserError(
                f"sweep.random.draws is {search.draws}, and sweep.random.fields give {len(found)} different runs.",
                "equal values give the same run twice.",
                f"set sweep.random.draws to {len(found)}, or widen a range.",
            )
        found[text] = point
    return list(found.values())


def _drawn(value: Any, chance: float) -> Any:  # noqa: ANN401
    """Return a value of a list or of a range, uniform or log-uniform; `chance` is uniform from 0 to 1."""
    if isinstance(value, list):
        return value[int(chance * len(value))]
    low, high = value["low"], value["high"]
    # Each whole number has the stretch from half a unit below it to half a unit above.
    is_whole = isinstance(low, int) and isinstance(high, int)
    start, end = (low - 0.5, high + 0.5) if is_whole else (low, high)
    if value.get("log"):
        number = math.exp(math.log(start) + chance * (math.log(end) - math.log(start)))
    else:
        number = start + chance * (end - start)
    return min(max(round(number) if is_whole else float(f"{number:.4g}"), low), high)
