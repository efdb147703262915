"""Every real file is read by the format that its rows show, or by the columns that a user would name."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from packhorse.data.convert.convert import Target, convert_file
from packhorse.data.formats.example import Example
from packhorse.data.formats.rows import convert_rows, resolve_format
from packhorse.data.gather.sources import read_rows
from packhorse.data.read.row import RowMistakes
from packhorse.errors import UserError
from packhorse.recipe.schema import Source

SQUAD = {
    "instruction": "paragraphs.*.qas.*.question",
    "input": "paragraphs.*.context",
    "output": "paragraphs.*.qas.*.answers.0.text",
}


def examples(path: Path, **source: Any) -> tuple[str, list[Example], RowMistakes]:
    given = Source.model_validate({"path": str(path), **source})
    mistakes = RowMistakes(path.name)
    rows = read_rows(given, Path("runs"), mistakes)
    first = next(rows)
    found = resolve_format(given.format, first, given)
    return found, list(convert_rows(chain([first], rows), found, mistakes, given)), mistakes


@pytest.mark.parametrize(
    ("name", "source", "row_format", "rows", "bad"),
    [
        pytest.param("alpaca_libre_v2.jsonl", {}, "alpaca", 2229, 65, id="alpaca"),
        pytest.param("banking77_train.csv", {}, "text_label", 10003, 0, id="banking train"),
        pytest.param("banking77_test.csv", {}, "text_label", 3080, 0, id="banking test"),
        pytest.param("gsm8k_train.jsonl", {}, "question_answer", 7473, 0, id="gsm8k train"),
        pytest.param("gsm8k_test.jsonl", {}, "question_answer", 1319, 0, id="gsm8k test"),
        pytest.param("ifeval_input_data.jsonl", {"columns": {"text": "prompt"}}, "text", 541, 0, id="ifeval"),
        pytest.param("lf_c4_demo.jsonl", {}, "text", 300, 0, id="c4"),
        pytest.param("lf_dpo_en_demo.json", {}, "preference", 300, 0, id="dpo"),
        pytest.param("lf_glaive_toolcall_en_demo.json", {}, "sharegpt", 300, 0, id="tools"),
        pytest.param("lf_kto_en_demo.json", {}, "kto", 300, 0, id="kto"),
        pytest.param("lf_v1_sft_demo.jsonl", {}, "messages", 500, 0, id="parts"),
        pytest.param(
            "mgsm_es.tsv", {"columns": {"question": "1", "answer": "2"}}, "question_answer", 250, 0, id="mgsm es"
        ),
        pytest.param(
            "mgsm_en.tsv", {"columns": {"question": "1", "answer": "2"}}, "question_answer", 250, 0, id="mgsm en"
        ),
        pytest.param(
            "mt_bench_question.jsonl",
            {"format": "text", "columns": {"text": "turns"}, "ignore": ["reference"]},
            "text",
            80,
            0,
            id="mt bench",
        ),
        pytest.param("openai_toy_chat_fine_tuning.jsonl", {}, "messages", 5, 0, id="toy"),
        pytest.param("xquad_es.json", {"columns": SQUAD}, "alpaca", 1190, 0, id="xquad"),
    ],
)
def test_every_file_is_read(
    shared: Path, name: str, source: dict[str, Any], row_format: str, rows: int, bad: int
) -> None:
    found, made, mistakes = examples(shared / "data" / name, **source)
    assert (found, len(made), mistakes.num_rows) == (row_format, rows, bad), mistakes.to_show()[:1]


def test_every_call_and_observation_of_the_tool_file(shared: Path) -> None:
    path = shared / "data" / "lf_glaive_toolcall_en_demo.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    _, made, _ = examples(path)
    for row, example in zip(rows, made, strict=True):
        assert [tool["function"] for tool in example.tools] == json.loads(row["tools"])
        for turn, message in zip(row["conversations"], example.messages or (), strict=True):
            if turn["from"] == "function_call":
                (call,) = message.tool_calls
                assert (message.role, message.content) == ("assistant", "")
                assert call["function"] == json.loads(turn["value"])
            else:
                roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
                assert (message.role, message.content) == (roles[turn["from"]], turn["value"])


def test_pairs_and_verdicts_are_those_of_the_files(shared: Path) -> None:
    pairs = json.loads((shared / "data" / "lf_dpo_en_demo.json").read_text(encoding="utf-8"))
    _, made, _ = examples(shared / "data" / "lf_dpo_en_demo.json")
    for row, example in zip(pairs, made, strict=True):
        said = [turn.content for turn in example.messages or ()]
        assert said == [*(turn["value"] for turn in row["conversations"]), row["chosen"]["value"]]
        assert [turn.content for turn in example.rejected or ()] == [row["rejected"]["value"]]
        assert [turn.trained for turn in example.messages or ()] == [False] * (len(said) - 1) + [True]
    _, made, _ = examples(shared / "data" / "lf_kto_en_demo.json")
    assert Counter(example.desirable for example in made) == {True: 150, False: 150}


def test_labels_can_be_stratified_by(shared: Path) -> None:
    _, made, _ = examples(shared / "data" / "banking77_train.csv")
    assert len({example.fields["label"] for example in made}) == 77
    assert all(example.fields["label"] == (example.messages or ())[-1].content for example in made)


def test_a_context_and_its_question(shared: Path) -> None:
    article = json.loads((shared / "data" / "xquad_es.json").read_text(encoding="utf-8"))["data"][0]
    _, made, _ = examples(shared / "data" / "xquad_es.json", columns=SQUAD)
    first = article["paragraphs"][0]
    assert [turn.content for turn in made[0].messages or ()] == [
        f"{first['qas'][0]['question']}\n\n{first['context']}",
        first["qas"][0]["answers"][0]["text"],
    ]
    assert made[0].fields == {"title": article["title"]}


@pytest.mark.parametrize(
    ("name", "to"),
    [
        pytest.param("gsm8k_test.jsonl", "openai", id="gsm8k openai"),
        pytest.param("lf_glaive_toolcall_en_demo.json", "openai", id="tools openai"),
        pytest.param("lf_glaive_toolcall_en_demo.json", "messages", id="tools messages"),
        pytest.param("banking77_test.csv", "alpaca", id="labels alpaca"),
    ],
)
def test_real_rows_there_and_back(shared: Path, tmp_path: Path, name: str, to: Target) -> None:
    path = shared / "data" / name
    convert_file(Source(path=str(path)), tmp_path / "out.jsonl", to, False, tmp_path)
    _, first, _ = examples(path)
    _, last, _ = examples(tmp_path / "out.jsonl")
    for one, other in zip(first, last, strict=True):
        assert one.tools == other.tools
        for turn, again in zip(one.messages or (), other.messages or (), strict=True):
            assert (turn.role, turn.content, turn.trained) == (again.role, again.content, again.trained)
            called = [call["function"] for call in again.tool_calls]
            assert [call["function"] for call in turn.tool_calls] == called


def test_chats_without_a_user_are_no_alpaca_rows(shared: Path, tmp_path: Path) -> None:
    source = Source(path=str(shared / "data" / "openai_toy_chat_fine_tuning.jsonl"))
    with pytest.raises(UserError, match=r"jsonl:4: the turns are 'system assistant'"):
        convert_file(source, tmp_path / "out.jsonl", "alpaca", False, tmp_path)
    with pytest.raises(UserError, match="the file has 5 examples"):
        convert_file(source, tmp_path / "out.jsonl", "openai", False, tmp_path)
    assert list(tmp_path.iterdir()) == []
