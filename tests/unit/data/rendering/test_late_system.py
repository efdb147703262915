"""A system turn that is not the first: trained where the template writes it in its place, refused elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from rendering_cases import byte_tokenizer, chat_of, loaded, pieces, refusal, render

from packhorse.data.formats.example import Message

LATE = (
    Message("system", "be kind"),
    Message("user", "hi"),
    Message("assistant", "hello"),
    Message("system", "be brief"),
    Message("user", "be brief"),  # equal to the system text: only the place distinguishes them
    Message("assistant", "fine"),
)
TURN = "<t>{{ m.role }}:{{ m.content }}<e>"
TWICE = "<t>{{ m.role }}:{{ m.content }}{% if m.role == 'system' %} {{ m.content }}{% endif %}<e>"
PROMPT = "{% if add_generation_prompt %}<t>assistant:{% endif %}"
EACH = "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
ALL_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n{% endif %}{% endfor %}"
OTHERS = "{% for m in messages %}{% if m.role != 'system' %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
FIRST = "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
REFUSES = (
    "{% for m in messages[1:] %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}" + EACH
)


def test_in_its_place(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "each", "<t>", "<e>", template=EACH)
    (row,) = render(folder, chat_of(*LATE))
    assert pieces(loaded(folder, "tokenizer"), row) == [
        ("<t>system:be kind<e><t>user:hi<e><t>assistant:", 0),
        ("hello<e>", 1),
        ("<t>system:be brief<e><t>user:be brief<e><t>assistant:", 0),
        ("fine<e>", 1),
    ]


@pytest.mark.parametrize(
    ("template", "what"),
    [
        pytest.param(ALL_SYSTEM + OTHERS, "does not write in its place", id="moved to the beginning"),
        pytest.param(FIRST + OTHERS, "does not write in its place", id="omitted"),
        pytest.param(EACH.replace(TURN, TWICE), "does not write in its place", id="twice"),
        pytest.param(REFUSES, "refuses (no)", id="refused"),
    ],
)
def test_elsewhere(tmp_path: Path, template: str, what: str) -> None:
    folder = byte_tokenizer(tmp_path / "other", "<t>", "<e>", template=template)
    # A system turn at the beginning is not concerned.
    assert len(render(folder, chat_of(*LATE[:3]), train_on={"turns": "last"})) == 1
    message = refusal(folder, chat_of(*LATE), train_on={"turns": "last"})
    assert f"rows.jsonl:7: turn 4 is a system turn, which the chat template {what}: 'be brief'" in message
    assert "fix: move it to the beginning, make it a user turn, or set data.template to one" in message


@pytest.mark.parametrize("name", ["chatml", "llama3", "phi3", "gemma"])
def test_named_templates(tmp_path: Path, name: str) -> None:
    special = {
        "chatml": ("<|im_start|>", "<|im_end|>"),
        "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "phi3": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    }[name]
    start = {"bos_token": special[0]} if name in ("llama3", "gemma") else {}
    folder = byte_tokenizer(tmp_path / name, *special, **start)
    if name == "gemma":
        assert "which the chat template refuses (" in refusal(folder, chat_of(*LATE), template=name)
    else:
        assert len(render(folder, chat_of(*LATE), template=name)) == 1
