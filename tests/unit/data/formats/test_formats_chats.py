from __future__ import annotations

from typing import Any

import pytest
from formats_cases import BOT, GPT, HUMAN, USER, convert, turns

from packhorse.data.formats.rows import convert_rows, detect_format, resolve_format
from packhorse.data.read.row import Row, RowMistakes
from packhorse.errors import UserError
from packhorse.recipe.schema import Source

HI = [("user", "hi", True), ("assistant", "fine", True)]
ADD = [("user", "add\n\n1 2", True), ("assistant", "3", True)]
SYSTEM = ("system", "be", True)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param({"messages": [USER, BOT]}, HI, id="messages"),
        pytest.param(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "value": "h"}, {"type": "text", "text": "i"}]},
                    {**BOT, "loss_weight": 0.0},
                    {**USER, "loss_weight": 0.0},
                    {**BOT, "train": False},
                    {**USER, "train": False},
                    {**BOT, "weight": 0},
                    {**BOT, "loss_weight": 1.0},
                    {**BOT, "train": True},
                ]
            },
            [
                ("user", "hi", True),
                ("assistant", "fine", False),
                ("user", "hi", False),
                ("assistant", "fine", False),
                ("user", "hi", False),
                ("assistant", "fine", False),
                ("assistant", "fine", True),
                ("assistant", "fine", True),
            ],
            id="parts and weights",
        ),
        pytest.param({"messages": [{**USER, "role": "developer"}, USER, BOT]}, [("system", "hi", True), *HI], id="dev"),
        pytest.param({"messages": [USER, BOT], "system": "be"}, [SYSTEM, *HI], id="system beside messages"),
        pytest.param({"conversations": [HUMAN, GPT], "system": "be"}, [SYSTEM, *HI], id="sharegpt"),
        pytest.param(
            {"conversations": [{"from": "system", "value": "be"}, HUMAN, GPT], "system": "be"}, [SYSTEM, *HI],
            id="the same system twice",
        ),
        pytest.param({"conversations": [USER, BOT], "system": ""}, HI, id="role and content in conversations"),
        pytest.param({"instruction": "add", "input": "1 2", "output": "3", "system": "be"}, [SYSTEM, *ADD], id="alp"),
        pytest.param(
            {"instruction": "add", "input": "", "output": "3", "history": []},
            [("user", "add", True), ("assistant", "3", True)],
            id="alpaca without input",
        ),
        pytest.param(
            {"instruction": "add", "input": "1 2", "output": "3", "history": [["a", "b"], ["c", "d"]], "system": "be"},
            [
                SYSTEM,
                ("user", "a", True),
                ("assistant", "b", True),
                ("user", "c", True),
                ("assistant", "d", True),
                *ADD,
            ],
            id="alpaca with history",
        ),
        pytest.param({"prompt": "hi", "completion": "fine"}, HI, id="prompt"),
        pytest.param({"prompt": "hi", "completion": "fine", "system": "be"}, [SYSTEM, *HI], id="prompt with system"),
        pytest.param(
            {"prompt": [USER, BOT, USER], "completion": [BOT]},
            [("user", "hi", False), ("assistant", "fine", False), ("user", "hi", False), ("assistant", "fine", True)],
            id="prompt and completion as turns: the prompt is context",
        ),
        pytest.param({"question": "hi", "answer": "fine"}, HI, id="question"),
        pytest.param({"question": "hi", "answer": "fine", "system": "be"}, [SYSTEM, *HI], id="question with system"),
        pytest.param({"text": "hi", "label": "fine"}, HI, id="text and label"),
        pytest.param({"text": "hi", "category": 3}, [("user", "hi", True), ("assistant", "3", True)], id="number"),
        pytest.param({"text": "hi", "label": True}, [("user", "hi", True), ("assistant", "true", True)], id="boolean"),
    ],
)  # fmt: skip
def test_chats(values: dict[str, Any], expected: list[tuple[str, str, bool]]) -> None:
    assert turns(convert(values).messages) == expected


def test_text_and_other_fields() -> None:
    example = convert({"text": "once", "language": "en", "score": 0.5, "other": {"deep": 1}, "none": None})
    assert (example.messages, example.text, example.where) == (None, "once", "rows.jsonl:7")
    assert example.fields == {"language": "en", "score": 0.5}


def test_a_list_of_texts_is_paragraphs() -> None:
    assert convert({"text": ["once", "upon"]}).text == "once\n\nupon"


def test_a_label_is_a_field_too() -> None:
    assert convert({"text": "a", "category": "b", "split": "x"}).fields == {"category": "b", "split": "x", "label": "b"}
    assert convert({"text": "a", "label": 0}).fields == {"label": 0}


def test_declared_text_takes_a_labelled_row() -> None:
    assert detect_format({"text": "a", "category": "b"}) == "text_label"
    example = convert({"text": "a", "category": "b"}, "text")
    assert (example.text, example.fields) == ("a", {"category": "b"})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_stands_apart(key: str) -> None:
    (_, answer) = convert({"messages": [USER, {**BOT, key: "hm"}]}).messages or ()
    assert (answer.content, answer.thinking) == ("fine", "hm")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param({"messages": [], "text": "summary", "label": "x"}, "messages", id="a chat with a label"),
        pytest.param({"messages": [], "label": True}, "kto", id="a chat with a verdict"),
        pytest.param({"conversations": [], "kto_tag": False}, "kto", id="kto_tag"),
        pytest.param({"prompt": "", "completion": "", "label": False}, "kto", id="completion with a verdict"),
        pytest.param({"prompt": "", "completion": "", "label": "x"}, "prompt_completion", id="completion with a label"),
        pytest.param({"prompt": "", "chosen": "", "rejected": ""}, "preference", id="pair"),
        pytest.param({"messages": [], "chosen": {}, "rejected": {}}, "preference", id="pair beside messages"),
        pytest.param({"text": "", "intent": ""}, "text_label", id="intent"),
        pytest.param({"text": "", "topic": ""}, "text", id="text"),
        pytest.param({"prompt": ""}, None, id="prompt alone"),
    ],
)
def test_the_keys_show_the_format(values: dict[str, Any], expected: str | None) -> None:
    assert detect_format(values) == expected


@pytest.mark.parametrize(
    ("values", "declared", "fact", "fix"),
    [
        pytest.param({"question": "a", "answer": "b"}, "messages", "it looks like question_answer", "set", id="other"),
        pytest.param({"key": 1, "prompt": "a"}, "auto", "key, prompt, which is no", "columns", id="prompt alone"),
        pytest.param({"text": "a"}, "text_label", "no label or category or class or", "set the", id="no label"),
        pytest.param({"instuction": "a", "output": "b"}, "alpaca", "instuction is close to", "fix the row", id="typo"),
        pytest.param({"messages": [{**USER, "role": "asistant"}]}, "auto", "'asistant'", "write assistant", id="role"),
        pytest.param({"messages": [{**USER, "role": 5}]}, "auto", "the role 5", "one of these", id="role type"),
        pytest.param({"messages": [{**USER, "role": ["x"]}]}, "auto", "the role list", "one of", id="role as list"),
        pytest.param({"messages": [{"speaker": "a", "content": ""}]}, "auto", "speaker, content", "colu", id="no role"),
        pytest.param({"messages": [{"role": "user", "says": ""}]}, "auto", "are role, says", "colu", id="no content"),
        pytest.param({"messages": [USER]}, "auto", "no assistant turn", "add the answer", id="no answer"),
        pytest.param({"messages": []}, "auto", "messages is an empty list", "list of objects", id="no turns"),
        pytest.param({"messages": "hi"}, "auto", "messages is str", "list of objects", id="no list"),
        pytest.param({"messages": ["hi"]}, "auto", "other elements than", "list of", id="no objects"),
        pytest.param({"messages": [USER, {**BOT, "content": " "}]}, "auto", "turn is empty", "fill it in", id="empty"),
        pytest.param({"messages": [USER, {**BOT, "content": []}]}, "auto", "an empty list", "as text", id="no parts"),
        pytest.param({"messages": [USER, {**BOT, "content": None}]}, "auto", "2 is null, not", "as text", id="null"),
        pytest.param({"messages": [USER, {**BOT, "content": 3}]}, "auto", "2 is int, not", "as text", id="number"),
        pytest.param(
            {"messages": [{**USER, "content": [{"type": "image", "url": "x"}]}, BOT]}, "auto", "type image", "text",
            id="image",
        ),
        pytest.param(
            {"messages": [{**USER, "content": [{"type": "text", "text": [{"type": "text", "text": "x"}]}]}, BOT]},
            "auto", "is null", "text", id="parts in parts",
        ),
        pytest.param({"messages": [USER, {**BOT, "loss_weight": 0.5}]}, "auto", "2 is 0.5", "0 or 1", id="weight"),
        pytest.param({"messages": [USER, {**BOT, "weight": True}]}, "auto", "2 is True", "0 or 1", id="weight yes"),
        pytest.param({"messages": [USER, {**BOT, "train": "no"}]}, "auto", "2 is 'no'", "true or", id="train"),
        pytest.param({"messages": [{**USER, "loss_weight": 1}, BOT]}, "auto", "marked to be", "train_on", id="user"),
        pytest.param({"messages": [{**USER, "train": True}, BOT]}, "auto", "marked to be", "roles", id="train user"),
        pytest.param({"messages": [{**USER, "reasoning": "a"}, BOT]}, "auto", "user has reasoning", "", id="thinking"),
        pytest.param({"messages": [USER, {**BOT, "train": False}]}, "auto", "no assistant turn", "one turn", id="none"),
        pytest.param(
            {"conversations": [{"from": "system", "value": "a"}, HUMAN, GPT], "system": "b"}, "auto", "another system",
            "remove one", id="two systems",
        ),
        pytest.param({"text": " \n"}, "auto", "text is empty", "remove", id="empty text"),
        pytest.param({"text": None}, "auto", "text is null", "as text", id="null text"),
        pytest.param({"text": "a", "label": ""}, "auto", "answer of an assistant turn is empty", "fill", id="label"),
        pytest.param({"text": "a", "label": None}, "auto", "label is null", "as text", id="null label"),
        pytest.param({"question": "a", "answer": "\t"}, "auto", "turn is empty", "fill", id="empty answer"),
        pytest.param({"prompt": "a\ud800", "completion": "b"}, "auto", "half a surrogate pair", "pair", id="surrogate"),
        pytest.param({"text": "a", "x": "\udfff"}, "auto", "x has half a surrogate", "pair", id="surrogate in a field"),
        pytest.param({"text": "a", "\udfff": "x"}, "auto", "name of the field '\\udfff'", "pair", id="in a name"),
        pytest.param({"instruction": "a", "input": [1], "output": "b"}, "auto", "part of type int", "text", id="input"),
        pytest.param(
            {"instruction": "a", "output": "b", "history": [["a"]]}, "auto", "history has an element that", "prompt",
            id="history pair",
        ),
        pytest.param(
            {"instruction": "a", "output": "b", "history": "x"}, "auto", "history is 'x'", "null", id="history text"
        ),
        pytest.param(
            {"instruction": "a", "output": "b", "history": [["a", ""]]}, "auto", "turn is empty", "", id="history empty"
        ),
        pytest.param({"prompt": [USER], "completion": [USER]}, "auto", "completion begins with", "first", id="who"),
    ],
)  # fmt: skip
def test_refused_with_its_line(values: dict[str, Any], declared: Any, fact: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(values, declared)
    (mistake,) = caught.value.mistakes
    assert mistake.where == "rows.jsonl:7"
    assert fact in mistake.fact
    assert fix in mistake.fix
    # A terminal must be able to show it.
    str(caught.value).encode()


def mixed(first: dict[str, Any], second: dict[str, Any], declared: Any) -> tuple[list[str], str]:
    """Lines that were taken, and what was said of the others."""
    source = Source(path="rows.jsonl", format=declared)
    rows = [Row("rows.jsonl:1", first), Row("rows.jsonl:2", second)]
    mistakes = RowMistakes("rows.jsonl")
    found = resolve_format(declared, rows[0], source)
    taken = [example.where for example in convert_rows(rows, found, mistakes, source)]
    return taken, "\n".join(str(mistake) for mistake in mistakes.to_show())


@pytest.mark.parametrize(
    ("first", "second", "fact"),
    [
        pytest.param({"text": "a"}, {"prompt": "a", "completion": "b"}, "it looks like prompt_completion", id="keys"),
        pytest.param({"text": "a"}, {"text": "a", "label": "b"}, "looks like text_label", id="a label"),
        pytest.param({"messages": [USER, BOT]}, {"messages": [USER, BOT], "label": False}, "looks like kto", id="kto"),
        pytest.param(
            {"messages": [USER, BOT]}, {"messages": [USER], "chosen": BOT, "rejected": GPT}, "preference", id="pair"
        ),
    ],
)  # fmt: skip
def test_row_unlike_the_first_is_found(first: dict[str, Any], second: dict[str, Any], fact: str) -> None:
    taken, told = mixed(first, second, "auto")
    assert taken == ["rows.jsonl:1"]
    assert told.startswith("rows.jsonl:2: the row ")
    assert fact in told


def test_a_declared_format_keeps_a_label_as_a_field() -> None:
    taken, told = mixed({"messages": [USER, BOT]}, {"messages": [USER, BOT], "label": False}, "messages")
    assert (len(taken), told) == (2, "")


def test_the_first_rows_decide_not_only_the_very_first() -> None:
    rows = [Row("rows.jsonl:1", {"txt": "a"}), Row("rows.jsonl:2", {"text": "a"})]
    assert resolve_format("auto", rows) == "text"


def test_a_row_of_ten_thousand_strange_keys_is_told_briefly() -> None:
    row = Row("rows.jsonl:1", {f"{at}-{'k' * 1000}": at for at in range(10_000)})
    with pytest.raises(UserError) as caught:
        resolve_format("auto", row)
    assert len(str(caught.value)) < 2500
    assert "and 9980 more" in str(caught.value)
