"""Hashes of what rows say, 128 bits each: whether two rows, two prompts or two answers are the same.

Nothing is normalised: equal means equal character by character, white space and case included. A row's other fields,
and which of its turns are trained on, are not part of what it says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from packhorse.data.checks.texts import answer_start, as_json, call_text
from packhorse.data.formats.example import Example, Message

Keys = NDArray[np.uint64]
"""uint64 [rows, 2]: a 128-bit hash a row."""


def content_keys(examples: Sequence[Example]) -> Keys:
    """Return uint64 [rows, 2]: a hash over roles, contents, thinking, calls, tools, rejected answer and verdict."""
    return _hashed([_content(example) for example in examples])


def prompt_keys(examples: Sequence[Example]) -> Keys:
    """Return uint64 [rows, 2]: a hash of what each row's answer, hashed by `answer_keys`, is an answer to.

    Of a chat, that is all before the last assistant turn. The answer of a preference pair is which of its two texts is
    better, of a KTO row whether the text is good; both texts, or the one, belong to the question. Plain text asks
    nothing: the hash is that of the text.
    """
    return _hashed([_prompt(example) for example in examples])


def answer_keys(examples: Sequence[Example]) -> Keys:
    """Return uint64 [rows, 2]: a hash of the last assistant turn and what follows it, or of the verdict."""
    return _hashed([_answer(example) for example in examples])


def distinct_rows(keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Sort rows by key.

    Returns:
        int64 [rows], row numbers in the order of the keys, equal ones in the order of the rows; and bool [rows],
        whether that row is the first with its key.
    """
    by_key = np.lexsort((keys[:, 1], keys[:, 0]))
    is_first = np.zeros(len(keys), np.bool_)
    is_first[:1] = True
    # One half after the other: at ten million rows every column counts.
    for half in keys.T:
        ordered = half[by_key]
        is_first[1:] |= ordered[1:] != ordered[:-1]
    return by_key, is_first


def _hashed(said: list[str]) -> Keys:
    blake2b = hashlib.blake2b
    digests = [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in said]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64, copy=False).reshape(-1, 2)


def _content(example: Example) -> str:
    if example.messages is None:
        return f"text {example.text}"
    said = _turns(example.messages)
    if example.tools or example.rejected is not None or example.desirable is not None:
        said += _beside(example)
    return said


def _beside(example: Example) -> str:
    said = _tools(example)
    if example.rejected is not None:
        said += f"rejected {_turns(example.rejected)}"
    return said if example.desirable is None else f"{said}desirable {example.desirable}"


def _turns(turns: Sequence[Message]) -> str:
    return _turn(turns[0]) if len(turns) == 1 else "".join([_turn(turn) for turn in turns])


def _turn(turn: Message) -> str:
    # The length before each text leaves one way to read the whole, whatever the texts contain.
    said = f"{turn.role} {len(turn.content)} {turn.content}"
    if not turn.thinking and not turn.tool_calls and turn.name is None:
        return said
    thinking = turn.thinking or ""
    return f"{said} thinking {len(thinking)} {thinking} calls {call_text(turn)} name {turn.name}"


def _tools(example: Example) -> str:
    return f"tools {as_json(example.tools)} " if example.tools else ""


def _prompt(example: Example) -> str:
    turns = example.messages
    if turns is None:
        return f"text {example.text}"
    border = answer_start(turns)
    tools = _tools(example)
    if example.rejected is not None:
        both = sorted((_turns(turns[border:]), _turns(example.rejected)))
        return f"{tools}{_turns(turns[:border])}which {both[0]}{both[1]}"
    if example.desirable is not None:
        return f"{tools}{_turns(turns)}verdict"
    return tools + _turns(turns[:border])


def _answer(example: Example) -> str:
    turns = example.messages
    if turns is None:
        return "text"
    if example.desirable is not None and example.rejected is None:
        return f"verdict {example.desirable}"
    return _turns(turns[answer_start(turns) :])
