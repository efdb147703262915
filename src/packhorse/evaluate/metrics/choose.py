"""Which metrics a set of rows gets, and metrics of the user."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from packhorse.errors import UserError
from packhorse.evaluate.metrics.labels import labels_of
from packhorse.evaluate.metrics.metric import Expected, Metric, Reply
from packhorse.evaluate.metrics.number import EXTRACTED, NUMBER_MATCH, is_numeric
from packhorse.evaluate.metrics.structure import (
    ABSENT,
    JSON_FIELDS,
    JSON_VALID,
    TOOL_ARGUMENTS,
    TOOL_NAMES,
    parse_json,
)
from packhorse.evaluate.metrics.text import BLEU, CHRF, EXACT, NORMALISED, ROUGE_L, STOPPED, TOKEN_F1

METRICS: Final = {
    metric.name: metric
    for metric in (
        EXACT,
        NORMALISED,
        NUMBER_MATCH,
        EXTRACTED,
        JSON_VALID,
        JSON_FIELDS,
        TOOL_NAMES,
        TOOL_ARGUMENTS,
        TOKEN_F1,
        ROUGE_L,
        CHRF,
        BLEU,
        STOPPED,
    )
}
BY_KIND: Final = {
    "tools": (TOOL_NAMES, TOOL_ARGUMENTS),
    "json": (JSON_VALID, JSON_FIELDS),
    "number": (NUMBER_MATCH, EXTRACTED),
    "label": (NORMALISED,),
    "text": (TOKEN_F1, CHRF),
}


def kinds_of(expected: Sequence[Expected]) -> list[str]:
    """Return the kinds of answers in a set, in the order of `BY_KIND`."""
    plain = [answer.text for answer in expected if _structure(answer) == "text"]
    found = {_structure(answer) for answer in expected}
    if "text" in found and labels_of(plain):
        found = found - {"text"} | {"label"}
    return [kind for kind in BY_KIND if kind in found]


def _structure(answer: Expected) -> str:
    if answer.has_tool_calls:
        return "tools"
    if parse_json(answer.text) is not ABSENT:
        return "json"
    return "number" if is_numeric(answer.text) else "text"


def metrics_for(expected: Sequence[Expected], chosen: Sequence[str] | None) -> list[Metric]:
    """Return the metrics of a set: those named in `evaluation.metrics`, or those that fit its answers.

    Args:
        expected: Expected answers.
        chosen: Names, or `FILE.py:FUNCTION`; None: by the kinds of the answers.

    Raises:
        UserError: A function of the user cannot be imported.
    """
    if not expected:
        return []
    if chosen is not None:
        return [own_metric(name) if ":" in name else METRICS[name] for name in chosen]
    fitting = [metric for kind in kinds_of(expected) for metric in BY_KIND[kind]]
    return [EXACT, *fitting, STOPPED]


def own_metric(name: str) -> Metric:
    """Return the metric of a user's function: `score(row, answer)` with the row as a dict, which returns a number.

    True and False count as 1 and 0, None as no value. The test treats its values as graded.

    Args:
        name: `FILE.py:FUNCTION`.

    Raises:
        UserError: The file cannot be imported, or has no such function.
    """
    file, _, function = name.partition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        score: Callable[[Any, str], float | bool | None] = getattr(module, function)
    except Exception as error:
        raise UserError(
            f"evaluation.metrics has {name}, which fails with {type(error).__name__}: {error}.",
            "the function is imported before the models are loaded.",
            f"correct it: python -c 'import runpy; runpy.run_path(\"{file}\")'.",
        ) from error

    def scored(expected: Expected, reply: Reply) -> float:
        value = score(expected.row, reply.text)
        return math.nan if value is None else float(value)

    return Metric(name, "graded", "value", scored)
