"""Handle control tokens typed in a row's text: `</s>` in a question would end it for the model.

A tokenizer finds its special tokens in any text, so that text about a token becomes the token.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final, Literal

from transformers import PreTrainedTokenizerBase

from packhorse.data.formats.bad_row import BadRowError, excerpt

Action = Literal["raise", "escape", "keep"]
BEGINNING: Final = 2


class ControlTokens:
    """Special tokens of a tokenizer, and the action for rows that contain one.

    Attributes:
        tokens: Texts of the special tokens, sorted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, action: Action) -> None:
        self.action = action
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self.tokens = tuple(sorted(token for token in special if token))
        by_beginning: defaultdict[str, list[str]] = defaultdict(list)
        for token in self.tokens:
            by_beginning[token[:BEGINNING]].append(token)
        # Hundreds of tokens share a few beginnings, and most texts contain none of them.
        grouped: defaultdict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
        for beginning, tokens in by_beginning.items():
            grouped[beginning[0]].append((beginning, tuple(sorted(tokens, key=len, reverse=True))))
        self._by_first = tuple((first, tuple(groups)) for first, groups in grouped.items())

    def checked(self, text: str, what: str) -> str:
        """Return the text to render; under `escape`, with a space after the first character of each control token.

        Raises:
            BadRowError: The text has a control token, and the action is `raise`.
        """
        if self.action == "keep":
            return text
        for first, groups in self._by_first:
            if first not in text:
                continue
            for beginning, tokens in groups:
                if beginning in text:
                    text = self._without(text, beginning, tokens, what)
        return text

    def _without(self, text: str, beginning: str, tokens: tuple[str, ...], what: str) -> str:
        at = text.find(beginning)
        while at >= 0:
            if text.startswith(tokens, at):
                if self.action == "raise":
                    raise _control_token(text, at, next(token for token in tokens if text.startswith(token, at)), what)
                text = f"{text[: at + 1]} {text[at + 1 :]}"
            at = text.find(beginning, at + 1)
        return text


def _control_token(text: str, at: int, token: str, what: str) -> BadRowError:
    return BadRowError(
        f"{what} has the control token {token} typed in its text: {excerpt(text, at)}",
        "the tokenizer turns it into the control id, so the model would see a turn begin or end there.",
        "remove it from the row; or set data.control_tokens to escape (a space breaks it up) or keep (it is intended).",
    )
