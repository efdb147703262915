"""Every template on every real tokenizer and real rows: ids and masks as transformers has them, or refused in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from packhorse.data.formats.example import Example, Message
from packhorse.data.read.row import RowMistakes
from packhorse.data.render.render import check_serving, load_tokenizer, make_renderer, render_examples
from packhorse.data.render.serving import saved_form
from packhorse.errors import UserError
from packhorse.recipe.schema import DataSection

TOKENIZERS = {
    "qwen2": "tokenizers/qwen2-151k",
    "mistral": "tokenizers/mistral-v3-32768",
    "minimind": "tokenizers/minimind-6k",
    "gpt2": "tokenizers/gpt2-50k",
    "stories": "models/stories260K-llama",
}
# By hand: which tokenizer has which tokens, and what the refusal names.
TAKES = {
    ("qwen2", "tokenizer"): "<|im_end|>",
    ("qwen2", "chatml"): "<|im_end|>",
    ("qwen2", "alpaca"): "<|im_end|>",
    ("mistral", "tokenizer"): "</s>",
    ("mistral", "mistral"): "</s>",
    ("mistral", "alpaca"): "</s>",
    ("minimind", "tokenizer"): "<|im_end|>",
    ("minimind", "chatml"): "<|im_end|>",
    ("minimind", "qwen3"): "<|im_end|>",
    ("minimind", "alpaca"): "<|im_end|>",
    ("gpt2", "alpaca"): "<|endoftext|>",
    ("stories", "alpaca"): "</s>",
}
REFUSES = {
    ("qwen2", "llama3"): "<|start_header_id|>",
    ("qwen2", "gemma"): "<start_of_turn>",
    ("qwen2", "qwen3"): "<think>",
    ("qwen2", "phi4"): "<|im_sep|>",
    ("mistral", "phi3"): "<|user|>",
    ("qwen2", "mistral"): "[INST]",
    ("mistral", "chatml"): "<|im_start|>",
    ("mistral", "llama3"): "<|start_header_id|>",
    ("mistral", "gemma"): "<start_of_turn>",
    ("minimind", "llama3"): "<|start_header_id|>",
    ("minimind", "gemma"): "<start_of_turn>",
    ("minimind", "mistral"): "[INST]",
    ("gpt2", "tokenizer"): "has no chat template",
    ("gpt2", "chatml"): "<|im_start|>",
    ("gpt2", "llama3"): "<|start_header_id|>",
    ("gpt2", "gemma"): "<start_of_turn>",
    ("gpt2", "mistral"): "[INST]",
    ("stories", "tokenizer"): "has no chat template",
    ("stories", "chatml"): "<|im_start|>",
    ("stories", "llama3"): "<|start_header_id|>",
    ("stories", "gemma"): "<start_of_turn>",
    ("stories", "mistral"): "[INST]",
}
# system, user, assistant, user, assistant
CHAT = (
    Message("system", "be kind"),
    Message("user", "hi"),
    Message("assistant", "hello"),
    Message("user", "how are you"),
    Message("assistant", "fine"),
)
CHATML = [
    ("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", 0),
    ("hello<|im_end|>", 1),
    ("\n<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n", 0),
    ("fine<|im_end|>", 1),
    ("\n", 0),
]


def alpaca(start: str, stop: str) -> list[tuple[str, int]]:
    return [
        (f"{start}be kind\n\n### Instruction:\nhi\n\n### Response:\n", 0),
        (f"hello{stop}", 1),
        ("\n\n### Instruction:\nhow are you\n\n### Response:\n", 0),
        (f"fine{stop}", 1),
    ]


# What is between two texts in the same chat; spaces at their ends differ by tokenizer and are not compared.
BY_HAND = {
    ("qwen2", "tokenizer"): CHATML,
    ("qwen2", "chatml"): CHATML,
    ("qwen2", "alpaca"): alpaca("", "<|im_end|>"),
    ("mistral", "tokenizer"): [
        ("<s>[INST] be kind [/INST][INST] hi [/INST]", 0),
        ("hello</s>", 1),
        ("[INST] how are you [/INST]", 0),
        ("fine</s>", 1),
    ],
    ("mistral", "mistral"): [
        ("<s>[INST] be kind\n\nhi[/INST]", 0),
        ("hello</s>", 1),
        ("[INST] how are you[/INST]", 0),
        ("fine</s>", 1),
    ],
    ("mistral", "alpaca"): alpaca("<s>", "</s>"),
    ("minimind", "tokenizer"): [
        (
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n\n</think>\n\n",
            0,
        ),
        ("hello<|im_end|>", 1),
        ("\n<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", 0),
        ("fine<|im_end|>", 1),
        ("\n", 0),
    ],
    ("minimind", "chatml"): CHATML,
    ("minimind", "qwen3"): [(f"<think>\n\n</think>\n\n{text}" * on or text, on) for text, on in CHATML],
    ("minimind", "alpaca"): alpaca("<|im_start|>", "<|im_end|>"),
    ("gpt2", "alpaca"): alpaca("<|endoftext|>", "<|endoftext|>"),
    ("stories", "alpaca"): alpaca("<s>", "</s>"),
}


@cache
def loaded(folder: Path, template: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder, template)


def section(template: str) -> DataSection:
    # Real rows write about control tokens; here it counts that the mask holds whatever they hold.
    return DataSection.model_validate({"sources": [{"path": "rows"}], "template": template, "control_tokens": "keep"})


def real_rows(shared: Path) -> Iterator[Example]:
    data = shared / "data"
    with (data / "gsm8k_train.jsonl").open(newline="\n") as lines:
        for number, line in zip(range(150), lines):
            row = json.loads(line)
            yield one(f"gsm8k:{number}", Message("user", row["question"]), Message("assistant", row["answer"]))
    for line in (data / "mgsm_es.tsv").read_text().splitlines()[:50]:
        question, answer = line.split("\t")
        yield one("mgsm", Message("user", question), Message("assistant", answer))
    with (data / "lf_v1_sft_demo.jsonl").open() as lines:
        for number, line in zip(range(150), lines):
            turns = json.loads(line)["messages"]
            yield one(
                f"sft:{number}",
                *(Message(turn["role"], "".join(part["value"] for part in turn["content"])) for turn in turns),
            )
    for row in json.loads((data / "lf_kto_en_demo.json").read_text())[:60]:
        yield one("kto", *(Message(turn["role"], turn["content"]) for turn in row["messages"]))


def one(where: str, *messages: Message) -> Example:
    return Example(messages, None, {}, where)


def as_dicts(example: Example) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": turn.content} for turn in example.messages or ()]


@pytest.mark.parametrize(("name", "template"), TAKES, ids="-".join)
def test_ids_and_masks_of_real_rows(shared: Path, name: str, template: str) -> None:
    folder = shared / TOKENIZERS[name]
    tokenizer = loaded(folder, template)
    renderer = make_renderer(tokenizer, folder, section(template), chats=True)
    rows = [*real_rows(shared)]
    mistakes = RowMistakes("rows")
    rendered = render_examples(renderer, rows, mistakes)
    assert tokenizer.eos_token == TAKES[name, template]
    assert mistakes.num_rows <= 2, mistakes.to_show()
    taken = [(example, row) for example, row in zip(rows, rendered, strict=True) if row is not None]
    has_markers = "generation -%}" in tokenizer.chat_template or "{% generation %}" in tokenizer.chat_template
    assert has_markers == ((name, template) != ("minimind", "tokenizer"))
    expected = tokenizer.apply_chat_template(
        [as_dicts(example) for example, _ in taken],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=has_markers,
        tokenizer_kwargs={"verbose": False},
    )
    assert [row.ids for _, row in taken] == expected["input_ids"]
    if has_markers:
        assert [row.supervised.tolist() for _, row in taken] == expected["assistant_masks"]
    else:
        for example, row in taken[:150]:
            answers = [turn.content for turn in example.messages or () if turn.role == "assistant"]
            assert trained_texts(tokenizer, row) == [f"{answer}<|im_end|>" for answer in answers], example.where


def trained_texts(tokenizer: PreTrainedTokenizerBase, row: Any) -> list[str]:
    return [text for text, supervised in pieces(tokenizer, row) if supervised]


def pieces(tokenizer: PreTrainedTokenizerBase, row: Any) -> list[tuple[str, int]]:
    runs = groupby(zip(row.ids, row.supervised.tolist(), strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([token for token, _ in run]), supervised) for supervised, run in runs]


@pytest.mark.parametrize(("name", "template"), TAKES, ids="-".join)
def test_three_turns_by_hand(shared: Path, name: str, template: str) -> None:
    folder = shared / TOKENIZERS[name]
    tokenizer = loaded(folder, template)
    renderer = make_renderer(tokenizer, folder, section(template), chats=True)
    mistakes = RowMistakes("rows")
    (row,) = render_examples(renderer, [one("chat", *CHAT)], mistakes)
    mistakes.raise_if_any()

    def squeezed(parts: list[tuple[str, int]]) -> list[tuple[str, int]]:
        return [("".join(text.split(" ")), supervised) for text, supervised in parts]

    assert squeezed(pieces(tokenizer, row)) == squeezed(BY_HAND[name, template])
    check_serving(renderer, [(one("chat", *CHAT), row)], saved_form(tokenizer))


@pytest.mark.parametrize(("name", "template"), REFUSES, ids="-".join)
def test_the_others_are_refused_in_words(shared: Path, name: str, template: str) -> None:
    folder = shared / TOKENIZERS[name]
    with pytest.raises(UserError) as caught:
        make_renderer(load_tokenizer(folder, template), folder, section(template), chats=True)
    assert REFUSES[name, template] in str(caught.value)
    assert "fix: set data.template to " in str(caught.value)
