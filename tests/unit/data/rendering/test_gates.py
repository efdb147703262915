"""Templates and rows that would train the wrong tokens, one for each gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_cases import TEMPLATE, save_tiny_tokenizer
from rendering_cases import CHAT, byte_tokenizer, chat_of, loaded, pieces, refusal, render, text_of
from tokenizers import Tokenizer, processors

from packhorse.data.formats.example import Example, Message

USER = "<user>{{ message['content'] }}<end>"
MARKED_USER = "<user>{% generation %}{{ message['content'] }}<end>{% endgeneration %}"
TINY_CHAT = (Message("user", "how are you"), Message("assistant", "fine"))
SAYS = (
    "{% for m in messages %}<t>{{ m.role }}:SAID<e>{% endfor %}{% if add_generation_prompt %}<t>assistant:{% endif %}"
)


def without_markers(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        pytest.param(None, ["has no chat template", "set data.template to alpaca"], id="none"),
        pytest.param(
            TEMPLATE.replace("<end>{% endgeneration %}", "{% endgeneration %}<end>"),
            ["turn 2 (assistant) is trained up to [UNK], and generation stops at <end>", "never stops", "of the probe"],
            id="stop token outside",
        ),
        pytest.param(
            "{% generation %}" + without_markers(TEMPLATE) + "{% endgeneration %}",
            ["2 assistant turns, and the template marks 1"],
            id="all inside",
        ),
        pytest.param(
            TEMPLATE.replace(USER, MARKED_USER),
            ["2 assistant turns, and the template marks 4"],
            id="user marked too",
        ),
        pytest.param(
            without_markers(TEMPLATE).replace(USER, MARKED_USER),
            ["the text of turn 1 (user) is trained on: 'first question of the probe'", "learn to write the prompt"],
            id="user marked instead",
        ),
        pytest.param(
            TEMPLATE.replace("{% if message['role'] == 'assistant' %}", "{% if loop.last %}"),
            ["2 assistant turns, and the template marks 1 as generated"],
            id="last turn only",
        ),
        pytest.param(
            "{{ raise_exception('never') }}{% generation %}{% endgeneration %}",
            ["cannot render", "never"],
            id="always raises",
        ),
        pytest.param("<pad><pad>" + TEMPLATE, ["begins with the start token twice"], id="doubled start"),
        pytest.param("{% for %}{% generation %}", ["cannot render"], id="syntax"),
        pytest.param(
            TEMPLATE.replace("{% generation %}", "{% generation %}{% generation %}").replace(
                "{% endgeneration %}", "{% endgeneration %}{% endgeneration %}"
            ),
            ["its generation markers are nested"],
            id="markers in markers",
        ),
        pytest.param(
            TEMPLATE.replace("{% if add_generation_prompt %}<bot>{% endif %}", ""),
            ["is trained after", "<bot>", "nothing would write the text between"],
            id="no generation prompt",
        ),
        pytest.param(
            TEMPLATE.replace("add_generation_prompt %}<bot>", "add_generation_prompt %}<bot>hi"),
            ["is trained after", "<bot>hi"],
            id="another generation prompt",
        ),
    ],
)
def test_templates_that_would_train_wrongly(tmp_path: Path, template: str | None, told: list[str]) -> None:
    folder = save_tiny_tokenizer(tmp_path / "bad", template, bos_token="<pad>")
    message = refusal(folder, chat_of(*TINY_CHAT))
    assert [words for words in told if words not in message] == [], message


@pytest.mark.parametrize(
    ("content", "row", "told"),
    [
        pytest.param(
            "{{ m.content | replace('kind', 'bad') }}",
            chat_of(*CHAT),
            "omits or rewrites the text of turn 1 (system): 'be kind'",
            id="rewrites",
        ),
        pytest.param(
            "{{ m.content | replace('hello', 'HELLO') }}",
            chat_of(*CHAT),
            "omits or rewrites the text of turn 3 (assistant): 'hello'",
            id="rewrites an answer",
        ),
        pytest.param(
            "{{ m.content if m.role != 'system' }}",
            chat_of(*CHAT),
            "omits or rewrites the text of turn 1 (system): 'be kind'",
            id="drops the system",
        ),
        pytest.param(
            "{{ m.content }}",
            chat_of(CHAT[1], Message("assistant", "hello", thinking="a greeting")),
            "omits or rewrites the thinking of turn 2: 'a greeting'",
            id="drops thinking",
        ),
        pytest.param(
            "{{ m.content }}",
            chat_of(CHAT[1], Message("assistant", "hello", tool_calls=({"function": {"name": "look"}},))),
            "omits or rewrites 'look' of a tool call in turn 2",
            id="drops tool calls",
        ),
        pytest.param(
            "{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}",
            chat_of(
                CHAT[1],
                Message("assistant", "", tool_calls=({"function": {"name": "look", "arguments": {"city": 1}}},)),
            ),
            "omits or rewrites 'city' of a tool call in turn 2",
            id="drops arguments",
        ),
        pytest.param(
            "{{ m.content }}",
            chat_of(*CHAT[1:3], tools=({"type": "function", "function": {"name": "look"}},)),
            "omits or rewrites the tool definition look",
            id="drops tools",
        ),
        pytest.param(
            "{{ m.content }}",
            chat_of(Message("user", "hi", name="Ana"), CHAT[2]),
            "omits the name of turn 1: 'Ana'",
            id="drops names",
        ),
    ],
)
@pytest.mark.parametrize("markers", [True, False], ids=["markers", "no markers"])
def test_rows_of_which_the_template_loses_something(
    tmp_path: Path, content: str, row: Example, told: str, markers: bool
) -> None:
    template = SAYS.replace("SAID", content)
    if markers:
        answer = "{% generation %}" + content + "<e>{% endgeneration %}"
        template = template.replace(
            content + "<e>", "{% if m.role == 'assistant' %}" + answer + "{% else %}" + content + "<e>{% endif %}"
        )
    folder = byte_tokenizer(tmp_path / "lossy", "<t>", "<e>", template=template)
    message = refusal(folder, row)
    assert message.startswith("rows.jsonl:7: ")
    assert told in message


def test_template_that_writes_the_answer_of_a_tool_as_json(tmp_path: Path) -> None:
    content = "{{ m.content | tojson if m.role == 'tool' else m.content }}"
    folder = byte_tokenizer(tmp_path / "json", "<t>", "<e>", template=SAYS.replace("SAID", content))
    chat = chat_of(CHAT[1], CHAT[2], Message("tool", 'says "31"\n'), CHAT[4])
    (row,) = render(folder, chat)
    assert pieces(loaded(folder, "tokenizer"), row) == [
        ("<t>user:hi<e><t>assistant:", 0),
        ("hello<e>", 1),
        ('<t>tool:"says \\"31\\"\\n"<e><t>assistant:', 0),
        ("fine<e>", 1),
    ]


def test_user_text_inside_the_markers_of_one_row_only(tmp_path: Path) -> None:
    """The probe cannot see what a template does with some rows."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{% if m.content != 'odd' %}<t>u:{{ m.content }}<e>{% endif %}{% else %}<t>a:"
        "{% generation %}{% if messages[0].content == 'odd' %}odd {% endif %}{{ m.content }}<e>{% endgeneration %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<t>a:{% endif %}"
    )
    folder = byte_tokenizer(tmp_path / "odd", "<t>", "<e>", template=template)
    assert len(render(folder, chat_of(*CHAT[1:3]))) == 1
    message = refusal(folder, chat_of(Message("user", "odd"), CHAT[2]))
    assert "rows.jsonl:7: the text of turn 1 (user) is trained on: 'odd'" in message


def test_answer_that_begins_inside_a_token(tmp_path: Path) -> None:
    """A colon and a line break are one token, so the line break of the answer is swallowed by its header."""
    folder = byte_tokenizer(tmp_path / "merged", "<t>", "<e>", template=SAYS.replace("SAID", "{{ m.content }}"))
    merge_colon_and_break(folder / "tokenizer.json")
    assert len(render(folder, chat_of(*CHAT))) == 1
    message = refusal(folder, chat_of(CHAT[1], Message("assistant", "\nhello")))
    assert "rows.jsonl:7: turn 2 begins inside a token: " in message
    assert "assistant:\\nhello" in message
    assert "set data.strip: true, which removes white space around turns" in message


def merge_colon_and_break(file: Path) -> None:
    settings = json.loads(file.read_text())
    settings["pre_tokenizer"]["use_regex"] = False
    settings["model"]["vocab"][":Ċ"] = 1000
    settings["model"]["merges"] = [[":", "Ċ"]]
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("messages", "train_on", "told"),
    [
        pytest.param(
            [CHAT[1], Message("assistant", "x", trained=False)], {}, "role assistant: 1, of which", id="all context"
        ),
        pytest.param([CHAT[1]], {}, "role assistant: 0, of which", id="no answer"),
        pytest.param(
            [*CHAT[:4], Message("assistant", "x", trained=False)],
            {"turns": "last"},
            "the last turn",
            id="last is context",
        ),
        pytest.param(CHAT[1:3], {"roles": ["tool"]}, "role tool: 0, of which", id="another role"),
    ],
)
def test_row_with_no_supervised_token(
    tmp_path: Path, messages: list[Message], train_on: dict[str, object], told: str
) -> None:
    folder = byte_tokenizer(tmp_path / "chatml", "<|im_start|>", "<|im_end|>")
    message = refusal(folder, chat_of(*messages), template="chatml", train_on=train_on)
    assert "rows.jsonl:7: the row has no supervised token: " in message
    assert told in message
    assert "'user: hi" in message or "system: be kind" in message


def test_turn_in_which_nothing_is_said_is_not_trained_by_its_header(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "chatml", "<|im_start|>", "<|im_end|>")
    chat = chat_of(Message("user", " "), CHAT[2])
    message = refusal(folder, chat, template="chatml", train_on={"roles": ["user"]})
    assert message.startswith("rows.jsonl:7: the row has no supervised token: '<|im_start|>user")


@pytest.mark.parametrize("row", [text_of("<s>hi"), chat_of(Message("user", "<s>hi"), CHAT[2])], ids=["text", "chat"])
def test_start_token_twice(tmp_path: Path, row: Example) -> None:
    template = "{{ '<s>' if messages[0].content != '<s>hi' else '<s>' }}{% for m in messages %}{{ m.content }}"
    template += "{% if m.role == 'assistant' %}<e>{% endif %}{% endfor %}"
    folder = byte_tokenizer(tmp_path / "starts", "<s>", "<e>", template=template, bos_token="<s>", add_bos_token=True)
    if row.text is not None:
        add_start_by_itself(folder / "tokenizer.json")
    assert "rows.jsonl:7: the row begins with the start token twice" in refusal(folder, row, control_tokens="keep")


def add_start_by_itself(file: Path) -> None:
    tokenizer = Tokenizer.from_file(str(file))
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer.save(str(file))
