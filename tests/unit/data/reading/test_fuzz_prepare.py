"""Mutated files through the whole of `prepare`: packs with the right masks and a ledger that adds up, or words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from fuzz_cases import make_file
from transformers import AutoTokenizer

from packhorse.data.packs.store import open_store
from packhorse.data.prepare import prepare
from packhorse.errors import Mistake, UserError
from packhorse.recipe.schema import Recipe
from quickstart_corpus.tokenizer import save_tokenizer, train_tokenizer

NUM_FILES = 300
FORMS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl+gz", "csv+zst")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["hi there, be brief: two lines", "user assistant system\n"]), folder)
    return folder


def recipe_of(path: Path, sound: Path, runs: Path, tokenizer: Path) -> Recipe:
    """Mutated rows are held out, since the rows themselves are kept beside the tokens only there."""
    data: dict[str, Any] = {
        "sources": [{"path": str(sound)}],
        "validation": [{"path": str(path)}],
        "on_bad_row": "drop",
        "most_bad_rows": 1.0,
        "over_long": "drop",
        "duplicates": {"exact": "drop"},
    }
    model = {"config": {"model_type": "llama"}, "tokenizer": str(tokenizer)}
    return Recipe.model_validate(
        {"name": "fuzz", "runs_folder": str(runs), "model": model, "data": data, "optimizer": {"learning_rate": 1e-4},
         "steps": 1}
    )  # fmt: skip


def check_tokens(folder: Path, tokenizer: Any) -> int:
    """Ids are those of `apply_chat_template`; the mask lies within its own, as a row may mark a turn as not trained."""
    store = open_store(folder, "validation")
    for index, row in enumerate(store.rows()):
        ids, supervised = (values.tolist() for values in store.document(index))
        if row["messages"] is None:
            assert ids == [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
            assert all(supervised)
            continue
        expected = tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == expected["input_ids"]
        assert any(supervised)
        assert all(wanted or not given for given, wanted in zip(supervised, expected["assistant_masks"]))
    return store.num_documents


def test_mutated_files_become_packs_or_words(tmp_path: Path, tokenizer_folder: Path) -> None:
    chance = random.Random(20261121)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    sound = tmp_path / "sound.jsonl"
    sound.write_text('{"text": "another row altogether"}\n')
    documents = refused = 0
    told: list[Mistake] = []
    for number in range(NUM_FILES):
        form = chance.choice(FORMS)
        path = tmp_path / f"{number}.{form.replace('+', '.')}"
        path.write_bytes(make_file(form, chance))
        try:
            done = prepare(recipe_of(path, sound, tmp_path / f"runs-{number}", tokenizer_folder))
        except UserError as error:
            told += error.mistakes
            refused += 1
            continue
        ledger = done.manifest.ledger
        assert ledger.rows_in.rows == ledger.rows_kept + sum(entry.rows for entry in ledger.losses.values())
        if "validation" in done.manifest.splits:
            documents += check_tokens(done.folder, tokenizer)
    assert all(mistake.fact and mistake.why and mistake.fix for mistake in told)
    assert documents > NUM_FILES // 3
    assert refused > NUM_FILES // 10
