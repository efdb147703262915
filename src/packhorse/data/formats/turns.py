"""Convert one turn of a chat, in OpenAI's form (role, content) or ShareGPT's (from, value), to a `Message`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, closest, names, shown
from packhorse.data.formats.content import text_of
from packhorse.data.formats.example import Message
from packhorse.data.formats.tools import NOTHING, calls_of

CALL: Final = "call"  # a ShareGPT turn whose text is a call
ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": CALL,
    "tool_call": CALL,
}
THINKING_KEYS: Final = ("reasoning_content", "reasoning", "thinking")
WEIGHT_KEYS: Final = ("loss_weight", "weight")


def turn_list(turns: object, key: str) -> list[dict[str, Any]]:
    """Return a chat as its list of turns.

    Raises:
        BadRowError: The chat is not a list of objects, or is empty.
    """
    if isinstance(turns, list) and turns:
        for turn in turns:
            if not isinstance(turn, dict):
                break
        else:
            return turns
    what = "an empty list" if turns == [] else type(turns).__name__
    raise BadRowError(
        f"{key} is {'a list with other elements than turns' if isinstance(turns, list) and turns else what}.",
        "a chat is a list of turns.",
        f"write {key} as a list of objects, one per turn.",
    )


def messages_of(turns: object, key: str) -> list[Message]:
    """Return the messages of a list of turns in the field `key`.

    Raises:
        BadRowError: One of them is not a turn.
    """
    return [message_of(turn, number) for number, turn in enumerate(turn_list(turns, key), 1)]


def message_of(turn: dict[str, Any], number: int) -> Message:
    """Return the message of the `number`-th turn of a chat.

    Raises:
        BadRowError: Role, content, calls or marks are wrong.
    """
    given = turn["role"] if "role" in turn else turn.get("from")
    role = ROLES.get(given) if type(given) is str else None
    content = turn["content"] if "content" in turn else turn.get("value")
    # Most turns have only a role and a text.
    if role is not None and role is not CALL and len(turn) == 2 and type(content) is str and content.isascii():
        return Message(role, content)
    if role is None:
        raise _no_role(turn, given, number)
    return _whole_message(turn, role, content, number)


def _whole_message(turn: dict[str, Any], role: str, content: object, number: int) -> Message:
    calls: tuple[dict[str, Any], ...] = ()
    # ShareGPT writes a call as a separate turn; the assistant is the one who calls.
    if role is CALL:
        calls, role, content = calls_of(content, f"the call of turn {number}"), "assistant", ""
    for key in ("tool_calls", "function_call"):
        if turn.get(key) not in NOTHING:
            _only_for("assistant", role, key, number)
            calls += calls_of(turn[key], f"{key} of turn {number}")
    # OpenAI writes null next to calls.
    if content is None and calls:
        content = ""
    elif content is None and not {"content", "value"} & turn.keys():
        raise _no_content(turn, number)
    return Message(
        role,
        text_of(content, f"content of turn {number}"),
        _is_trained(turn, role, number),
        _thinking(turn, role, number),
        calls,
        _optional_text(turn, "name", number),
        _optional_text(turn, "tool_call_id", number) if role == "tool" else None,
    )


def _thinking(turn: dict[str, Any], role: str, number: int) -> str | None:
    for key in THINKING_KEYS:
        if turn.get(key) not in NOTHING:
            _only_for("assistant", role, key, number)
            return text_of(turn[key], f"{key} of turn {number}")
    return None


def _optional_text(turn: dict[str, Any], key: str, number: int) -> str | None:
    value = turn.get(key)
    return None if value is None or value == "" else text_of(value, f"{key} of turn {number}")


def _only_for(wanted: str, role: str, key: str, number: int) -> None:
    if role != wanted:
        raise BadRowError(
            f"turn {number} of the role {role} has {key}.",
            f"only the {wanted} has this field.",
            f"give the turn the role {wanted}, or remove {key}.",
        )


def _is_trained(turn: dict[str, Any], role: str, number: int) -> bool:
    """Return the value of `train`, `loss_weight` or `weight`; True without any of them."""
    weight = next((turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None), None)
    wanted = turn.get("train")
    if weight is not None and (
        not isinstance(weight, (int, float)) or isinstance(weight, bool) or weight not in (0, 1)
    ):
        raise BadRowError(
            f"the loss weight of turn {number} is {shown(weight)}.",
            "a token is either trained on or not: the loss is a mean over supervised tokens.",
            "write 0 or 1.",
        )
    if wanted is not None and not isinstance(wanted, bool):
        raise BadRowError(
            f"train of turn {number} is {shown(wanted)}.", "it says whether to train on it.", "write true or false."
        )
    if role != "assistant" and (wanted or weight):
        raise BadRowError(
            f"turn {number} of the role {role} is marked to be trained on.",
            "the mark can only exclude a turn; data.train_on.roles selects the roles for all rows.",
            f"remove the mark; to train on such turns, add {role} to data.train_on.roles.",
        )
    return wanted is not False and weight != 0


def _no_role(turn: dict[str, Any], given: object, number: int) -> BadRowError:
    known = "the roles are system, user, assistant and tool; in ShareGPT human, gpt, function_call and observation."
    if given is None and not {"role", "from"} & turn.keys():
        return BadRowError(
            f"turn {number} has neither role nor from; its keys are {names(turn)}.",
            known,
            "map its key in the source's columns, such as {role: speaker}.",
        )
    near = closest(given, ROLES) if isinstance(given, str) else None
    return BadRowError(
        f"turn {number} has the role {shown(given)}.",
        known,
        f"write {near}."
        if near
        else "write one of these, or map it in the source's roles, such as {agent: assistant}.",
    )


def _no_content(turn: dict[str, Any], number: int) -> BadRowError:
    return BadRowError(
        f"turn {number} has neither content nor value; its keys are {names(turn)}.",
        "only text becomes tokens.",
        "map its key in the source's columns, such as {content: says}.",
    )
