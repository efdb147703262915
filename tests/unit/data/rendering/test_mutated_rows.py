"""Chats of nasty pieces: each is refused in words, or has the ids and the mask that transformers gives it."""

from __future__ import annotations

import random

import pytest
from rendering_cases import chat_of, loaded, renderer_of

from packhorse.data.formats.example import Example, Message
from packhorse.data.read.row import RowMistakes
from packhorse.data.render.render import render_examples
from shared_folder import shared

PIECES = [
    *(
        "a",
        " ",
        "\n",
        "\t",
        "\r",
        "\u2028",
        "é",
        "e\u0301",
        "\0",
        "  ",
        "\n\n",
        "▁",
        "👩‍👩‍👧",
        "ß",
        "123",
        ":",
        "hello",
    ),
    *("</s>", "<s>", "<unk>", "<|im_end|>", "<|im_start|>", "<|im_end", "|>", "<|endoftext|>", "[INST]", "[/INST]"),
    *("<think>", "</think>", "assistant\n", "### Response:\n", "</", "<", "\ufeff", "{{", "{%", "\u200b", "Ã³", "１"),
]
REASONS = ("begins inside a token", "begins with the start token twice", "the thinking of turn")


def nasty_chat(random_source: random.Random) -> Example:
    def content() -> str:
        return "".join(random_source.choice(PIECES) for _ in range(random_source.choice([0, 1, 2, 3, 5, 9])))

    turns = [Message("system", content())] if random_source.random() < 0.3 else []
    for _ in range(random_source.choice([1, 1, 2, 3])):
        turns += [Message("user", content()), Message("assistant", content())]
    return chat_of(*turns)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("minimind-6k", "chatml"),
        ("mistral-v3-32768", "tokenizer"),
        ("mistral-v3-32768", "mistral"),
        ("gpt2-50k", "alpaca"),
    ],
)
def test_ids_and_mask_of_nasty_chats(name: str, template: str) -> None:
    folder = shared(f"tokenizers/{name}")
    tokenizer = loaded(folder, template)
    renderer = renderer_of(folder, tokenizer, template=template, control_tokens="keep")
    random_source = random.Random(0)
    rows = [nasty_chat(random_source) for _ in range(500)]
    mistakes = RowMistakes("rows.jsonl")
    rendered = render_examples(renderer, rows, mistakes)
    taken = [(example, row) for example, row in zip(rows, rendered, strict=True) if row is not None]
    assert len(taken) + mistakes.num_rows == 500
    assert len(taken) > 350
    assert all(any(reason in mistake.fact for reason in REASONS) for mistake in mistakes.recorded)
    expected = tokenizer.apply_chat_template(
        [[{"role": turn.role, "content": turn.content} for turn in example.messages or ()] for example, _ in taken],
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    assert [row.ids for _, row in taken] == expected["input_ids"]
    assert [row.supervised.tolist() for _, row in taken] == expected["assistant_masks"]


@pytest.mark.parametrize("name", ["minimind-6k", "mistral-v3-32768"])
def test_no_control_id_comes_from_an_escaped_row(name: str) -> None:
    folder = shared(f"tokenizers/{name}")
    template = "chatml" if name == "minimind-6k" else "mistral"
    tokenizer = loaded(folder, template)
    renderer = renderer_of(folder, tokenizer, template=template, control_tokens="escape")
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    random_source = random.Random(1)
    plain = chat_of(Message("user", "a"), Message("assistant", "b"))
    rows = [nasty_chat(random_source) for _ in range(300)]
    mistakes = RowMistakes("rows.jsonl")
    (written, *rendered) = render_examples(renderer, [plain, *rows], mistakes)
    assert written is not None
    # ChatML ends every turn with the stop token, Mistral's form the answers.
    roles = ("system", "user", "assistant") if template == "chatml" else ("assistant",)
    for example, row in zip(rows, rendered, strict=True):
        if row is not None:
            assert {token for token in row.ids if token in special} <= {*written.ids}
            ends = sum(turn.role in roles for turn in example.messages or ())
            assert row.ids.count(tokenizer.eos_token_id) == ends
