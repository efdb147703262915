"""The quickstart's tokenizer: loads as any other, marks what is learnt, and is the same everywhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from packhorse.quickstart.files import VOCABULARY_SIZE, materialise
from quickstart_corpus.__main__ import tokenizer_texts, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materialise("tokenizer", tmp_path_factory.mktemp("quickstart"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_the_special_tokens_have_their_parts(tokenizer: Any) -> None:
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == 1
    assert len(tokenizer) == VOCABULARY_SIZE


def test_the_shipped_tokenizer_has_the_bytes_that_training_makes(folder: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_vocabulary_and_merges_are_the_same_on_every_machine(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    learnt = json.dumps([model["vocab"], model["merges"]], sort_keys=True)
    assert (
        hashlib.sha256(learnt.encode()).hexdigest()
        == "7a524345cd51e3a862793dc5c12791d5fd25200f0677f75defbd4ef1b0245335"
    )


def test_the_chat_reads_as_written_by_hand(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Sé breve."},
        {"role": "user", "content": "Hola"},
        {"role": "assistant", "content": "Buenas"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nSé breve.<|im_end|>\n"
        "<|im_start|>user\nHola<|im_end|>\n"
        "<|im_start|>assistant\nBuenas<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nSé breve.<|im_end|>\n<|im_start|>user\nHola<|im_end|>\n<|im_start|>assistant\n"
    )


def test_only_the_assistants_words_and_stop_tokens_are_supervised(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "Hola"},
        {"role": "assistant", "content": "Buenas tardes, Ana."},
        {"role": "user", "content": "Convierte 42 kilos a gramos."},
        {"role": "assistant", "content": "42000 gramos"},
    ]
    chat = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    marked = zip(chat["input_ids"], chat["assistant_masks"])
    supervised = [token for token, mark in marked if mark]
    assert tokenizer.decode(supervised) == "Buenas tardes, Ana.<|im_end|>42000 gramos<|im_end|>"


def test_numbers_are_single_digits(tokenizer: Any) -> None:
    assert [token.strip("Ġ") for token in tokenizer.tokenize("2029")] == ["2", "0", "2", "9"]


@pytest.mark.parametrize("text", ["¿Cuántos años?\n\nÑandú: 12 €", "naïve 漢字 🐎", "a  b\t\n c "])
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_tokenizer_reads_both_corpora() -> None:
    texts = tokenizer_texts()
    assert any(text.startswith("assistant\nBILLING/") for text in texts)
    assert any(text.startswith("system\n") for text in texts)
