from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from data_cases import MakeRecipe, chat, save_tiny_tokenizer, write_lines

from packhorse.data import prepare as prepare_module
from packhorse.data.audit import audit
from packhorse.data.content_key import content_key, find_prepared
from packhorse.data.ledger import Ledger
from packhorse.data.packs.store import open_store
from packhorse.data.prepare import prepare
from packhorse.errors import UserError
from packhorse.recipe.locate import expand, locate

PLACES = ["hi", "there", "how", "are", "you", "fine", "bye", "x"]


def many(count: int, offset: int = 0) -> list[dict[str, Any]]:
    """Different rows of 5 to 12 tokens: the number in base 8, in words."""
    return [
        chat(
            "u:hi",
            "a:" + " ".join(PLACES[int(digit)] for digit in f"{number:o}"),
            language="en" if number % 2 else "es",
        )
        for number in range(offset, offset + count)
    ]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", *many(100))


def refusal(recipe: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepare(recipe)
    return str(caught.value)


def said(folder: Path, split: str) -> set[str]:
    return {row["messages"][-1]["content"] for row in open_store(folder, split, unsealed=True).rows()}


def counts_of(ledger: Ledger) -> dict[str, int]:
    """Rows of each entry, and the other counts that are not 0."""
    entries = {"rows_in": ledger.rows_in, **ledger.losses, **ledger.kept}
    others = ledger.model_dump(include={"truncated", "tokens_cut", "split_rows"}, exclude_defaults=True)
    return {name: entry.rows for name, entry in entries.items()} | others


def test_cold_then_warm(make_recipe: MakeRecipe, rows: Path, tiny: Path) -> None:
    recipe = make_recipe(rows)
    assert find_prepared(recipe) is None
    seen: list[int] = []
    cold = prepare(recipe, seen.append)
    warm = prepare(recipe)
    assert (cold.was_warm, warm.was_warm) == (False, True)
    assert warm.manifest == cold.manifest == find_prepared(recipe)
    assert seen == [100]
    assert cold.folder.name == cold.manifest.content_hash == content_key(recipe)
    assert {split: counts.num_rows for split, counts in cold.manifest.splits.items()} == {
        "train": 70,
        "validation": 15,
        "test": 15,
    }
    assert (cold.manifest.tokenizer, cold.manifest.vocab_size, cold.manifest.stop_token) == (str(tiny), 14, "<end>")
    assert cold.manifest.fields == ("language",)
    assert [source.format for source in cold.manifest.sources] == ["messages"]
    assert sorted(path.name for path in cold.folder.parent.iterdir()) == sorted(
        [cold.folder.name, f"{cold.folder.name}.lock", "files.json"]
    )
    assert not (cold.folder / "train" / "rows.jsonl").exists()


def test_row_by_hand(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "two.jsonl", chat("u:how are you", "a:fine", kind="a"), chat("u:hi", "a:bye bye"))
    data = {"split": {"train": 1.0, "validation": 0.0, "test": 0.0}}
    prepared = prepare(make_recipe(path, data=data))
    store = open_store(prepared.folder, "train")
    # <user> how are you <end> <bot> fine <end>, then <user> hi <end> <bot> bye bye <end>
    assert store.tokens.tolist() == [1, 8, 9, 10, 4, 2, 11, 4, 1, 6, 4, 2, 12, 12, 4]
    assert store.supervised.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    counts = prepared.manifest.splits["train"]
    assert (counts.num_tokens, counts.num_supervised_tokens, counts.num_packs) == (15, 5, 1)
    assert counts.fill == 15 / 64


def test_moving_the_files_changes_nothing(make_recipe: MakeRecipe, rows: Path, tiny: Path, tmp_path: Path) -> None:
    before = prepare(make_recipe(rows))
    moved, tokenizer = tmp_path / "moved.jsonl", tmp_path / "moved-tokenizer"
    rows.rename(moved)
    tiny.rename(tokenizer)
    after = prepare(make_recipe(moved, model={"tokenizer": str(tokenizer)}))
    assert (after.folder, after.was_warm) == (before.folder, True)


def test_key_changes_with_all_that_decides(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("one")
    other = save_tiny_tokenizer(tmp_path / "other", pad_token="x")
    more = write_lines(tmp_path / "more.jsonl", *many(101))
    recipes = {
        "same": make_recipe(rows),
        "learning rate does not": make_recipe(rows, batch={"packs": 4}),
        "length": make_recipe(rows, batch={"length": 65}),
        "row": make_recipe(more),
        "tokenizer": make_recipe(rows, model={"tokenizer": str(other)}),
        "template": make_recipe(rows, data={"template": str(template)}),
        "chatml": make_recipe(rows, data={"template": "chatml"}),
        "over_long": make_recipe(rows, data={"over_long": "drop"}),
        "seed": make_recipe(rows, data={"split": {"seed": 7}}),
        "columns": make_recipe({"path": str(rows), "columns": {"messages": "messages"}}),
        "rows": make_recipe({"path": str(rows), "rows": 50}),
        "control tokens": make_recipe(rows, data={"control_tokens": "escape"}),
        "duplicates": make_recipe(rows, data={"duplicates": {"exact": "drop"}}),
        "decontaminate": make_recipe(rows, data={"decontaminate": {"against": [{"path": str(more)}]}}),
        "packing": make_recipe(rows, data={"packing": "in_order"}),
        "train_on": make_recipe(rows, data={"train_on": {"turns": "last"}}),
        "format": make_recipe({"path": str(rows), "format": "messages"}),
        "retain": make_recipe(rows, data={"retain": [{"path": str(more)}]}),
        "validation": make_recipe(rows, data={"validation": [{"path": str(more)}]}),
        "hub": make_recipe({"id": "some/rows"}),
        "revision": make_recipe({"id": "some/rows", "revision": "abc"}),
    }
    keys = {name: content_key(recipe) for name, recipe in recipes.items()}
    assert keys.pop("same") == keys["learning rate does not"]
    assert len(set(keys.values())) == len(keys)
    before = keys["template"]
    template.write_text("two")
    assert content_key(recipes["template"]) != before


def test_order_of_the_file_changes_no_side(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    backwards = write_lines(tmp_path / "backwards.jsonl", *reversed(many(100)))
    one, other = prepare(make_recipe(rows)), prepare(make_recipe(backwards))
    assert one.folder != other.folder
    for split in ("validation", "test"):
        assert said(one.folder, split) == said(other.folder, split)
    assert not said(one.folder, "validation") & said(one.folder, "test")


def test_strata_keep_their_shares(make_recipe: MakeRecipe, rows: Path) -> None:
    prepared = prepare(make_recipe(rows, data={"split": {"train": 0.8, "validation": 0.2, "test": 0.0,
                                                         "stratify": ["language"]}}))  # fmt: skip
    languages = [row["fields"]["language"] for row in open_store(prepared.folder, "validation").rows()]
    assert sorted(languages) == ["en"] * 10 + ["es"] * 10


def test_validation_rows_of_their_own(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    held_out = write_lines(tmp_path / "held-out.jsonl", *many(9, offset=500))
    prepared = prepare(make_recipe(rows, data={"validation": [{"path": str(held_out)}]}))
    assert {split: counts.num_rows for split, counts in prepared.manifest.splits.items()} == {
        "train": 85,
        "validation": 9,
        "test": 15,
    }


def test_retained_rows_are_those_an_earlier_run_validated_on(
    make_recipe: MakeRecipe, rows: Path, tmp_path: Path
) -> None:
    earlier = prepare(make_recipe(rows))
    new = write_lines(tmp_path / "new.jsonl", *many(50, offset=500))
    prepared = prepare(make_recipe(new, data={"retain": [{"path": str(rows)}]}))
    assert said(prepared.folder, "retain") == said(earlier.folder, "validation")
    assert counts_of(prepared.manifest.ledger) == {
        "rows_in": 150, "retain_unused": 85, "train": 35, "validation": 8, "test": 7, "retain": 15,
    }  # fmt: skip


LONG = "a:" + "hi " * 40


@pytest.mark.parametrize(
    ("over_long", "lengths", "ledger"),
    [
        pytest.param("drop", [5, 5], {"over_long": 2, "train": 2}, id="drop"),
        pytest.param(
            "truncate", [5, 10, 5], {"masked_out": 1, "train": 3, "truncated": 1, "tokens_cut": 35},
            id="truncate",
        ),
    ],
)  # fmt: skip
def test_over_long_rows_are_counted(
    make_recipe: MakeRecipe, tmp_path: Path, over_long: str, lengths: list[int], ledger: dict[str, int]
) -> None:
    path = write_lines(tmp_path / "long.jsonl", chat("u:", "a:hi"), chat("u:hi", LONG), chat("u:" + "x " * 20, "a:hi"),
                       chat("u:", "a:x"))  # fmt: skip
    data = {"over_long": over_long, "split": {"train": 1.0, "validation": 0.0, "test": 0.0}}
    prepared = prepare(make_recipe(path, data=data, batch={"length": 10}))
    store = open_store(prepared.folder, "train")
    assert [len(store.document(number)[0]) for number in range(store.num_documents)] == lengths
    assert counts_of(prepared.manifest.ledger) == {"rows_in": 4, **ledger}


def test_over_long_rows_stop_by_default(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "long.jsonl", *many(99), chat("u:hi", LONG))
    message = refusal(make_recipe(path, batch={"length": 20}))
    assert "1 of 100 rows are longer than batch.length, which is 20; the longest has 45 tokens." in message
    assert "set batch.length to 8 (fits 99 %) or 45 (fits all)" in message


@pytest.mark.parametrize("over_long", ["raise", "drop", "truncate"])
def test_length_below_every_row(make_recipe: MakeRecipe, rows: Path, over_long: str) -> None:
    message = refusal(make_recipe(rows, batch={"length": 4}, data={"over_long": over_long}))
    assert "batch.length is 4, and every row is longer: 6 to 8 tokens." in message
    assert "(fits 99 % of the 100 rows) or 8 (fits all)" in message


@pytest.mark.parametrize(
    ("count", "split", "told"),
    [
        pytest.param(
            2,
            {"train": 0.7, "validation": 0.15, "test": 0.15},
            "has 2 rows, and data.split.validation of 0.15 gives 0",
            id="validation",
        ),
        pytest.param(1, {"train": 0.1, "validation": 0.9, "test": 0.0}, "data.split.train of 0.1 gives 0", id="train"),
    ],
)
def test_too_few_rows_for_the_split(
    make_recipe: MakeRecipe, tmp_path: Path, count: int, split: dict[str, Any], told: str
) -> None:
    path = write_lines(tmp_path / "few.jsonl", *many(count))
    assert told in refusal(make_recipe(path, data={"split": split}))


def test_mistakes_of_all_files_at_once_and_nothing_is_left(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", chat("u:hi", "a:x"), "{", chat("u:hi"))
    other = write_lines(tmp_path / "other.jsonl", chat("a:x", "u:hi", "u:"), chat("u:hi", "a:"))
    message = refusal(make_recipe(rows, bad, other))
    for told in (
        f"{bad}:2: the line is not JSON",
        f"{bad}:3: the chat has no assistant turn",
        f"{other}:2: the answer of an assistant turn is empty",
    ):
        assert told in message
    assert [path.suffix for path in (tmp_path / "runs" / ".data").iterdir() if path.suffix != ".json"] == [".lock"]


def test_field_that_rows_lack(make_recipe: MakeRecipe, rows: Path) -> None:
    assert "rows.jsonl:1: the row has no topic; its other fields are language." in refusal(
        make_recipe(rows, data={"split": {"stratify": ["topic"]}})
    )
    prepare(make_recipe(rows))
    message = refusal(make_recipe(rows, evaluation={"group_by": "topic"}))
    assert "evaluation.group_by is topic" in message
    assert "every row has: language" in message
    assert prepare(make_recipe(rows, evaluation={"group_by": "language"})).was_warm


def test_what_a_killed_process_left_is_never_taken_for_data(make_recipe: MakeRecipe, rows: Path) -> None:
    recipe = make_recipe(rows)
    leftover = Path(recipe.runs_folder) / ".data" / f"{content_key(recipe)}.draft-1"
    (leftover / "train").mkdir(parents=True)
    assert find_prepared(recipe) is None
    assert not prepare(recipe).was_warm
    assert not leftover.exists()


def test_failure_midway_leaves_nothing(make_recipe: MakeRecipe, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "write_data_manifest", full)
    recipe = make_recipe(rows)
    assert "No space left on device" in refusal(recipe)
    assert [path.name for path in (Path(recipe.runs_folder) / ".data").glob("*.draft-*")] == []
    assert find_prepared(recipe) is None


def test_two_at_once_do_the_work_once(make_recipe: MakeRecipe, rows: Path) -> None:
    recipe = make_recipe(rows)
    warm: list[bool] = []
    threads = [threading.Thread(target=lambda: warm.append(prepare(recipe).was_warm)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(warm) == [False, True, True]


def test_rows_that_change_meanwhile(make_recipe: MakeRecipe, rows: Path) -> None:
    def change(_: int) -> None:
        write_lines(rows, *many(101))

    with pytest.raises(UserError, match="changed while the data was prepared"):
        prepare(make_recipe(rows), change)


def test_unknown_builtin_names_the_closest(make_recipe: MakeRecipe) -> None:
    message = refusal(make_recipe("builtin:tickets.jsonl"))
    assert "builtin:tickets.jsonl is not one of the files that come with Packhorse: core.messages.jsonl" in message
    assert "write builtin:tickets." in message


def test_folder_that_cannot_be_written(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    assert "cannot be written" in refusal(make_recipe(rows))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        pytest.param({"tokenizer": None}, "model.tokenizer is missing", id="none"),
        pytest.param({"tokenizer": "./nowhere"}, "the tokenizer's folder nowhere does not exist", id="folder"),
        pytest.param({"tokenizer": "{runs}"}, "has no tokenizer", id="no tokenizer in it"),
    ],
)
def test_tokenizers_that_are_not_there(
    make_recipe: MakeRecipe, rows: Path, tmp_path: Path, model: dict[str, Any], told: str
) -> None:
    (tmp_path / "runs").mkdir()
    text = model["tokenizer"]
    assert told in refusal(make_recipe(rows, model={"tokenizer": text and text.format(runs=tmp_path / "runs")}))


def test_model_of_an_earlier_run_brings_its_tokenizer(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    save_tiny_tokenizer(run / "model")
    (run / "plan.json").write_text("{}")
    for path in (str(run), "first"):
        recipe = make_recipe(rows, model={"config": None, "path": path, "tokenizer": None})
        assert Path(prepare(recipe).manifest.tokenizer) == run / "model"


def test_audit_shows_what_would_be_trained(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    report = audit(make_recipe(rows, batch={"length": 7}, data={"over_long": "drop"}))
    assert sum(split.num_rows for split in report.splits.values()) == 64
    # 8 rows of one word (6 tokens), 56 of two, 36 of three.
    assert report.length_percentiles == {0: 6, 50: 7, 90: 8, 99: 8, 100: 8}
    assert report.num_tokens == 8 * 6 + 56 * 7 + 36 * 8
    assert report.supervised_share == (8 * 2 + 56 * 3 + 36 * 4) / report.num_tokens
    assert counts_of(report.ledger)["over_long"] == 36
    assert report.rows[0].where == f"{rows}:1"
    assert report.rows[0].pieces == (("<user> hi <end> <bot>", False), ("hi <end>", True))
    assert not (tmp_path / "runs").exists()


def test_audit_lists_the_keys_of_each_source(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [{"q": "hi", "answer": "fine", "topic": "x", "meta": {"n": 1}, "notes": "how " * 99} for _ in range(9)]
    path = write_lines(tmp_path / "rows.jsonl", *rows, {"q": "you", "answer": "bye"})
    source = {"path": str(path), "columns": {"question": "q"}, "ignore": ["notes"]}
    (audited,) = audit(make_recipe(source, data={"split": {"train": 1.0}})).sources
    assert audited.keys == {
        "used": {"answer": 10, "question (q)": 10},
        "kept": {"topic": 9},
        "ignored": {"meta": 9, "notes": 9},
    }


def test_warm_start_needs_no_torch(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    recipe = make_recipe(rows)
    prepare(recipe)
    file = tmp_path / "recipe.json"
    file.write_text(recipe.model_dump_json())
    program = (
        "import sys; from packhorse.data.content_key import find_prepared; from packhorse.recipe.schema import Recipe;"
        f"print(find_prepared(Recipe.model_validate_json(open({str(file)!r}).read())).content_hash);"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert out.stdout.split("\n")[:2] == [content_key(recipe), "[]"]


def test_references_to_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROWS", "data")
    assert expand("${env:ROWS}/a-${env:ROWS}.jsonl") == "data/a-data.jsonl"
    assert locate("${env:ROWS}/x", tmp_path) == Path("data/x")
    monkeypatch.delenv("ROWS")
    with pytest.raises(UserError, match=r"ROWS is not set"):
        expand("${env:ROWS}")


def test_manifest_is_plain_json(make_recipe: MakeRecipe, rows: Path) -> None:
    prepared = prepare(make_recipe(rows))
    told = json.loads((prepared.folder / "data.json").read_text())
    assert told["splits"]["train"]["num_rows"] == 70
    assert told["ledger"]["rows_in"]["rows"] == 100


def test_replayed_rows_are_of_those_an_earlier_run_trained_on(
    make_recipe: MakeRecipe, rows: Path, tmp_path: Path
) -> None:
    earlier = prepare(make_recipe(rows))
    new = write_lines(tmp_path / "new.jsonl", *many(50, offset=500))
    prepared = prepare(make_recipe(new, data={"retain": [{"path": str(rows), "replay_rows": 20}]}))
    counts = counts_of(prepared.manifest.ledger)
    assert (counts["train"], counts["retain"], counts["retain_unused"]) == (35 + 20, 15, 65)
    assert said(prepared.folder, "retain") == said(earlier.folder, "validation")
    trained, before = (tokens_of(data.folder) for data in (prepared, earlier))
    assert len(trained & before) == 20
    with pytest.raises(UserError, match="has 71 replay_rows for .*, and its train share has 70 rows"):
        prepare(make_recipe(new, data={"retain": [{"path": str(rows), "replay_rows": 71}]}))


def tokens_of(folder: Path) -> set[tuple[int, ...]]:
    store = open_store(folder, "train")
    return {tuple(store.document(index)[0].tolist()) for index in range(store.num_documents)}
