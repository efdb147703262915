"""Overrides such as `optimizer.learning_rate=1e-4`, and the joining of one YAML tree over another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from packhorse.errors import UserError
from packhorse.yaml_source.nodes import Node, kind_of, parse_scalar, parse_yaml

OVERRIDE_LAYER = 1_000
FLOW_STARTS = ("[", "{", '"', "'")


@dataclass(frozen=True)
class Override:
    """A parsed override: `optimizer.learning_rate=1e-4` has the keys `optimizer` and `learning_rate`."""

    keys: tuple[str, ...]
    node: Node


def parse_override(text: str) -> Override:
    """Parse `a.b.c=value`, with the value read as in a file, `[a, b]` and `{k: v}` included.

    Raises:
        UserError: There is no `=`, no key or no value.
    """
    where = f"override {text}"
    key, equals, value = text.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys) or key.startswith("-"):
        raise UserError(
            f"{text} is not an override.",
            "an override gives a key of the recipe and its value.",
            "write it in the form optimizer.learning_rate=1e-4, without dashes or spaces.",
            where,
        )
    if not value.strip():
        raise UserError(
            f"{text} gives no value.",
            "an empty shell variable would unset the field without a warning.",
            f"write a value after the =, or {key}=null to unset it.",
            where,
        )
    return Override(keys, _parse_value(value.strip(), where))


def set_override(root: Node, override: Override) -> Node:
    """Return a copy of the tree with the override's value at its keys; missing sections on the way are added.

    Raises:
        UserError: A key leads through a value that is not a section, or past the end of a list.
    """
    return _set(root, override.keys, override.node, ())


def merge(base: Node, top: Node) -> Node:
    """Join two trees: sections key by key; any other value, lists too, is that of `top`."""
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    joined = {key: merge(base.value[key], node) if key in base.value else node for key, node in top.value.items()}
    return replace(top, value={**base.value, **joined})


def at_layer(node: Node, layer: int, line: int | None = None) -> Node:
    """Return the tree with this layer in every node, and with this line if one is given."""
    value: Any = node.value
    if isinstance(value, dict):
        value = {key: at_layer(child, layer, line) for key, child in value.items()}
    elif isinstance(value, list):
        value = [at_layer(child, layer, line) for child in value]
    return replace(node, value=value, layer=layer, line=node.line if line is None else line)


def _parse_value(value: str, where: str) -> Node:
    if not value.startswith(FLOW_STARTS):
        return Node(parse_scalar(value), where, 0, value, OVERRIDE_LAYER)
    try:
        node, mistakes = parse_yaml(value, where)
    except UserError as error:
        node, mistakes = Node(None, where), list(error.mistakes)
    if mistakes:
        raise UserError.of([replace(mistake, where=where) for mistake in mistakes])
    return at_layer(node, OVERRIDE_LAYER, line=0)


def _set(node: Node, keys: tuple[str, ...], value: Node, above: tuple[str, ...]) -> Node:
    if not keys:
        return value
    if node.value is None:
        node = replace(value, value={}, written="")
    if isinstance(node.value, dict):
        child = node.value.get(keys[0], replace(value, value=None, written=""))
        return replace(node, value={**node.value, keys[0]: _set(child, keys[1:], value, (*above, keys[0]))})
    if isinstance(node.value, list):
        return _set_item(node, keys, value, above)
    field = ".".join(above)
    raise UserError(
        f"{field} is {node.written}, so it has no {keys[0]}.",
        f"{field} is {kind_of(node.value)}, not a section (see {node.where}).",
        f"override {field} itself, or another key.",
        value.where,
    )


def _set_item(node: Node, keys: tuple[str, ...], value: Node, above: tuple[str, ...]) -> Node:
    items, field = list(node.value), ".".join(above)
    if not (keys[0].isascii() and keys[0].isdigit() and int(keys[0]) < len(items)):
        raise UserError(
            f"{field} has no item {keys[0]}.",
            f"{field} is a list of {len(items)} items, counted from 0 (see {node.where}).",
            f"use {field}.0 to {field}.{len(items) - 1}, or override the whole list."
            if items
            else f"override the whole list: {field}=[...].",
            value.where,
        )
    items[int(keys[0])] = _set(items[int(keys[0])], keys[1:], value, (*above, keys[0]))
    return replace(node, value=items)
