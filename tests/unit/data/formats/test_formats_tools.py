from __future__ import annotations

import json
from typing import Any

import pytest
from formats_cases import BOT, GPT, HUMAN, USER, convert

from packhorse.errors import UserError

WEATHER = {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}
DEFINED = {"type": "function", "function": WEATHER}
OSLO = {"name": "weather", "arguments": {"city": "Oslo"}}
CALLED = {"type": "function", "function": OSLO}
TEXT = json.dumps({"city": "Oslo"})


def openai(arguments: Any, **call: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": arguments}, **call}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


RAIN = {"role": "tool", "content": "rain"}
OBSERVED = {"from": "observation", "value": "rain"}


@pytest.mark.parametrize(
    ("chat", "call"),
    [
        pytest.param({"messages": [USER, openai(TEXT), RAIN, BOT]}, CALLED, id="arguments as text"),
        pytest.param({"messages": [USER, openai({"city": "Oslo"}), RAIN, BOT]}, CALLED, id="arguments as object"),
        pytest.param(
            {"messages": [USER, openai(TEXT, id="c1"), {**RAIN, "tool_call_id": "c1"}, BOT]}, {"id": "c1", **CALLED},
            id="with an id",
        ),
        pytest.param(
            {"messages": [USER, {**BOT, "content": "", "tool_calls": [OSLO]}, RAIN, BOT]}, CALLED, id="bare call"
        ),
        pytest.param(
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": TEXT}},
                    {"role": "function", "name": "weather", "content": "rain"},
                    BOT,
                ]
            },
            CALLED,
            id="function_call of old",
        ),
        pytest.param(
            {"conversations": [HUMAN, {"from": "function_call", "value": json.dumps(OSLO)}, OBSERVED, GPT]}, CALLED,
            id="sharegpt",
        ),
        pytest.param(
            {"conversations": [HUMAN, {"from": "function_call", "value": json.dumps([OSLO])}, OBSERVED, GPT]}, CALLED,
            id="sharegpt list",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "tools", [[DEFINED], json.dumps([DEFINED]), [WEATHER], json.dumps([WEATHER])], ids=["list", "text", "bare", "both"]
)
def test_every_form_gives_the_same_call(chat: dict[str, Any], call: dict[str, Any], tools: Any) -> None:
    example = convert({**chat, "tools": tools})
    assert example.tools == (DEFINED,)
    asked, calling, rain, answer = example.messages or ()
    assert (asked.role, calling.role, rain.role, answer.role) == ("user", "assistant", "tool", "assistant")
    assert (calling.content, calling.tool_calls, calling.trained) == ("", (call,), True)
    assert (rain.content, rain.call_id) == ("rain", call.get("id"))
    assert example.fields == {}


def test_calls_at_once_and_their_answers() -> None:
    calls = [{"id": "a", **CALLED}, {"id": "b", "function": {"name": "weather", "arguments": "{}"}}]
    answers = [{**RAIN, "tool_call_id": "b", "name": "weather"}, {**RAIN, "tool_call_id": "a"}]
    example = convert({"messages": [USER, {**BOT, "tool_calls": calls}, *answers, BOT]})
    _, calling, first, second, _ = example.messages or ()
    assert [call["function"]["arguments"] for call in calling.tool_calls] == [{"city": "Oslo"}, {}]
    assert (calling.content, first.name, first.call_id, second.call_id) == ("fine", "weather", "b", "a")


@pytest.mark.parametrize("tools", [None, "", "[]", []], ids=repr)
def test_no_tools_is_no_tools(tools: Any) -> None:
    assert convert({"messages": [USER, BOT], "tools": tools}).tools == ()


def test_a_call_without_defined_tools_is_taken() -> None:
    assert convert({"messages": [USER, openai(TEXT)]}).tools == ()


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize(
    ("values", "fact", "fix"),
    [
        pytest.param({"messages": [USER, openai("{city: Oslo}")]}, "is not JSON (Expecting", "arguments", id="no json"),
        pytest.param({"messages": [USER, openai("[1]")]}, "are list, not an object", "arguments", id="list"),
        pytest.param({"messages": [USER, openai('{"a": NaN}')]}, "is not JSON (ValueError)", "arguments", id="nan"),
        pytest.param({"messages": [USER, openai(3)]}, "are int, not an object", "arguments", id="number"),
        pytest.param({"messages": [USER, openai(DEEP)]}, "is not JSON (RecursionError)", "argum", id="deep"),
        pytest.param({"messages": [USER, openai('{"a": "\\ud800"}')]}, "surrogate", "remove", id="surrogate"),
        pytest.param({"messages": [USER, openai({"a": {1, 2}})]}, "is not JSON (TypeError)", "", id="set"),
        pytest.param({"messages": [USER, {**BOT, "tool_calls": ["x"]}]}, "the name of a tool: 'x'", "name", id="x"),
        pytest.param({"messages": [USER, {**BOT, "tool_calls": [{"name": ""}]}]}, "without the name", "name", id="''"),
        pytest.param({"messages": [{**USER, "tool_calls": [OSLO]}, BOT]}, "role user has tool_calls", "give", id="who"),
        pytest.param({"messages": [USER, RAIN, BOT]}, "turn 2 is a tool's answer, and", "before it", id="no call"),
        pytest.param({"messages": [USER, openai(TEXT), BOT, RAIN, BOT]}, "turn 4 is a tool's", "", id="call too early"),
        pytest.param({"conversations": [HUMAN, OBSERVED, GPT]}, "turn 2 is a tool's answer", "", id="sharegpt no call"),
        pytest.param(
            {"conversations": [HUMAN, {"from": "function_call", "value": "call weather"}]}, "call of turn 2 is not",
            '{"name"', id="sharegpt no json",
        ),
        pytest.param(
            {"conversations": [HUMAN, {"from": "function_call", "value": "[]"}]}, "is an empty list", "write", id="none"
        ),
        pytest.param(
            {"messages": [USER, openai(TEXT, id="a"), {**RAIN, "tool_call_id": "b"}, BOT]}, "answers the call 'b'; the",
            "id of the call", id="another id",
        ),
        pytest.param(
            {"messages": [USER, openai(TEXT)], "tools": [{"name": "wether"}]},
            "turn 2 calls weather; the row's tools are wether", "write wether, or add", id="unknown tool",
        ),
        pytest.param({"messages": [USER, BOT], "tools": "weather"}, "tools is not JSON", "func", id="tools no json"),
        pytest.param({"messages": [USER, BOT], "tools": {"name": "a"}}, "tools is dict, not a list", "list", id="dict"),
        pytest.param({"messages": [USER, BOT], "tools": [{}]}, "tool 1 of tools has no name", "name", id="no name"),
        pytest.param({"messages": [USER, BOT], "tools": ["x"]}, "tool 1 of tools has no name", "name", id="text"),
    ],
)  # fmt: skip
def test_refused_tool_use(values: dict[str, Any], fact: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(values)
    (mistake,) = caught.value.mistakes
    assert mistake.where == "rows.jsonl:7"
    assert fact in mistake.fact
    assert fix in mistake.fix
    assert len(mistake.fact) < 2_500
