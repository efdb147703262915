"""Real rows with their real defects, through real tokenizers."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packhorse.data.audit import audit
from packhorse.data.gather.sources import read_rows
from packhorse.data.packs.store import open_store
from packhorse.data.prepare import prepare
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe, Source
from shared_folder import shared

QWEN, MISTRAL, GPT2 = "qwen2-151k", "mistral-v3-32768", "gpt2-50k"


def recipe_of(runs: Path, file: Path, tokenizer: str, length: int = 2048, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "real",
            "runs_folder": str(runs),
            "model": {"config": {"model_type": "llama"}, "tokenizer": str(shared(f"tokenizers/{tokenizer}"))},
            "data": {
                "sources": [{"path": str(file)}],
                "split": {"train": 0.7, "validation": 0.15, "test": 0.15},
                **data,
            },
            "batch": {"length": length},
            "optimizer": {"learning_rate": 1e-4},
            "steps": 1,
        }
    )


def refusal(recipe: Recipe) -> str:
    with pytest.raises(UserError) as caught:
        prepare(recipe)
    return str(caught.value)


def good_rows(file: Path, folder: Path) -> Path:
    """The lines that json.loads takes and that have an answer, found without our reader."""
    kept = []
    for line in file.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["output"].strip():
            kept.append(line)
    path = folder / file.name
    path.write_bytes(b"\n".join(kept) + b"\n")
    return path


@pytest.mark.parametrize(
    ("name", "tokenizer", "rows", "row_format"),
    [
        pytest.param("gsm8k_test.jsonl", QWEN, 1319, "question_answer", id="gsm8k qwen"),
        pytest.param("gsm8k_test.jsonl", MISTRAL, 1319, "question_answer", id="gsm8k mistral"),
        pytest.param("lf_v1_sft_demo.jsonl", QWEN, 500, "messages", id="parts and weights"),
    ],
)
def test_every_token_of_every_row_is_in_the_packs(
    tmp_path: Path, name: str, tokenizer: str, rows: int, row_format: str
) -> None:
    prepared = prepare(recipe_of(tmp_path / "runs", shared(f"data/{name}"), tokenizer))
    manifest = prepared.manifest
    assert (manifest.ledger.rows_in.rows, manifest.sources[0].format) == (rows, row_format)
    assert manifest.ledger.rows_kept == rows
    assert manifest.ledger.kept["train"].rows == round(0.7 * rows)
    for split, counts in manifest.splits.items():
        store = open_store(prepared.folder, split, unsealed=True)
        assert np.array_equal(np.sort(store.packs), np.arange(counts.num_rows))
        assert store.pack_tokens.sum() == counts.num_tokens == len(store.tokens)
        assert store.pack_tokens.max() <= 2048
        assert store.pack_labels.sum() == counts.num_supervised_tokens


def test_stored_rows_are_what_the_chat_template_gives(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "runs", shared("data/gsm8k_test.jsonl"), MISTRAL)
    prepared = prepare(recipe)
    store = open_store(prepared.folder, "validation")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared.manifest.tokenizer)
    rows = list(store.rows())
    expected = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert len(rows) == 198
    for number, (ids, mask) in enumerate(zip(expected["input_ids"], expected["assistant_masks"])):
        stored = store.document(number)
        assert (stored[0].tolist(), stored[1].tolist()) == (ids, mask)


def test_row_with_an_escaped_line_separator_stays_one_row() -> None:
    path = shared("data/gsm8k_train.jsonl")
    rows = list(read_rows(Source(path=str(path)), Path("runs")))
    assert len(rows) == 7473
    (odd,) = [row for row in rows if "\u2028" in row.values["question"] + row.values["answer"]]
    line = int(odd.where.rpartition(":")[2])
    assert json.loads(path.read_bytes().split(b"\n")[line - 1]) == odd.values


def test_fourteen_broken_lines_are_named(tmp_path: Path) -> None:
    path = shared("data/alpaca_libre_v2.jsonl")
    message = refusal(recipe_of(tmp_path / "runs", path, QWEN))
    assert f"{path}:2279: the line is not JSON: Expecting ',' delimiter at column 97; it begins {{" in message
    listed = tmp_path / "runs" / ".check" / "real" / "mistakes.jsonl"
    facts = [json.loads(line)["fact"] for line in listed.read_text(encoding="utf-8").splitlines()]
    # Answers that begin with a line break, which one token of qwen2 joins with the template's own.
    kinds = {"the line is not JSON": 14, "the answer of an assistant turn is empty": 51, "begins inside a token": 34}
    for words, count in kinds.items():
        assert sum(words in fact for fact in facts) == count
        assert f"{count} rows of {path} have a mistake of one kind, such as" in message
        assert message.count(words) == 3
    assert f"alpaca_libre_v2.jsonl has 99 rows with mistakes of 3 kinds; all are listed in {listed}." in message
    # What the message proposes for these 34 answers is enough.
    assert "fix: set data.strip: true, which removes white space around turns" in message
    stripped = refusal(recipe_of(tmp_path / "runs", path, QWEN, strip=True))
    assert "begins inside a token" not in stripped
    assert "alpaca_libre_v2.jsonl has 65 rows with mistakes of 2 kinds" in stripped


def test_alpaca_rows_that_can_be_read(tmp_path: Path) -> None:
    path = good_rows(shared("data/alpaca_libre_v2.jsonl"), tmp_path)
    report = audit(recipe_of(tmp_path / "runs", path, MISTRAL))
    assert [(source.row_format, source.num_rows) for source in report.sources] == [("alpaca", 2280 - 51)]
    labelled = Counter(json.loads(line)["status"] for line in path.read_bytes().splitlines())
    assert report.cards[0].strata == {"status": labelled}
    shown = report.rows[0]
    row = json.loads(path.read_bytes().split(b"\n")[int(shown.where.rpartition(":")[2]) - 1])
    text, supervised = shown.pieces[-1]
    assert supervised
    assert text == f" {row['output']}</s>"


def test_labels_are_answers_and_strata(tmp_path: Path) -> None:
    path = shared("data/banking77_train.csv")
    split = {"train": 0.7, "validation": 0.15, "test": 0.15, "stratify": ["label"]}
    prepared = prepare(recipe_of(tmp_path / "runs", path, QWEN, split=split))
    assert prepared.manifest.sources[0].format == "text_label"
    with path.open(newline="", encoding="utf-8") as file:
        labels = Counter(row["category"] for row in csv.DictReader(file))
    held_out = Counter(row["fields"]["label"] for row in open_store(prepared.folder, "validation").rows())
    # Near copies stay together, so a label of 35 rows may be off by a group.
    assert all(abs(held_out[label] - 0.15 * count) <= max(2, 0.02 * count) for label, count in labels.items())
    assert abs(sum(held_out.values()) - 0.15 * 10003) < 10
    row = next(open_store(prepared.folder, "validation").rows())
    assert row["messages"][-1]["content"] == row["fields"]["label"]


def test_questions_of_the_test_file_are_found_among_those_of_training(tmp_path: Path) -> None:
    test, split = shared("data/banking77_test.csv"), {"train": 0.8, "validation": 0.2}
    data = {"test": [{"path": str(test)}], "split": split, "duplicates": {"near": "ignore"}}
    message = refusal(recipe_of(tmp_path / "runs", shared("data/banking77_train.csv"), GPT2, template="alpaca", **data))
    # None is equal letter for letter; 7 differ by white space or case alone.
    told = "25 rows of data.sources are also in data.test: 25 with the same prompt and answer; the first: "
    assert told in message


def test_csv_lines_are_exact() -> None:
    path = shared("data/banking77_train.csv")
    rows = list(read_rows(Source(path=str(path)), Path("runs")))
    assert len(rows) == 10003
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        lines = [(reader.line_num, row["text"]) for row in reader]
    # The csv module counts to the end of a row, and each row of one line ends where it begins.
    ends = [line for line, _ in lines]
    assert [int(row.where.rpartition(":")[2]) for row in rows] == [2, *(end + 1 for end in ends[:-1])]
    assert [row.values["text"] for row in rows] == [text for _, text in lines]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        pytest.param("lf_dpo_en_demo.json", "has preference pairs (format preference)", id="dpo"),
        pytest.param("lf_kto_en_demo.json", "has answers with a verdict (format kto)", id="kto"),
        pytest.param("mt_bench_question.jsonl", "question_id, category, turns", id="prompts"),
        pytest.param("mgsm_es.tsv", "which looks like a value of a row", id="tsv"),
    ],
)  # fmt: skip
def test_rows_that_sft_cannot_train_on_are_refused_in_words(tmp_path: Path, name: str, told: str) -> None:
    assert told in refusal(recipe_of(tmp_path / "runs", shared(f"data/{name}"), QWEN))


def test_plain_text_and_its_one_over_long_row(tmp_path: Path) -> None:
    path = shared("data/lf_c4_demo.jsonl")
    message = refusal(recipe_of(tmp_path / "runs", path, GPT2, length=4096))
    assert "of 300 rows are longer than batch.length, which is 4096" in message
    prepared = prepare(recipe_of(tmp_path / "runs", path, GPT2, length=4096, over_long="truncate"))
    assert prepared.manifest.ledger.truncated >= 1
    assert prepared.manifest.ledger.rows_kept == 300
    store = open_store(prepared.folder, "train")
    assert store.supervised.all()


def test_an_answer_of_eight_thousand_tokens(tmp_path: Path) -> None:
    message = refusal(recipe_of(tmp_path / "runs", shared("data/openai_toy_chat_fine_tuning.jsonl"), QWEN))
    assert "1 of 5 rows are longer than batch.length, which is 2048; the longest has 80" in message
