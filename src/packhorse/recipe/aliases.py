"""Names and values of other trainers, for the message about an unknown key or value of a recipe.

Nothing is translated silently: the message gives the line that a recipe has instead.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from packhorse.yaml_source.nodes import KeyPath, Node, dotted

TABLE = Path(__file__).with_suffix(".toml")


def fix_for_key(path: KeyPath, node: Node) -> tuple[str, KeyPath] | None:
    """Return the fix for a key of another trainer, without the full stop, and the field that it sets, if any.

    Returns None for a key that is of no other trainer.

    Args:
        path: Unknown key, with the sections around it.
        node: Value of the key.
    """
    name = str(path[-1]).lower().replace("-", "_")
    table = _table()
    if reason := table["sentences"].get(name):
        return f"remove {dotted(path)}: {reason}", ()
    if line := table["lines"].get(name):
        return (f"remove {dotted(path)}", ()) if node.value is False else (f"write `{line}`", _field_of(line))
    field = table["fields"].get(name)
    if field is None:
        return None
    return f"write `{field}: {node.written}`" if node.written else f"write `{field}`", _field_of(field)


def fix_for_value(path: KeyPath, node: Node) -> str | None:
    """Return the fix for a value of another trainer, without the full stop; None for any other value.

    Args:
        path: Field of the recipe that does not take the value.
        node: Value.
    """
    key, text = dotted(path), str(node.value).lower()
    line = _table()["values"].get(key, {}).get(text)
    if line is None and isinstance(node.value, str):
        if key == "model":
            line = f"model.{'path' if node.value.startswith(('.', '/', '~')) else 'id'}: {node.value}"
        elif key in ("data", "data.sources"):
            line = f"data.sources: [{{path: {node.value}}}]"
    return f"write `{line}`" if line else None


def _field_of(line: str) -> KeyPath:
    """`data.sources[0].path: x` -> `("data", "sources")`."""
    return tuple(line.partition(":")[0].partition("[")[0].split("."))


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))
