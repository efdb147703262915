"""Types decide what a value is, never whether it is true: 0, false, [] and NaN are not the same as no value."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
from formats_cases import BOT, USER, convert, said, turns

from packhorse.errors import UserError

ALPACA = {"instruction": "add", "output": "3"}
QA = {"question": "q", "answer": "a"}
ZERO_VALUES = (0, 0.0, False, [], {}, nan)
OPTIONAL = {
    "input": ALPACA,
    "context": QA,
    "system": QA,
    "system_prompt": {"messages": [USER, BOT]},
}


@pytest.mark.parametrize("value", ZERO_VALUES, ids=repr)
@pytest.mark.parametrize("key", OPTIONAL)
def test_what_is_no_text_is_refused_beside_the_prompt(key: str, value: Any) -> None:
    what = "an empty list" if value == [] else type(value).__name__
    with pytest.raises(UserError, match=f"{key} is {what}, not text"):
        convert({**OPTIONAL[key], key: value})


@pytest.mark.parametrize("value", [None, ""], ids=repr)
@pytest.mark.parametrize("key", OPTIONAL)
def test_null_and_an_empty_text_are_no_value(key: str, value: Any) -> None:
    assert convert({**OPTIONAL[key], key: value}).messages == convert(OPTIONAL[key]).messages


@pytest.mark.parametrize("value", [0, False, {"a": 1}, nan], ids=repr)
@pytest.mark.parametrize("key", ["history", "tools"])
def test_what_is_no_list_is_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{key} is"):
        convert({**ALPACA, key: value})


@pytest.mark.parametrize("value", [0, False, [], {}, nan], ids=repr)
@pytest.mark.parametrize("key", ["reasoning_content", "name"])
def test_what_is_no_text_is_refused_in_a_turn(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{key} of turn 2 is"):
        convert({"messages": [USER, {**BOT, key: value}]})


def test_thinking_may_look_like_empty_json() -> None:
    (_, answer) = convert({"messages": [USER, {**BOT, "reasoning_content": "[]"}]}).messages or ()
    assert answer.thinking == "[]"


@pytest.mark.parametrize("value", [nan, inf, -inf], ids=repr)
@pytest.mark.parametrize("key", ["label", "category", "intent"])
def test_a_label_that_is_missing_from_a_column_of_numbers(key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{key} is {value}"):
        convert({"text": "hi", key: value})


@pytest.mark.parametrize(("label", "text"), [(0, "0"), (False, "false"), (0.0, "0.0"), (-1, "-1"), ("nan", "nan")])
def test_a_label_may_be_zero_or_false(label: Any, text: str) -> None:
    assert turns(convert({"text": "hi", "label": label}).messages)[1] == ("assistant", text, True)


@pytest.mark.parametrize("value", [nan, 0, False, [], {}, None], ids=repr)
@pytest.mark.parametrize(
    ("row", "key"), [(QA, "answer"), (ALPACA, "output"), ({"prompt": "p", "completion": "c"}, "completion")]
)
def test_an_answer_that_is_no_text(row: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{key} is"):
        convert({**row, key: value})


@pytest.mark.parametrize("value", [nan, 0, False, [], {}, None], ids=repr)
@pytest.mark.parametrize(
    "row", [QA, ALPACA, {"prompt": "p", "completion": "c"}, {"text": "t"}], ids=lambda row: next(iter(row))
)
def test_a_prompt_that_is_no_text(row: dict[str, Any], value: Any) -> None:
    key = next(iter(row))
    with pytest.raises(UserError, match=f"{key} is"):
        convert({**row, key: value})


def test_a_zero_in_text_is_text() -> None:
    assert said(convert({**ALPACA, "input": "0", "system": "0"}).messages) == [
        ("system", "0"), ("user", "add\n\n0"), ("assistant", "3"),
    ]  # fmt: skip
