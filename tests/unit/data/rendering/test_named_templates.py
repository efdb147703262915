"""Each named template against the published form of its chats, written out by hand with what is trained."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from rendering_cases import CHAT, byte_tokenizer, chat_of, pieces, refusal, render

from packhorse.data.formats.example import Message
from packhorse.data.render.render import load_tokenizer
from packhorse.errors import UserError

SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "qwen3": ["<think>", "</think>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<s>", "[INST]", "[/INST]", "</s>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "phi4": ["<|im_start|>", "<|im_sep|>", "<|im_end|>"],
    "alpaca": ["<s>", "</s>"],
}
BOS = {"llama3": "<|begin_of_text|>", "gemma": "<bos>", "mistral": "<s>", "alpaca": "<s>"}
# system, user, assistant, user, assistant
PUBLISHED = {
    "chatml": [
        (
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
            0,
        ),
        ("hello<|im_end|>", 1),
        ("\n<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n", 0),
        ("fine<|im_end|>", 1),
        ("\n", 0),
    ],
    "qwen3": [
        (
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
            0,
        ),
        ("<think>\n\n</think>\n\nhello<|im_end|>", 1),
        ("\n<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n", 0),
        ("<think>\n\n</think>\n\nfine<|im_end|>", 1),
        ("\n", 0),
    ],
    "llama3": [
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            0,
        ),
        ("hello<|eot_id|>", 1),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nhow are you<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            0,
        ),
        ("fine<|eot_id|>", 1),
    ],
    "gemma": [
        ("<bos><start_of_turn>user\nbe kind\n\nhi<end_of_turn>\n<start_of_turn>model\n", 0),
        ("hello<end_of_turn>", 1),
        ("\n<start_of_turn>user\nhow are you<end_of_turn>\n<start_of_turn>model\n", 0),
        ("fine<end_of_turn>", 1),
        ("\n", 0),
    ],
    "mistral": [
        ("<s>[INST] be kind\n\nhi[/INST]", 0),
        (" hello</s>", 1),
        ("[INST] how are you[/INST]", 0),
        (" fine</s>", 1),
    ],
    "phi3": [
        ("<|system|>\nbe kind<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n", 0),
        ("hello<|end|>", 1),
        ("\n<|user|>\nhow are you<|end|>\n<|assistant|>\n", 0),
        ("fine<|end|>", 1),
        ("\n", 0),
    ],
    "phi4": [
        (
            "<|im_start|>system<|im_sep|>be kind<|im_end|><|im_start|>user<|im_sep|>hi<|im_end|>"
            "<|im_start|>assistant<|im_sep|>",
            0,
        ),
        ("hello<|im_end|>", 1),
        ("<|im_start|>user<|im_sep|>how are you<|im_end|><|im_start|>assistant<|im_sep|>", 0),
        ("fine<|im_end|>", 1),
    ],
    "alpaca": [
        ("<s>be kind\n\n### Instruction:\nhi\n\n### Response:\n", 0),
        ("hello</s>", 1),
        ("\n\n### Instruction:\nhow are you\n\n### Response:\n", 0),
        ("fine</s>", 1),
    ],
}
TRL = Path(str(importlib.util.find_spec("trl").submodule_search_locations[0])) / "chat_templates"
# Copy of the published form -> our name for it, and what it writes behind the last turn, which is never trained.
COPIES = {
    TRL / "qwen2_5.jinja": ("chatml", ""),
    TRL / "qwen3_instruct_2507.jinja": ("chatml", ""),
    TRL / "qwen3.jinja": ("qwen3", ""),
    TRL / "llama3.jinja": ("llama3", ""),
    TRL / "gemma3.jinja": ("gemma", ""),
    TRL / "phi3_5.jinja": ("phi3", "<|endoftext|>"),
}
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
WITH_THINKING = Message("assistant", "hello", thinking="a greeting")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "León"}}}
TOOL_CHAT = chat_of(
    Message("user", "warm?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "31 °C"),
    Message("assistant", "yes"),
    tools=(TOOL,),
)
# The form of Hermes and Qwen.
TOOL_PIECES = [
    (
        "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}\n'
        "</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
        "<args-json-object>}\n</tool_call><|im_end|>\n<|im_start|>user\nwarm?<|im_end|>\n<|im_start|>assistant\n",
        0,
    ),
    ('<tool_call>\n{"name": "weather", "arguments": {"city": "León"}}\n</tool_call><|im_end|>', 1),
    (
        "\n<|im_start|>user\n<tool_response>\n31 °C\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        0,
    ),
    ("yes<|im_end|>", 1),
    ("\n", 0),
]


@pytest.fixture(params=list(PUBLISHED))
def named(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    name = request.param
    config = {"bos_token": BOS[name]} if name in BOS else {}
    # Gemma and Llama 3 come with another eos_token than the one that ends a turn.
    wrong_stop = {"gemma": "<eos>", "llama3": "<|end_of_text|>"}.get(name)
    return name, byte_tokenizer(
        tmp_path / name, *SPECIAL[name], **config, **({"eos_token": wrong_stop} if wrong_stop else {})
    )


def test_published_form_and_what_is_trained(named: tuple[str, Path]) -> None:
    name, folder = named
    (row,) = render(folder, chat_of(*CHAT), template=name)
    tokenizer = load_tokenizer(folder, name)
    assert pieces(tokenizer, row) == PUBLISHED[name]
    assert tokenizer.eos_token == SPECIAL[name][-1]


def test_same_ids_and_mask_as_apply_chat_template(named: tuple[str, Path]) -> None:
    name, folder = named
    tokenizer = load_tokenizer(folder, name)
    (row,) = render(folder, chat_of(*CHAT), template=name)
    expected = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in CHAT],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert row.ids == expected["input_ids"]
    assert row.supervised.tolist() == expected["assistant_masks"]


def test_prompt_that_is_served_ends_where_the_first_trained_token_stands(named: tuple[str, Path]) -> None:
    name, folder = named
    tokenizer = load_tokenizer(folder, name)
    prompt = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in CHAT[:2]],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt == PUBLISHED[name][0][0]


def test_thinking_stands_before_the_answer_and_is_trained(named: tuple[str, Path]) -> None:
    name, folder = named
    (row,) = render(folder, chat_of(CHAT[1], WITH_THINKING), template=name)
    trained = [text for text, supervised in pieces(load_tokenizer(folder, name), row) if supervised]
    assert [text.lstrip(" ") for text in trained] == [
        f"<think>\na greeting\n</think>\n\nhello{SPECIAL[name][-1]}",
    ]


@pytest.mark.parametrize("path", COPIES, ids=lambda path: path.stem)
def test_the_text_is_that_of_a_published_template(path: Path, tmp_path: Path) -> None:
    """trl carries copies of the templates that models are published with."""
    name, end = COPIES[path]
    folder = byte_tokenizer(tmp_path / name, *SPECIAL[name], "<|endoftext|>", bos_token=BOS.get(name, "<|endoftext|>"))
    tokenizer = load_tokenizer(folder, name)
    turns = [{"role": turn.role, "content": turn.content} for turn in CHAT]
    if name == "qwen3":
        turns = [*turns[:2], {"role": "assistant", "content": "hello", "reasoning_content": "a greeting"}]
    ours, theirs = (
        tokenizer.apply_chat_template(turns, tokenize=False, chat_template=form, eos_token="<|endoftext|>")
        for form in (tokenizer.chat_template, path.read_text(encoding="utf-8"))
    )
    assert ours + end == theirs


def test_tools_are_written_by_chatml_and_refused_by_the_others(named: tuple[str, Path]) -> None:
    name, folder = named
    if name in ("chatml", "qwen3"):
        (row,) = render(folder, TOOL_CHAT, template=name)
        opened = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
        expected = [(opened + text if supervised else text, supervised) for text, supervised in TOOL_PIECES]
        assert pieces(load_tokenizer(folder, name), row) == expected
        return
    message = refusal(folder, TOOL_CHAT, template=name)
    assert message.startswith("rows.jsonl:7: the chat template refuses the chat (roles: user, assistant, tool, ")
    assert f"the {name} template has no form for tools" in message
    message = refusal(folder, chat_of(*TOOL_CHAT.messages or ()), template=name)
    assert "tool" in message.splitlines()[0]


def test_chatml_writes_two_calls_and_two_answers_of_tools_as_qwen_does(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "chatml", *SPECIAL["chatml"])
    chat = chat_of(
        Message("system", "be brief"),
        Message("user", "warm?"),
        Message("assistant", "I look.", tool_calls=(CALL, CALL)),
        Message("tool", "31"),
        Message("tool", "12"),
        Message("assistant", "yes"),
        tools=(TOOL,),
    )
    (row,) = render(folder, chat, template="chatml")
    first, call, answers, *_ = pieces(load_tokenizer(folder, "chatml"), row)
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "León"}}\n</tool_call>'
    assert first[0].startswith("<|im_start|>system\nbe brief\n\n# Tools\n\n")
    assert call == (f"I look.\n{one}\n{one}<|im_end|>", 1)
    assert answers[0].startswith(
        "\n<|im_start|>user\n<tool_response>\n31\n</tool_response>\n<tool_response>\n12\n</tool_response><|im_end|>\n"
    )


def test_alpaca_without_a_system_turn_has_the_published_preamble(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "alpaca", "</s>")
    (row,) = render(folder, chat_of(*CHAT[1:3]), template="alpaca")
    assert pieces(load_tokenizer(folder, "alpaca"), row) == [
        (f"{PREAMBLE}\n\n### Instruction:\nhi\n\n### Response:\n", 0),
        ("hello</s>", 1),
    ]


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_turns_that_do_not_alternate_are_refused_where_the_published_form_refuses_them(
    tmp_path: Path, name: str
) -> None:
    folder = byte_tokenizer(tmp_path / name, *SPECIAL[name], bos_token=BOS[name])
    assert "by turns, and begins with a user" in refusal(folder, chat_of(CHAT[1], CHAT[1], CHAT[2]), template=name)


def test_a_tokenizer_without_the_marks_is_refused_and_told_what_fits(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "other", *SPECIAL["llama3"][:2])
    with pytest.raises(UserError, match="data.template is llama3") as caught:
        load_tokenizer(folder, "llama3")
    assert "no token <|start_header_id|> and no <|end_header_id|> and no <|eot_id|>" in str(caught.value)
    assert "fix: set data.template to alpaca" in str(caught.value)


def test_padding_with_the_stop_token_does_not_hide_it(named: tuple[str, Path]) -> None:
    name, folder = named
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", f'{{"pad_token": "{SPECIAL[name][-1]}", ', 1))
    (row,) = render(folder, chat_of(*CHAT), template=name)
    tokenizer = load_tokenizer(folder, name)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert pieces(tokenizer, row) == PUBLISHED[name]
