from __future__ import annotations

from typing import Any

import pytest

from packhorse.data.formats.rows import Example, convert_rows, detect_format, resolve_format
from packhorse.data.reading.mistakes import RowMistakes
from packhorse.data.reading.sources import Row
from packhorse.errors import UserError

USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "fine"}


def convert(values: dict[str, Any], declared: Any = "auto") -> Example:
    row = Row("rows.jsonl:7", values)
    mistakes = RowMistakes("rows.jsonl")
    examples = list(convert_rows([row], resolve_format(declared, row), mistakes))
    mistakes.raise_if_any()
    return examples[0]


def turns(example: Example) -> list[tuple[str, str, bool]]:
    return [(turn.role, turn.content, turn.trained) for turn in example.messages or ()]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param({"messages": [USER, BOT]}, [("user", "hi", False), ("assistant", "fine", True)], id="messages"),
        pytest.param(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "value": "h"}, {"type": "text", "text": "i"}]},
                    {**BOT, "loss_weight": 0.0},
                    {**USER, "loss_weight": 0.0},
                    {**BOT, "train": False},
                    {**BOT, "loss_weight": 1.0},
                ]
            },
            [
                ("user", "hi", False),
                ("assistant", "fine", False),
                ("user", "hi", False),
                ("assistant", "fine", False),
                ("assistant", "fine", True),
            ],
            id="parts and weights",
        ),
        pytest.param(
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "fine"}], "system": "be"},
            [("system", "be", False), ("user", "hi", False), ("assistant", "fine", True)],
            id="sharegpt",
        ),
        pytest.param(
            {"instruction": "add", "input": "1 2", "output": "3", "system": "be"},
            [("system", "be", False), ("user", "add\n\n1 2", False), ("assistant", "3", True)],
            id="alpaca",
        ),
        pytest.param(
            {"instruction": "add", "input": "", "output": "3"},
            [("user", "add", False), ("assistant", "3", True)],
            id="alpaca without input",
        ),
        pytest.param({"prompt": "a", "completion": "b"}, [("user", "a", False), ("assistant", "b", True)], id="prompt"),
        pytest.param({"question": "a", "answer": "b"}, [("user", "a", False), ("assistant", "b", True)], id="question"),
    ],
)
def test_chats(values: dict[str, Any], expected: list[tuple[str, str, bool]]) -> None:
    assert turns(convert(values)) == expected


def test_text_and_other_fields() -> None:
    example = convert({"text": "once", "language": "en", "score": 0.5, "other": {"deep": 1}, "none": None})
    assert (example.messages, example.text, example.where) == (None, "once", "rows.jsonl:7")
    assert example.fields == {"language": "en", "score": 0.5}


@pytest.mark.parametrize(
    ("values", "declared", "fact", "fix"),
    [
        pytest.param({"question": "a", "answer": "b"}, "messages", "it looks like question_answer", "set", id="other"),
        pytest.param({"text": "a", "category": "b"}, "auto", "text, category, which is", "rename", id="label"),
        pytest.param({"instuction": "a", "output": "b"}, "alpaca", "instuction is near instruction", "mend", id="typo"),
        pytest.param({"messages": [{**USER, "role": "asistant"}]}, "auto", "'asistant'", "write assistant", id="role"),
        pytest.param({"messages": [{**USER, "role": 5}]}, "auto", "the role 5", "one of these", id="role type"),
        pytest.param({"messages": [USER]}, "auto", "no assistant turn", "add the answer", id="no answer"),
        pytest.param({"messages": []}, "auto", "messages is an empty list", "list of objects", id="no turns"),
        pytest.param({"messages": "hi"}, "auto", "messages is str", "list of objects", id="no list"),
        pytest.param({"messages": ["hi"]}, "auto", "other things than", "list of", id="no objects"),
        pytest.param({"messages": [USER, {**BOT, "content": " "}]}, "auto", "turn is empty", "fill it in", id="empty"),
        pytest.param({"messages": [USER, {**BOT, "content": None}]}, "auto", "2 is null, not", "as text", id="null"),
        pytest.param({"messages": [USER, {**BOT, "content": 3}]}, "auto", "2 is int, not", "as text", id="number"),
        pytest.param(
            {"messages": [{**USER, "content": [{"type": "image", "url": "x"}]}, BOT]}, "auto", "type image", "text",
            id="image",
        ),
        pytest.param({"messages": [USER, {**BOT, "loss_weight": 0.5}]}, "auto", "2 is 0.5", "0 or 1", id="weight"),
        pytest.param({"messages": [USER, {**BOT, "train": "no"}]}, "auto", "2 is 'no'", "true or", id="train"),
        pytest.param({"messages": [{**USER, "loss_weight": 1}, BOT]}, "auto", "marked to be", "remove", id="user"),
        pytest.param({"messages": [USER, {**BOT, "train": False}]}, "auto", "no assistant turn", "one turn", id="none"),
        pytest.param({"messages": [USER, {"role": "tool", "content": "1"}, BOT]}, "auto", "tool use", "", id="role"),
        pytest.param({"messages": [USER, BOT], "tools": ["x"]}, "auto", "tools (tool def", "plain", id="tools"),
        pytest.param({"messages": [USER, BOT], "label": True}, "auto", "(KTO)", "take these rows", id="kto"),
        pytest.param(
            {"conversations": [{"from": "human", "value": "a"}], "chosen": {"x": 1}}, "auto", "preference", "take",
            id="preference",
        ),
        pytest.param({"text": " \n"}, "auto", "text is empty", "remove", id="empty text"),
        pytest.param({"text": None}, "auto", "text is null", "as text", id="null text"),
        pytest.param({"prompt": "a\ud800", "completion": "b"}, "auto", "half a surrogate pair", "pair", id="surrogate"),
        pytest.param({"instruction": "a", "input": [1], "output": "b"}, "auto", "part of type int", "text", id="input"),
    ],
)  # fmt: skip
def test_refused_with_its_line(values: dict[str, Any], declared: Any, fact: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(values, declared)
    (mistake,) = caught.value.mistakes
    assert mistake.where == "rows.jsonl:7"
    assert fact in mistake.fact
    assert fix in mistake.fix


def test_row_unlike_the_first_is_found() -> None:
    mistakes = RowMistakes("rows.jsonl")
    rows = [Row("rows.jsonl:1", {"text": "a"}), Row("rows.jsonl:2", {"prompt": "a", "completion": "b"})]
    examples = list(convert_rows(rows, "text", mistakes))
    assert [example.where for example in examples] == ["rows.jsonl:1"]
    assert "rows.jsonl:2: the row has no text, so it is not text; it looks like prompt_completion." in str(
        mistakes.told()[0]
    )


def test_declared_text_takes_a_labelled_row() -> None:
    assert detect_format({"text": "a", "category": "b"}) is None
    assert convert({"text": "a", "category": "b"}, "text").fields == {"category": "b"}
