"""A recipe's layers, joined: the file, the files that it extends, and the overrides of the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packhorse.errors import Mistake, UserError
from packhorse.recipe.shipped import find_recipe, unknown_recipe
from packhorse.yaml_source.nodes import Node, kind_of, parse_scalar, parse_yaml, read_yaml

ALTERNATIVES = {"steps": "epochs", "epochs": "steps"}
OVERRIDE_LAYER = 1_000
FLOW_STARTS = ("[", "{", '"', "'")


@dataclass(frozen=True)
class Override:
    """`optimizer.learning_rate=1e-4`, read."""

    keys: tuple[str, ...]
    node: Node


def read_layers(name_or_path: str) -> tuple[Node, list[Mistake]]:
    """Reads a recipe and all that it extends into one tree.

    Raises:
        UserError: A file is missing, is no YAML, or extends itself.
    """
    return _read_chain(locate_recipe(name_or_path), ())


def locate_recipe(name_or_path: str) -> Path:
    """The file of a path or of a shipped recipe's name; a file of the user's comes first.

    Raises:
        UserError: It is neither.
    """
    path = Path(name_or_path)
    found = path if path.is_file() else find_recipe(name_or_path)
    if found is None:
        raise unknown_recipe(name_or_path)
    return found


def apply_overrides(root: Node, overrides: Sequence[str]) -> tuple[Node, list[Mistake]]:
    """Sets dotted keys, later ones over earlier ones; `steps` takes the place of `epochs` and the reverse."""
    mistakes: list[Mistake] = []
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed.append(parse_override(text))
        except UserError as error:
            mistakes.extend(error.mistakes)
    root = _without_alternatives(root, {each.keys[0] for each in parsed if each.node.value is not None})
    for each in parsed:
        try:
            root = _set(root, each.keys, each.node, ())
        except UserError as error:
            mistakes.extend(error.mistakes)
    return root, mistakes


def parse_override(text: str) -> Override:
    """Reads `a.b.c=value`; the value is read as in the file, `[a, b]` and `{k: v}` included.

    Raises:
        UserError: There is no `=`, no key or no value.
    """
    where = f"override {text}"
    key, equals, value = text.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys) or key.startswith("-"):
        raise UserError(
            f"{text} is no override.",
            "an override names a key of the recipe and its value.",
            "write it as optimizer.learning_rate=1e-4, without dashes or spaces.",
            where,
        )
    if not value.strip():
        raise UserError(
            f"{text} gives no value.",
            "an empty shell variable would unset the field silently.",
            f"write a value behind the =, or {key}=null to unset it.",
            where,
        )
    return Override(keys, _override_value(value.strip(), where))


def _override_value(value: str, where: str) -> Node:
    if not value.startswith(FLOW_STARTS):
        return Node(parse_scalar(value), where, 0, value, OVERRIDE_LAYER)
    try:
        node, mistakes = parse_yaml(value, where)
    except UserError as error:
        node, mistakes = Node(None, where), list(error.mistakes)
    if mistakes:
        raise UserError.of([replace(mistake, where=where) for mistake in mistakes])
    return _at_layer(node, OVERRIDE_LAYER, line=0)


def _at_layer(node: Node, layer: int, line: int | None = None) -> Node:
    value: Any = node.value
    if isinstance(value, dict):
        value = {key: _at_layer(child, layer, line) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_at_layer(child, layer, line) for child in value]
    return replace(node, value=value, layer=layer, line=node.line if line is None else line)


def _read_chain(path: Path, above: tuple[Path, ...]) -> tuple[Node, list[Mistake]]:
    shown = _shown(path)
    root, mistakes = read_yaml(path, shown)
    keys = {key: node for key, node in root.value.items() if key != "extends"}
    if "extends" not in root.value:
        return replace(root, value=keys), mistakes
    base_path = _extended_file(root.value["extends"], path)
    chain = (*above, path.resolve())
    if base_path.resolve() in chain:
        loop = " → ".join(file.name for file in (*chain, base_path))
        raise UserError(
            f"{shown} extends itself: {loop}.",
            "the chain of `extends` would never end.",
            "remove one `extends`.",
            root.value["extends"].where,
        )
    base, below = _read_chain(base_path, chain)
    return _merge_files(base, replace(root, value=keys)), [*below, *mistakes]


def _merge_files(base: Node, top: Node) -> Node:
    top = _at_layer(top, base.layer + 1)
    given = {key for key, node in top.value.items() if node.value is not None}
    return _merge(_without_alternatives(base, given), top)


def _merge(base: Node, top: Node) -> Node:
    """Sections are joined key by key; anything else, lists too, is replaced by the upper file's."""
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    joined = {key: _merge(base.value[key], node) if key in base.value else node for key, node in top.value.items()}
    return replace(top, value={**base.value, **joined})


def _without_alternatives(root: Node, given: set[str]) -> Node:
    """Drops `epochs` where a later layer gives `steps` alone, and the reverse."""
    dropped = {other for key, other in ALTERNATIVES.items() if key in given and other not in given}
    return replace(root, value={key: node for key, node in root.value.items() if key not in dropped})


def _extended_file(node: Node, path: Path) -> Path:
    if not isinstance(node.value, str):
        raise UserError(
            f"extends is {kind_of(node.value)}, not a file.",
            "a recipe extends one other recipe.",
            "write `extends: other.yaml` or a shipped name.",
            node.where,
        )
    beside = path.parent / node.value
    found = beside if beside.is_file() else find_recipe(node.value)
    if found is None:
        error = unknown_recipe(node.value)
        raise UserError(
            f"extends names {node.value}: no file of that name stands beside {path.name}, "
            "and no shipped recipe has it.",
            error.mistakes[0].why,
            error.mistakes[0].fix,
            node.where,
        )
    return found


def _shown(path: Path) -> str:
    """The path as the user would write it: below the current folder relative, else as it is."""
    normal = os.path.normpath(path)
    relative = os.path.relpath(normal)
    return normal if relative.startswith("..") else relative


def _set(node: Node, keys: tuple[str, ...], value: Node, done: tuple[str, ...]) -> Node:
    """A copy of the tree with `value` at `keys`; sections on the way are made where they are missing."""
    if not keys:
        return value
    if done == ("method",) and isinstance(node.value, str):
        node = replace(node, value={"kind": node})
    if node.value is None:
        node = replace(value, value={}, written="")
    if isinstance(node.value, dict):
        child = node.value.get(keys[0], replace(value, value=None, written=""))
        return replace(node, value={**node.value, keys[0]: _set(child, keys[1:], value, (*done, keys[0]))})
    if isinstance(node.value, list):
        return _set_item(node, keys, value, done)
    raise UserError(
        f"{'.'.join(done)} is {node.written}, so it has no {keys[0]}.",
        f"{'.'.join(done)} is {kind_of(node.value)}, not a section (it stands at {node.where}).",
        f"override {'.'.join(done)} itself, or another key.",
        value.where,
    )


def _set_item(node: Node, keys: tuple[str, ...], value: Node, done: tuple[str, ...]) -> Node:
    items = list(node.value)
    if not (keys[0].isascii() and keys[0].isdigit() and int(keys[0]) < len(items)):
        raise UserError(
            f"{'.'.join(done)} has no item {keys[0]}.",
            f"it is a list of {len(items)}, counted from 0 (it stands at {node.where}).",
            f"use {'.'.join(done)}.0 to .{len(items) - 1}, or override the whole list.",
            value.where,
        )
    items[int(keys[0])] = _set(items[int(keys[0])], keys[1:], value, (*done, keys[0]))
    return replace(node, value=items)
