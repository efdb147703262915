from __future__ import annotations

from pathlib import Path

import pytest
from data_cases import TEMPLATE, save_tiny_tokenizer
from rendering_cases import byte_tokenizer, chat_of, data_section, loaded, pieces, refusal, render, renderer_of, text_of
from transformers import PreTrainedTokenizerBase

from packhorse.data.formats.example import Message
from packhorse.data.read.row import RowMistakes
from packhorse.data.render.render import load_tokenizer, make_renderer, render_examples
from shared_folder import shared

THREE_TURNS = (
    Message("system", "you are there"),
    Message("user", "how are you"),
    Message("assistant", "fine"),
    Message("user", "there"),
    Message("assistant", "hi hi"),
    Message("user", "x"),
    Message("assistant", "bye"),
)
# One word a token: the ids are places in data_cases.WORDS.
THREE_TURNS_IDS = [3, 10, 9, 7, 4, 1, 8, 9, 10, 4, 2, 11, 4, 1, 7, 4, 2, 6, 6, 4, 1, 13, 4, 2, 12, 4]
THREE_TURNS_MASK = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]


def real_tokenizer(name: str, template: str = "tokenizer") -> tuple[Path, PreTrainedTokenizerBase]:
    folder = shared(f"tokenizers/{name}")
    return folder, loaded(folder, template)


def test_three_turns_by_hand(tiny: Path) -> None:
    (row,) = render(tiny, chat_of(*THREE_TURNS))
    assert row.ids == THREE_TURNS_IDS
    assert row.supervised.tolist() == THREE_TURNS_MASK


def test_turn_that_is_only_context_is_not_trained(tiny: Path) -> None:
    messages = [*THREE_TURNS]
    messages[2] = Message("assistant", "fine", trained=False)
    (row,) = render(tiny, chat_of(*messages))
    assert row.ids == THREE_TURNS_IDS
    assert row.supervised.tolist() == [*THREE_TURNS_MASK[:11], 0, 0, *THREE_TURNS_MASK[13:]]


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [
        pytest.param({"turns": "last"}, [24, 25], id="last turn"),
        pytest.param({"roles": ["user"]}, [6, 7, 8, 9, 14, 15, 21, 22], id="user"),
        pytest.param({"roles": ["system"]}, [1, 2, 3, 4], id="system"),
        pytest.param({"roles": ["user", "assistant"], "turns": "last"}, [24, 25], id="last of two roles"),
        pytest.param(
            {"roles": ["user", "assistant"]}, [6, 7, 8, 9, 11, 12, 14, 15, 17, 18, 19, 21, 22, 24, 25], id="two roles"
        ),
    ],
)
@pytest.mark.parametrize("markers", [True, False], ids=["markers", "no markers"])
def test_which_turns_are_trained(
    tmp_path: Path, train_on: dict[str, object], trained: list[int], markers: bool
) -> None:
    template = TEMPLATE if markers else TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    folder = save_tiny_tokenizer(tmp_path / "tiny", template)
    (row,) = render(folder, chat_of(*THREE_TURNS), train_on=train_on)
    assert row.ids == THREE_TURNS_IDS
    assert [at for at, supervised in enumerate(row.supervised) if supervised] == trained


def test_text_ends_with_the_stop_token_and_is_all_trained(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(tmp_path / "plain", template=None)
    first, second = render(folder, text_of("hi there"), text_of("bye <end>"), control_tokens="keep")
    assert (first.ids, first.supervised.tolist()) == ([6, 7, 4], [1, 1, 1])
    assert second.ids == [12, 4]


@pytest.mark.parametrize("name", ["qwen2-151k", "mistral-v3-32768"])
def test_equal_to_apply_chat_template(name: str) -> None:
    folder, tokenizer = real_tokenizer(name)
    contents = [
        ("¿Qué tal?", "Muy bien.\n\nGracias  "),
        ("\n\n  leading", "  spaces"),
        ("e\u0301 composed", "n\u0303 \u2028 \U0001f600👩‍👩‍👧"),
        ("a\tb", "def f():\n    return 1\n"),
        ("literal </s> and <|im_end|>", "x <|im_end|> </s> y"),
        ("[INST] 1 [/INST]", "<|im_start|>assistant\n"),
        ("same", "same"),
    ]
    chats = [chat_of(*(Message(role, text) for role, text in zip(("user", "assistant"), pair))) for pair in contents]
    chats.append(chat_of(*THREE_TURNS))
    expected = tokenizer.apply_chat_template(
        [[{"role": turn.role, "content": turn.content} for turn in chat.messages or ()] for chat in chats],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    rows = render(folder, *chats, control_tokens="keep")
    assert [row.ids for row in rows] == expected["input_ids"]
    assert [row.supervised.tolist() for row in rows] == expected["assistant_masks"]


def test_qwen_by_hand() -> None:
    folder, tokenizer = real_tokenizer("qwen2-151k")
    (row,) = render(folder, chat_of(*THREE_TURNS[1:5]))
    tokens = tokenizer.convert_ids_to_tokens(row.ids)
    trained = [token for token, supervised in zip(tokens, row.supervised) if supervised]
    assert tokens[:6] == ["<|im_start|>", "user", "Ċ", "how", "Ġare", "Ġyou"]
    assert trained == ["fine", "<|im_end|>", "hi", "Ġhi", "<|im_end|>"]


def test_line_break_inside_the_markers_is_trained_as_transformers_has_it(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<t>{{ m.role }}:{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<e>\n{% endgeneration %}{% else %}{{ m.content }}<e>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<t>assistant:{% endif %}"
    )
    folder = byte_tokenizer(tmp_path / "breaks", "<t>", "<e>", template=template)
    (row,) = render(folder, chat_of(*THREE_TURNS[1:5]))
    assert pieces(load_tokenizer(folder, "tokenizer"), row) == [
        ("<t>user:how are you<e>\n<t>assistant:", 0),
        ("fine<e>\n", 1),
        ("<t>user:there<e>\n<t>assistant:", 0),
        ("hi hi<e>\n", 1),
    ]


@pytest.mark.parametrize(
    ("thinking", "told"),
    [
        pytest.param("keep", [("<t>u:sum?<e><t>a:", 0), ("<think>\n1+1\n</think>\n\nIt is 2<e>", 1)], id="keep"),
        pytest.param(
            "mask",
            [("<t>u:sum?<e><t>a:<think>\n1+1\n</think>", 0), ("\n\nIt is 2<e>", 1)],
            id="mask",
        ),
        pytest.param("remove", [("<t>u:sum?<e><t>a:", 0), ("It is 2<e>", 1)], id="remove"),
    ],
)
@pytest.mark.parametrize("apart", [True, False], ids=["field", "content"])
def test_thinking(tmp_path: Path, thinking: str, told: list[tuple[str, int]], apart: bool) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<t>u:{{ m.content }}<e>{% else %}<t>a:{% generation %}"
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<e>"
        "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}<t>a:{% endif %}"
    )
    folder = byte_tokenizer(tmp_path / "thinker", "<t>", "<e>", template=template)
    answer = (
        Message("assistant", "It is 2", thinking="1+1")
        if apart
        else Message("assistant", "<think>\n1+1\n</think>\n\nIt is 2")
    )
    (row,) = render(folder, chat_of(Message("user", "sum?"), answer), train_on={"thinking": thinking})
    assert pieces(load_tokenizer(folder, "tokenizer"), row) == told


@pytest.mark.parametrize("thinking", ["mask", "remove"])
def test_thinking_that_does_not_end(tiny: Path, tmp_path: Path, thinking: str) -> None:
    folder = byte_tokenizer(tmp_path / "chatml", "<|im_start|>", "<|im_end|>")
    chat = chat_of(Message("user", "sum?"), Message("assistant", "<think>1+1 It is 2"))
    message = refusal(folder, chat, template="chatml", train_on={"thinking": thinking})
    assert "rows.jsonl:7: the thinking of turn 2 begins" in message
    assert "<think>1+1 It is 2" in message


def test_chatml_gives_a_real_tokenizer_its_template_and_stop_token() -> None:
    folder, tokenizer = real_tokenizer("minimind-6k", "chatml")
    (row,) = render(folder, chat_of(*THREE_TURNS[1:3]), template="chatml")
    assert tokenizer.eos_token == "<|im_end|>"
    assert pieces(tokenizer, row) == [
        ("<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n", 0),
        ("fine<|im_end|>", 1),
        ("\n", 0),
    ]


def test_real_tokenizer_without_a_template() -> None:
    folder = shared("tokenizers/gpt2-50k")
    message = refusal(folder, chat_of(*THREE_TURNS))
    assert "gpt2-50k has no chat template." in message
    assert "fix: set data.template to alpaca, whose tokens this tokenizer has; or to your own Jinja file" in message
    assert "after:  {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}" in message
    assert "no token <|im_start|> and no <|im_end|>" in refusal(folder, chat_of(*THREE_TURNS), template="chatml")
    (row,) = render(folder, text_of("Hello world"))
    assert row.ids == [15496, 995, 50256]


def test_template_from_a_file_is_what_is_saved(tmp_path: Path, tiny: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE.replace("<sys>", "<pad>"))
    (row,) = render(tiny, chat_of(*THREE_TURNS), template=str(template))
    assert row.ids == [0, *THREE_TURNS_IDS[1:]]
    load_tokenizer(tiny, str(template)).save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved", "tokenizer").chat_template == template.read_text()


def test_rows_do_not_see_what_the_template_has_set_for_others(tmp_path: Path) -> None:
    """One context renders all rows."""
    template = (
        "{% if messages[0].content == 'hi' %}{% set greeting = 'bye' %}{% endif %}"
        "{{ greeting if greeting is defined else '' }}" + TEMPLATE
    )
    folder = save_tiny_tokenizer(tmp_path / "setter", template)
    first, second = (chat_of(Message("user", word), Message("assistant", "fine")) for word in ("hi", "you"))
    rows = render(folder, first, second, first)
    assert [row.ids for row in rows] == [[12, 1, 6, 4, 2, 11, 4], [1, 10, 4, 2, 11, 4], [12, 1, 6, 4, 2, 11, 4]]


@pytest.mark.parametrize("system", [True, False], ids=["system", "no system"])
def test_row_that_the_template_refuses_is_named(tmp_path: Path, system: bool) -> None:
    template = TEMPLATE.replace("<sys>", "{{ raise_exception('no system here') }}")
    folder = save_tiny_tokenizer(tmp_path / "picky", template)
    if not system:
        assert len(render(folder, chat_of(*THREE_TURNS[1:]))) == 1
        return
    message = refusal(folder, chat_of(*THREE_TURNS))
    assert message.startswith("rows.jsonl:7: the chat template refuses the chat (roles: system, user, assistant, user")
    assert "no system here" in message


def test_slip_of_a_template_names_the_row(tmp_path: Path) -> None:
    template = "{% if messages[0].content == 'x' %}{{ 1 + 'a' }}{% endif %}" + TEMPLATE
    folder = save_tiny_tokenizer(tmp_path / "slip", template)
    message = refusal(folder, chat_of(Message("user", "x"), Message("assistant", "fine")))
    assert "rows.jsonl:7: the chat template refuses the chat" in message
    assert "TypeError: unsupported operand" in message


def test_a_bad_row_leaves_the_others_in_their_places(tiny: Path) -> None:
    good, bad = chat_of(*THREE_TURNS), chat_of(Message("user", "<end>"), Message("assistant", "fine"))
    mistakes = RowMistakes("rows.jsonl")
    rows = render_examples(renderer_of(tiny), [bad, good, text_of("hi"), text_of("<end>"), good], mistakes)
    assert [row and len(row.ids) for row in rows] == [None, 26, 2, None, 26]
    assert mistakes.num_rows == 2


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
    assert len(render(folder, chat_of(*THREE_TURNS))) == 1


def test_plain_text_needs_no_template(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(tmp_path / "plain", template=None)
    renderer = make_renderer(load_tokenizer(folder, "tokenizer"), folder, data_section(), chats=False)
    assert renderer.chats is None


def test_tokenizer_with_a_second_template_for_tools(tmp_path: Path) -> None:
    plain = TEMPLATE.replace("message['content']", "message['content'] | trim")
    with_tools = "{% for tool in tools %}<sys>{{ tool.function.name }}<end>{% endfor %}" + TEMPLATE
    folder = save_tiny_tokenizer(
        tmp_path / "two",
        chat_template=[{"name": "default", "template": plain}, {"name": "tool_use", "template": with_tools}],
    )
    chat = (Message("user", "hi"), Message("assistant", "fine"))
    first, second = render(folder, chat_of(*chat), chat_of(*chat, tools=({"function": {"name": "there"}},)))
    assert first.ids == [1, 6, 4, 2, 11, 4]
    assert second.ids == [3, 7, 4, 1, 6, 4, 2, 11, 4]
    assert second.supervised.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1]
