"""Metrics of structured answers: JSON fields and tool calls."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import regex

from packhorse.evaluate.metrics.metric import Expected, Metric, Reply

FENCE: Final = regex.compile(r"```(?:json)?\s*\n(.*?)\n?```", regex.DOTALL)
ABSENT: Final = object()
NAME_KEYS: Final = ("name", "function")
ARGUMENT_KEYS: Final = ("arguments", "parameters")


def parse_json(text: str) -> object:
    """Return the JSON object or array that is the whole text or its one code block; ABSENT if there is none."""
    fenced = FENCE.findall(text)
    for candidate in (text, *fenced[:1]):
        try:
            value = json.loads(candidate, parse_constant=_refuse)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict | list):
            return value
    return ABSENT


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def leaves(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield path and value (as JSON text) of each leaf; an empty object or array is a leaf."""
    if not value or not isinstance(value, dict | list):
        # 1 and 1.0 are one JSON number; json.dumps keeps them apart.
        plain = int(value) if isinstance(value, float) and value.is_integer() else value
        yield path, json.dumps(plain, sort_keys=True, ensure_ascii=False)
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(inner, (*path, key))


def field_accuracy(expected: object, answer: object) -> float:
    """Return the share of leaves, expected or answered, that both have with the same value; 0 to 1."""
    truth, given = dict(leaves(expected)), dict(leaves(answer))
    return sum(given.get(path) == value for path, value in truth.items()) / len(truth.keys() | given.keys())


def tool_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return name and arguments of the calls in a text: JSON objects with a name and arguments, in order.

    Hermes' and Qwen's `<tool_call>` blocks, Llama's `{"name": …, "parameters": …}` and Mistral's lists hold such
    objects; whatever is around them is skipped.
    """
    calls, decoder, at = [], json.JSONDecoder(), 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        call = _call(value)
        calls += [call] if call else []
        at = end if call else at + 1
    return calls


def _call(value: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    name = next((value[key] for key in NAME_KEYS if isinstance(value.get(key), str)), None)
    arguments = next((value[key] for key in ARGUMENT_KEYS if key in value), None)
    if isinstance(arguments, str):
        arguments = parse_json(arguments)
    return (name, arguments) if name is not None and isinstance(arguments, dict) else None


def _json_valid(expected: Expected, reply: Reply) -> float:
    if expected.has_tool_calls or parse_json(expected.text) is ABSENT:
        return math.nan
    return float(reply.ended and parse_json(reply.text) is not ABSENT)


def _json_fields(expected: Expected, reply: Reply) -> float:
    if expected.has_tool_calls or (truth := parse_json(expected.text)) is ABSENT:
        return math.nan
    given = parse_json(reply.text)
    return 0.0 if given is ABSENT else field_accuracy(truth, given)


def _tool_names(expected: Expected, reply: Reply) -> float:
    truth = tool_calls(expected.text) if expected.has_tool_calls else []
    if not truth:
        return math.nan
    return float(Counter(name for name, _ in truth) == Counter(name for name, _ in tool_calls(reply.text)))


def _tool_arguments(expected: Expected, reply: Reply) -> float:
    """Return the F1 of (tool, argument, value): precision and recall of what is passed to tools."""
    truth = tool_calls(expected.text) if expected.has_tool_calls else []
    if not truth:
        return math.nan
    wanted, given = _passed(truth), _passed(tool_calls(reply.text))
    total = wanted.total() + given.total()
    return 2 * (wanted & given).total() / total if total else 1.0


def _passed(calls: list[tuple[str, dict[str, Any]]]) -> Counter[tuple[Any, ...]]:
    # A call without arguments counts as one item, so that it is found or missed too.
    return Counter((name, *leaf) for name, arguments in calls for leaf in leaves(arguments))


JSON_VALID: Final = Metric("json_valid", "binary", "%", _json_valid)
JSON_FIELDS: Final = Metric("json_fields", "graded", "%", _json_fields)
TOOL_NAMES: Final = Metric("tool_names", "binary", "%", _tool_names)
TOOL_ARGUMENTS: Final = Metric("tool_arguments", "graded", "%", _tool_arguments)
