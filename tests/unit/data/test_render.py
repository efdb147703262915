from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from data_cases import TEMPLATE, save_tiny_tokenizer, shared
from transformers import PreTrainedTokenizerBase

from packhorse.data.formats.rows import Example, Message
from packhorse.data.reading.mistakes import RowMistakes
from packhorse.data.rendering.render import Rendered, load_tokenizer, make_renderer, render_examples
from packhorse.errors import UserError

THREE_TURNS = (
    Message("system", "you are there", trained=False),
    Message("user", "how are you", trained=False),
    Message("assistant", "fine", trained=True),
    Message("user", "there", trained=False),
    Message("assistant", "hi hi", trained=True),
    Message("user", "x", trained=False),
    Message("assistant", "bye", trained=True),
)
# One letter a token: s system, u user, b bot, e end, and the words of WORDS; capitals are trained on.
THREE_TURNS_IDS = [3, 10, 9, 7, 4, 1, 8, 9, 10, 4, 2, 11, 4, 1, 7, 4, 2, 6, 6, 4, 1, 13, 4, 2, 12, 4]
THREE_TURNS_MASK = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]


@cache
def real_tokenizer(name: str, template: str = "tokenizer") -> tuple[Path, PreTrainedTokenizerBase]:
    folder = shared(f"tokenizers/{name}")
    return folder, load_tokenizer(folder, template)


def render(
    folder: Path, *examples: Example, template: str = "tokenizer", tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Rendered | None]:
    tokenizer = tokenizer or load_tokenizer(folder, template)
    renderer = make_renderer(tokenizer, folder, chats=any(example.messages for example in examples))
    mistakes = RowMistakes("rows.jsonl")
    rows = render_examples(renderer, examples, mistakes)
    mistakes.raise_if_any()
    return rows


def chat_of(*messages: Message) -> Example:
    return Example(messages, None, {}, "rows.jsonl:7")


def text_of(text: str) -> Example:
    return Example(None, text, {}, "rows.jsonl:7")


def refusal(folder: Path, *examples: Example, template: str = "tokenizer") -> str:
    with pytest.raises(UserError) as caught:
        render(folder, *examples, template=template)
    return str(caught.value)


def test_three_turns_by_hand(tiny: Path) -> None:
    (row,) = render(tiny, chat_of(*THREE_TURNS))
    assert row is not None
    assert row.ids == THREE_TURNS_IDS
    assert row.supervised.tolist() == THREE_TURNS_MASK


def test_turn_that_is_only_context_is_not_trained(tiny: Path) -> None:
    messages = [*THREE_TURNS]
    messages[2] = Message("assistant", "fine", trained=False)
    (row,) = render(tiny, chat_of(*messages))
    assert row is not None
    assert row.ids == THREE_TURNS_IDS
    assert row.supervised.tolist() == [*THREE_TURNS_MASK[:11], 0, 0, *THREE_TURNS_MASK[13:]]


def test_text_ends_with_the_stop_token_and_is_all_trained(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(tmp_path / "plain", template=None)
    first, second = render(folder, text_of("hi there"), text_of("bye <end>"))
    assert first is not None
    assert second is not None
    assert (first.ids, first.supervised.tolist()) == ([6, 7, 4], [1, 1, 1])
    assert second.ids == [12, 4]


@pytest.mark.parametrize("name", ["qwen2-151k", "mistral-v3-32768"])
def test_equal_to_apply_chat_template(name: str) -> None:
    folder, tokenizer = real_tokenizer(name)
    contents = [
        ("¿Qué tal?", "Muy bien.\n\nGracias  "),
        ("  leading", "\n\nlines"),
        ("e\u0301 composed", "n\u0303 \u2028 \U0001f600👩‍👩‍👧"),
        ("a\tb", "def f():\n    return 1\n"),
        ("literal </s> and <|im_end|>", "x"),
    ]
    chats = [
        chat_of(*(Message(role, text, role == "assistant") for role, text in zip(("user", "assistant"), pair)))
        for pair in contents
    ]
    chats.append(chat_of(*THREE_TURNS))
    expected = tokenizer.apply_chat_template(
        [[{"role": turn.role, "content": turn.content} for turn in chat.messages or ()] for chat in chats],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    rows = render(folder, *chats, tokenizer=tokenizer)
    assert [row and row.ids for row in rows] == expected["input_ids"]
    assert [row and row.supervised.tolist() for row in rows] == expected["assistant_masks"]


def test_qwen_by_hand() -> None:
    folder, tokenizer = real_tokenizer("qwen2-151k")
    chat = chat_of(Message("user", "hi"), Message("assistant", "fine"), *THREE_TURNS[3:5])
    (row,) = render(folder, chat, tokenizer=tokenizer)
    assert row is not None
    pieces = tokenizer.convert_ids_to_tokens(row.ids)
    trained = [piece for piece, supervised in zip(pieces, row.supervised) if supervised]
    assert "".join(pieces[:6]) == "<|im_start|>userĊhi<|im_end|>Ċ"
    assert trained == ["fine", "<|im_end|>", "hi", "Ġhi", "<|im_end|>"]


def test_real_template_without_markers_says_how_to_add_them() -> None:
    message = refusal(shared("tokenizers/minimind-6k"), chat_of(*THREE_TURNS))
    assert "minimind-6k has no {% generation %} markers." in message
    assert "before: {{ message['content'] + eos_token }}" in message
    assert "after:  {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}" in message
    assert "or set data.template: chatml" in message


def test_chatml_gives_a_real_tokenizer_its_template_and_stop_token() -> None:
    folder, tokenizer = real_tokenizer("minimind-6k", "chatml")
    (row,) = render(folder, chat_of(*THREE_TURNS[1:3]), tokenizer=tokenizer)
    assert row is not None
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(row.ids) == (
        "<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>\n"
    )
    trained = [token for token, supervised in zip(row.ids, row.supervised) if supervised]
    assert tokenizer.decode(trained) == "fine<|im_end|>"


def test_real_tokenizer_without_a_template() -> None:
    folder = shared("tokenizers/gpt2-50k")
    assert "gpt2-50k has no chat template." in refusal(folder, chat_of(*THREE_TURNS))
    assert "no token <|im_start|> and no <|im_end|>" in refusal(folder, chat_of(*THREE_TURNS), template="chatml")
    (row,) = render(folder, text_of("Hello world"))
    assert row is not None
    assert row.ids == [15496, 995, 50256]


def test_template_from_a_file_is_what_is_saved(tmp_path: Path, tiny: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE.replace("<sys>", "<pad>"))
    (row,) = render(tiny, chat_of(*THREE_TURNS), template=str(template))
    assert row is not None
    assert row.ids == [0, *THREE_TURNS_IDS[1:]]
    load_tokenizer(tiny, str(template)).save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved", "tokenizer").chat_template == template.read_text()


@pytest.mark.parametrize(
    ("template", "told"),
    [
        pytest.param(None, ["has no chat template", "set data.template to a Jinja file of your own"], id="none"),
        pytest.param(
            TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
            ["has no {% generation %} markers", "after:  {% generation %}"],
            id="no markers",
        ),
        pytest.param(
            TEMPLATE.replace("<end>{% endgeneration %}", "{% endgeneration %}<end>"),
            ["turn 1 is trained up to [UNK], and generation stops at <end>", "never stops"],
            id="stop token outside",
        ),
        pytest.param(
            "{% generation %}" + TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
            + "{% endgeneration %}",
            ["has the text of the system inside its generation markers"],
            id="all inside",
        ),
        pytest.param(
            TEMPLATE.replace("<user>", "<user>{% generation %}").replace("{% endif", "{% endgeneration %}{% endif"),
            ["has the text of the user inside its generation markers"],
            id="user inside",
        ),
        pytest.param(
            TEMPLATE.replace("{% if message['role'] == 'assistant' %}", "{% if loop.last %}"),
            ["2 assistant turns, and the template marks 1 as generated"],
            id="last turn only",
        ),
        pytest.param("{{ raise_exception('never') }}{% generation %}{% endgeneration %}", ["cannot render", "never"],
                     id="always raises"),
        pytest.param("<pad><pad>" + TEMPLATE, ["begins with <pad> twice"], id="doubled start"),
        pytest.param("{% for %}{% generation %}", ["cannot render"], id="syntax"),
    ],
)  # fmt: skip
def test_templates_that_would_train_wrongly(tmp_path: Path, template: str | None, told: list[str]) -> None:
    folder = save_tiny_tokenizer(tmp_path / "bad", template, bos_token="<pad>")
    message = refusal(folder, chat_of(*THREE_TURNS))
    assert all(words in message for words in told), message


@pytest.mark.parametrize("system", [True, False], ids=["system", "no system"])
def test_row_that_the_template_refuses_is_named(tmp_path: Path, system: bool) -> None:
    template = TEMPLATE.replace("<sys>", "{{ raise_exception('no system here') }}")
    folder = save_tiny_tokenizer(tmp_path / "picky", template)
    if not system:
        assert render(folder, chat_of(*THREE_TURNS[1:]))[0] is not None
        return
    message = refusal(folder, chat_of(*THREE_TURNS))
    assert message.startswith("rows.jsonl:7: the chat template refuses the chat (roles: system, user, assistant, user")
    assert "no system here" in message


def test_tokenizer_without_a_stop_token(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(tmp_path / "bad", eos_token=None)
    assert "has no eos_token" in refusal(folder, chat_of(*THREE_TURNS))


def test_broken_tokenizer_file(tiny: Path) -> None:
    (tiny / "tokenizer.json").write_text("{")
    assert f"the tokenizer in {tiny} cannot be loaded: " in refusal(tiny, chat_of(*THREE_TURNS))


def test_stop_tokens_of_the_generation_config_count(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(tmp_path / "two", eos_token="<pad>")
    assert "generation stops at <pad>" in refusal(folder, chat_of(*THREE_TURNS))
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 4]}')
    assert render(folder, chat_of(*THREE_TURNS))[0] is not None
