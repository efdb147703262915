"""A sweep: from one recipe and lists of values to many recipes, each a run of its own."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from packhorse.errors import Mistake, UserError
from packhorse.recipe.layers import FLOW_STARTS
from packhorse.recipe.load import override_recipe
from packhorse.recipe.schema import Recipe, SweepSection
from packhorse.recipe.sweep_rules import dotted_fields
from packhorse.yaml_source.nodes import parse_scalar


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        number: Counted from 1, in the order of the recipe; the last field of a grid changes fastest.
        overrides: What sets it apart, as it would be typed.
        recipe: Its own, complete, called NAME-NUMBER.
    """

    number: int
    overrides: tuple[str, ...]
    recipe: Recipe


def is_sweep(recipe: Recipe) -> bool:
    """Whether the recipe stands for more than one run."""
    return bool(recipe.sweep.grid or recipe.sweep.runs)


def num_runs(sweep: SweepSection) -> int:
    """How many runs a sweep has."""
    return len(_choices(sweep))


def expand(recipe: Recipe) -> list[SweepRun]:
    """Every run of the sweep.

    Raises:
        UserError: A value is none of its field, or values do not go together; told of all runs at once.
    """
    runs: list[SweepRun] = []
    mistakes: list[Mistake] = []
    for number, choice in enumerate(_choices(recipe.sweep), 1):
        overrides = tuple(f"{key}={as_typed(value)}" for key, value in choice.items())
        try:
            own = override_recipe(recipe, ["sweep={}", f"name={recipe.name}-{number}", *overrides])
        except UserError as error:
            mistakes.extend(error.mistakes)
        else:
            runs.append(SweepRun(number, overrides, own))
    if mistakes:
        # A value that several runs share is told once.
        raise UserError.of(dict.fromkeys(mistakes))
    return runs


def check_single(recipe: Recipe, file: str) -> None:
    """Refuses a recipe of many runs where one is trained.

    Args:
        recipe: As it was loaded.
        file: As it was typed.

    Raises:
        UserError: The recipe has a sweep.
    """
    if not is_sweep(recipe):
        return
    first = expand(recipe)[0]
    alone = shlex.join(["packhorse", "train", file, "sweep={}", f"name={first.recipe.name}", *first.overrides])
    raise UserError(
        f"{recipe.name} has a sweep of {num_runs(recipe.sweep)} runs, and one run is asked for.",
        "each run of a sweep has a run folder and a job of its own.",
        f"make them all with `packhorse submit {file}`, or one of them with `{alone}`.",
    )


def as_typed(value: Any) -> str:  # noqa: ANN401
    """A value as an override takes it: text bare where that is read as the same text, else quoted."""
    if isinstance(value, str) and value == value.strip() and not value.startswith(FLOW_STARTS):
        return value if parse_scalar(value) == value else json.dumps(value)
    return json.dumps(value, ensure_ascii=False)


def _choices(sweep: SweepSection) -> list[Mapping[str, Any]]:
    if sweep.runs:
        return [dotted_fields(run) for run in sweep.runs]
    fields = dotted_fields(sweep.grid)
    return [dict(zip(fields, values, strict=True)) for values in product(*fields.values())]
