"""The tokenizer that is saved with the model must give the ids that training saw."""

from __future__ import annotations

from pathlib import Path

import pytest
from rendering_cases import CHAT, byte_tokenizer, chat_of, renderer_of, text_of
from tokenizers import normalizers, processors

from packhorse.data.formats.example import Example, Message
from packhorse.data.read.row import RowMistakes
from packhorse.data.render.render import Rendered, Renderer, check_serving, load_tokenizer, render_examples
from packhorse.data.render.serving import saved_form
from packhorse.errors import UserError
from shared_folder import shared

ROWS = [chat_of(*CHAT), text_of("plain"), chat_of(Message("user", "Ünïcode \n"), Message("assistant", "fine"))]


def rows_of(renderer: Renderer, examples: list[Example]) -> list[tuple[Example, Rendered]]:
    mistakes = RowMistakes("rows.jsonl")
    rendered = render_examples(renderer, examples, mistakes)
    mistakes.raise_if_any()
    return [(example, row) for example, row in zip(examples, rendered, strict=True) if row is not None]


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("qwen2-151k", "tokenizer"),
        ("minimind-6k", "tokenizer"),
        ("gpt2-50k", "alpaca"),
    ],
)
def test_real_tokenizers_are_served_as_trained(name: str, template: str) -> None:
    renderer = renderer_of(shared(f"tokenizers/{name}"), template=template)
    rows = rows_of(renderer, ROWS[:2] if template != "tokenizer" else ROWS)
    check_serving(renderer, rows)
    check_serving(renderer, rows, saved_form(renderer.tokenizer))


def test_escaped_rows_are_served_as_trained(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "chatml", "<|im_start|>", "<|im_end|>")
    renderer = renderer_of(folder, template="chatml", control_tokens="escape")
    check_serving(renderer, rows_of(renderer, [chat_of(Message("user", "<|im_end|>"), CHAT[2])]))


@pytest.mark.parametrize(
    ("breaks", "told"),
    [
        pytest.param(
            "template", "the chat is served with other ids than it is trained with, from token 1 on", id="template"
        ),
        pytest.param("prompt", "the prompt of turn 3 is served with other ids", id="generation prompt"),
        pytest.param("normalizer", "the chat is served with other ids", id="normalizer"),
    ],
)
def test_a_saved_tokenizer_that_gives_other_ids(tmp_path: Path, breaks: str, told: str) -> None:
    folder = byte_tokenizer(tmp_path / "chatml", "<|im_start|>", "<|im_end|>")
    renderer = renderer_of(folder, template="chatml")
    rows = rows_of(renderer, ROWS[:1])
    served = load_tokenizer(folder, "chatml")
    if breaks == "template":
        served.chat_template = served.chat_template.replace("message['role'] +", "'a ' + message['role'] +")
    elif breaks == "prompt":
        served.chat_template = served.chat_template.replace(
            "assistant\\n' -}}{%- endif -%}", "bot\\n' -}}{%- endif -%}"
        )
    else:
        served.backend_tokenizer.normalizer = normalizers.Replace("hi", "HI")
    with pytest.raises(UserError) as caught:
        check_serving(renderer, rows, served)
    assert str(caught.value).startswith(f"rows.jsonl:7: {told}")


def test_saved_tokenizer_that_adds_another_start_to_text(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "chatml", "<|im_start|>", "<|im_end|>")
    renderer = renderer_of(folder, template="chatml")
    rows = rows_of(renderer, [text_of("plain")])
    served = load_tokenizer(folder, "chatml")
    start = served.convert_tokens_to_ids("<|im_start|>")
    served.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    with pytest.raises(UserError, match="the text is served with other ids than it is trained with, from token 0 on"):
        check_serving(renderer, rows, served)
