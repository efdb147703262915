"""Names and values of other trainers, for `packhorse recipes import` and for messages about unknown keys and values.

A recipe is never translated silently: the message gives the line that a recipe has instead.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Literal

from packhorse.yaml_source.nodes import KeyPath, Node, dotted

TABLE = Path(__file__).with_suffix(".toml")


def fix_for_key(path: KeyPath, node: Node) -> tuple[str, KeyPath] | None:
    """Return the fix for a key of another trainer, without the full stop, and the field that it sets, if any.

    Returns None for a key that is of no other trainer.

    Args:
        path: Unknown key, with the sections around it.
        node: Value of the key.
    """
    name = str(path[-1])
    if reason := counterpart("sentences", name):
        return f"remove {dotted(path)}: {reason}", ()
    if line := counterpart("lines", name):
        return (f"remove {dotted(path)}", ()) if node.value is False else (f"write `{line}`", _field_of(line))
    field = counterpart("fields", name)
    if field is None:
        return None
    return f"write `{field}: {node.written}`" if node.written else f"write `{field}`", _field_of(field)


def fix_for_value(path: KeyPath, node: Node) -> str | None:
    """Return the fix for a value of another trainer, without the full stop; None for any other value.

    Args:
        path: Field of the recipe that does not take the value.
        node: Value.
    """
    key = dotted(path)
    line = line_for_value(key, node.value)
    if line is None and isinstance(node.value, str):
        if key == "model":
            line = f"model.{'path' if node.value.startswith(('.', '/', '~')) else 'id'}: {node.value}"
        elif key in ("data", "data.sources"):
            line = f"data.sources: [{{path: {node.value}}}]"
    if line is None:
        return None
    reason = _table()["reasons"].get(key, {}).get(str(node.value).lower())
    return f"write `{line}`: {reason}" if reason else f"write `{line}`"


def counterpart(kind: Literal["fields", "lines", "sentences"], name: str) -> str | None:
    """Return what the table gives for a name of another trainer: its field, its line, or why it has neither."""
    found: str | None = _table()[kind].get(name.lower().replace("-", "_"))
    return found


def line_for_value(field: str, value: object) -> str | None:
    """Return the line of a recipe, `field: value`, for a value of another trainer; None for any other value."""
    line: str | None = _table()["values"].get(field, {}).get(str(value).lower())
    return line


def _field_of(line: str) -> KeyPath:
    """`data.sources[0].path: x` -> `("data", "sources")`."""
    return tuple(line.partition(":")[0].partition("[")[0].split("."))


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))
