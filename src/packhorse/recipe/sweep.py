"""Sweeps: one recipe and lists of values become several recipes, one per run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from packhorse.errors import Mistake, UserError
from packhorse.recipe.load import override_recipe
from packhorse.recipe.rules.sweep import dotted_fields
from packhorse.recipe.schema import Recipe
from packhorse.recipe.sweep_section import SweepSection, drawn_fields
from packhorse.yaml_source.nodes import parse_scalar
from packhorse.yaml_source.overrides import FLOW_STARTS

FOLD: Final = "data.split.fold"


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        number: Number of the run from 1, in the order of the recipe; the last field of a grid changes fastest.
        overrides: Overrides of this run, as typed on the command line.
        recipe: Complete recipe of this run, with the name NAME-NUMBER, or NAME-fold-NUMBER if only folds differ.
    """

    number: int
    overrides: tuple[str, ...]
    recipe: Recipe


def is_sweep(recipe: Recipe) -> bool:
    """Return whether the recipe has a sweep."""
    sweep = recipe.sweep
    return bool(sweep.grid or sweep.runs or sweep.random or sweep.folds)


def num_runs(sweep: SweepSection) -> int:
    """Return the number of runs of a sweep."""
    return len(_choices(sweep))


def expand(recipe: Recipe) -> list[SweepRun]:
    """Return every run of the sweep.

    Raises:
        UserError: A value is wrong for its field, or values conflict; the mistakes of all runs are reported at once.
    """
    runs: list[SweepRun] = []
    mistakes: list[Mistake] = []
    for number, choice in enumerate(_choices(recipe.sweep), 1):
        overrides = tuple(f"{key}={as_typed(value)}" for key, value in choice.items())
        try:
            run_recipe = override_recipe(recipe, ["sweep={}", f"name={run_prefix(recipe)}-{number}", *overrides])
        except UserError as error:
            mistakes.extend(error.mistakes)
        else:
            runs.append(SweepRun(number, overrides, run_recipe))
    if mistakes:
        # A wrong value that several runs share is reported once.
        raise UserError.of(dict.fromkeys(mistakes))
    return runs


def run_prefix(recipe: Recipe) -> str:
    """Return the name of the runs of a sweep without their number."""
    sweep = recipe.sweep
    return recipe.name if sweep.grid or sweep.runs or sweep.random else f"{recipe.name}-fold"


def check_single(recipe: Recipe, file: str) -> None:
    """Refuse a recipe with a sweep in a command that trains one run.

    Args:
        recipe: The loaded recipe.
        file: Path or name of the recipe as typed.

    Raises:
        UserError: The recipe has a sweep.
    """
    if not is_sweep(recipe):
        return
    first = expand(recipe)[0]
    alone = shlex.join(["packhorse", "train", file, "sweep={}", f"name={first.recipe.name}", *first.overrides])
    raise UserError(
        f"{recipe.name} has a sweep of {num_runs(recipe.sweep)} runs, and this command trains one run.",
        "each run of a sweep has its own run folder and job.",
        f"start all of them with `packhorse train {file}` or `packhorse submit {file}`, or one with `{alone}`.",
    )


def as_typed(value: Any) -> str:  # noqa: ANN401
    """Return a value in the form of an override: text bare if it is read as the same text, else quoted."""
    if isinstance(value, str) and value == value.strip() and not value.startswith(FLOW_STARTS):
        return value if parse_scalar(value) == value else json.dumps(value)
    return json.dumps(value, ensure_ascii=False)


def _choices(sweep: SweepSection) -> list[Mapping[str, Any]]:
    """Return the changed fields of each run; the fold changes fastest."""
    if sweep.folds is None:
        return _points(sweep)
    numbers = range(1, sweep.folds + 1)
    return [{**point, FOLD: [number, sweep.folds]} for point in _points(sweep) for number in numbers]


def _points(sweep: SweepSection) -> list[Mapping[str, Any]]:
    if sweep.runs:
        return [dotted_fields(run) for run in sweep.runs]
    if sweep.random is not None:
        return drawn_fields(sweep.random)
    fields = dotted_fields(sweep.grid)
    return [dict(zip(fields, values, strict=True)) for values in product(*fields.values())]
