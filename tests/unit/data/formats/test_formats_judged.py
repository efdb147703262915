"""Transcripts, ranked lists and ratings, and what `packhorse convert` writes of rows with a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from formats_cases import convert, turns

from packhorse.data.convert.convert import convert_file
from packhorse.data.formats.example import Example
from packhorse.data.formats.rows import convert_rows, resolve_format
from packhorse.data.read.row import Row, RowMistakes
from packhorse.errors import UserError
from packhorse.recipe.schema import Source

HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: how are you\n\nAssistant:"
HH_TURNS = [("user", "hi", False), ("assistant", "yes?", False), ("user", "how are you", False)]


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"chosen": f"{HH} fine", "rejected": f"{HH} go away"}, id="hh-rlhf"),
        pytest.param({"prompt": HH, "chosen": " fine", "rejected": " go away"}, id="prompt alone"),
    ],
)
def test_transcripts(values: dict[str, Any]) -> None:
    example = convert(values)
    assert [(role, text.strip(), trained) for role, text, trained in turns(example.messages)] == [
        *HH_TURNS, ("assistant", "fine", True)
    ]  # fmt: skip
    assert [text.strip() for _, text, _ in turns(example.rejected)] == ["go away"]


def test_a_transcript_with_an_empty_turn_is_refused() -> None:
    empty = HH.replace("yes?", "")
    with pytest.raises(UserError, match="turn 2 of the transcript is empty"):
        convert({"chosen": f"{empty} fine", "rejected": f"{empty} no"})


@pytest.mark.parametrize(
    ("scores", "chosen", "rejected"),
    [
        pytest.param({"scores": [2, 9.5, 1]}, "b", "c", id="scores"),
        pytest.param({"ranks": [2, 3, 1]}, "c", "b", id="ranks"),
    ],
)
def test_a_ranked_list_is_its_best_and_its_worst(scores: dict[str, Any], chosen: str, rejected: str) -> None:
    example = convert({"prompt": "hi", "completions": ["a", "b", "c"], **scores, "id": 3})
    assert turns(example.messages) == [("user", "hi", False), ("assistant", chosen, True)]
    assert turns(example.rejected) == [("assistant", rejected, True)]
    assert example.fields == {"id": 3}


@pytest.mark.parametrize(
    ("values", "fact"),
    [
        pytest.param({"completions": ["a", "b"], "scores": [1, 1]}, "all scores are 1", id="equal"),
        pytest.param({"completions": ["a", "b"], "scores": [1]}, "is a list of 2, and scores is a list of 1", id="few"),
        pytest.param({"completions": ["a", "b"], "scores": [1, "x"]}, "scores has 'x'", id="no number"),
    ],
)
def test_ranked_lists_that_say_nothing(values: dict[str, Any], fact: str) -> None:
    with pytest.raises(UserError, match=fact):
        convert({"prompt": "hi", **values})


def rated(good: float | None, *values: dict[str, Any]) -> list[Example]:
    rows = [Row(f"rows.jsonl:{at}", each) for at, each in enumerate(values, 1)]
    source = Source(path="rows.jsonl", format="rated", good_rating=good)
    mistakes = RowMistakes("rows.jsonl")
    examples = list(convert_rows(rows, resolve_format("rated", rows, source), mistakes, source))
    mistakes.raise_if_any()
    return examples


def test_ratings_are_verdicts() -> None:
    rows = [{"prompt": "hi", "completion": "fine", "rating": rating} for rating in (3, 4, 5)]
    assert [example.desirable for example in rated(4, *rows)] == [False, True, True]
    with pytest.raises(UserError, match="the source has no good_rating"):
        rated(None, rows[0])


PAIR = {"prompt": "hi", "chosen": "fine", "rejected": "go away", "id": 7}
USER, FINE, AWAY = (
    {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "fine"), ("assistant", "go away"))
)


@pytest.mark.parametrize(
    ("to", "rows"),
    [
        pytest.param("preference", [{"prompt": [USER], "chosen": [FINE], "rejected": [AWAY], "id": 7}], id="pairs"),
        pytest.param(
            "kto",
            [{"messages": [USER, FINE], "label": True, "id": 7}, {"messages": [USER, AWAY], "label": False, "id": 7}],
            id="kto",
        ),
        pytest.param("chosen", [{"messages": [{**USER, "train": False}, FINE], "id": 7}], id="chosen"),
    ],
)
def test_convert_pairs(tmp_path: Path, to: Any, rows: list[dict[str, Any]]) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    target = tmp_path / "out.jsonl"
    done = convert_file(Source(path=str(tmp_path / "pairs.jsonl")), target, to, False, tmp_path)
    assert [json.loads(line) for line in target.read_text().splitlines()] == rows
    assert (done.num_rows, done.dropped) == (len(rows), {})


def test_convert_keeps_good_answers_alone(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "completion": text, "label": text == "fine"} for text in ("fine", "bye")]
    (tmp_path / "kto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert_file(Source(path=str(tmp_path / "kto.jsonl")), tmp_path / "out.jsonl", "chosen", False, tmp_path)
    assert [
        json.loads(line)["messages"][-1]["content"] for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ] == ["fine"]
    with pytest.raises(UserError, match="the row has no rejected answer"):
        convert_file(Source(path=str(tmp_path / "kto.jsonl")), tmp_path / "b.jsonl", "preference", False, tmp_path)
