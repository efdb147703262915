"""The same rows as JSON lines, Parquet and Arrow become the same tokens, whatever Arrow adds to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from data_cases import MakeRecipe, write_lines
from pyarrow import parquet
from rendering_cases import byte_tokenizer

from packhorse.data.audit import audit
from packhorse.data.convert.convert import convert_file
from packhorse.data.packs.store import open_store
from packhorse.data.prepare import prepare
from packhorse.recipe.schema import Source

Row = dict[str, Any]


def tool(name: str, **properties: Row) -> Row:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name: str, **arguments: Any) -> Row:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


USER = {"role": "user", "content": "go"}
ROWS: list[Row] = [
    {
        "messages": [USER, call("f1", time="9:00", tags=["a", None])],
        "tools": [tool("f1", time={"type": "string"})],
        "system": "be kind",
    },
    {"messages": [USER, call("f2", when="now", deep={"x": 1})], "tools": [tool("f2", when={"enum": ["now"]})]},
    {"messages": [USER, call("f3")], "system": "be brief"},
    {"messages": [USER, {"role": "assistant", "content": "no", "reasoning_content": "none fits"}]},
]
ARGUMENTS = "messages.tool_calls.function.arguments"


def by_pyarrow(path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def by_datasets(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(path)


def by_datasets_from_json(path: Path) -> None:
    """Newer releases keep mixed JSON as JSON text, in the type arrow.json."""
    lines = write_lines(path.with_suffix(".jsonl"), *ROWS)
    cache = str(path.parent / "cache")
    loaded = datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=cache)
    assert "Json" in str(loaded.features)
    loaded.to_parquet(path)


def as_saved(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(path)


@pytest.fixture
def tokens_of(make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., list[list[int]]]:
    folder = byte_tokenizer(tmp_path / "bytes", "<|im_start|>", "<|im_end|>")
    data = {"template": "chatml", "split": {"train": 1.0, "validation": 0.0, "test": 0.0}, "packing": "in_order"}

    def prepared_tokens(path: Path, settings: Row | None = None, **source: Any) -> list[list[int]]:
        sections = {
            "data": {**data, **(settings or {})},
            "model": {"tokenizer": str(folder)},
            "batch": {"length": 2048},
        }
        recipe = make_recipe({"path": str(path), **source}, **sections)
        store = open_store(prepare(recipe).folder, "train")
        return [store.document(number)[0].tolist() for number in range(store.num_documents)]

    return prepared_tokens


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (by_pyarrow, "rows.parquet"),
        (by_datasets, "rows.parquet"),
        (by_datasets_from_json, "rows.parquet"),
        (as_saved, "saved"),
    ],
)
def test_tool_calls_with_different_arguments(
    tmp_path: Path, tokens_of: Callable[..., list[list[int]]], write: Callable[[Path], None], name: str
) -> None:
    path = tmp_path / "written" / name
    path.parent.mkdir()
    write(path)
    assert tokens_of(path) == tokens_of(write_lines(tmp_path / "rows.jsonl", *ROWS))


def test_nulls_that_stay(tmp_path: Path, tokens_of: Callable[..., list[list[int]]]) -> None:
    """A null in JSON lines is part of the row, and `keep_nulls` keeps those of Parquet."""
    rows = [{"messages": [USER, call("f1", time="9:00", when=None)]}, {"messages": [USER, call("f1", when=None)]}]
    first, second = tokens_of(write_lines(tmp_path / "rows.jsonl", *rows))
    assert '"arguments": {"time": "9:00", "when": null}' in bytes_of(first)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert '"arguments": {"time": "9:00"}' in bytes_of(tokens_of(tmp_path / "rows.parquet")[0])
    kept = tokens_of(tmp_path / "rows.parquet", keep_nulls=True)
    assert kept[0] == first
    assert '"arguments": {"time": null, "when": null}' in bytes_of(kept[1])
    assert '"arguments": {"when": null}' in bytes_of(second)


def bytes_of(ids: list[int]) -> str:
    """Ids of the byte tokenizer are places in the alphabet; 256 and more are special tokens."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return "".join(" " if letters[number] == "Ġ" else letters[number] for number in ids if number < 256)


def test_removed_nulls_are_counted_and_reported(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    by_pyarrow(tmp_path / "rows.parquet")
    folder = byte_tokenizer(tmp_path / "bytes", "<|im_start|>", "<|im_end|>")
    recipe = make_recipe(
        tmp_path / "rows.parquet",
        data={"template": "chatml", "split": {"train": 1.0, "validation": 0.0, "test": 0.0}},
        model={"tokenizer": str(folder)},
        batch={"length": 2048},
    )
    manifest = prepare(recipe).manifest
    # By hand: what Arrow adds to each struct of the four rows, by its path.
    expected = {
        "messages.tool_calls": 5,  # four questions and the last answer
        "messages.reasoning_content": 7,  # four questions and three answers
        f"{ARGUMENTS}.time": 2,
        f"{ARGUMENTS}.tags": 2,
        f"{ARGUMENTS}.when": 2,
        f"{ARGUMENTS}.deep": 2,
        "tools.function.parameters.properties.time": 1,
        "tools.function.parameters.properties.when": 1,
    }
    (source,) = manifest.sources
    assert source.removed_nulls == sum(expected.values())
    note = next(note for note in manifest.notes if "nulls" in note)
    assert f"{sum(expected.values())} nulls were removed from 4 rows (messages.reasoning_content 7, " in note
    assert "keep_nulls: true of the source keeps them" in note
    assert note in audit(recipe).notes
    converted = convert_file(Source(path=str(tmp_path / "rows.parquet")), tmp_path / "out.jsonl", "messages", False,
                             tmp_path)  # fmt: skip
    assert converted.removed_nulls.num_nulls == source.removed_nulls
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written[0]["messages"][2]["tool_calls"] == ROWS[0]["messages"][1]["tool_calls"]


def test_columns_of_other_formats_do_not_decide_the_format(
    make_recipe: MakeRecipe, tmp_path: Path, tokens_of: Callable[..., list[list[int]]]
) -> None:
    """A column that a row lacks is null there: neither a label nor a rejected answer of this row."""
    table = pyarrow.table({"question": ["hi", "how"], "answer": ["you", "fine"], "chosen": [None, None]})
    table = table.append_column("rejected", pyarrow.array([None, None], pyarrow.string()))
    parquet.write_table(table, tmp_path / "mixed.parquet")
    lines = write_lines(
        tmp_path / "rows.jsonl", {"question": "hi", "answer": "you"}, {"question": "how", "answer": "fine"}
    )
    assert tokens_of(tmp_path / "mixed.parquet") == tokens_of(lines)


def test_a_first_row_without_an_answer_costs_only_itself(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    table = pyarrow.table({"question": ["hi", *["how"] * 199], "answer": [None, *["fine"] * 199]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    data = {"template": "alpaca", "on_bad_row": "drop", "split": {"train": 1.0, "validation": 0.0, "test": 0.0}}
    ledger = prepare(make_recipe(tmp_path / "rows.parquet", data=data)).manifest.ledger
    assert {name: entry.rows for name, entry in ledger.losses.items()} == {"bad": 1}


def test_white_space_around_turns(tmp_path: Path, tokens_of: Callable[..., list[list[int]]]) -> None:
    def rows(space: str) -> list[Row]:
        answer = {"role": "assistant", "content": f"{space}a b{space}", "reasoning_content": f"{space}so{space}"}
        return [{"messages": [{"role": "user", "content": f"{space}go\n on{space}"}, answer]}]

    bare, spaced = (write_lines(tmp_path / f"{len(space)}.jsonl", *rows(space)) for space in ("", " \n\u00a0 "))
    assert tokens_of(bare) != tokens_of(spaced)
    assert tokens_of(bare) == tokens_of(spaced, settings={"strip": True})


def test_half_a_thinking_block_is_completed_on_request(
    tmp_path: Path, tokens_of: Callable[..., list[list[int]]]
) -> None:
    def written(name: str, *answers: str) -> Path:
        rows = [{"messages": [USER, {"role": "assistant", "content": answer}]} for answer in answers]
        return write_lines(tmp_path / f"{name}.jsonl", *rows)

    half = written("half", "It is 4.\n</think>\n\n4", "\nno\n</think>5", "6")
    whole = tokens_of(written("whole", "<think>\nIt is 4.\n</think>\n\n4", "<think>\nno\n</think>5", "6"))
    assert tokens_of(half, settings={"half_thinking": "open"}) == whole
    removed = tokens_of(half, settings={"half_thinking": "open", "train_on": {"thinking": "remove"}})
    assert removed == tokens_of(written("answers", "4", "5", "6"))
