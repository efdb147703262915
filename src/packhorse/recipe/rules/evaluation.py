"""Rules on evaluation: metrics and the gate."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from packhorse.recipe.evaluation import EvaluationSection, JudgeSection
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
ADDED: Final = ("judge_wins", "judge_score", "people_wins", "people_score")
"""Verdicts of a judge and of people, which `packhorse.evaluate.opinions` adds to an evaluation."""


def evaluation_rules(evaluation: EvaluationSection) -> Iterator[Finding]:
    """Yield the rules on metrics and gate that the section breaks."""
    chosen = [] if evaluation.metrics == "auto" else evaluation.metrics
    for index, name in enumerate(chosen):
        if ":" in name:
            yield from _own_metric(index, name)
        elif name not in METRICS:
            path = ("evaluation", "metrics", index)
            yield Finding((path,), f"evaluation.metrics has `{name}`.", _known(), _nearest(name, METRICS))
    if evaluation.judge is not None:
        yield from _judge_rules(evaluation.judge)
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
        known = (*GATE_ONLY, *METRICS, *ADDED)
        if criterion.metric not in known and criterion.metric not in chosen:
            fact = f"evaluation.gate[{index}].metric is `{criterion.metric}`."
            yield Finding(((*path, "metric"),), fact, _known(), _nearest(criterion.metric, known))


def _judge_rules(judge: JudgeSection) -> Iterator[Finding]:
    path = ("evaluation", "judge")
    if judge.max_cost is not None and (judge.input_price is None or judge.output_price is None):
        yield Finding(
            ((*path, "max_cost"),),
            f"evaluation.judge.max_cost is {judge.max_cost:g}, and a price is missing.",
            "the cost is estimated from tokens and prices before the first request.",
            "set evaluation.judge.input_price and evaluation.judge.output_price, per million tokens",
        )
    for name in sorted({"messages", "model", "stream", "tools"} & set(judge.request)):
        fact = f"evaluation.judge.request has `{name}`."
        why = "the prompt and the model are given by the other fields, and the reply is read whole."
        yield Finding(((*path, "request"),), fact, why, f"remove `{name}` from evaluation.judge.request")
    if judge.template is not None and not Path(judge.template).is_file():
        fact = f"evaluation.judge.template is {judge.template}, and there is no such file."
        why = "the prompt is read from the file, relative to the current folder."
        yield Finding(((*path, "template"),), fact, why, "correct the path, or remove evaluation.judge.template")


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
