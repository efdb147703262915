"""Convert spans of characters to spans of tokens, and prove that a served prompt has the ids that training saw.

A special token cuts a text into parts that are tokenised separately. The tokens before an answer are therefore found by
counting special tokens and tokenising the text between the last one and the answer, which is nearly always the same few
words. This is exact, and needs neither the offsets of each token nor the prompt tokenised once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from packhorse.data.formats.bad_row import BadRowError, excerpt
from packhorse.data.render.spans import TurnSpan
from packhorse.data.render.turns import CLOSE_THINKING, OPEN_THINKING

MOST_REMEMBERED: Final = 64
TokenSpan = tuple[int, int]


class TokenMasker:
    """Converts spans to tokens for one tokenizer and one template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], written: str) -> None:
        """Find the landmarks: special tokens that are recognised wherever they are.

        Args:
            tokenizer: Tokenizer of the rows.
            stop_ids: Tokens at which generation stops.
            written: A chat written by the template, with the special tokens that can be landmarks.
        """
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._stop_ids = stop_ids
        self._landmarks = _isolating(self._backend, written)
        self._stops = tuple(token for token, number in self._landmarks.items() if number in stop_ids)
        self._remembered: dict[str, list[int]] = {}

    def mask(
        self, text: str, ids: list[int], spans: Sequence[TurnSpan], roles: Sequence[str], hide_thinking: bool
    ) -> NDArray[np.uint8]:
        """Return uint8 [length], 1 for the tokens of the spans.

        Args:
            text: Text of the chat.
            ids: Tokens of the chat.
            spans: Trained turns.
            roles: Role of each message.
            hide_thinking: Whether to leave `<think>…</think>` unsupervised.

        Raises:
            BadRowError: A span begins inside a token, its prompt alone has other ids, or it ends without a stop token.
        """
        supervised = np.zeros(len(ids), np.uint8)
        furthest = 0
        for span in spans:
            is_answer = roles[span.place] == "assistant"
            first = self._first(text, ids, span)
            last = self._last(text, ids, span, first, is_answer)
            supervised[first : last + 1] = 1
            furthest = max(furthest, last)
            if hide_thinking and is_answer:
                for start, end in thinking_spans(text, span):
                    hidden_first, hidden_last = self._by_offsets(text, start, end)
                    supervised[hidden_first : hidden_last + 1] = 0
        # Nothing predicts the first token. The mask is searched only if hidden thinking may have emptied it.
        if furthest == 0 or (hide_thinking and not supervised[1:].any()):
            raise _nothing_trained(text)
        return supervised

    def _first(self, text: str, ids: list[int], span: TurnSpan) -> int:
        """Return the first token of a span, with the proof that the prompt alone gives the ids before it."""
        at, before = -1, 0
        for token in self._landmarks:
            at = max(at, text.rfind(token, 0, span.start))
        if at >= 0:
            landmark = next(token for token in self._landmarks if text.startswith(token, at))
            before = _nth(ids, self._landmarks[landmark], text.count(landmark, 0, at) + 1)
        prompt_end = self._ids(text[max(at, 0) : span.start])
        first = before + len(prompt_end)
        if ids[before:first] != prompt_end or first >= len(ids):
            raise _inside_a_token(text, span)
        return first

    def _last(self, text: str, ids: list[int], span: TurnSpan, first: int, is_answer: bool) -> int:
        """Return the last token of a span; an answer must end in a stop token, apart from white space."""
        end = span.start + len(text[span.start : span.end].rstrip())
        stop = next((token for token in self._stops if text.endswith(token, span.start, end)), None)
        if stop is None:
            at_end = self._by_offsets(text, span.start, end)[1]
            if is_answer and ids[at_end] not in self._stop_ids:
                raise self._no_stop(text, span, ids[at_end])
        else:
            at_end = _nth(ids, self._landmarks[stop], text.count(stop, span.start, end), first)
        if end == span.end:
            return at_end
        if stop and (span.end == len(text) or any(text.startswith(token, span.end) for token in self._landmarks)):
            return at_end + len(self._ids(text[end - len(stop) : span.end])) - 1
        return self._by_offsets(text, span.start, span.end)[1]

    def _ids(self, text: str) -> list[int]:
        """Return the ids of a part that begins with a landmark or with the text; short parts are cached."""
        ids = self._remembered.get(text)
        if ids is None:
            ids = self._backend.encode(text, add_special_tokens=False).ids
            if len(text) <= MOST_REMEMBERED and len(self._remembered) < MOST_REMEMBERED:
                self._remembered[text] = ids
        return ids

    def _by_offsets(self, text: str, start: int, end: int) -> TokenSpan:
        """Return the first and last token of a span of characters; an empty span of tokens if it has none."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        tokens = (token for at in range(start, end) if (token := encoding.char_to_token(at)) is not None)
        first = next(tokens, None)
        if first is None:
            return 0, -1
        backwards = (token for at in range(end - 1, start - 1, -1) if (token := encoding.char_to_token(at)) is not None)
        return first, next(backwards, first)

    def _no_stop(self, text: str, span: TurnSpan, last_id: int) -> BadRowError:
        names = self._tokenizer.convert_ids_to_tokens
        stops = " or ".join(names(sorted(self._stop_ids)))
        return BadRowError(
            f"turn {span.place + 1} (assistant) is trained up to {names(last_id)}, and generation stops at {stops}: "
            f"{excerpt(text, span.end)}",
            "a model that does not learn its stop token never stops.",
            "end the generation block of the template with the stop token: "
            "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}.",
        )


def thinking_spans(text: str, span: TurnSpan) -> list[tuple[int, int]]:
    """Return the spans of thinking in an answer, marks included.

    Raises:
        BadRowError: The thinking begins and does not end.
    """
    spans: list[tuple[int, int]] = []
    at = span.start
    while True:
        start, end = text.find(OPEN_THINKING, at, span.end), text.find(CLOSE_THINKING, at, span.end)
        if start < 0 and end < 0:
            return spans
        if end < 0:
            raise _endless_thinking(text, span)
        begin = start if 0 <= start < end else at
        at = end + len(CLOSE_THINKING)
        # Some generation prompts open the thinking; the answer then begins inside it.
        if begin == start or not spans:
            spans.append((begin, at))


def _nth(ids: list[int], wanted: int, count: int, start: int = 0) -> int:
    """Return the index of the count-th such id from start on."""
    at = start - 1
    for _ in range(count):
        at = ids.index(wanted, at + 1)
    return at


def _isolating(backend: Tokenizer, written: str) -> dict[str, int]:
    """Return the special tokens in a text that are recognised wherever they are, whatever text is around them."""
    added = backend.get_added_tokens_decoder()
    contents = [token.content for token in added.values()]
    as_typed = backend.normalizer is None
    return {
        token.content: number
        for number, token in added.items()
        if token.content in written
        and not token.single_word
        and (as_typed or not token.normalized)
        and not any(_overlap(token.content, other) for other in contents if other != token.content)
    }


def _overlap(token: str, other: str) -> bool:
    """Return whether some text could be read as either token."""
    shorter = min(len(token), len(other))
    ends = any(token.endswith(other[:size]) or other.endswith(token[:size]) for size in range(1, shorter))
    return ends or token in other or other in token


def _inside_a_token(text: str, span: TurnSpan) -> BadRowError:
    return BadRowError(
        f"turn {span.place + 1} begins inside a token: {excerpt(text, span.start)}",
        "a served prompt ends before the turn and is cut into other tokens, which the model never saw.",
        "set data.strip: true, which removes white space around turns; or fix the template so that an answer begins "
        "after a special token, or that the white space before it is inside its generation markers.",
    )


def _nothing_trained(text: str) -> BadRowError:
    return BadRowError(
        f"the row has no supervised token: {excerpt(text)}",
        "it would teach nothing.",
        "mark a turn to be trained on, change data.train_on, or remove the row.",
    )


def _endless_thinking(text: str, span: TurnSpan) -> BadRowError:
    return BadRowError(
        f"the thinking of turn {span.place + 1} begins and does not end: {excerpt(text, span.start)}",
        "data.train_on.thinking is mask, and the start of the answer is unknown.",
        "write </think> at its end, or set data.train_on.thinking to keep.",
    )
