"""Half a thinking block is refused wherever a template knows thinking, and only there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rendering_cases import byte_tokenizer, chat_of, loaded, pieces, refusal, render

from packhorse.data.formats.example import Message

SAYS = (
    "{% for m in messages %}<t>{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}SAID<e>{% endgeneration %}"
    "{% else %}{{ m.content }}<e>{% endif %}{% endfor %}{% if add_generation_prompt %}<t>assistant:OPENED{% endif %}"
)
PLAIN = SAYS.replace("SAID", "{{ m.content }}").replace("OPENED", "")
# As Qwen 3 does: thinking is read from the content too, so that the template itself would complete the half.
READS = SAYS.replace("OPENED", "").replace(
    "SAID",
    "{% if '</think>' in m.content %}<think>{{ m.content.split('</think>')[0].split('<think>')[-1] }}</think>"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}",
)
# As DeepSeek R1 does: the generation prompt opens the thinking.
OPENS = (
    "{% for m in messages %}<t>{{ m.role }}:{% if m.role == 'assistant' %}<think>\n{% generation %}"
    "{% if m.reasoning_content %}{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<e>"
    "{% endgeneration %}{% else %}{{ m.content }}<e>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<t>assistant:<think>\n{% endif %}"
)
USER = Message("user", "2+2?")
HALF = Message("assistant", "It is 4.\n</think>\n\n4")
ENDS, BEGINS = "the thinking of turn 2 ends and does not begin", "the thinking of turn 2 begins and does not end"


@pytest.fixture(params=["chatml", "qwen3", "reads", "a token"])
def knowing(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder with a tokenizer whose template knows thinking, and `data.template`."""
    marks = ("<|im_start|>", "<|im_end|>")
    folder = tmp_path / "knowing"
    if request.param == "reads":
        return byte_tokenizer(folder, "<t>", "<e>", template=READS), "tokenizer"
    if request.param == "a token":
        byte_tokenizer(folder, "<t>", "<e>", template=PLAIN)
        file = folder / "tokenizer.json"
        contents = json.loads(file.read_text())
        token = {**contents["added_tokens"][0], "id": 300, "content": "</think>", "special": False}
        contents["added_tokens"].append(token)
        file.write_text(json.dumps(contents))
        return folder, "tokenizer"
    return byte_tokenizer(folder, *(("<think>", "</think>") if request.param == "qwen3" else ()), *marks), request.param


def test_half_a_block_is_refused(knowing: tuple[Path, str]) -> None:
    folder, template = knowing
    last = (USER, Message("assistant", "5"))

    def message_of(*turns: Message) -> str:
        return refusal(folder, chat_of(*turns), template=template, control_tokens="keep")

    half = message_of(USER, HALF)
    assert f"rows.jsonl:7: {ENDS}: 'It is 4.\\n</think>\\n\\n4'" in half
    assert "set data.half_thinking to open" in half
    assert ENDS in message_of(USER, HALF, *last)
    assert ENDS in message_of(USER, Message("assistant", HALF.content, trained=False), *last)
    beside = message_of(USER, Message("assistant", HALF.content, thinking="hm"))
    assert ENDS in beside
    assert "fix: remove </think> from content, as reasoning_content holds the thinking." in beside
    assert ENDS in message_of(USER, Message("assistant", "<think>a</think>b</think>4"))
    for text in ("<think>It is 4. 4", "4<think>", "<think>a<think>b</think>4"):
        message = message_of(USER, Message("assistant", text))
        assert BEGINS in message
        assert "write </think> where the thinking ends" in message
    inside = message_of(USER, Message("assistant", "4", thinking="<think>hm"))
    assert "the thinking of turn 2 has <think> in its text" in inside


def test_whole_blocks_and_other_turns_are_accepted(knowing: tuple[Path, str]) -> None:
    folder, template = knowing
    rows = [
        chat_of(USER, Message("assistant", "<think>\nIt is 4.\n</think>\n\n4")),
        chat_of(Message("user", "what is </think>?"), Message("assistant", "a mark")),
    ]
    assert len(render(folder, *rows, template=template, control_tokens="keep")) == 2


def test_a_template_without_thinking_writes_the_marks_as_text(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "plain", "<t>", "<e>", template=PLAIN)
    (row,) = render(folder, chat_of(USER, HALF))
    assert pieces(loaded(folder, "tokenizer"), row)[-1] == (f"{HALF.content}<e>", 1)


def test_an_answer_may_begin_inside_the_thinking_that_its_prompt_opens(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "opens", "<t>", "<e>", template=OPENS)
    apart = Message("assistant", "4", thinking="It is 4.")
    for row in render(folder, chat_of(USER, HALF), chat_of(USER, apart)):
        assert pieces(loaded(folder, "tokenizer"), row) == [
            ("<t>user:2+2?<e><t>assistant:<think>\n", 0),
            ("It is 4.\n</think>\n\n4<e>", 1),
        ]
    message = refusal(folder, chat_of(USER, Message("assistant", "4")))
    assert "turn 2 (assistant) has no </think>, and the generation prompt ends inside <think>: " in message
    assert BEGINS in refusal(folder, chat_of(USER, Message("assistant", "<think>4")))
