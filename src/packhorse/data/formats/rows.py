"""From rows in six formats to one `Example`; a row that cannot be meant as declared is a mistake, never a guess."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Literal

from packhorse.data.formats.example import Example, Message
from packhorse.data.reading.mistakes import RowMistakes
from packhorse.data.reading.sources import Row
from packhorse.errors import Mistake, UserError
from packhorse.recipe.schema import Format

RowFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text"]

KEYS_OF: Final[dict[RowFormat, tuple[str, ...]]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
OPTIONAL_KEYS: Final = ("input", "system", "tools", "history", "chosen", "rejected")
LABEL_KEYS: Final = ("label", "category", "class", "intent")
OPENAI_ROLES: Final = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
TOOL_ROLES: Final = ("tool", "function", "function_call", "observation", "tool_call", "tool_response")
NOTHING: Final[tuple[object, ...]] = (None, "", [], {}, "[]", "{}")  # some tools write JSON inside JSON
LATER: Final = {
    "tools": "tool definitions",
    "tool_calls": "tool calls",
    "function_call": "tool calls",
    "history": "an Alpaca history",
    "chosen": "preference pairs",
    "rejected": "preference pairs",
}


class _BadRowError(Exception):
    def __init__(self, fact: str, why: str, fix: str) -> None:
        super().__init__(fact)
        self.fact, self.why, self.fix = fact, why, fix


def detect_format(values: dict[str, Any]) -> RowFormat | None:
    """Return the format that a row's keys show; None where they show none that is known."""
    if "text" in values and any(key in values for key in LABEL_KEYS):
        return None
    return next((name for name, keys in KEYS_OF.items() if all(key in values for key in keys)), None)


def resolve_format(declared: Format, first: Row) -> RowFormat:
    """Return the declared format, or the one that the first row shows.

    Raises:
        UserError: The format is `auto` and the row shows none.
    """
    if declared != "auto":
        return declared
    found = detect_format(first.values)
    if found is None:
        raise UserError(
            f"the row has the keys {_names(first.values)}, which is no known format{_resembles(first.values)}.",
            "the keys say which part is the prompt and which the answer.",
            f"rename the keys to those of one format: {_known_formats()}.",
            first.where,
        )
    return found


def convert_rows(rows: Iterable[Row], row_format: RowFormat, mistakes: RowMistakes) -> Iterator[Example]:
    """Yield an example for each row that is as it should be, and collect what is wrong with the others."""
    convert = CONVERTERS[row_format]
    for row in rows:
        try:
            _refuse_other_format(row.values, row_format)
            example = convert(row)
            _check_example(example)
        except _BadRowError as error:
            mistakes.add(Mistake(error.fact, error.why, error.fix, row.where))
        else:
            yield example


def _refuse_other_format(values: dict[str, Any], row_format: RowFormat) -> None:
    missing = [key for key in KEYS_OF[row_format] if key not in values]
    if missing:
        other = detect_format(values)
        looks = f"it looks like {other}" if other else f"its keys are {_names(values)}{_resembles(values)}"
        raise _BadRowError(
            f"the row has no {' and no '.join(missing)}, so it is not {row_format}; {looks}.",
            f"rows of this source are read as {row_format}, by declaration or by its first row.",
            f"set the source's format to {other}, or mend the row." if other else f"mend the row: {_known_formats()}.",
        )
    for key, name in LATER.items():
        if values.get(key) not in NOTHING:
            raise _later(f"the row has {key} ({name})")
    if row_format == "messages" and isinstance(values.get("label"), bool):
        raise _later("the row has messages and a boolean label (KTO)")


def _later(fact: str) -> _BadRowError:
    return _BadRowError(
        f"{fact}, which cannot be trained on yet.",
        "left out of the text, it would change silently what the row teaches; it arrives in a later version.",
        "take these rows out, or rewrite them as plain user and assistant turns.",
    )


def _from_messages(row: Row) -> Example:
    turns = _turn_list(row.values["messages"], "messages")
    messages = tuple(_openai_message(turn, number) for number, turn in enumerate(turns, 1))
    return Example(messages, None, _other_fields(row, ("messages",)), row.where)


def _openai_message(turn: dict[str, Any], number: int) -> Message:
    for key, name in LATER.items():
        if turn.get(key) not in NOTHING:
            raise _later(f"turn {number} has {key} ({name})")
    role = _role(turn.get("role"), OPENAI_ROLES, number)
    content = _content(turn.get("content"), f"content of turn {number}")
    return Message(role, content, _trained(turn, role, number))


def _trained(turn: dict[str, Any], role: str, number: int) -> bool:
    weight = turn.get("loss_weight", turn.get("weight"))
    wanted = turn.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise _BadRowError(
            f"the loss weight of turn {number} is {weight!r}.",
            "a token is either trained on or not: the loss is a mean over supervised tokens.",
            "write 0 or 1.",
        )
    if wanted is not None and not isinstance(wanted, bool):
        raise _BadRowError(f"train of turn {number} is {wanted!r}.", "it is a yes or no.", "write true or false.")
    if role != "assistant":
        if wanted or weight:
            raise _BadRowError(
                f"turn {number} of the role {role} is marked to be trained on.",
                "only what the assistant says is learnt; the rest is what it answers to.",
                "remove the mark, or give the turn the role assistant.",
            )
        return False
    return wanted is not False and weight != 0


def _from_sharegpt(row: Row) -> Example:
    turns = _turn_list(row.values["conversations"], "conversations")
    messages = []
    if row.values.get("system"):
        messages.append(Message("system", _content(row.values["system"], "system"), trained=False))
    for number, turn in enumerate(turns, 1):
        role = _role(turn.get("from"), SHAREGPT_ROLES, number)
        messages.append(Message(role, _content(turn.get("value"), f"value of turn {number}"), role == "assistant"))
    return Example(tuple(messages), None, _other_fields(row, ("conversations", "system")), row.where)


def _from_alpaca(row: Row) -> Example:
    values = row.values
    prompt = _content(values["instruction"], "instruction")
    if values.get("input"):
        prompt = f"{prompt}\n\n{_content(values['input'], 'input')}"
    system = _content(values["system"], "system") if values.get("system") else None
    return _single_turn(row, prompt, "output", system, ("instruction", "input", "output", "system"))


def _from_prompt_completion(row: Row) -> Example:
    prompt = _content(row.values["prompt"], "prompt")
    return _single_turn(row, prompt, "completion", None, ("prompt", "completion"))


def _from_question_answer(row: Row) -> Example:
    question = _content(row.values["question"], "question")
    return _single_turn(row, question, "answer", None, ("question", "answer"))


def _single_turn(row: Row, prompt: str, answer: str, system: str | None, keys: tuple[str, ...]) -> Example:
    messages = [] if system is None else [Message("system", system, trained=False)]
    messages.append(Message("user", prompt, trained=False))
    messages.append(Message("assistant", _content(row.values[answer], answer)))
    return Example(tuple(messages), None, _other_fields(row, keys), row.where)


def _from_text(row: Row) -> Example:
    return Example(None, _content(row.values["text"], "text"), _other_fields(row, ("text",)), row.where)


CONVERTERS: Final[dict[RowFormat, Callable[[Row], Example]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "question_answer": _from_question_answer,
    "text": _from_text,
}


def _turn_list(turns: object, key: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        shown = "an empty list" if turns == [] else type(turns).__name__
        raise _BadRowError(
            f"{key} is {shown if not isinstance(turns, list) or not turns else 'a list with other things than turns'}.",
            "a chat is a list of turns.",
            f"write {key} as a list of objects, one a turn.",
        )
    return turns


def _role(given: object, roles: dict[str, str], number: int) -> str:
    if isinstance(given, str) and given in roles:
        return roles[given]
    if given in TOOL_ROLES:
        raise _later(f"turn {number} has the role {given} (tool use)")
    close = difflib.get_close_matches(given.lower(), roles, n=1) if isinstance(given, str) else []
    raise _BadRowError(
        f"turn {number} has the role {given!r}.",
        f"the roles are {', '.join(roles)}.",
        f"write {close[0]}." if close else "write one of these.",
    )


def _content(value: object, name: str) -> str:
    """Return text, or the joined texts of content parts."""
    if isinstance(value, list):
        return "".join(_part(part, name) for part in value)
    if not isinstance(value, str):
        raise _BadRowError(
            f"{name} is {'null' if value is None else type(value).__name__}, not text.",
            "only text becomes tokens.",
            "write it as text in double quotes.",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRowError(
            f"{name} has half a surrogate pair ({value[error.start]!a}) at character {error.start}.",
            "it is no character, and no tokenizer takes it.",
            "write the whole pair, or remove it.",
        ) from error
    return value


def _part(part: object, name: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if not isinstance(part, dict) or kind != "text":
        raise _BadRowError(f"{name} has a part of type {kind}.", "only text becomes tokens.", "leave text parts only.")
    return _content(part.get("text", part.get("value")), f"{name}, a text part,")


def _check_example(example: Example) -> None:
    if example.messages is None:
        if not (example.text or "").strip():
            raise _BadRowError("text is empty.", "there is nothing to learn.", "remove the row.")
        return
    answers = [message for message in example.messages if message.role == "assistant"]
    if not answers:
        raise _BadRowError(
            "the chat has no assistant turn.",
            "what the assistant says is what is learnt.",
            "add the answer, or remove the row.",
        )
    if not any(message.trained for message in answers):
        raise _BadRowError(
            "no assistant turn of the chat is trained on: each has loss weight 0 or train: false.",
            "the row would teach nothing.",
            "let one turn be trained on, or remove the row.",
        )
    if any(message.trained and not message.content.strip() for message in answers):
        raise _BadRowError(
            "the answer of an assistant turn is empty.",
            "the model would learn to say nothing.",
            "fill it in, mark the turn train: false, or remove the row.",
        )


def _other_fields(row: Row, keys: tuple[str, ...]) -> dict[str, str | int | float | bool]:
    return {
        key: value
        for key, value in row.values.items()
        if key not in keys and isinstance(value, str | int | float | bool)
    }


def _names(values: dict[str, Any]) -> str:
    return ", ".join(map(str, values)) or "none"


def _known_formats() -> str:
    return "; ".join(f"{name} ({', '.join(keys)})" for name, keys in KEYS_OF.items())


def _resembles(values: dict[str, Any]) -> str:
    if "text" in values and any(key in values for key in LABEL_KEYS):
        return " (text with a label is not a format yet: rewrite it as prompt and completion)"
    known = sorted({*OPTIONAL_KEYS, *(key for keys in KEYS_OF.values() for key in keys)})
    pairs = [(key, difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.75)) for key in values]
    near = [f"{key} is near {close[0]}" for key, close in pairs if close and close[0] != key]
    return f" ({'; '.join(near)})" if near else ""
