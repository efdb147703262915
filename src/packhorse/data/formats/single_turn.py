"""Formats with one prompt and one answer: Alpaca, prompt and completion, question and answer, text and label; text."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, shown
from packhorse.data.formats.chats import check_chat, empty_answer, is_blank, with_system
from packhorse.data.formats.content import other_fields, text_of
from packhorse.data.formats.detect import LABEL_KEYS
from packhorse.data.formats.example import Example, Message
from packhorse.data.formats.tools import NOTHING, TOOL_KEYS, tools_of
from packhorse.data.formats.turns import messages_of
from packhorse.data.read.row import Row

ALPACA_KEYS: Final = frozenset(("instruction", "input", "output", "system", "history", *TOOL_KEYS))
PROMPT_KEYS: Final = frozenset(("prompt", "completion", "system"))
QUESTION_KEYS: Final = frozenset(("question", "answer", "system"))
TEXT_KEYS: Final = frozenset(("text",))


def from_question_answer(row: Row) -> Example:
    """Return the example of a row with `question` and `answer`."""
    values = row.values
    question = Message("user", text_of(values["question"], "question"))
    answer = text_of(values["answer"], "answer")
    # The usual row has only these two keys.
    if len(values) > 2:
        return _pair(row, with_system(values, [question]), answer, QUESTION_KEYS)
    _refuse_blank(answer)
    return Example((question, Message("assistant", answer)), None, {}, row.where)


def from_alpaca(row: Row) -> Example:
    """Return the example of a row with `instruction` and `output`; `history` becomes earlier turns."""
    values = row.values
    messages = [*alpaca_prompt(values), Message("assistant", text_of(values["output"], "output"))]
    tools = tools_of(values)
    check_chat(messages, tools)
    return Example(tuple(messages), None, other_fields(values, ALPACA_KEYS), row.where, tools)


def alpaca_prompt(values: dict[str, Any]) -> list[Message]:
    """Return the system turn, earlier turns and the instruction, followed by its input after an empty line."""
    prompt = text_of(values["instruction"], "instruction")
    if values.get("input"):
        prompt = f"{prompt}\n\n{text_of(values['input'], 'input')}"
    return with_system(values, [*_history(values.get("history")), Message("user", prompt)])


def from_prompt_completion(row: Row) -> Example:
    """Return the example of a row with `prompt` and `completion`, each a text or a list of turns (as in TRL)."""
    values = row.values
    messages = [*prompt_turns(values), *answer_turns(values["completion"], "completion")]
    # Next to a text, `tools` is a plain field.
    tools = tools_of(values) if is_turns(values["prompt"]) else ()
    check_chat(messages, tools)
    fields = other_fields(values, PROMPT_KEYS.union(TOOL_KEYS) if tools else PROMPT_KEYS)
    return Example(tuple(messages), None, fields, row.where, tools)


def prompt_turns(values: dict[str, Any]) -> list[Message]:
    """Return the turns of `prompt`; those of a list are context, whatever their role."""
    prompt = values["prompt"]
    if is_turns(prompt):
        return with_system(values, [replace(turn, trained=False) for turn in messages_of(prompt, "prompt")])
    return with_system(values, [Message("user", text_of(prompt, "prompt"))])


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
    if isinstance(value, dict):
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
    example = _pair(row, [prompt], _label(values[key], key), TEXT_KEYS)
    example.fields.setdefault("label", values[key])
    return example


def from_text(row: Row) -> Example:
    """Return the example of a row with `text`; a list of texts is joined by empty lines."""
    value = row.values["text"]
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        text = "\n\n".join([text_of(part, "text") for part in value])
    else:
        text = text_of(value, "text")
    if is_blank(text):
        raise BadRowError("text is empty.", "there is nothing to train on.", "remove the row.")
    return Example(None, text, other_fields(row.values, TEXT_KEYS), row.where)


def _pair(row: Row, prompt: list[Message], answer: str, keys: Container[str]) -> Example:
    _refuse_blank(answer)
    return Example((*prompt, Message("assistant", answer)), None, other_fields(row.values, keys), row.where)


def _refuse_blank(answer: str) -> None:
    if is_blank(answer):
        raise empty_answer()


def _label(value: object, key: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (int, float)) else text_of(value, key)


def _history(given: object) -> list[Message]:
    if given in NOTHING:
        return []
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
