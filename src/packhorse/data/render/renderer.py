"""The proven tokenizer with its template, and rendered rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from packhorse.data.render.chat_template import ChatTemplate
from packhorse.data.render.control_tokens import ControlTokens
from packhorse.data.render.mask import TokenMasker
from packhorse.data.render.thinking import ThinkingMarks
from packhorse.recipe.schema import TrainOnSection


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row as tokens.

    Attributes:
        ids: Token ids [length]; of a preference pair, those of both documents, the chosen one first.
        supervised: uint8 [length], 1 where the token is trained on.
        cut: Number of tokens of a pair's first document, or of the prompt before an answer with a verdict; else 0.
    """

    ids: list[int]
    supervised: NDArray[np.uint8]
    cut: int = 0


@dataclass(frozen=True)
class ChatRenderer:
    """Parts of a renderer that only chats need.

    Attributes:
        template: Template for chats.
        tool_template: Template for chats with tools; the same object unless the tokenizer has two templates.
        masker: Converter from trained turns to tokens.
        thinking: What the template does with `<think>` and `</think>`.
    """

    template: ChatTemplate
    tool_template: ChatTemplate
    masker: TokenMasker
    thinking: ThinkingMarks


@dataclass(frozen=True)
class Renderer:
    """A proven tokenizer and its settings.

    Attributes:
        tokenizer: Fast tokenizer with the template set.
        start_id: Start token, or None.
        stop_id: Token that ends plain text.
        vocab_size: Highest id + 1.
        train_on: Selection of what is trained on in a chat.
        control: Handling of control tokens in rows.
        chats: Parts for chats; None if all rows are plain text.
    """

    tokenizer: PreTrainedTokenizerBase
    start_id: int | None
    stop_id: int
    vocab_size: int
    train_on: TrainOnSection
    control: ControlTokens
    chats: ChatRenderer | None
