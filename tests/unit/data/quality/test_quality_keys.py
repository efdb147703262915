"""Which rows are the same, which only look so, and which contradict each other."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from packhorse.data.checks.keys import answer_keys, content_keys, contradictions, prompt_keys
from packhorse.data.formats.example import Example, Message

ASKED = Message("user", "Is it raining?")
ANSWER = Message("assistant", "Yes.")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Vigo"}}}
ROW = Example((ASKED, ANSWER), None, {}, "rows.jsonl:1")


def changed(**turn: Any) -> Example:
    return replace(ROW, messages=(ASKED, replace(ANSWER, **turn)))


def same(keys: np.ndarray) -> bool:
    return len({tuple(key) for key in keys.tolist()}) == 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(changed(content="Yes. "), id="a space"),
        pytest.param(changed(content="yes."), id="case"),
        pytest.param(changed(role="user"), id="role"),
        pytest.param(changed(thinking="I look out."), id="thinking"),
        pytest.param(changed(name="bot"), id="name"),
        pytest.param(changed(tool_calls=(CALL,)), id="call"),
        pytest.param(replace(ROW, tools=(CALL,)), id="tools"),
        pytest.param(replace(ROW, rejected=(Message("assistant", "No."),)), id="rejected"),
        pytest.param(replace(ROW, desirable=True), id="verdict"),
        pytest.param(
            replace(ROW, messages=(replace(ASKED, content="Is it raining?user"), ANSWER)), id="a role as text"
        ),
        pytest.param(Example(None, "Is it raining?Yes.", {}, ""), id="plain text"),
    ],
)
def test_rows_that_say_something_else_differ(other: Example) -> None:
    assert not same(content_keys([ROW, other]))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(replace(ROW, fields={"id": 7}, where="rows.jsonl:9"), id="fields"),
        pytest.param(changed(trained=False), id="mask"),
        pytest.param(changed(thinking=""), id="thinking of nothing"),
    ],
)
def test_what_is_beside_the_text_does_not_count(other: Example) -> None:
    assert same(content_keys([ROW, other]))


def test_a_call_under_another_number_is_the_same_call() -> None:
    one, two = changed(tool_calls=({"id": "call_1", **CALL},)), changed(tool_calls=({"id": "call_2", **CALL},))
    assert same(content_keys([one, two]))
    other = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Lugo"}}}
    assert not same(content_keys([one, changed(tool_calls=({"id": "call_1", **other},))]))


def test_a_border_between_turns_is_part_of_the_row() -> None:
    rows = [
        Example((Message("user", one), Message("assistant", two)), None, {}, "")
        for one, two in [("ab", "c"), ("a", "bc"), ("", "abc"), ("ab 1 c", ""), ("ab\0c", "")]
    ]
    # What the rows above might look like once their turns are written one after the other.
    rows += [
        Example((Message("user", said),), None, {}, "")
        for said in ("aassistantbc", "a assistant 2 bc", "aassistant 2 bc")
    ]
    assert len({tuple(key) for key in content_keys(rows).tolist()}) == len(rows)


def test_keys_do_not_hang_on_the_batch() -> None:
    rows = [ROW, changed(content="No."), changed(content="¿Sí?")]
    together = content_keys(rows)
    assert (together == np.concatenate([content_keys([row]) for row in rows])).all()
    assert (together.dtype, together.shape, content_keys([]).shape) == (np.uint64, (3, 2), (0, 2))


def opposed(*rows: Example) -> list[bool]:
    found: list[bool] = contradictions(prompt_keys(rows), answer_keys(rows)).tolist()
    return found


def chat(*contents: str) -> Example:
    roles = ("user", "assistant")
    return Example(tuple(Message(roles[at % 2], said) for at, said in enumerate(contents)), None, {}, "")


def preference(chosen: str, rejected: str) -> Example:
    return replace(chat("Which?", chosen), rejected=(Message("assistant", rejected),))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([chat("a", "1"), chat("a", "2"), chat("b", "1")], [True, True, False], id="another answer"),
        pytest.param([chat("a", "1"), chat("a", "1")], [False, False], id="a copy"),
        pytest.param([chat("a", "1"), chat("a", "1"), chat("a", "2")], [True, True, True], id="copies and another"),
        pytest.param([chat("a", "1", "b", "2"), chat("a", "9", "b", "3")], [False, False], id="another history"),
        pytest.param([chat("a", "1", "b", "2"), chat("a", "1", "b", "3")], [True, True], id="the last turn"),
        pytest.param([Example(None, "a", {}, ""), Example(None, "b", {}, "")], [False, False], id="plain text"),
        pytest.param([preference("x", "y"), preference("y", "x")], [True, True], id="the other one is better"),
        pytest.param([preference("x", "y"), preference("x", "z")], [False, False], id="another pair"),
        pytest.param(
            [replace(chat("a", "1"), desirable=True), replace(chat("a", "1"), desirable=False)],
            [True, True],
            id="verdict",
        ),
        pytest.param(
            [replace(chat("a", "1"), desirable=True), replace(chat("a", "2"), desirable=False)],
            [False, False],
            id="verdicts on two answers",
        ),
    ],
)
def test_contradictions(rows: list[Example], expected: list[bool]) -> None:
    assert opposed(*rows) == expected


def test_contradictions_are_those_of_a_plain_loop() -> None:
    draw = random.Random(5)
    pairs = [(draw.randrange(60), draw.randrange(3)) for _ in range(300)]
    rows = [chat(f"prompt {prompt}", f"answer {answer}") for prompt, answer in pairs]
    expected = [any(one[0] == other[0] and one[1] != other[1] for other in pairs) for one in pairs]
    assert opposed(*rows) == expected
    assert 0 < sum(expected) < len(expected)
