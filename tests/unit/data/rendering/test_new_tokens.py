"""Tokens that the recipe adds: cut as one, kept by the saved tokenizer, and part of what prepared data is."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_cases import MakeRecipe, chat, save_tiny_tokenizer, write_lines

from packhorse.data.content_key import content_key
from packhorse.data.packs.store import open_store
from packhorse.data.prepare import prepare
from packhorse.data.render.tokenizer import load_tokenizer, pieces_before
from packhorse.errors import UserError


def test_a_new_token_is_one_id_in_rows_and_text_again_in_answers(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder, "tokenizer", new_tokens=["how are"])
    ids = tokenizer("hi how are you", add_special_tokens=False)["input_ids"]
    assert ids == [6, 14, 10]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi how are you"
    assert pieces_before(folder, ["how are", "bye"]) == {"how are": (8, 9), "bye": (12,)}
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved", "tokenizer")
    assert again("hi how are you", add_special_tokens=False)["input_ids"] == ids


def test_new_tokens_can_be_the_marks_of_a_template(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder, "chatml", new_tokens=["<|im_start|>", "<|im_end|>"])
    assert tokenizer.eos_token_id == 15


def test_a_token_that_is_known_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="model.new_tokens has 'bye', which is token 12 of the tokenizer"):
        load_tokenizer(folder, "tokenizer", new_tokens=["bye"])


def test_prepared_rows_are_cut_with_the_new_tokens(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    write_lines(tmp_path / "rows.jsonl", chat("u:hi", "a:how are you"), chat("u:bye", "a:fine how are you"))
    plain = make_recipe(data={"sources": [{"path": str(tmp_path / "rows.jsonl")}], "split": {"train": 1.0}})
    grown = plain.model_copy(update={"model": plain.model.model_copy(update={"new_tokens": ["how are"]})})
    assert content_key(plain) != content_key(grown)
    store = open_store(prepare(grown).folder, "train")
    found = [store.document(index)[0].tolist() for index in range(store.num_documents)]
    assert sorted(found) == [[1, 6, 4, 2, 14, 10, 4], [1, 12, 4, 2, 11, 14, 10, 4]]
