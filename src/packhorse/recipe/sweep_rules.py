"""Rules on `sweep`: what is no list of values, and what each run of a sweep must have of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from packhorse.recipe.findings import Finding
from packhorse.recipe.schema import Recipe
from packhorse.recipe.schema_view import KeyPath

MOST_RUNS = 1000
"""A job array of Slurm ends at 1,001 by default (MaxArraySize in slurm.conf(5))."""
OWN = ("name", "runs_folder", "sweep")


def dotted_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """What stands at each dotted field, whether it is written `a.b: …` or as a section in a section."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            found |= {f"{key}.{below}": deeper for below, deeper in dotted_fields(value).items()}
        else:
            found[key] = value
    return found


def sweep_rules(recipe: Recipe) -> Iterator[Finding]:
    """What keeps a sweep from being a number of different runs."""
    sweep = recipe.sweep
    if sweep.grid and sweep.runs:
        yield Finding(
            (("sweep", "grid"), ("sweep", "runs")),
            "sweep gives grid and runs at once.",
            "both say which runs there are.",
            "keep one of them",
        )
        return
    fields = dotted_fields(sweep.grid)
    yield from _grid_rules(fields)
    names = [*fields, *(key for run in sweep.runs for key in run)]
    for name in dict.fromkeys(each for each in names if each.split(".")[0] in OWN):
        yield Finding(
            (_grid_path(name) if fields else ("sweep", "runs"),),
            f"sweep varies {name}.",
            "each run of a sweep is called NAME-1, NAME-2 and so on, in one runs_folder.",
            f"remove {name} from the sweep",
        )
    yield from _runs_rules(sweep.runs)


def _grid_rules(fields: Mapping[str, Any]) -> Iterator[Finding]:
    lists = {name: values for name, values in fields.items() if isinstance(values, list) and values}
    for name, values in fields.items():
        if name not in lists:
            yield Finding(
                (_grid_path(name),),
                f"sweep.grid.{name} is {json.dumps(values)}.",
                "a grid has a list of values for each field, and a run for each combination.",
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
            f"a sweep is one job array, which takes {MOST_RUNS:,}.",
            "give fewer values, or name the runs that matter in sweep.runs",
        )


def _runs_rules(runs: list[dict[str, Any]]) -> Iterator[Finding]:
    texts = [json.dumps(dotted_fields(run), sort_keys=True) for run in runs]
    for index, run in enumerate(runs):
        if not run:
            yield Finding(
                (("sweep", "runs", index),),
                f"sweep.runs.{index} is empty.",
                "it says what sets this run apart.",
                "give it a field, for example seed: 1",
            )
        elif texts[index] in texts[:index]:
            first = texts.index(texts[index])
            yield _twice((("sweep", "runs", index),), f"sweep.runs.{index} is the same as sweep.runs.{first}")
    if len(runs) > MOST_RUNS:
        yield Finding(
            (("sweep", "runs"),),
            f"sweep.runs has {len(runs):,} runs.",
            f"a sweep is one job array, which takes {MOST_RUNS:,}.",
            "make two sweeps of it",
        )


def _twice(paths: tuple[KeyPath, ...], fact: str) -> Finding:
    return Finding(paths, f"{fact}.", "the same recipe gives the same run: it would be made twice.", "keep one of them")


def _grid_path(name: str) -> KeyPath:
    return ("sweep", "grid", *name.split("."))
