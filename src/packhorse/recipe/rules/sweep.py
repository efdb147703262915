"""Rules on sweeps: a list of different runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from packhorse.recipe.schema import Recipe
from packhorse.recipe.sweep_section import RANGE_KEYS, RandomSearch, searched_fields
from packhorse.yaml_source.findings import Finding
from packhorse.yaml_source.nodes import KeyPath

MOST_RUNS = 1000
"""A job array of Slurm ends at index 1,000 by default (MaxArraySize in slurm.conf(5))."""
NOT_SWEPT = ("name", "runs_folder", "sweep")


def dotted_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each dotted field, whether it is written `a.b: …` or as nested sections."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            values |= {f"{key}.{below}": deeper for below, deeper in dotted_fields(value).items()}
        else:
            values[key] = value
    return values


def sweep_rules(recipe: Recipe) -> Iterator[Finding]:
    """Yield whatever prevents the sweep from being a list of different runs."""
    sweep = recipe.sweep
    yield from _fold_rules(recipe)
    given = [name for name in ("grid", "runs", "random") if getattr(sweep, name)]
    if len(given) > 1:
        yield Finding(
            tuple(("sweep", name) for name in given),
            f"sweep gives {' and '.join(given)} at once.",
            "each of them lists the runs.",
            "keep one of them",
        )
        return
    fields = dotted_fields(sweep.grid)
    searched = searched_fields(sweep.random.fields) if sweep.random is not None else {}
    yield from _grid_rules(fields)
    names = [*fields, *searched, *(key for run in sweep.runs for key in run)]
    for name in dict.fromkeys(name for name in names if name.split(".")[0] in NOT_SWEPT):
        path = _grid_path(name) if fields else ("sweep", "random") if searched else ("sweep", "runs")
        yield Finding(
            (path,),
            f"sweep varies {name}.",
            "each run of a sweep is called NAME-1, NAME-2 and so on, in one runs_folder.",
            f"remove {name} from the sweep",
        )
    yield from _runs_rules(sweep.runs)
    if sweep.random is not None:
        yield from _random_rules(sweep.random, searched)


def _fold_rules(recipe: Recipe) -> Iterator[Finding]:
    split, folds = recipe.data.split, recipe.sweep.folds
    if split.fold is not None and not split.fold[0] <= split.fold[1] != 1:
        yield Finding(
            (("data", "split", "fold"),),
            f"data.split.fold is {list(split.fold)}.",
            "it is the number of a fold from 1, and the number of folds, at least 2.",
            "write for example fold: [1, 5]",
        )
    if split.fold is not None and folds is not None:
        yield Finding(
            (("sweep", "folds"), ("data", "split", "fold")),
            f"sweep.folds is {folds}, and data.split.fold is {list(split.fold)}.",
            "the sweep sets data.split.fold of each run.",
            "remove data.split.fold",
        )
    if recipe.data.validation and (folds is not None or split.fold is not None):
        path = ("sweep", "folds") if folds is not None else ("data", "split", "fold")
        yield Finding(
            (path, ("data", "validation")),
            f"{'.'.join(path)} is set, and data.validation names rows.",
            "in cross-validation each row of data.sources is validated once, by the run that did not train on it.",
            "move these rows to data.sources, or remove the folds",
        )
    if folds is not None and folds > MOST_RUNS:
        yield Finding(
            (("sweep", "folds"),),
            f"sweep.folds is {folds:,}.",
            f"a sweep has at most {MOST_RUNS:,} runs.",
            "set sweep.folds to 5 or 10",
        )


def _random_rules(search: RandomSearch, fields: Mapping[str, Any]) -> Iterator[Finding]:
    where = ("sweep", "random", "fields")
    if not fields:
        yield Finding(
            (where,),
            "sweep.random.fields is empty.",
            "the values of each run are drawn from these fields.",
            "add a field, for example optimizer.learning_rate: {low: 1e-6, high: 1e-4, log: true}",
        )
    for name, value in fields.items():
        if not (_is_range(value) if isinstance(value, dict) else isinstance(value, list) and value):
            yield Finding(
                (where,),
                f"sweep.random.fields.{name} is {json.dumps(value)}.",
                "it is a list of values, or a range with low below high; with log: true, low is above 0.",
                f"write for example {name}: {{low: 1e-6, high: 1e-4, log: true}}",
            )
    if search.draws > MOST_RUNS:
        yield Finding(
            (("sweep", "random", "draws"),),
            f"sweep.random.draws is {search.draws:,}.",
            f"a sweep has at most {MOST_RUNS:,} runs.",
            f"set sweep.random.draws to {MOST_RUNS:,} or less",
        )


def _is_range(value: Mapping[str, Any]) -> bool:
    low, high, log = value.get("low"), value.get("high"), value.get("log", False)
    numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in (low, high))
    if set(value) - RANGE_KEYS or not numbers or not isinstance(log, bool):
        return False
    assert low is not None
    assert high is not None
    return bool(low < high and (not log or low > 0))


def _grid_rules(fields: Mapping[str, Any]) -> Iterator[Finding]:
    lists = {name: values for name, values in fields.items() if isinstance(values, list) and values}
    for name, values in fields.items():
        if name not in lists:
            yield Finding(
                (_grid_path(name),),
                f"sweep.grid.{name} is {json.dumps(values)}.",
                "a grid has a list of values for each field, and one run per combination.",
                f"write a list, for example {name}: [{json.dumps(values) if values else '…'}]",
            )
        elif len(set(map(json.dumps, values))) < len(values):
            yield _twice((_grid_path(name),), f"sweep.grid.{name} has a value twice")
    count = math.prod(map(len, lists.values())) if lists else 0
    if count > MOST_RUNS:
        shown = " x ".join(str(len(values)) for values in lists.values())
        yield Finding(
            (("sweep", "grid"),),
            f"sweep.grid has {shown} = {count:,} runs.",
            f"a sweep is one job array of at most {MOST_RUNS:,} runs.",
            "give fewer values, or name the runs that matter in sweep.runs",
        )


def _runs_rules(runs: list[dict[str, Any]]) -> Iterator[Finding]:
    texts = [json.dumps(dotted_fields(run), sort_keys=True) for run in runs]
    for index, run in enumerate(runs):
        if not run:
            yield Finding(
                (("sweep", "runs", index),),
                f"sweep.runs.{index} is empty.",
                "each entry gives the fields that distinguish the run.",
                "add a field, for example seed: 1",
            )
        elif texts[index] in texts[:index]:
            first = texts.index(texts[index])
            yield _twice((("sweep", "runs", index),), f"sweep.runs.{index} is the same as sweep.runs.{first}")
    if len(runs) > MOST_RUNS:
        yield Finding(
            (("sweep", "runs"),),
            f"sweep.runs has {len(runs):,} runs.",
            f"a sweep is one job array of at most {MOST_RUNS:,} runs.",
            "split it into two sweeps",
        )


def _twice(paths: tuple[KeyPath, ...], fact: str) -> Finding:
    return Finding(paths, f"{fact}.", "the same recipe gives the same run twice.", "keep one of them")


def _grid_path(name: str) -> KeyPath:
    return ("sweep", "grid", *name.split("."))
