"""A proven tokenizer with its template, and a row as it renders."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from packhorse.data.render.control_tokens import ControlTokens
from packhorse.data.render.draw import ChatTemplate
from packhorse.data.render.mask import TokenMasker
from packhorse.recipe.schema import TrainOnSection


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as tokens: ids [length], supervised uint8 [length], 1 where the token is trained on."""

    ids: list[int]
    supervised: NDArray[np.uint8]


@dataclass(frozen=True)
class ChatRenderer:
    """What only chats need.

    Attributes:
        template: Draws a chat.
        tool_template: Draws a chat with tools; the same one but for tokenizers that have two.
        masker: Finds the tokens of its turns.
    """

    template: ChatTemplate
    tool_template: ChatTemplate
    masker: TokenMasker


@dataclass(frozen=True)
class Renderer:
    """A tokenizer that has been proven, and what is known of it.

    Attributes:
        tokenizer: The fast tokenizer, with the template set.
        start_id: The start token, where there is one.
        stop_id: The token that ends plain text.
        vocab_size: Highest id + 1.
        train_on: Which part of a chat is trained on.
        control: What is done with control tokens in rows.
        chats: None where all rows are plain text.
    """

    tokenizer: PreTrainedTokenizerBase
    start_id: int | None
    stop_id: int
    vocab_size: int
    train_on: TrainOnSection
    control: ControlTokens
    chats: ChatRenderer | None
