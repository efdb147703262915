"""Rows, and a tiny tokenizer made by hand: one token a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from packhorse.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
WORDS = ["<pad>", "<user>", "<bot>", "<sys>", "<end>", "[UNK]", "hi", "there", "how", "are", "you", "fine", "bye", "x"]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<bot>{% generation %}{{ message['content'] }}<end>{% endgeneration %}"
    "{% elif message['role'] == 'system' %}<sys>{{ message['content'] }}<end>"
    "{% else %}<user>{{ message['content'] }}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def save_tiny_tokenizer(folder: Path, template: str | None = TEMPLATE, **config: Any) -> Path:
    """Word-level: the ids are the places in WORDS."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "unk_token": "[UNK]",
        "clean_up_tokenization_spaces": False,
        **({"chat_template": template} if template else {}),
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_lines(path: Path, *rows: object) -> Path:
    """JSONL; a str is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def chat(*turns: str, **fields: Any) -> dict[str, Any]:
    """`u:hi`, `a:fine`, `s:you` to a row of messages."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns], **fields}
