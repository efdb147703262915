"""Rendering rows in tests, and byte-level tokenizers whose special tokens are chosen by hand."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from packhorse.data.formats.example import Example, Message
from packhorse.data.read.row import RowMistakes
from packhorse.data.render.render import Rendered, Renderer, load_tokenizer, make_renderer, render_examples
from packhorse.errors import UserError
from packhorse.recipe.schema import DataSection

CHAT = (
    Message("system", "be kind"),
    Message("user", "hi"),
    Message("assistant", "hello"),
    Message("user", "how are you"),
    Message("assistant", "fine"),
)


def data_section(**data: Any) -> DataSection:
    return DataSection.model_validate({"sources": [{"path": "rows.jsonl"}], **data})


def chat_of(*messages: Message, **fields: Any) -> Example:
    return Example(messages, None, {}, "rows.jsonl:7", **fields)


def text_of(text: str) -> Example:
    return Example(None, text, {}, "rows.jsonl:7")


loaded = lru_cache(maxsize=16)(load_tokenizer)  # a large one takes a second


def renderer_of(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, **data: Any) -> Renderer:
    section = data_section(**data)
    tokenizer = tokenizer or loaded(folder, section.template)
    return make_renderer(tokenizer, folder, section, chats=True)


def render(folder: Path, *examples: Example, **data: Any) -> list[Rendered]:
    """Render, or raise what is wrong with the rows."""
    section = data_section(**data)
    tokenizer = loaded(folder, section.template)
    chats = any(example.messages for example in examples)
    mistakes = RowMistakes("rows.jsonl")
    rows = render_examples(make_renderer(tokenizer, folder, section, chats), examples, mistakes)
    mistakes.raise_if_any()
    return [row for row in rows if row is not None]


def refusal(folder: Path, *examples: Example, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        render(folder, *examples, **data)
    return str(caught.value)


def pieces(tokenizer: PreTrainedTokenizerBase, row: Rendered) -> list[tuple[str, int]]:
    """A row as the text of each run of tokens that are supervised, or are not."""
    runs = groupby(zip(row.ids, row.supervised.tolist(), strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([token for token, _ in run]), supervised) for supervised, run in runs]


def byte_tokenizer(folder: Path, *special: str, template: str | None = None, **config: Any) -> Path:
    """Every byte is a token; the last special token ends turns unless `eos_token` says otherwise."""
    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special[-1],
        "clean_up_tokenization_spaces": False,
        **({"chat_template": template} if template else {}),
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
