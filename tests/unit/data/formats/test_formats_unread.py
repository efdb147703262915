"""Keys that no format reads: metadata is kept, what carries a part of the conversation is refused, nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
from formats_cases import BOT, GPT, HUMAN, USER, convert, count_keys, said

from packhorse.errors import UserError

ANA = [("user", "Who won?\n\nAna beat Bo 3-1."), ("assistant", "Ana")]
HI = [("user", "hi"), ("assistant", "fine")]
BE = ("system", "be brief")
TOOLS = [{"type": "function", "function": {"name": "rain"}}]
CONTEXT = "Ana beat Bo 3-1."
PROSE = "It was a long day, and nobody knew how it would end. " * 5


def refusal(values: dict[str, Any], **source: Any) -> str:
    with pytest.raises(UserError) as caught:
        convert(values, **source)
    (mistake,) = caught.value.mistakes
    assert mistake.where == "rows.jsonl:7"
    return f"{mistake.fact} {mistake.fix}"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param({"question": "Who won?", "context": CONTEXT, "answer": "Ana"}, ANA, id="context"),
        pytest.param(
            {"instruction": "Who won?", "context": CONTEXT, "response": "Ana", "category": "closed_qa"}, ANA, id="dolly"
        ),
        pytest.param({"instruction": "hi", "context": "", "response": "fine", "category": "qa"}, HI, id="dolly, open"),
        pytest.param(
            {
                "id": "57", "title": "Match", "context": CONTEXT, "question": "Who won?",
                "answers": {"text": ["Ana"], "answer_start": [0]},
            },
            ANA, id="squad",
        ),
        pytest.param({"question": "hi", "answers": [{"text": "fine", "start": 3}, {"text": "ok"}]}, HI, id="answers"),
        pytest.param({"question": "hi", "answers": ["fine"]}, HI, id="answers as texts"),
        pytest.param({"system_prompt": "be brief", "question": "hi", "response": "fine"}, [BE, *HI], id="open orca"),
        pytest.param({"messages": [USER, BOT], "system_prompt": "be brief"}, [BE, *HI], id="messages"),
        pytest.param({"conversations": [HUMAN, GPT], "system_prompt": "be brief"}, [BE, *HI], id="sharegpt"),
        pytest.param({"prompt": [USER], "completion": [BOT], "system_prompt": "be brief"}, [BE, *HI], id="turns"),
        pytest.param({"text": "hi", "label": "fine", "system": "be brief"}, [BE, *HI], id="label"),
        pytest.param(
            {"prompt": "hi", "response": "fine", "history": [["a", "b"]]},
            [("user", "a"), ("assistant", "b"), *HI], id="history beside a prompt",
        ),
        pytest.param(
            {"instruction": "hi", "output": "fine", "history": [USER, BOT]}, [*HI, *HI], id="history of turns"
        ),
        pytest.param({"messages": [{**USER, "from": None}, {**BOT, "value": None, "trian": None}]}, HI, id="null keys"),
    ],
)  # fmt: skip
def test_what_a_row_says_is_trained(values: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert said(convert(values).messages) == expected


def test_a_context_is_read_as_the_columns_of_alpaca_would_read_it() -> None:
    row = {"question": "Who won?", "context": CONTEXT, "answers": {"text": ["Ana"], "answer_start": [0]}}
    columns = {"instruction": "question", "input": "context", "output": "answers.text.0"}
    assert convert(row).messages == convert(row, columns=columns).messages


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"prompt": "hi", "completion": "fine"}, id="texts"),
        pytest.param({"prompt": [USER], "completion": [BOT]}, id="turns"),
        pytest.param({"question": "hi", "answer": "fine"}, id="question"),
        pytest.param({"instruction": "hi", "output": "fine"}, id="instruction"),
    ],
)
def test_tools_of_a_row_reach_the_template(row: dict[str, Any]) -> None:
    assert convert({**row, "tools": TOOLS}).tools == tuple(TOOLS)


def test_parts_of_reasoning_and_calls() -> None:
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "value": "wait"},
        {"type": "tool_call", "value": '{"name": "rain", "arguments": {"city": "Oslo"}}'},
        {"type": "tool_call", "id": "b", "function": {"name": "rain", "arguments": {}}},
    ]
    answer = {"role": "tool", "content": "wet", "tool_call_id": "b"}
    _, calling, *_ = convert({"messages": [USER, {"role": "assistant", "content": parts}, answer, BOT]}).messages or ()
    assert (calling.content, calling.thinking) == ("wait", "hm")
    assert [call["function"] for call in calling.tool_calls] == [
        {"name": "rain", "arguments": {"city": "Oslo"}},
        {"name": "rain", "arguments": {}},
    ]


QA = {"question": "q", "answer": "a"}
CHAT = {"messages": [USER, BOT]}


def turn(**keys: Any) -> dict[str, Any]:
    """A chat whose answer has further keys."""
    return {"messages": [USER, {**BOT, **keys}]}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({**CHAT, "documents": [{"text": "a"}]}, "has documents", "ignore: [documents]"),
    ({**CHAT, "system_message": "s"}, "has system_message", "columns: {system: system_message}"),
    ({**CHAT, "history": [["a", "b"]]}, "has history", "ignore: [history]"),
    ({**CHAT, "images": ["a.png"]}, "has images", "ignore: [images]"),
    ({**QA, "passage": "p"}, "has passage", "columns: {context: passage}"),
    ({**QA, "available_tools": TOOLS}, "has available_tools", "columns: {tools: available_tools}"),
    ({**QA, "choices": ["a", "b"]}, "has choices", "ignore: [choices]"),
    ({**QA, "options": "A) a B) b"}, "has options", "ignore: [options]"),
    ({**QA, "reasoning": "r"}, "has reasoning", "ignore: [reasoning]"),
    ({**QA, "explained": PROSE}, "has explained", "ignore: [explained]"),
    ({**QA, "drafts": [PROSE, "b"]}, "has drafts", "ignore: [drafts]"),
    ({**QA, "log": [{"role": "user", "content": "x"}]}, "has log", "ignore: [log]"),
    ({**QA, "json": '[{"from": "human", "value": "x"}]'}, "has json", "ignore: [json]"),
    ({**QA, "first": PROSE, "then": PROSE}, "has first, then", "ignore: [first, then]"),
    ({"text": "a", "audio": {"bytes": b"x", "path": None}}, "has audio", "ignore: [audio]"),
    ({"text": "a", "frame": b"PNG"}, "has frame", "ignore: [frame]"),
    ({"text": "a", "video": "a.mp4"}, "has video", "ignore: [video]"),
    ({"text": "a", "role": "prompter", "parent_id": None}, "has role", "ignore: [role]"),
    ({"text": "a", "summary": "s"}, "has summary", "ignore: [summary]"),
    ({"text": "a", "data": {"question": "q"}}, "has data", "ignore: [data]"),
    ({"text": "title", "prompt": "p", "response": "r"}, "prompt_completion and of text", "format: text"),
    ({"text": "paper", "prompt": "p", "response": "r"}, "prompt_completion and of text", "ignore: [text]"),
    ({**CHAT, **QA}, "messages and of question_answer", "format: messages"),
    ({**QA, "response": "r"}, "answer and response", "ignore: [response]"),
    ({**CHAT, "system": "a", "system_prompt": "b"}, "system and system_prompt", "ignore: [system_prompt]"),
    ({**CHAT, "tools": TOOLS, "functions": [{"name": "a"}]}, "tools and functions", "ignore: [functions]"),
    ({"question": "q", "answers": {"text": [], "answer_start": []}}, "answers is no answer", "remove a question"),
    ({**QA, "what: it": PROSE}, "has what: it", 'ignore: ["what: it"]'),
    (turn(images=["a"]), "turn 2 has images", "ignore: [images]"),
    (turn(tool_call={}), "turn 2 has tool_call", "write tool_calls"),
    ({"messages": [USER, {"role": "assistant", "tool_call": {}}]}, "turn 2 has tool_call", "write tool_calls"),
    (turn(trian=False), "turn 2 has trian", "write train"),
    ({"messages": [{**USER, "at": 1}, {**BOT, "by": 2}]}, "turn 1 has at", "ignore: [at, by]"),
    (turn(value="other"), "turn 2 has content and value", "ignore: [value]"),
    (turn(reasoning="a", thinking="b"), "turn 2 has reasoning and thinking", "ignore: [thinking]"),
    (turn(train=True, weight=0), "turn 2 has train: true and weight: 0", "ignore: [weight]"),
    (turn(tool_call_id="a"), "the role assistant has tool_call_id", "the role tool"),
    (turn(tool_calls=[{"name": "a", "parameters": {}}]), "a call with parameters", "arguments"),
    (turn(tool_calls=[{"type": "custom", "name": "a"}]), "whose type is 'custom'", "function"),
    (turn(tool_calls=[{"id": 3, "name": "a"}]), "whose id is 3", "call_1"),
    (turn(content=[{"type": "text", "text": "a", "cite": "b"}]), "has cite", "remove cite"),
    (turn(content=[{"type": "video_url", "video_url": {}}]), "a part of type video_url", "text, reasoning"),
    ({"prompt": [USER, {**BOT, "train": True}, USER], "completion": "c"}, "turn 2 of prompt is marked", "remove"),
]


@pytest.mark.parametrize(("values", "fact", "fix"), REFUSED, ids=[fact for _, fact, _ in REFUSED])
def test_what_carries_a_part_of_the_conversation_is_refused(values: dict[str, Any], fact: str, fix: str) -> None:
    text = refusal(values)
    assert fact in text
    assert fix in text


ASKED = {"question": "Who won?\n\nAna beat Bo 3-1.", "answer": "Ana"}


@pytest.mark.parametrize(
    ("values", "source"),
    [
        ({"question": "Who won?", "answer": "Ana", "passage": CONTEXT}, {"columns": {"context": "passage"}}),
        ({**ASKED, "text": "title"}, {"declared": "question_answer"}),
        ({**ASKED, "text": "title"}, {"ignore": ["text"]}),
        (
            {"messages": [{**USER, "content": ANA[0][1], "images": ["a"]}, {**BOT, "content": "Ana"}]},
            {"ignore": ["images"]},
        ),
    ],
    ids=["columns", "format", "ignore", "ignore in a turn"],
)  # fmt: skip
def test_the_line_of_the_message_accepts_the_row(values: dict[str, Any], source: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        convert(values)
    assert said(convert(values, **source).messages) == ANA


def test_keys_are_counted_as_used_kept_or_ignored() -> None:
    rows = [
        {"question": "hi", "answer": "fine", "id": 7, "context": "", "notes": PROSE},
        {"question": "hi", "answer": "fine", "id": None, "context": "c", "other": {"deep": 1}},
    ]
    counts = count_keys({"ignore": ["notes", "nots"]}, *rows)
    assert counts.used == {"question": 2, "answer": 2, "context": 1}
    assert counts.kept == {"id": 1}
    assert counts.ignored == {"notes": 1, "nots": 0, "other": 1}


def test_parts_that_are_not_read_are_counted() -> None:
    squad = {"question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 4]}}
    assert count_keys({}, squad).ignored == {"answers.answer_start": 1, "answers after the first": 1}
    assert count_keys({"ignore": ["at"]}, {"messages": [{**USER, "at": 3}, {**BOT, "at": 4}]}).ignored == {"at": 1}
    dialog = {"dialog": [{**USER, "at": 3}, BOT]}
    assert count_keys({"ignore": ["at"], "columns": {"messages": "dialog"}}, dialog).ignored == {"at": 1}


def test_a_declared_format_makes_the_keys_of_others_metadata() -> None:
    row = {"text": "a", "prompt": "p", "completion": "c", "documents": "d"}
    assert "has documents" in refusal(row, declared="text")
    del row["documents"]
    assert convert(row, "text").text == "a"
    assert said(convert(row, "prompt_completion").messages) == [("user", "p"), ("assistant", "c")]


def test_a_key_hidden_by_columns_is_refused_until_it_is_ignored() -> None:
    text = refusal({"question": "else", "q": "hi", "answer": "fine"}, columns={"question": "q"})
    assert "columns maps question to q, and the row also has a key question" in text
    row = {"question": "else", "q": "hi", "answer": "fine"}
    assert said(convert(row, columns={"question": "q"}, ignore=["question"]).messages) == HI
    turn = {"role": "user", "says": "hi", "content": "else"}
    for key in ("messages", "dialog"):
        columns = {"messages": key, "content": "says"}
        assert "a key content" in refusal({key: [turn, {**BOT, "says": "fine"}]}, columns=columns)
