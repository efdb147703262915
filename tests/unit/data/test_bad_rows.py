"""Many bad rows: each kind is shown once, and a file lists every row."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from data_cases import MakeRecipe, chat, write_lines

from packhorse.data.formats.bad_row import excerpt
from packhorse.data.prepare import prepare
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe
from packhorse.workflows.check import check_recipe

GOOD = [chat("u:hi", "a:" + "fine " * number) for number in range(1, 41)]
EMPTY = chat("u:hi", "a:")


def role(name: str) -> dict[str, Any]:
    return {"messages": [{"role": name, "content": "hi"}, {"role": "assistant", "content": "fine"}]}


# The fix names the role that was meant, so that the rows have one kind and four fixes.
ROLES = [role(name) for name in ("usr", "asistant", "systm", "usre")]
BAD = [*[EMPTY] * 50, *ROLES * 10, *['{"messages": ['] * 9]


def refusal(recipe: Recipe) -> UserError:
    with pytest.raises(UserError) as caught:
        prepare(recipe)
    return caught.value


def listed(recipe: Recipe) -> Path:
    return Path(recipe.runs_folder) / ".check" / recipe.name / "mistakes.jsonl"


def test_99_bad_rows_of_three_kinds_are_four_mistakes(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *GOOD, *BAD)
    recipe = make_recipe(path)
    error = refusal(recipe)
    heads = [mistake.fact.partition(", such as")[0] for mistake in error.mistakes]
    assert sorted(heads[:3]) == sorted(f"{count} rows of {path} have a mistake of one kind" for count in (50, 40, 9))
    total = f"{path} has 99 rows with mistakes of 3 kinds; all are listed in {listed(recipe)}."
    assert heads[3:] == [total]
    assert str(error).count(f"\n    {path}:") == 9
    assert len(str(error).splitlines()) == 3 * (1 + 3 + 2) + 3
    rows = [json.loads(line) for line in listed(recipe).read_text(encoding="utf-8").splitlines()]
    assert sorted(int(row["where"].rpartition(":")[2]) for row in rows) == list(range(41, 140))
    assert {row["fix"] for row in rows if "asistant" in row["fact"]} != {
        row["fix"] for row in rows if "usr" in row["fact"]
    }
    assert [file.name for file in listed(recipe).parent.iterdir()] == ["mistakes.jsonl"]


def test_the_list_is_of_the_newest_reading(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *GOOD, *BAD)
    recipe = make_recipe(path)
    refusal(recipe)
    write_lines(path, *GOOD, *[EMPTY] * 3)
    assert "listed in" not in str(refusal(recipe)), "all three are shown"
    assert not listed(recipe).exists()


def test_a_source_without_a_good_row_is_listed_too(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *["{"] * 5)
    recipe = make_recipe(path)
    assert f"5 rows with mistakes; all are listed in {listed(recipe)}." in str(refusal(recipe))
    assert len(listed(recipe).read_text().splitlines()) == 5


def test_check_lists_the_bad_rows_that_it_drops(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *GOOD, EMPTY)
    recipe = make_recipe(path, data={"on_bad_row": "drop", "most_bad_rows": 0.5})
    checked = check_recipe(recipe)
    assert checked.bad_rows == listed(recipe)
    assert json.loads(listed(recipe).read_text())["where"] == f"{path}:41"
    write_lines(path, *GOOD)
    assert check_recipe(recipe).bad_rows is None


def test_a_list_that_cannot_be_written_is_a_mistake_beside_the_others(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *GOOD, *BAD)
    recipe = make_recipe(path)
    listed(recipe).parent.parent.mkdir(parents=True)
    listed(recipe).parent.write_text("in the way")
    message = str(refusal(recipe))
    assert "50 rows of" in message
    assert f"{listed(recipe)} cannot be written: " in message


def test_an_excerpt_is_whole_in_a_log_and_short_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a" * 150 + "|" + "b" * 150
    assert excerpt(text, 150) == f"'{text}' at character 151"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert excerpt(text, 150) == f"…'{'a' * 40}|{'b' * 39}'…"
