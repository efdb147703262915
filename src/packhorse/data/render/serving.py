"""Prove that serving sees what training saw: render rows with `apply_chat_template` of the saved tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from packhorse.data.formats.bad_row import excerpt
from packhorse.data.formats.example import Example
from packhorse.data.render.renderer import Rendered, Renderer
from packhorse.data.render.tokenizer import read_tokenizer
from packhorse.data.render.turns import Turn, template_tools, template_turns, trained_turns
from packhorse.errors import UserError


def saved_form(tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer after saving it with a model and loading it again."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return read_tokenizer(Path(folder), trust_remote_code)


def check_serving(
    renderer: Renderer,
    rows: Sequence[tuple[Example, Rendered]],
    served: PreTrainedTokenizerBase | None = None,
) -> None:
    """Prove that a served chat, and the prompt of each trained answer, has the ids that training saw.

    Args:
        renderer: Renderer of the rows.
        rows: A few rows with their tokens.
        served: Tokenizer that will be served, from `saved_form`; None for the one in memory.

    Raises:
        UserError: The first row that would be served differently.
    """
    tokenizer = renderer.tokenizer if served is None else served
    for example, row in rows:
        if example.messages is None:
            _check_text(renderer, tokenizer, example, row)
            continue
        turns = template_turns(example, renderer.train_on, renderer.control)
        tools = template_tools(example, renderer.control)
        whole = _served_ids(tokenizer, turns, tools, prompt=False)
        if whole != row.ids:
            raise _served_differently(tokenizer, example, row.ids, whole, "the chat")
        for place in trained_turns(example, renderer.train_on):
            # A chat may begin with the assistant's turn, which has no prompt to serve.
            if turns[place]["role"] != "assistant" or place == 0:
                continue
            prompt = _served_ids(tokenizer, turns[:place], tools, prompt=True)
            reached = renderer.train_on.thinking == "mask" or row.supervised[len(prompt) : len(prompt) + 1].all()
            if prompt != row.ids[: len(prompt)] or not reached:
                raise _served_differently(tokenizer, example, row.ids, prompt, f"the prompt of turn {place + 1}")


def _served_ids(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], tools: list[Turn] | None, prompt: bool
) -> list[int]:
    ids = tokenizer.apply_chat_template(
        turns,
        tools=tools,
        add_generation_prompt=prompt,
        tokenize=True,
        return_dict=False,
        tokenizer_kwargs={"verbose": False},  # a row may be longer than the model's context
    )
    return list(ids)


def _check_text(renderer: Renderer, tokenizer: PreTrainedTokenizerBase, example: Example, row: Rendered) -> None:
    ids = list(tokenizer(renderer.control.checked(example.text or "", "the text"), verbose=False)["input_ids"])
    if ids != row.ids[: len(ids)]:
        raise _served_differently(tokenizer, example, row.ids, ids, "the text")


def _served_differently(
    tokenizer: PreTrainedTokenizerBase, example: Example, trained: list[int], served: list[int], what: str
) -> UserError:
    pairs = enumerate(zip(trained, served))
    at = next((at for at, (here, there) in pairs if here != there), min(len(trained), len(served)))
    before = tokenizer.decode(trained[:at])
    here, there = (tokenizer.decode(ids[at : at + 8]) for ids in (trained, served))
    return UserError(
        f"{what} is served with other ids than it is trained with, from token {at} on, after "
        f"{excerpt(before, len(before))}: trained {here!r}, served {there!r}.",
        "in use, the model would see what it never saw in training.",
        "fix the template, so that its generation prompt is the text before an answer; or set data.template to "
        "another one.",
        example.where,
    )
