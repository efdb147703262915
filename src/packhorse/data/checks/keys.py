"""Hash rows, prompts and answers, 128 bits each, to find equal ones and contradictions.

Equal means equal character by character, white space and case included, but for the keys of normalised text. A row's
other fields, and which of its turns are trained on, are not part of its content.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from packhorse.data.checks.texts import answer_start, answer_text, as_json, call_text, prompt_text
from packhorse.data.formats.example import Example, Message

Keys = NDArray[np.uint64]
"""uint64 [rows, 2]: one 128-bit hash per row."""

# Signs that calculate, compare or are code stay: 3 - 2 is another question than 3 + 2, and .5 another number than 5.
_PUNCTUATION: Final = re.compile(r"[.,:](?!\d)|[;!?…'’‘´`\"“”«»„¿¡()。，、！？；：–—]|(?<=[^\W\d_])-(?=[^\W\d_])")


def content_keys(examples: Sequence[Example]) -> Keys:
    """Return uint64 [rows, 2], a hash of roles, contents, thinking, calls, tools, rejected answer and verdict."""
    return _hashed([_content(example) for example in examples])


def prompt_keys(examples: Sequence[Example]) -> Keys:
    """Return uint64 [rows, 2], a hash of the question that each row's answer (`answer_keys`) belongs to.

    For a chat, the question is all text before the last assistant turn. The answer of a preference pair is which of its
    two texts is better, and of a KTO row whether the text is good; the texts belong to the question. Plain text has no
    question: the hash is that of the text.
    """
    return _hashed([_prompt(example) for example in examples])


def answer_keys(examples: Sequence[Example]) -> Keys:
    """Return uint64 [rows, 2], a hash of the last assistant turn and what follows it, or of the verdict."""
    return _hashed([_answer(example) for example in examples])


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation, with single spaces."""
    return " ".join(_PUNCTUATION.sub(" ", unicodedata.normalize("NFC", text).casefold()).split())


def normalised_prompt_keys(examples: Sequence[Example]) -> Keys:
    """Return uint64 [rows, 2], a hash of each row's normalised prompt without system turns; `NO_PROMPT` if empty."""
    return _hashed([normalised(prompt_text(example)) for example in examples])


def normalised_answer_keys(examples: Sequence[Example]) -> Keys:
    """Return uint64 [rows, 2], a hash of each row's normalised last answer and what follows it."""
    return _hashed([normalised(answer_text(example)) for example in examples])


def distinct_rows(keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Sort rows by key.

    Returns:
        int64 [rows], row numbers in the order of the keys, with equal keys in the order of the rows; and bool [rows],
        whether that row is the first with its key.
    """
    by_key = np.lexsort((keys[:, 1], keys[:, 0]))
    is_first = np.zeros(len(keys), np.bool_)
    is_first[:1] = True
    # One half at a time: with ten million rows every temporary column counts.
    for half in keys.T:
        ordered = half[by_key]
        is_first[1:] |= ordered[1:] != ordered[:-1]
    return by_key, is_first


def contradictions(prompts: Keys, answers: Keys) -> NDArray[np.bool_]:
    """Return bool [rows]: whether another row has the same prompt and another answer.

    Nothing is normalised: an answer that differs by a space counts; so does a second good answer to an open question.

    Args:
        prompts: uint64 [rows, 2] of `prompt_keys`.
        answers: uint64 [rows, 2] of `answer_keys`.
    """
    by_prompt, is_first = distinct_rows(prompts)
    group = np.cumsum(is_first) - 1
    ordered = answers[by_prompt]
    differs = (ordered != ordered[is_first][group]).any(axis=1)
    contradicted = np.zeros(len(prompts), np.bool_)
    contradicted[by_prompt] = (np.bincount(group, differs, len(prompts)) > 0)[group]
    return contradicted


def _hashed(contents: list[str]) -> Keys:
    blake2b = hashlib.blake2b
    digests = [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in contents]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64, copy=False).reshape(-1, 2)


NO_PROMPT: Final = _hashed([""])[0]
"""Key of a row without a prompt, uint64 [2]."""


def _content(example: Example) -> str:
    if example.messages is None:
        return f"text {example.text}"
    content = _turns(example.messages)
    if example.tools or example.rejected is not None or example.desirable is not None:
        content += _rare_parts(example)
    return content


def _rare_parts(example: Example) -> str:
    content = _tools(example)
    if example.rejected is not None:
        content += f"rejected {_turns(example.rejected)}"
    return content if example.desirable is None else f"{content}desirable {example.desirable}"


def _turns(turns: Sequence[Message]) -> str:
    return _turn(turns[0]) if len(turns) == 1 else "".join([_turn(turn) for turn in turns])


def _turn(turn: Message) -> str:
    # The length before each text makes the whole unambiguous, whatever the texts contain.
    content = f"{turn.role} {len(turn.content)} {turn.content}"
    if not turn.thinking and not turn.tool_calls and turn.name is None:
        return content
    thinking = turn.thinking or ""
    return f"{content} thinking {len(thinking)} {thinking} calls {call_text(turn)} name {turn.name}"


def _tools(example: Example) -> str:
    return f"tools {as_json(example.tools)} " if example.tools else ""


def _prompt(example: Example) -> str:
    turns = example.messages
    if turns is None:
        return f"text {example.text}"
    start = answer_start(turns)
    tools = _tools(example)
    if example.rejected is not None:
        both = sorted((_turns(turns[start:]), _turns(example.rejected)))
        return f"{tools}{_turns(turns[:start])}which {both[0]}{both[1]}"
    if example.desirable is not None:
        return f"{tools}{_turns(turns)}verdict"
    return tools + _turns(turns[:start])


def _answer(example: Example) -> str:
    turns = example.messages
    if turns is None:
        return "text"
    if example.desirable is not None and example.rejected is None:
        return f"verdict {example.desirable}"
    return _turns(turns[answer_start(turns) :])
