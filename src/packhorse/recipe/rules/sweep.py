"""Rules on sweeps: a list of different runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from packhorse.recipe.schema import Recipe
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
    if sweep.grid and sweep.runs:
        yield Finding(
            (("sweep", "grid"), ("sweep", "runs")),
            "sweep gives grid and runs at once.",
            "each of the two lists the runs.",
            "keep one of them",
        )
        return
    fields = dotted_fields(sweep.grid)
    yield from _grid_rules(fields)
    names = [*fields, *(key for run in sweep.runs for key in run)]
    for name in dict.fromkeys(name for name in names if name.split(".")[0] in NOT_SWEPT):
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
