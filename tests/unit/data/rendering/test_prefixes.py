"""Templates without markers: turns are found by rendering what comes before them."""

from __future__ import annotations

from pathlib import Path

import pytest
from rendering_cases import CHAT, byte_tokenizer, chat_of, loaded, pieces, refusal, render

from packhorse.data.formats.example import Message
from shared_folder import shared

# Removes what was thought before the last question, as Qwen 3 does.
FORGETS = (
    "{% for m in messages %}<t>{{ m.role }}:"
    "{% if m.role == 'assistant' and '</think>' in m.content and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<e>{% endfor %}"
    "{% if add_generation_prompt %}<t>assistant:{% endif %}"
)
THOUGHTS = chat_of(
    Message("user", "1+1"),
    Message("assistant", "<think>easy</think>2"),
    Message("user", "2+2"),
    Message("assistant", "<think>easier</think>4"),
)


def test_minimind_by_hand() -> None:
    """Its template opens and closes the thinking before every answer; the generation prompt does, too."""
    folder = shared("tokenizers/minimind-6k")
    (row,) = render(folder, chat_of(*CHAT))
    assert pieces(loaded(folder, "tokenizer"), row) == [
        (
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            0,
        ),
        ("hello<|im_end|>", 1),
        ("\n<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", 0),
        ("fine<|im_end|>", 1),
        ("\n", 0),
    ]


def test_row_whose_generation_prompt_is_not_what_is_trained() -> None:
    folder = shared("tokenizers/minimind-6k")
    message = refusal(folder, chat_of(CHAT[1], Message("assistant", "hello", thinking="a greeting")))
    assert message.startswith("rows.jsonl:7: the chat template writes turn 2 (assistant) differently")
    assert "a greeting" in message
    assert "fix: set data.train_on.thinking to remove" in message


def test_template_that_rewrites_earlier_turns(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "forgets", "<t>", "<e>", template=FORGETS)
    message = refusal(folder, THOUGHTS)
    assert message.startswith(
        "rows.jsonl:7: the chat template writes turn 2 (assistant) differently when more turns follow"
    )
    assert "<think>easy</think>2" in message
    assert "set data.train_on.turns to last, whose answer the template does not change" in message


def test_last_turn_of_a_template_that_rewrites_earlier_turns(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "forgets", "<t>", "<e>", template=FORGETS)
    (row,) = render(folder, THOUGHTS, train_on={"turns": "last"})
    assert pieces(loaded(folder, "tokenizer"), row) == [
        ("<t>user:1+1<e><t>assistant:2<e><t>user:2+2<e><t>assistant:", 0),
        ("<think>easier</think>4<e>", 1),
    ]


def test_rewriting_does_not_matter_once_the_thinking_is_removed(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "forgets", "<t>", "<e>", template=FORGETS)
    (row,) = render(folder, THOUGHTS, train_on={"thinking": "remove"})
    assert [text for text, supervised in pieces(loaded(folder, "tokenizer"), row) if supervised] == [
        "2<e>",
        "4<e>",
    ]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        pytest.param(
            FORGETS.replace("<e>{% endfor %}", "{% if loop.last %}<e>{% endif %}{% endfor %}"),
            "differently when more turns follow",
            id="stop token at the end only",
        ),
        pytest.param(
            FORGETS.replace("<e>{% endfor %}", "{% endfor %}"),
            "is trained up to",
            id="no stop token",
        ),
        pytest.param(
            FORGETS.replace("%}<t>assistant:{%", "%}<t>model:{%"),
            "differently from its generation prompt",
            id="another generation prompt",
        ),
    ],
)
def test_templates_without_markers_that_cannot_be_trusted(tmp_path: Path, template: str, told: str) -> None:
    folder = byte_tokenizer(tmp_path / "bad", "<t>", "<e>", template=template)
    message = refusal(folder, chat_of(*CHAT))
    assert "tested on a chat: " in message
    assert told in message
    assert "In it, put the markers around what the assistant says" in message


def test_chat_that_begins_with_an_answer() -> None:
    folder = shared("tokenizers/minimind-6k")
    message = refusal(folder, chat_of(CHAT[2]))
    assert message.startswith("rows.jsonl:7: the chat template refuses the chat (roles: assistant): ")


def test_template_that_only_writes_the_last_answer_as_it_is_served(tmp_path: Path) -> None:
    """Even the probe is refused, unless only the last turn is asked for."""
    template = FORGETS.replace("<t>{{ m.role }}:", "<t>{{ m.role if loop.last or m.role != 'assistant' else 'old' }}:")
    folder = byte_tokenizer(tmp_path / "old", "<t>", "<e>", template=template)
    assert "set data.train_on.turns to last" in refusal(folder, chat_of(*CHAT))
    (row,) = render(folder, chat_of(*CHAT), train_on={"turns": "last"})
    assert pieces(loaded(folder, "tokenizer"), row)[1:] == [("fine<e>", 1)]
