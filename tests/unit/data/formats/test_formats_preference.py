from __future__ import annotations

from typing import Any

import pytest
from formats_cases import BOT, GPT, HUMAN, USER, convert, said, turns

from packhorse.errors import UserError

BAD = {"role": "assistant", "content": "go away"}
HI = {"role": "user", "content": "and you"}
ASKED = [("user", "hi", False)]


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        pytest.param({"prompt": "hi", "chosen": "fine", "rejected": "go away"}, ASKED, id="texts"),
        pytest.param({"question": "hi", "chosen": "fine", "rejected": "go away"}, ASKED, id="question"),
        pytest.param(
            {"system": "be", "prompt": "hi", "chosen": "fine", "rejected": "go away"},
            [("system", "be", False), *ASKED],
            id="system",
        ),
        pytest.param(
            {"instruction": "hi", "input": "x", "chosen": "fine", "rejected": "go away"}, [("user", "hi\n\nx", False)],
            id="alpaca",
        ),
        pytest.param({"prompt": [USER], "chosen": [BOT], "rejected": [BAD]}, ASKED, id="turns"),
        pytest.param({"messages": [USER], "chosen": BOT, "rejected": BAD}, ASKED, id="messages and a turn"),
        pytest.param(
            {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "go away"}}, ASKED,
            id="sharegpt",
        ),
        pytest.param({"chosen": [USER, BOT], "rejected": [USER, BAD]}, ASKED, id="implicit prompt"),
        pytest.param(
            {"chosen": [USER, BOT, HI, BOT], "rejected": [USER, BOT, HI, BAD]},
            [*ASKED, ("assistant", "fine", False), ("user", "and you", False)],
            id="implicit prompt of three turns",
        ),
        pytest.param(
            {"prompt": "hi", "chosen": [USER, BOT], "rejected": [USER, BAD]}, ASKED, id="whole chats beside the prompt"
        ),
        pytest.param(
            {"system": "be", "chosen": [USER, BOT], "rejected": [USER, BAD]}, [("system", "be", False), *ASKED],
            id="implicit prompt and system",
        ),
    ],
)  # fmt: skip
def test_pairs(values: dict[str, Any], prompt: list[tuple[str, str, bool]]) -> None:
    example = convert({**values, "score": 1})
    assert turns(example.messages) == [*prompt, ("assistant", "fine", True)]
    assert turns(example.rejected) == [("assistant", "go away", True)]
    assert example.desirable is None
    assert example.fields == {"score": 1}


@pytest.mark.parametrize(
    ("values", "expected", "desirable"),
    [
        pytest.param(
            {"prompt": "hi", "completion": "fine", "label": False}, [*ASKED, ("assistant", "fine", True)], False,
            id="completion",
        ),
        pytest.param(
            {"messages": [USER, BOT, HI, BAD], "label": True},
            [*ASKED, ("assistant", "fine", False), ("user", "and you", False), ("assistant", "go away", True)],
            True,
            id="messages: only the last answer is judged",
        ),
        pytest.param(
            {"conversations": [HUMAN, GPT], "kto_tag": False}, [*ASKED, ("assistant", "fine", True)], False, id="tag"
        ),
        pytest.param(
            {"prompt": [USER, BOT, HI], "completion": [BAD], "label": True},
            [*ASKED, ("assistant", "fine", False), ("user", "and you", False), ("assistant", "go away", True)],
            True,
            id="turns",
        ),
    ],
)  # fmt: skip
def test_verdicts(values: dict[str, Any], expected: list[tuple[str, str, bool]], desirable: bool) -> None:
    example = convert(values)
    assert turns(example.messages) == expected
    assert example.desirable is desirable
    assert example.rejected is None
    assert example.fields == {}


def test_a_call_and_its_result_are_part_of_the_judged_answer() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "a", "arguments": {}}]}
    example = convert({"messages": [USER, call, {"role": "tool", "content": "1"}, BOT], "label": True})
    assert [turn.trained for turn in example.messages or ()] == [False, True, True, True]


def test_chats_that_part_early_are_answers_of_several_turns() -> None:
    example = convert({"chosen": [USER, BOT, HI, BOT], "rejected": [USER, BAD, HI, BOT]})
    assert turns(example.messages)[0] == ("user", "hi", False)
    assert said(example.rejected) == [("assistant", "go away"), ("user", "and you"), ("assistant", "fine")]


def test_a_chat_that_goes_on_where_the_other_ends() -> None:
    example = convert({"chosen": [USER, BOT], "rejected": [USER, BOT, HI, BAD]})
    assert turns(example.messages) == [("user", "hi", False), ("assistant", "fine", True)]
    assert said(example.rejected) == [("assistant", "fine"), ("user", "and you"), ("assistant", "go away")]


def test_a_rejected_answer_of_several_turns() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "a", "arguments": {}}]}
    example = convert({"prompt": "hi", "chosen": "fine", "rejected": [call, {"role": "tool", "content": "1"}, BAD]})
    assert said(example.rejected) == [("assistant", ""), ("tool", "1"), ("assistant", "go away")]


@pytest.mark.parametrize(
    ("values", "fact", "fix"),
    [
        pytest.param({"chosen": "a", "rejected": "b"}, "rejected, and no prompt", "add prompt", id="no prompt"),
        pytest.param({"prompt": "a", "chosen": "b", "rejected": "b"}, "are equal", "remove", id="same"),
        pytest.param({"chosen": [USER, BOT], "rejected": [USER, BOT]}, "are equal", "remove", id="same chats"),
        pytest.param({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected is empty", "fill", id="empty rejected"),
        pytest.param({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is empty", "fill", id="empty chosen"),
        pytest.param({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen is null", "as text", id="null"),
        pytest.param({"prompt": "a", "chosen": [USER], "rejected": [BOT]}, "chosen begins with", "move", id="user"),
        pytest.param({"prompt": "a", "chosen": [BOT, USER], "rejected": [BAD]}, "chosen ends with", "move", id="ends"),
        pytest.param({"prompt": "a", "chosen": [BOT], "rejected": {"x": 1}}, "neither role nor from", "", id="object"),
        pytest.param(
            {"chosen": [USER, BOT], "rejected": [HI, BAD]}, "there is no turn in their common", "same", id="unlike"
        ),
        pytest.param(
            {"prompt": "else", "chosen": [USER, BOT], "rejected": [USER, BAD]}, "turn 'else' is not among", "same",
            id="another prompt",
        ),
        pytest.param({"messages": [USER], "label": True}, "ends with a turn of the role user", "end", id="no answer"),
        pytest.param({"messages": [USER, {**BOT, "content": ""}], "label": True}, "turn is empty", "", id="kto empty"),
        pytest.param({"prompt": "a", "completion": "", "label": True}, "turn is empty", "", id="kto no words"),
    ],
)  # fmt: skip
def test_refused_verdicts(values: dict[str, Any], fact: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(values)
    (mistake,) = caught.value.mistakes
    assert fact in mistake.fact
    assert fix in mistake.fix


def test_a_declared_verdict_must_be_a_yes_or_no() -> None:
    with pytest.raises(UserError, match="label is 'good'"):
        convert({"messages": [USER, BOT], "label": "good"}, "kto")
    with pytest.raises(UserError, match="the row has no label, so it is not kto; it looks like messages"):
        convert({"messages": [USER, BOT]}, "kto")
