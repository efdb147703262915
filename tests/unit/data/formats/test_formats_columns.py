from __future__ import annotations

from typing import Any

import pytest
from formats_cases import BOT, USER, convert, said

from packhorse.data.formats.rows import convert_rows, resolve_format
from packhorse.data.read.row import Row, RowMistakes
from packhorse.errors import UserError
from packhorse.recipe.schema import Source

HI = [("user", "hi"), ("assistant", "fine")]


@pytest.mark.parametrize(
    ("values", "source", "expected"),
    [
        pytest.param({"1": "hi", "2": "fine"}, {"columns": {"question": "1", "answer": "2"}}, HI, id="no header"),
        pytest.param(
            {"dialog": [{"speaker": "customer", "says": "hi"}, {"speaker": "agent", "says": "fine"}]},
            {
                "columns": {"messages": "dialog", "role": "speaker", "content": "says"},
                "roles": {"customer": "user", "agent": "assistant"},
            },
            HI,
            id="chat",
        ),
        pytest.param(
            {"conversations": [{"from": "chatgpt-user", "value": "hi"}, {"from": "bard", "value": "fine"}]},
            {"roles": {"chatgpt-user": "user", "bard": "assistant"}},
            HI,
            id="roles alone",
        ),
        pytest.param(
            {"data": {"turns": [USER, BOT]}}, {"columns": {"messages": "data.turns"}}, HI, id="a path to a list"
        ),
        pytest.param(
            {"question": "who?", "context": "He came.", "answers": [{"text": "he"}], "id": "7"},
            {"columns": {"instruction": "question", "input": "context", "output": "answers.0.text"}},
            [("user", "who?\n\nHe came."), ("assistant", "he")],
            id="squad",
        ),
        pytest.param(
            {"question": "fine", "answer": "hi"}, {"columns": {"question": "answer", "answer": "question"}}, HI,
            id="swap",
        ),
        pytest.param(
            {"prompt": "hi", "good": {"by": "agent", "content": "fine"}, "bad": {"by": "agent", "content": "no"}},
            {"columns": {"chosen": "good", "rejected": "bad", "role": "by"}, "roles": {"agent": "assistant"}},
            HI,
            id="a pair of turns",
        ),
        pytest.param({"a.b": "hi", "c": "fine"}, {"columns": {"prompt": "a.b", "completion": "c"}}, HI, id="dotted"),
        pytest.param({"text": "hi", "topic": "fine"}, {"columns": {"label": "topic"}}, HI, id="a label"),
    ],
)  # fmt: skip
def test_other_names(values: dict[str, Any], source: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert said(convert(values, **source).messages) == expected


def test_a_mapped_key_is_no_field_any_more() -> None:
    example = convert({"ask": "hi", "say": "fine", "lang": "en"}, columns={"question": "ask", "answer": "say"})
    assert example.fields == {"lang": "en"}
    assert convert({"prompt": "hi", "key": 1}, "text", columns={"text": "prompt"}).fields == {"key": 1}


@pytest.mark.parametrize(
    ("source", "fact", "fix"),
    [
        pytest.param(
            {"columns": {"question": "q", "answer": "a"}},
            "columns has {question: q}, and the row has no q; the row's keys are ask, a",
            "exactly as in the rows", id="absent",
        ),
        pytest.param({"columns": {"question": "ask.0"}}, "the row has no ask.0", "", id="no such path"),
        pytest.param({"columns": {"qestion": "ask"}}, "no format has a key qestion", "write question", id="mistyped"),
        pytest.param({"roles": {"agent": "bot"}}, "roles maps agent to bot", "system, user, assistant", id="role"),
    ],
)  # fmt: skip
def test_one_clear_error(source: dict[str, Any], fact: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        convert({"ask": "hi", "a": "fine"}, **source)
    (mistake,) = caught.value.mistakes
    assert fact in mistake.fact
    assert fix in mistake.fix


def test_an_absent_key_of_turns_is_told_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"has no text; the keys of its turns are role, says") as caught:
        convert({"messages": [{"role": "user", "says": "hi"}]}, columns={"content": "text"})
    assert len(caught.value.mistakes) == 1


def test_a_later_row_without_the_mapped_key_is_a_mistake_of_its_own() -> None:
    source = Source.model_validate({"path": "x", "columns": {"question": "q", "answer": "a"}})
    rows = [Row("x:1", {"q": "hi", "a": "b"}), Row("x:2", {"question": "hi", "a": "b"})]
    mistakes = RowMistakes("x")
    assert len(list(convert_rows(rows, resolve_format("auto", rows[0], source), mistakes, source))) == 1
    assert "x:2: the row has no question (columns: q), so it is not question_answer" in str(mistakes.to_show()[0])


SQUAD = {
    "title": "Ann",
    "paragraphs": [
        {"context": "A", "qas": [{"q": "a1", "answers": ["x"]}, {"q": "a2", "answers": ["y"]}]},
        {"context": "B", "qas": [{"q": "b1", "answers": ["z"]}]},
    ],
}


def nested(row: dict[str, Any], **columns: str) -> tuple[list[tuple[str, list[str]]], list[str]]:
    source = Source.model_validate({"path": "x", "columns": columns})
    mistakes = RowMistakes("x")
    rows = [Row("x:1", row)]
    made = convert_rows(rows, resolve_format("auto", rows, source), mistakes, source)
    taken = [(example.where, [turn.content for turn in example.messages or ()]) for example in made]
    return taken, [str(mistake) for mistake in mistakes.recorded]


def test_each_element_of_a_list_is_a_row() -> None:
    taken, mistakes = nested(
        SQUAD,
        instruction="paragraphs.*.qas.*.q",
        input="paragraphs.*.context",
        output="paragraphs.*.qas.*.answers.0",
    )
    assert mistakes == []
    assert taken == [
        ("x:1[0.0]", ["a1\n\nA", "x"]),
        ("x:1[0.1]", ["a2\n\nA", "y"]),
        ("x:1[1.0]", ["b1\n\nB", "z"]),
    ]


def test_an_element_without_an_answer_is_named_by_its_place() -> None:
    row = {"qas": [{"q": "a1", "a": "x"}, {"q": "a2"}]}
    taken, mistakes = nested(row, question="qas.*.q", answer="qas.*.a")
    assert [where for where, _ in taken] == ["x:1[0]"]
    assert mistakes[0].startswith("x:1[1]: the row has no answer (columns: qas.*.a)")


def test_no_list_to_go_through_is_told() -> None:
    with pytest.raises(UserError, match=r"the row has no qas\.\*\.q and no"):
        nested({"qas": []}, question="qas.*.q", answer="qas.*.a")
