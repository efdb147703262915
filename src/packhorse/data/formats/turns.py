"""Convert one turn of a chat, in OpenAI's form (role, content) or ShareGPT's (from, value), to a `Message`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, closest, ignore_line, names, shown
from packhorse.data.formats.content import CALL_PART, content_of, one_of, optional_text
from packhorse.data.formats.example import Message
from packhorse.data.formats.tools import NOTHING, calls_of

CALL: Final = "call"  # a ShareGPT turn whose text is a call
ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
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
ROLE_KEYS: Final = ("role", "from")
CONTENT_KEYS: Final = ("content", "value")
CALLS_KEYS: Final = ("tool_calls", "function_call")
TURN_KEYS: Final = frozenset(
    (*ROLE_KEYS, *CONTENT_KEYS, *CALLS_KEYS, "name", "tool_call_id", "train", *THINKING_KEYS, *WEIGHT_KEYS)
)
MEDIA_KEYS: Final = frozenset(
    word + plural for word in ("image", "audio", "video", "sound", "picture") for plural in ("", "s")
)


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
        BadRowError: One of them is not a turn, or has a key that nothing reads.
    """
    listed = turn_list(turns, key)
    return [_message(turn, number, listed) for number, turn in enumerate(listed, 1)]


def context_of(turns: object, key: str) -> list[Message]:
    """Return the messages of a list of turns that are only context, whatever their role.

    Raises:
        BadRowError: One of them is not a turn, or is marked to be trained on.
    """
    messages = messages_of(turns, key)
    refuse_trained(turn_list(turns, key), key)
    return [replace(message, trained=False) for message in messages]


def refuse_trained(turns: Sequence[dict[str, Any]], key: str) -> None:
    """Raise BadRowError for a turn that is context and is marked to be trained on."""
    for number, turn in enumerate(turns, 1):
        if turn.get("train") or any(turn.get(weight) for weight in WEIGHT_KEYS):
            raise BadRowError(
                f"turn {number} of {key} is marked to be trained on.",
                "it is part of the prompt, which is only context.",
                "remove the mark, or write the row as messages.",
            )


def _message(turn: dict[str, Any], number: int, turns: Sequence[dict[str, Any]]) -> Message:
    given = turn.get("role")
    if given is None:
        given = turn.get("from")
    role = ROLES.get(given) if type(given) is str else None
    content = turn["content"] if "content" in turn else turn.get("value")
    # Most turns have only a role and a text.
    if role is not None and role is not CALL and len(turn) == 2 and type(content) is str and content.isascii():
        return Message(role, content)
    if role is None:
        raise _no_role(turn, given, number)
    if not turn.keys() <= TURN_KEYS:
        _refuse_unknown(turn, number, turns)
    one_of(turn, ROLE_KEYS, f"turn {number}")
    return _whole_message(turn, role, number)


def _whole_message(turn: dict[str, Any], role: str, number: int) -> Message:
    owner = f"turn {number}"
    # Next to nothing but "" and null, an empty text stays one.
    key = one_of(turn, CONTENT_KEYS, owner) or next((key for key in CONTENT_KEYS if turn.get(key) == ""), "")
    content = turn.get(key)
    calls: tuple[dict[str, Any], ...] = ()
    # ShareGPT writes a call as a separate turn; the assistant is the one who calls.
    if role is CALL:
        calls, role, content = calls_of(content, f"the call of {owner}"), "assistant", ""
    for calls_key in CALLS_KEYS:
        if turn.get(calls_key) not in NOTHING:
            _only_for("assistant", role, calls_key, number)
            calls += calls_of(turn[calls_key], f"{calls_key} of {owner}")
    # OpenAI writes null next to calls.
    if calls and (content is None or content == []):
        content = ""
    elif content is None and not turn.keys() & set(CONTENT_KEYS):
        raise _no_content(turn, number)
    parts = content_of(content, f"content of {owner}")
    if parts.calls:
        _only_for("assistant", role, f"a part of type {CALL_PART}", number)
    return Message(
        role,
        parts.text,
        _is_trained(turn, role, number),
        _thinking(turn, role, number, parts.thinking),
        calls + parts.calls,
        optional_text(turn, "name", f"name of {owner}"),
        _call_id(turn, role, number),
    )


def _thinking(turn: dict[str, Any], role: str, number: int, in_part: str | None) -> str | None:
    key = one_of(turn, THINKING_KEYS, f"turn {number}")
    if key is None and not in_part:
        return None
    _only_for("assistant", role, key or "a part of type reasoning", number)
    if key is not None and in_part:
        raise BadRowError(
            f"turn {number} has {key} and a part of type reasoning.",
            "a turn has one text of thinking.",
            f"remove the part, or set the source's ignore: [{key}].",
        )
    return optional_text(turn, key, f"{key} of turn {number}") if key else in_part


def _call_id(turn: dict[str, Any], role: str, number: int) -> str | None:
    call_id = optional_text(turn, "tool_call_id", f"tool_call_id of turn {number}")
    if call_id is not None:
        _only_for("tool", role, "tool_call_id", number)
    return call_id


def _only_for(wanted: str, role: str, key: str, number: int) -> None:
    if role != wanted:
        raise BadRowError(
            f"turn {number} of the role {role} has {key}.",
            f"only the {wanted} has this field.",
            f"give the turn the role {wanted}, or remove {key}.",
        )


def _is_trained(turn: dict[str, Any], role: str, number: int) -> bool:
    """Return the value of `train`, `loss_weight` or `weight`; True without any of them."""
    key = one_of(turn, WEIGHT_KEYS, f"turn {number}")
    weight = turn[key] if key else None
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
    if wanted is not None and weight is not None and wanted != bool(weight):
        raise BadRowError(
            f"turn {number} has train: {str(wanted).lower()} and {key}: {weight}.",
            "one says to train on the turn, the other not to.",
            f"set the source's ignore: [{key}] or ignore: [train].",
        )
    return wanted is not False and weight != 0


def _refuse_unknown(turn: dict[str, Any], number: int, turns: Sequence[dict[str, Any]]) -> None:
    """Raise BadRowError for a turn with a key that nothing reads; null is no value."""
    unknown = [key for key, value in turn.items() if key not in TURN_KEYS and value is not None]
    if not unknown:
        return
    near = [close for key in unknown if (close := closest(key, TURN_KEYS))]
    # Where the text itself is missing, the unknown key may be its name.
    if not near and not turn.keys() & {*CONTENT_KEYS, *CALLS_KEYS}:
        return
    # One edit of the recipe is enough for all turns.
    everywhere = [key for each in turns for key, value in each.items() if key not in TURN_KEYS and value is not None]
    is_media = not MEDIA_KEYS.isdisjoint(unknown)
    raise BadRowError(
        f"turn {number} has {names(unknown)}, which is not a key of a turn.",
        "Packhorse trains on text: images, audio and video do not become tokens."
        if is_media
        else "a key that nothing reads would be lost, and what it says with it.",
        (f"write {near[0]}, or " if near else "remove the row, or " if is_media else "")
        + f"set the source's {ignore_line(dict.fromkeys(everywhere))} to train without it.",
    )


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
