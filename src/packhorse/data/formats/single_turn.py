"""Formats with one prompt and one answer: Alpaca, prompt and completion, question and answer, text and label; text."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, shown
from packhorse.data.formats.chats import chat_example, empty_answer, is_blank, with_system
from packhorse.data.formats.content import one_of, optional_text, other_fields, text_of
from packhorse.data.formats.detect import CONTEXT_KEYS, LABEL_KEYS, NAMES_OF, SYSTEM_KEYS
from packhorse.data.formats.example import Example, Message
from packhorse.data.formats.tools import TOOL_KEYS
from packhorse.data.formats.turns import context_of, messages_of
from packhorse.data.read.row import Row

PROMPT_PARTS: Final = (*SYSTEM_KEYS, "history", *CONTEXT_KEYS, *TOOL_KEYS)
ALPACA_KEYS: Final = frozenset(("instruction", *NAMES_OF["output"], *PROMPT_PARTS))
PROMPT_KEYS: Final = frozenset(("prompt", *NAMES_OF["completion"], *PROMPT_PARTS))
PROMPT_TURNS_KEYS: Final = PROMPT_KEYS - {"history", *CONTEXT_KEYS}
QUESTION_KEYS: Final = frozenset(("question", *NAMES_OF["answer"], *PROMPT_PARTS))
ONE_ANSWER_KEYS: Final = QUESTION_KEYS - {"answers"}
TEXT_KEYS: Final = frozenset(("text",))


def from_question_answer(row: Row) -> Example:
    """Return the example of a row with `question` and `answer`, `response` or `answers` (the first of them)."""
    values = row.values
    # The usual row has only these two keys.
    if len(values) == 2 and "answer" in values:
        answer = text_of(values["answer"], "answer")
        if is_blank(answer):
            raise empty_answer()
        question = Message("user", text_of(values["question"], "question"))
        return Example((question, Message("assistant", answer)), None, {}, row.where, used=QUESTION_KEYS)
    key = one_of(values, ("answer", "response")) or _empty(values, "answer")
    # Next to an answer, `answers` are further accepted ones.
    is_listed = key == "answers"
    answer, unused = _first_answer(values[key]) if is_listed else (text_of(values[key], key), ())
    messages = [*text_prompt(values, "question"), Message("assistant", answer)]
    example = chat_example(row, messages, QUESTION_KEYS if is_listed else ONE_ANSWER_KEYS)
    return replace(example, unused=unused) if unused else example


def from_alpaca(row: Row) -> Example:
    """Return the example of a row with `instruction` and `output` or `response`; `history` becomes earlier turns."""
    values = row.values
    key = one_of(values, NAMES_OF["output"]) or _empty(values, "output")
    messages = [*text_prompt(values, "instruction"), Message("assistant", text_of(values[key], key))]
    return chat_example(row, messages, ALPACA_KEYS)


def from_prompt_completion(row: Row) -> Example:
    """Return the example of a row with `prompt` and `completion`, each a text or a list of turns (as in TRL)."""
    values = row.values
    key = one_of(values, NAMES_OF["completion"]) or _empty(values, "completion")
    messages = [*prompt_turns(values), *answer_turns(values[key], key)]
    return chat_example(row, messages, PROMPT_TURNS_KEYS if is_turns(values["prompt"]) else PROMPT_KEYS)


def prompt_turns(values: dict[str, Any]) -> list[Message]:
    """Return the system turn and the turns of `prompt`; those of a list are context, whatever their role."""
    prompt = values["prompt"]
    return with_system(values, context_of(prompt, "prompt")) if is_turns(prompt) else text_prompt(values, "prompt")


def text_prompt(values: dict[str, Any], key: str) -> list[Message]:
    """Return the system turn, earlier turns, and a prompt followed by `input` and `context` after empty lines."""
    parts = [text_of(values[key], key)]
    parts += [text for name in CONTEXT_KEYS if (text := optional_text(values, name)) is not None]
    return with_system(values, [*_history(values.get("history")), Message("user", "\n\n".join(parts))])


def answer_turns(value: object, key: str) -> list[Message]:
    """Return an answer given as a text, a turn or a list of turns.

    Raises:
        BadRowError: The value is not one of these, or does not begin and end with the assistant.
    """
    turns = turns_of(value, key)
    check_speaker(turns, key)
    return turns


def turns_of(value: object, key: str) -> list[Message]:
    """Return the turns of a text (as the assistant's), of one turn, or of a list of turns."""
    if isinstance(value, dict) and value:
        return messages_of([value], key)
    return messages_of(value, key) if is_turns(value) else [Message("assistant", text_of(value, key))]


def check_speaker(turns: list[Message], key: str) -> None:
    """Raise BadRowError for an answer that does not begin and end with the assistant."""
    for word, turn in (("begins", turns[0]), ("ends", turns[-1])):
        if turn.role != "assistant":
            raise BadRowError(
                f"{key} {word} with a turn of the role {turn.role}.",
                "it is what the assistant answers.",
                "move other turns into the prompt, so that its first and last turn are the assistant's.",
            )


def is_turns(value: object) -> bool:
    """Return whether a value is a list of turns, not of content parts."""
    return isinstance(value, list) and any(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value
    )


def from_text_label(row: Row) -> Example:
    """Return the example of a row with `text` and a label: the user's turn is the text, the assistant's the label.

    The label stays in the fields as `label`, and under its own name, for `data.split.stratify`.
    """
    values = row.values
    key = next(key for key in LABEL_KEYS if key in values)
    prompt = Message("user", text_of(values["text"], "text"))
    messages = with_system(values, [prompt, Message("assistant", _label(values[key], key))])
    read = frozenset(("text", *SYSTEM_KEYS))
    if is_blank(messages[-1].content):
        raise empty_answer()
    fields = other_fields(values, read)
    fields.setdefault("label", values[key])
    return Example(tuple(messages), None, fields, row.where, used=read | {key})


def from_text(row: Row) -> Example:
    """Return the example of a row with `text`; a list of texts is joined by empty lines."""
    value = row.values["text"]
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        text = "\n\n".join([text_of(part, "text") for part in value])
    else:
        text = text_of(value, "text")
    if is_blank(text):
        raise BadRowError("text is empty.", "there is nothing to train on.", "remove the row.")
    return Example(None, text, other_fields(row.values, TEXT_KEYS), row.where, used=TEXT_KEYS)


def _empty(values: dict[str, Any], key: str) -> str:
    """Return the name under which a row has a key that is empty, or that is a list of answers."""
    present = [name for name in NAMES_OF[key] if name in values]
    return next((name for name in present if values[name] is not None), present[0])


def _first_answer(given: object) -> tuple[str, tuple[str, ...]]:
    """Return the first of several accepted answers (SQuAD), and the parts of `answers` that are not read."""
    listed, unused = given, []
    if isinstance(given, dict) and isinstance(given.get("text"), list):
        listed = given["text"]
        unused = [f"answers.{key}" for key in given if key != "text"]
    elif isinstance(given, list) and all(isinstance(one, dict) for one in given):
        listed = [one.get("text") for one in given]
        unused = list(dict.fromkeys(f"answers.*.{key}" for one in given for key in one if key != "text"))
    if not isinstance(listed, list) or not listed:
        what = "no answer" if isinstance(listed, list) else type(given).__name__
        raise BadRowError(
            f"answers is {what}, not a list of texts.",
            "the first of them is trained on.",
            'write it as {"text": ["…"]} or ["…"], or remove a question without an answer.',
        )
    if any(other != listed[0] for other in listed[1:]):
        unused.append("answers after the first")
    return text_of(listed[0], "the first of answers"), tuple(unused)


def _label(value: object, key: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRowError(
            f"{key} is {value}.",
            "NaN in a column of numbers means that the label is missing.",
            "add the label, or remove the row.",
        )
    return str(value) if isinstance(value, (int, float)) else text_of(value, key)


def _history(given: object) -> list[Message]:
    if given in (None, "", [], "[]"):
        return []
    if is_turns(given):
        return messages_of(given, "history")
    if not isinstance(given, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in given):
        raise BadRowError(
            f"history is {shown(given)}, not a list of pairs." if not isinstance(given, list) else
            "history has an element that is not a pair.",
            "each earlier turn has a prompt and an answer.",
            'write it as [["prompt", "answer"], …], or null.',
        )  # fmt: skip
    turns = []
    for number, (prompt, answer) in enumerate(given, 1):
        turns.append(Message("user", text_of(prompt, f"the prompt of pair {number} of history")))
        turns.append(Message("assistant", text_of(answer, f"the answer of pair {number} of history")))
    return turns
