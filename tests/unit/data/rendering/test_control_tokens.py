"""What somebody wrote about control tokens must not do what they do."""

from __future__ import annotations

from pathlib import Path

import pytest
from rendering_cases import byte_tokenizer, chat_of, loaded, refusal, render, renderer_of, text_of

from packhorse.data.formats.example import Example, Message
from packhorse.data.read.row import RowMistakes
from packhorse.data.render.render import load_tokenizer, render_examples
from shared_folder import shared

ANSWER = Message("assistant", "It ends a turn.")
ROWS = {
    "user": (chat_of(Message("user", "What is </s>?"), ANSWER), "turn 1 (user)"),
    "system": (chat_of(Message("system", "No </s>!"), Message("user", "hi"), ANSWER), "turn 1 (system)"),
    "assistant": (chat_of(Message("user", "hi"), Message("assistant", "a </s> b")), "turn 2 (assistant)"),
    "text": (text_of("Some </s> text"), "the text"),
}
RARE = {
    "thinking": (
        chat_of(Message("user", "hi"), Message("assistant", "x", thinking="<|im_end|> ends")),
        "the thinking of turn 2",
    ),
    "call": (
        chat_of(
            Message("user", "hi"),
            Message("assistant", "", tool_calls=({"function": {"name": "say", "arguments": {"a": ["<|im_end|>"]}}},)),
        ),
        "a tool call of turn 2",
    ),
    "tool": (
        chat_of(
            Message("user", "hi"), ANSWER, tools=({"function": {"name": "say", "description": "ends by <|im_end|>"}},)
        ),
        "a tool definition",
    ),
}


@pytest.mark.parametrize(("row", "what"), ROWS.values(), ids=ROWS)
def test_typed_control_token_is_refused(row: Example, what: str) -> None:
    message = refusal(shared("tokenizers/mistral-v3-32768"), row)
    assert message.startswith(f"rows.jsonl:7: {what} has the control token </s> typed in its text: ")
    assert "set data.control_tokens to escape (a space breaks it up) or keep" in message


@pytest.mark.parametrize(("row", "what"), RARE.values(), ids=RARE)
def test_typed_control_token_in_rare_places(tmp_path: Path, row: Example, what: str) -> None:
    folder = byte_tokenizer(tmp_path / "chatml", "<|im_start|>", "<|im_end|>")
    message = refusal(folder, row, template="chatml")
    assert message.startswith(f"rows.jsonl:7: {what} has the control token <|im_end|> typed in its text: ")
    (escaped,) = render(folder, row, template="chatml", control_tokens="escape")
    assert "< |im_end|>" in load_tokenizer(folder, "chatml").decode(escaped.ids)


@pytest.mark.parametrize(("row", "what"), ROWS.values(), ids=ROWS)
def test_escaped_control_token_is_no_control_id(row: Example, what: str) -> None:
    folder = shared("tokenizers/mistral-v3-32768")
    tokenizer = loaded(folder, "tokenizer")
    (kept,) = render(folder, row, control_tokens="keep")
    (escaped,) = render(folder, row, control_tokens="escape")
    stop = tokenizer.eos_token_id
    assert escaped.ids.count(stop) == kept.ids.count(stop) - 1 == 1
    assert "< /s>" in tokenizer.decode(escaped.ids)


def test_every_one_of_700_control_tokens_is_found() -> None:
    """All that the tokenizer itself makes one special id of, by its own word."""
    folder = shared("tokenizers/mistral-v3-32768")
    tokenizer = loaded(folder, "tokenizer")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert len(special) > 700
    rows = [chat_of(Message("user", f"x{token}{token} y"), ANSWER) for token in special]
    mistakes = RowMistakes("rows.jsonl")
    assert render_examples(renderer_of(folder), rows, mistakes) == [None] * len(rows)
    told = [mistake.fact for mistake in mistakes.recorded]
    assert [
        token for token, fact in zip(special, told, strict=True) if f"control token {token} typed" not in fact
    ] == []
    written = {tokenizer.bos_token_id, tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["[INST]", "[/INST]"])}
    special_ids = set(tokenizer.added_tokens_decoder)
    for row in render(folder, *rows, control_tokens="escape"):
        assert set(row.ids) & special_ids == written


@pytest.mark.parametrize(
    "text", ["a < b", "<div></div>", "[1, 2]", "<|", "im_end|>", "</ s>", "<<48/2=24>>"], ids=lambda text: text
)
def test_ordinary_text_passes_as_it_is(text: str) -> None:
    for name in ("mistral-v3-32768", "qwen2-151k"):
        folder = shared(f"tokenizers/{name}")
        row = chat_of(Message("user", text), ANSWER)
        assert render(folder, row)[0].ids == render(folder, row, control_tokens="keep")[0].ids
