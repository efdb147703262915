"""Rows to another form and back: nothing of a chat is lost, nothing is written by halves."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from formats_cases import BOT, USER
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from packhorse.cli.main import main
from packhorse.data.convert.convert import CONTEXT_MARK, Target, convert_file
from packhorse.data.convert.prices import default_epochs, estimated_tokens, read_prices
from packhorse.data.formats.example import Example, Message
from packhorse.data.formats.rows import convert_rows
from packhorse.data.gather.sources import read_rows
from packhorse.data.read.row import RowMistakes
from packhorse.errors import UserError
from packhorse.recipe.schema import Source


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def changed(folder: Path, to: Target, *rows: Any) -> list[dict[str, Any]]:
    source = write(folder / "in.jsonl", *rows)
    convert_file(Source(path=str(source)), folder / "out.jsonl", to, True, folder)
    return read(folder / "out.jsonl")


def refusal(folder: Path, to: Target, *rows: Any) -> str:
    with pytest.raises(UserError) as caught:
        changed(folder, to, *rows)
    assert {path.name for path in folder.iterdir()} <= {"in.jsonl", "out.mistakes.jsonl"}
    return str(caught.value)


def chat(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(turns), **fields}


SYSTEM = {"role": "system", "content": "be"}
THREE = chat(SYSTEM, USER, BOT, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "well"})
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Tromsø"}}}
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "to", "expected"),
    [
        pytest.param({"question": "hi", "answer": "fine", "n": [1]}, "messages", chat(USER, BOT, n=[1]), id="answer"),
        pytest.param({"text": "hi", "category": "fine"}, "messages", chat(USER, BOT, category="fine"), id="label"),
        pytest.param(
            {"text": "hi", "category": "fine", "system": "be"}, "messages", chat(SYSTEM, USER, BOT, category="fine"),
            id="label and system",
        ),
        pytest.param(
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "fine"}], "id": 3},
            "messages", chat(USER, BOT, id=3), id="sharegpt",
        ),
        pytest.param(
            {"instruction": "hi", "input": "x", "output": "fine", "history": [["a", "b"]], "system": "be"}, "messages",
            chat(
                SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "hi\n\nx"}, BOT,
            ),
            id="alpaca",
        ),
        pytest.param(
            chat({**USER, "train": False}, {**BOT, "weight": 0, "reasoning": "hm"}, BOT), "messages",
            chat({**USER, "train": False}, {**BOT, "reasoning_content": "hm", "train": False}, BOT), id="marks",
        ),
        pytest.param(
            {**THREE, "lang": "en", "deep": {"a": None}}, "alpaca",
            {
                "instruction": "and?", "input": "", "output": "well", "system": "be", "history": [["hi", "fine"]],
                "lang": "en", "deep": {"a": None},
            },
            id="to alpaca",
        ),
    ],
)  # fmt: skip
def test_forms(tmp_path: Path, row: dict[str, Any], to: Target, expected: dict[str, Any]) -> None:
    assert changed(tmp_path, to, row) == [expected]


def test_openai_form_of_tool_calls(tmp_path: Path) -> None:
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "id": "b"}]}
    answers = [{"role": "tool", "content": "wet", "tool_call_id": "b"}, {"role": "tool", "content": "dry"}]
    row = chat(
        {**USER, "train": False}, {**BOT, "train": False}, calling, *answers, BOT, tools=[TOOL["function"]], lang="en"
    )
    rows = changed(tmp_path, "openai", *[row] * 10)
    call = {"type": "function", "function": {"name": "rain", "arguments": '{"city": "Tromsø"}'}}
    expected = {
        "messages": [
            USER,
            {**BOT, "weight": 0},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "packhorse_call_1", **call}, {"id": "b", **call}],
            },
            {"role": "tool", "content": "wet", "tool_call_id": "b"},
            {"role": "tool", "content": "dry", "tool_call_id": "packhorse_call_1"},
            BOT,
        ],
        "tools": [TOOL],
    }
    assert rows == [expected] * 10


@pytest.mark.parametrize(
    ("row", "to", "fact"),
    [
        pytest.param(chat(BOT), "alpaca", "the turns are 'assistant', not [system] user assistant", id="no user"),
        pytest.param(chat(USER, BOT, USER), "alpaca", "the turns are 'user assistant user'", id="odd"),
        pytest.param(chat(USER, USER, BOT), "alpaca", "the turns are 'user user assistant'", id="two users"),
        pytest.param(chat({**SYSTEM, "content": ""}, USER, BOT), "alpaca", "system turn is empty", id="empty system"),
        pytest.param(chat(USER, BOT, USER, {**BOT, "train": False}), "alpaca", "answer with train: false", id="mark"),
        pytest.param(chat(USER, {**BOT, "thinking": "a"}), "alpaca", "has reasoning_content", id="thinking"),
        pytest.param(chat(USER, BOT, tools=[TOOL]), "alpaca", "the row has tools", id="tools"),
        pytest.param(chat(USER, BOT, input="x"), "alpaca", "other fields input would be read as part", id="input"),
        pytest.param(chat(USER, BOT, conversations=1), "alpaca", "other fields conversations would", id="detected"),
        pytest.param({"text": "a", "label": True}, "messages", "other fields label would be read", id="verdict"),
        pytest.param({"text": "a"}, "messages", "the row is plain text", id="text"),
        pytest.param({"prompt": "a", "chosen": "b", "rejected": "c"}, "openai", "has a rejected answer", id="pair"),
        pytest.param(chat(USER, BOT, label=True), "openai", "has a verdict on its answer", id="kto"),
        pytest.param(chat(USER, BOT, USER), "openai", "ends with a turn of the role user", id="last turn"),
        pytest.param(chat(USER, {**BOT, "thinking": "a"}), "openai", "turn 2 has reasoning_content", id="thinking 2"),
        pytest.param(
            chat(USER, {**BOT, "tool_calls": [{"name": "get rain", "arguments": {}}]}), "openai",
            "has the tool get rain", id="tool name",
        ),
        pytest.param(
            chat(USER, {**BOT, "tool_calls": [CALL]}, *[{"role": "tool", "content": "a"}] * 2, BOT), "openai",
            "turn 4 is a tool's answer, and no earlier call is unanswered", id="two answers to a call",
        ),
    ],
)  # fmt: skip
def test_what_a_form_has_no_place_for_is_refused(tmp_path: Path, row: dict[str, Any], to: Target, fact: str) -> None:
    said = refusal(tmp_path, to, *[row] * 11)
    assert fact in said
    assert "in.jsonl:1: " in said
    listed = (tmp_path / "out.mistakes.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(listed[-1])["where"].endswith("in.jsonl:11")


def test_a_field_that_is_no_json_is_named(tmp_path: Path) -> None:
    rows = [{"question": "hi", "answer": "fine", "when": datetime(2026, 1, 2)}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    with pytest.raises(UserError, match="the field when cannot be written as JSON") as caught:
        convert_file(Source(path=str(tmp_path / "in.parquet")), tmp_path / "out.jsonl", "messages", False, tmp_path)
    assert caught.value.mistakes[0].where == f"{tmp_path / 'in.parquet'}:1"
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("to", "dropped"), [("messages", {}), ("alpaca", {CONTEXT_MARK: 2})])
def test_what_is_left_out_is_counted(tmp_path: Path, to: Target, dropped: dict[str, int]) -> None:
    source = write(tmp_path / "in.jsonl", *[chat({**USER, "train": False}, BOT)] * 2, chat(USER, BOT, lang="en"))
    done = convert_file(Source(path=str(source)), tmp_path / "out.jsonl", to, False, tmp_path)
    assert (done.num_rows, done.row_format, dict(done.dropped)) == (3, "messages", dropped)


def test_what_training_would_refuse_is_copied(tmp_path: Path) -> None:
    documents = [{"title": "a", "text": "b"}]
    assert changed(tmp_path, "messages", chat(USER, BOT, documents=documents)) == [chat(USER, BOT, documents=documents)]


def test_parts_that_a_form_cannot_hold_are_counted(tmp_path: Path) -> None:
    row = {"question": "hi", "answers": {"text": ["fine"], "answer_start": [3]}}
    source = write(tmp_path / "in.jsonl", row)
    done = convert_file(Source(path=str(source)), tmp_path / "out.jsonl", "messages", False, tmp_path)
    assert (read(tmp_path / "out.jsonl"), dict(done.dropped)) == ([chat(USER, BOT)], {"answers.answer_start": 1})


def test_the_service_takes_ten_examples_or_more(tmp_path: Path) -> None:
    said = refusal(tmp_path, "openai", *[chat(USER, BOT)] * 9)
    assert "the file has 9 examples" in said
    assert "10 or more" in said
    assert len(changed(tmp_path, "openai", *[chat(USER, BOT)] * 10)) == 10


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
answers = words.filter(str.strip)
names = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
fields = st.dictionaries(
    st.sampled_from(["lang", "id", "ünï", "deep"]), st.one_of(words, st.integers(), st.lists(words))
)
thoughts = st.none() | answers


@st.composite
def plain_chats(draw: st.DrawFn) -> dict[str, Any]:
    """[system] (user assistant)+, each answer trained on."""
    turns = [{"role": "system", "content": draw(answers)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(words)}, {"role": "assistant", "content": draw(answers)}]
    return {"messages": turns, **draw(fields)}


values = st.recursive(st.none() | st.booleans() | st.integers() | words, lambda inner: st.lists(inner, max_size=3))


@st.composite
def tool_chats(draw: st.DrawFn) -> dict[str, Any]:
    """Any order of turns that a chat may have, with calls, ids and marks; the last answer is trained on."""
    turns: list[dict[str, Any]] = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    called = set()
    for number in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["user", "assistant", "call"]))
        if kind == "user":
            turns.append({"role": "user", "content": draw(words)})
            continue
        mark = {} if draw(st.booleans()) else {"train": False}
        turn: dict[str, Any] = {"role": "assistant", "content": draw(answers), **mark}
        if kind == "call":
            calls = [
                {"id": f"c{number}{at}", "type": "function", "function": {"name": name, "arguments": arguments}}
                for at, (name, arguments) in enumerate(
                    draw(st.lists(st.tuples(names, st.dictionaries(words, values, max_size=2)), min_size=1, max_size=3))
                )
            ]
            called |= {call["function"]["name"] for call in calls}
            turn |= {"tool_calls": calls, "content": draw(words)}
        turns.append(turn)
        for call in draw(st.permutations(turn.get("tool_calls", []))):
            named = {"name": call["function"]["name"]} if draw(st.booleans()) else {}
            turns.append({"role": "tool", "content": draw(words), "tool_call_id": call["id"], **named})
    turns.append({"role": "assistant", "content": draw(answers)})
    tools = [{"type": "function", "function": {"name": name, "description": draw(words)}} for name in sorted(called)]
    return {"messages": turns, **({"tools": tools} if tools and draw(st.booleans()) else {})}


def examples(path: Path) -> list[Example]:
    mistakes = RowMistakes(str(path))
    made = list(convert_rows(read_rows(Source(path=str(path)), path.parent), "messages", mistakes))
    mistakes.raise_if_any()
    return made


def there_and_back(folder: Path, to: Target, rows: list[dict[str, Any]]) -> tuple[list[Example], list[Example]]:
    start = write(folder / "start.jsonl", *rows)
    for name, form in (("there", to), ("back", "messages")):
        convert_file(Source(path=str(start)), folder / f"{name}.jsonl", form, True, folder)  # type: ignore[arg-type]
        start = folder / f"{name}.jsonl"
    return examples(folder / "start.jsonl"), examples(start)


def meant(example: Example) -> tuple[Any, ...]:
    return example.messages, example.tools, example.fields


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(plain_chats(), min_size=1, max_size=4))
def test_messages_to_alpaca_and_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("alpaca")
    first, last = there_and_back(folder, "alpaca", rows)
    assert list(map(meant, first)) == list(map(meant, last))
    assert sorted(map(json.dumps, map(sort, rows))) == sorted(map(json.dumps, map(sort, read(folder / "back.jsonl"))))


def sort(row: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(row.items()))


@settings(max_examples=60, deadline=None)
@given(row=tool_chats())
def test_messages_to_openai_and_back(tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any]) -> None:
    first, last = there_and_back(tmp_path_factory.mktemp("openai"), "openai", [row] * 10)
    assert list(map(meant, first)) == list(map(meant, last))


def test_the_property_would_see_a_difference() -> None:
    one = Example((Message("user", "a"),), None, {}, "")
    other = Example((Message("user", "a", trained=False),), None, {}, "")
    assert meant(one) != meant(other)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write(tmp_path / "in.jsonl", *[{"question": "hi", "answer": "fine", "lang": "en"}] * 12)
    return tmp_path


def test_the_command_says_what_it_did_and_what_it_would_cost(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "in.jsonl", "out.jsonl", "--to", "openai"]) == 0
    said = capsys.readouterr().out
    assert "12 rows of in.jsonl (question_answer) written to out.jsonl (openai)" in said
    assert "lang (12 rows): the form has no field for it" in said
    # A row: 1 + 1 tokens of text, 3 around each of two messages, 3 at the end; 12 rows; 100 // 12 epochs.
    assert "about 132, an estimate that may be a quarter off: UTF-8 bytes ÷ 4" in said
    assert "8, the default of the service for 12 examples" in said
    assert "2026-11" in said
    assert len(read(here / "out.jsonl")) == 12


def test_a_file_that_is_there_is_replaced_only_by_force(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "out.jsonl").write_text("mine")
    assert main(["convert", "in.jsonl", "out.jsonl", "--to", "messages"]) == 2
    assert "out.jsonl exists" in capsys.readouterr().err
    assert (here / "out.jsonl").read_text() == "mine"
    assert main(["convert", "in.jsonl", "out.jsonl", "--to", "messages", "--force"]) == 0
    assert len(read(here / "out.jsonl")) == 12


def test_a_broken_row_leaves_what_was_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "out.jsonl").write_text("mine")
    with (here / "in.jsonl").open("a") as file:
        file.write('{"question": "hi"}\n{"question": \n')
    assert main(["convert", "in.jsonl", "out.jsonl", "--to", "messages", "--force"]) == 2
    said = capsys.readouterr().err
    assert "in.jsonl:13: the row has no answer" in said
    assert "in.jsonl:14: the line is not JSON" in said
    assert (here / "out.jsonl").read_text() == "mine"
    assert sorted(path.name for path in here.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["in.jsonl", "out.jsonl"], "--to is missing", id="no form"),
        pytest.param(["in.jsonl", "out.jsonl", "--to", "opnai"], "write --to openai", id="mistyped form"),
        pytest.param(["in.jsonl", "out.jsonl", "--to", "alpaca", "--format", "sharegp"], "sharegpt", id="format"),
        pytest.param(["in.jsonl", "out.jsonl", "--to", "alpaca", "--format", "text"], "has no text", id="declared"),
        pytest.param(["in.jsonl", "out.csv", "--to", "messages"], "name it out.jsonl", id="extension"),
        pytest.param(["in.jsonl", "no/out.jsonl", "--to", "messages"], "folder no does not exist", id="no folder"),
        pytest.param(["nothing.jsonl", "out.jsonl", "--to", "messages"], "nothing.jsonl", id="no file"),
        pytest.param(["in.jsonl", "out.jsonl", "--to", "messages", "--forse"], "convert IN OUT --to", id="flag"),
        pytest.param(["in.jsonl"], "convert IN OUT --to", id="no target"),
    ],
)
def test_mistakes_of_the_command(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(["convert", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert {path.name for path in here.iterdir()} <= {"in.jsonl", "out.mistakes.jsonl"}


# --- the estimate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("examples", "epochs"),
    [(1, 25), (10, 10), (33, 3), (34, 3), (8333, 3), (8334, 2), (12_501, 1), (100_000, 1)],
)
def test_epochs_as_in_the_cookbook(examples: int, epochs: int) -> None:
    assert default_epochs(examples) == epochs


def test_tokens_are_bytes_by_four_rounded_up() -> None:
    row = {"messages": [{"role": "user", "content": "12345"}, {"role": "assistant", "content": "é"}]}
    assert estimated_tokens(row) == 2 + 1 + 2 * 3 + 3


def test_the_price_table_is_dated_and_sourced() -> None:
    prices = read_prices()
    assert prices.date == "2026-11"
    assert "pricing page" in prices.source
    of = {model.name: model.dollars_per_million_tokens for model in prices.models}
    assert (of["gpt-4.1-2025-04-14"], of["gpt-4.1-nano-2025-04-14"], of["gpt-4o-mini-2024-07-18"]) == (25, 1.5, 3)
