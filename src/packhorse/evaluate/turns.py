"""Rows as they were trained: with the thinking and the control tokens that `data.train_on` and others let through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from packhorse.data.formats.example import Example
from packhorse.data.formats.example import Message as Turn
from packhorse.data.render.control_tokens import ControlTokens
from packhorse.data.render.turns import template_tools, template_turns
from packhorse.evaluate.generate import Message, Tools
from packhorse.recipe.schema import DataSection, TrainOnSection

Form = Callable[[Mapping[str, Any]], tuple[list[Message], Tools]]
"""From a stored row to its turns and tools as the template takes them."""


def trained_form(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> Form:
    """Returns what makes of a stored row the turns and tools that training rendered.

    Args:
        tokenizer: Its special tokens are the control tokens.
        data: Of the recipe.
    """
    return partial(_formed, train_on=data.train_on, control=ControlTokens(tokenizer, data.control_tokens))


def _formed(row: Mapping[str, Any], train_on: TrainOnSection, control: ControlTokens) -> tuple[list[Message], Tools]:
    example = Example(
        messages=tuple(_turn(message) for message in row["messages"]),
        text=None,
        fields={},
        where=row["where"],
        tools=tuple(row.get("tools") or ()),
    )
    return template_turns(example, train_on, control), template_tools(example, control) or ()


def _turn(message: Mapping[str, Any]) -> Turn:
    return Turn(
        role=message["role"],
        content=message["content"],
        thinking=message.get("reasoning_content"),
        tool_calls=tuple(message.get("tool_calls") or ()),
        name=message.get("name"),
        call_id=message.get("tool_call_id"),
    )
