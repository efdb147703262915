"""The llama3 template against the published form of a Llama 3 chat, written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from packhorse.data.rendering.render import load_tokenizer
from packhorse.errors import UserError

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi "},
    {"role": "assistant", "content": "hello"},
]
PUBLISHED = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nhello<|eot_id|>"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def save_byte_tokenizer(folder: Path, special: list[str]) -> Path:
    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_llama3_is_the_published_form_and_trains_the_answer_with_its_stop_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_byte_tokenizer(tmp_path / "llama", SPECIAL), "llama3")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == PUBLISHED
    assert tokenizer.eos_token == "<|eot_id|>"
    done = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, mask in zip(done["input_ids"], done["assistant_masks"], strict=True) if mask]
    assert tokenizer.convert_ids_to_tokens(trained) == [*"hello", "<|eot_id|>"]


def test_a_tokenizer_without_the_marks_is_refused(tmp_path: Path) -> None:
    folder = save_byte_tokenizer(tmp_path / "other", SPECIAL[:2])
    with pytest.raises(UserError, match="data.template is llama3") as caught:
        load_tokenizer(folder, "llama3")
    assert "<|eot_id|>" in str(caught.value)
