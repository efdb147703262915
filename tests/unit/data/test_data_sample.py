"""Packs guessed from the first rows, beside those that preparing counts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from packhorse.data.estimate_packs import estimate_packs
from packhorse.data.prepare import prepare
from packhorse.data.resolve import resolve_tokenizer
from packhorse.recipe.schema import Recipe
from tiny import TINY

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "walking", "home"]


def rows(number: int) -> list[dict[str, Any]]:
    drawn = random.Random(7)
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(drawn.choices(WORDS, k=drawn.randint(5, 30)))},
                {"role": "assistant", "content": " ".join(drawn.choices(WORDS, k=drawn.randint(10, 60)))},
            ]
        }
        for _ in range(number)
    ]


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    return Recipe.model_validate({**TINY, "runs_folder": str(folder / "runs"), **sections})


def write(folder: Path, name: str, number: int) -> str:
    path = folder / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(number)), path)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows(number)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_guess_is_near_what_is_counted(name: str, tmp_path: Path) -> None:
    tokenizer = resolve_tokenizer(recipe_of(tmp_path))
    sections = {
        "model": {**TINY["model"], "tokenizer": str(tokenizer)},
        "data": {"sources": [{"path": write(tmp_path, name, 2500)}]},
        "batch": {"length": 512, "packs": 8},
    }
    recipe = recipe_of(tmp_path, **sections)
    guess = estimate_packs(recipe)
    assert guess is not None
    assert "from 500 of about" in guess.reason
    assert "their tokens" in guess.reason
    assert guess.num_rows == pytest.approx(2500, rel=0.05)
    counted = prepare(recipe).manifest.splits["train"].num_packs
    assert guess.num_packs == pytest.approx(counted, rel=0.15)


def test_rows_of_which_one_each_makes_a_pack(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", 1000)
    recipe = recipe_of(
        tmp_path,
        data={"sources": [{"path": path, "rows": 200}], "packing": "none", "split": {"train": 0.5, "validation": 0.5}},
    )
    guess = estimate_packs(recipe)
    assert guess is not None
    assert (guess.num_rows, guess.num_packs) == (200, 100)


@pytest.mark.parametrize(
    "source",
    [{"id": "some/set"}, {"path": "builtin:core.messages.jsonl"}, {"path": "missing.jsonl"}, {"path": "rows.csv"}],
    ids=lambda source: "".join(source.values()),
)
def test_nothing_is_guessed_where_too_little_is_seen(
    source: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    assert estimate_packs(recipe_of(tmp_path, data={"sources": [source]})) is None
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"], "looking writes nothing"
