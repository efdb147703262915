"""Rules on evaluation: metrics and the gate."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from packhorse.recipe.evaluation import EvaluationSection
from packhorse.yaml_source.findings import Finding
from packhorse.yaml_source.schema import join_words

METRICS: Final = (
    "bleu",
    "chrf",
    "exact_match",
    "json_fields",
    "json_valid",
    "normalised_match",
    "number",
    "number_found",
    "rouge_l",
    "stopped",
    "token_f1",
    "tool_arguments",
    "tool_names",
)
"""Metrics of answers; `packhorse.evaluate.metrics.choose` has them."""
GATE_ONLY: Final = ("loss", "macro_f1", "weighted_f1", "ece")
"""Metrics that are measured automatically."""


def evaluation_rules(evaluation: EvaluationSection) -> Iterator[Finding]:
    """Yield the rules on metrics and gate that the section breaks."""
    chosen = [] if evaluation.metrics == "auto" else evaluation.metrics
    for index, name in enumerate(chosen):
        if ":" in name:
            yield from _own_metric(index, name)
        elif name not in METRICS:
            path = ("evaluation", "metrics", index)
            yield Finding((path,), f"evaluation.metrics has `{name}`.", _known(), _nearest(name, METRICS))
    for index, criterion in enumerate(evaluation.gate):
        path = ("evaluation", "gate", index)
        if (criterion.min_gain is None) == (criterion.max_drop is None):
            given = "neither" if criterion.min_gain is None else "both"
            yield Finding(
                (path,),
                f"evaluation.gate[{index}] has {given} of min_gain and max_drop.",
                "a condition asks either for a gain, or for no more than a loss of quality.",
                "write one of them, e.g. min_gain: 0 or max_drop: 0.02",
            )
        if criterion.metric not in (*GATE_ONLY, *METRICS) and criterion.metric not in chosen:
            fact = f"evaluation.gate[{index}].metric is `{criterion.metric}`."
            yield Finding(((*path, "metric"),), fact, _known(), _nearest(criterion.metric, (*GATE_ONLY, *METRICS)))


def _own_metric(index: int, name: str) -> Iterator[Finding]:
    file, _, function = name.partition(":")
    path = ("evaluation", "metrics", index)
    if not function.isidentifier():
        fact = f"evaluation.metrics has `{name}`."
        yield Finding((path,), fact, "a metric of yours is FILE.py:FUNCTION.", "write metrics.py:score")
    elif not Path(file).is_file():
        fact = f"evaluation.metrics has `{name}`, and there is no file {file}."
        why = "the function is read from the file, relative to the current folder."
        yield Finding((path,), fact, why, "correct the path")


def _known() -> str:
    return f"known metrics are {join_words(METRICS)}, and FILE.py:FUNCTION for your own."


def _nearest(name: str, known: tuple[str, ...]) -> str:
    near = [each for each in known if name in each] or difflib.get_close_matches(name, known, 1, cutoff=0.4)
    return f"write {near[0]}" if near else f"write {known[0]}"
