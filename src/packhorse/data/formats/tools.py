"""Convert tool definitions and tool calls from the forms in rows to OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from packhorse.data.formats.bad_row import BadRowError, closest, names, shown
from packhorse.data.formats.example import Message

TOOL_KEYS: Final = ("tools", "functions")
NOTHING: Final[tuple[object, ...]] = (None, "", [], {}, "[]", "{}")  # some exports write JSON inside JSON


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


# NaN and Infinity are not JSON; Python's decoder would accept them.
STRICT: Final = json.JSONDecoder(parse_constant=_refuse_constant)
HOW_TO_DEFINE: Final = 'write it as {"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}.'
HOW_TO_CALL: Final = 'write it as {"name": "…", "arguments": {…}}.'
FUNCTION_KEYS: Final = ("name", "arguments")
CALL_KEYS: Final = ("id", "type", "index", "function")  # `index` is the place in the list


def tools_of(values: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the row's tool definitions, from a list or JSON text in `tools` or `functions`.

    Raises:
        BadRowError: They are not definitions of tools.
    """
    given = [key for key in TOOL_KEYS if key in values and values[key] not in NOTHING]
    for key in given:
        listed = _loaded(values[key], key, HOW_TO_DEFINE)
        if not isinstance(listed, list):
            raise BadRowError(
                f"{key} is {type(listed).__name__}, not a list.",
                "it lists the tools that the assistant may call.",
                f"write a list; {HOW_TO_DEFINE}",
            )
        if len(given) > 1 and values[given[0]] != values[given[1]]:
            raise BadRowError(
                f"the row has {' and '.join(given)}, with different values.",
                "they are two names of one thing.",
                f"set the source's ignore: [{given[1]}] or ignore: [{given[0]}].",
            )
        return tuple(_definition(tool, f"tool {number} of {key}") for number, tool in enumerate(listed, 1))
    return ()


def calls_of(value: object, name: str) -> tuple[dict[str, Any], ...]:
    """Return an assistant's calls, from a list, one object or JSON text, with their arguments as objects.

    Args:
        value: `tool_calls`, a `function_call`, or the value of a ShareGPT turn from `function_call`.
        name: Name of the value in a message.

    Raises:
        BadRowError: The value is not a call, or its arguments are not a JSON object.
    """
    listed = _loaded(value, name, HOW_TO_CALL)
    calls = listed if isinstance(listed, list) else [listed]
    if not calls:
        raise BadRowError(f"{name} is an empty list.", "it should hold the assistant's calls.", HOW_TO_CALL)
    return tuple(_call(call, name) for call in calls)


def check_tool_use(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
    """Refuse a call of a tool that the row does not define, and an answer to a call that does not exist.

    Raises:
        BadRowError: The row has such a call or answer.
    """
    # Rows often have no definitions, as the system text may hold them; only a list without the called tool is wrong.
    defined = {tool["function"]["name"] for tool in tools}
    calls: Sequence[dict[str, Any]] = ()
    for number, message in enumerate(messages, 1):
        if message.role == "tool":
            _check_answer(message, number, calls)
            continue
        calls = message.tool_calls
        for call in calls:
            called = call["function"]["name"]
            if defined and called not in defined:
                raise _undefined(called, number, defined)


def _check_answer(message: Message, number: int, calls: Sequence[dict[str, Any]]) -> None:
    if not calls:
        raise BadRowError(
            f"turn {number} is a tool's answer, and the turn before it calls no tool.",
            "an answer without its call does not teach when to call a tool.",
            "put the assistant's call before it, or remove the turn.",
        )
    # Rows with single calls often have no ids, so that only the order connects call and answer.
    called = [call["function"]["name"] for call in calls]
    if message.name is not None and message.name not in called:
        raise BadRowError(
            f"turn {number} is the answer of the tool {shown(message.name)}; the turn before it calls {names(called)}.",
            "an answer belongs to a call.",
            "write the name of the called tool.",
        )
    ids = [call["id"] for call in calls if "id" in call]
    if message.call_id is not None and ids and message.call_id not in ids:
        raise BadRowError(
            f"turn {number} answers the call {shown(message.call_id)}; the calls before it are {names(ids)}.",
            "templates match answers to calls by this id.",
            "write the id of the call as tool_call_id.",
        )


def _undefined(called: str, number: int, defined: set[str]) -> BadRowError:
    near = closest(called, defined)
    return BadRowError(
        f"turn {number} calls {names([called])}; the row's tools are {names(sorted(defined))}.",
        "the model would learn to call tools that it was not given.",
        f"write {near}, or add the tool to tools." if near else "add the tool to tools, or remove the row.",
    )


def _definition(tool: object, name: str) -> dict[str, Any]:
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or not isinstance(inner, dict) or not _is_name(inner.get("name")):
        raise BadRowError(f"{name} has no name.", "the assistant calls a tool by its name.", HOW_TO_DEFINE)
    # Unchanged: templates print keys that Packhorse does not know, such as `strict`.
    if inner is tool:
        return {"type": "function", "function": tool}
    return tool if "type" in tool else {"type": "function", **tool}


def _call(call: object, name: str) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(inner, dict) or not _is_name(inner.get("name")):
        raise BadRowError(
            f"{name} has a call without the name of a tool: {shown(call)}.", "the call needs a tool.", HOW_TO_CALL
        )
    _check_keys(call, inner, name)
    given = inner.get("arguments")
    arguments = {} if given is None else _loaded(given, f"arguments in {name}", HOW_TO_CALL)
    if not isinstance(arguments, dict):
        raise BadRowError(
            f"the arguments in {name} are {type(arguments).__name__}, not an object.",
            "a tool receives its arguments by name.",
            HOW_TO_CALL,
        )
    identity = {"id": call["id"]} if call.get("id") not in (None, "") else {}
    return {**identity, "type": "function", "function": {"name": inner["name"], "arguments": arguments}}


def _check_keys(call: dict[str, Any], inner: dict[str, Any], name: str) -> None:
    known = (*CALL_KEYS, *FUNCTION_KEYS) if inner is call else CALL_KEYS
    unknown = [key for key in call if key not in known and call[key] is not None]
    unknown += [key for key in inner if inner is not call and key not in FUNCTION_KEYS and inner[key] is not None]
    if unknown:
        raise BadRowError(
            f"{name} has a call with {names(unknown)}, which is not a key of a call.",
            "templates write a call's name and arguments; another key would be lost.",
            HOW_TO_CALL,
        )
    for key, valid in (("type", call.get("type") in (None, "function")), ("id", _is_id(call.get("id")))):
        if not valid:
            raise BadRowError(
                f"{name} has a call whose {key} is {shown(call[key])}.",
                "the type of a call is function, and its id is a text.",
                f'write "{key}": "{"function" if key == "type" else "call_1"}", or remove it.',
            )


def _is_id(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _loaded(value: object, name: str, fix: str) -> Any:  # noqa: ANN401
    """Return the value of JSON text, or the value itself, checked that it can be written as JSON in UTF-8."""
    try:
        loaded = STRICT.decode(value) if isinstance(value, str) else value
        # ASCII without escapes has no half pair, and text that was JSON can be written as JSON.
        if not (isinstance(value, str) and value.isascii() and "\\u" not in value):
            json.dumps(loaded, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"{name} has half a surrogate pair.", "it is not a character, and no tokenizer accepts it.", "remove it."
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise BadRowError(
            f"{name} is not JSON ({reason}): {shown(value)}.", "templates write calls and tools as JSON.", fix
        ) from error
    return loaded
