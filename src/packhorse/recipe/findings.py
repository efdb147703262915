"""What is wrong with a recipe, by key; placed in its file when it is told to the user."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from packhorse.errors import Mistake
from packhorse.recipe.schema_view import (
    NAME_WORDS,
    KeyPath,
    choices_of,
    fields_of,
    join_words,
    kinds_with_field,
    paths_named,
    schema_at,
    words_for,
)
from packhorse.yaml_source.nodes import Node, child_of, kind_of, parse_scalar, plain


@dataclass(frozen=True)
class Finding:
    """One mistake, named by keys.

    Attributes:
        paths: The keys it is about; told at the one that was given last.
        fact: See `packhorse.errors.Mistake`, as for `why`.
        fix: The same, without the full stop.
        touches: Further keys whose own mistakes would only repeat this one.
    """

    paths: tuple[KeyPath, ...]
    fact: str
    why: str
    fix: str
    touches: tuple[KeyPath, ...] = ()


def dotted(path: KeyPath) -> str:
    """`("data", "sources", 0)` as users write it: `data.sources.0`."""
    return ".".join(map(str, path))


def node_at(root: Node, path: KeyPath) -> tuple[Node, bool]:
    """The node at a path and True, or its nearest ancestor and False."""
    node = root
    for step in path:
        child = child_of(node, step)
        if child is None:
            return node, False
        node = child
    return node, True


def place(finding: Finding, root: Node) -> Mistake:
    """Adds file and line to a finding."""
    reached = [node_at(root, path) for path in finding.paths]
    given = [node for node, exact in reached if exact] or [reached[0][0]]
    last = max(given, key=lambda node: node.layer)
    return Mistake(finding.fact, finding.why, f"{finding.fix}.", last.where)


def overlaps(finding: Finding, others: Sequence[Finding]) -> bool:
    """Whether one of the others is about the same keys, a part of them or the section around them."""
    taken = [path for other in others for path in (*other.paths, *other.touches)]
    return any(mine[: len(path)] == path[: len(mine)] for mine in finding.paths for path in taken)


def schema_findings(error: ValidationError, root: Node) -> list[Finding]:
    """Turns pydantic's errors into findings: one for each key, in the words of the recipe."""
    by_path: dict[KeyPath, str] = {}
    for detail in error.errors(include_url=False, include_context=False):
        by_path.setdefault(*_located(detail["loc"], detail["type"], root))
    deepest = {path: kind for path, kind in by_path.items() if not _leads_to_any(path, by_path.keys() - {path})}
    findings = {path: _explain(path, kind, root) for path, kind in deepest.items()}
    meant = [path for finding in findings.values() for path in finding.touches]
    repeated = {path for path, kind in deepest.items() if kind == "missing" and _leads_to_any(path, meant)}
    return [finding for path, finding in findings.items() if path not in repeated]


def _located(loc: KeyPath, kind: str, root: Node) -> tuple[KeyPath, str]:
    """Drops the marks of union branches from pydantic's location: only keys that were written stay."""
    path: list[str | int] = []
    node = root
    for step in loc[:-1] if kind == "missing" else loc:
        child = child_of(node, step)
        if child is not None:
            node = child
            path.append(step)
    if kind == "missing" and isinstance(loc[-1], int):
        kind = "too_short"
    elif kind == "missing":
        path.append(loc[-1])
    elif kind == "union_tag_invalid":
        path.append("kind")
    elif kind == "union_tag_not_found":
        path, kind = [*path, "kind"], "missing"
    return tuple(path), kind


def _leads_to_any(path: KeyPath, others: Iterable[KeyPath]) -> bool:
    return any(other[: len(path)] == path for other in others)


def _explain(path: KeyPath, kind: str, root: Node) -> Finding:
    if kind == "extra_forbidden":
        return _unknown_key(path, root)
    if kind == "missing":
        return _missing_key(path, root)
    return _wrong_value(path, root)


def _unknown_key(path: KeyPath, root: Node) -> Finding:
    section, name = path[:-1], str(path[-1])
    fields = [*fields_of(schema_at(section, root) or {}), *([] if section else ["extends"])]
    owner = dotted(section) or "the recipe"
    close = difflib.get_close_matches(name, fields, n=1)
    touches: tuple[KeyPath, ...] = ()
    elsewhere = [found for found in paths_named(name) if found != dotted(path)]
    if close:
        fix, touches = f"write `{dotted((*section, close[0]))}`", ((*section, close[0]),)
    elif elsewhere:
        fix, touches = f"write `{elsewhere[0]}`", (tuple(elsewhere[0].split(".")),)
    elif kinds := kinds_with_field(path):
        fix = f"remove it, or set {dotted(section)}.kind to {join_words(kinds)}"
    else:
        fix = f"remove it, or use one of {', '.join(fields)}"
    return Finding(
        (path,),
        f"{dotted(path)} is not a field of {owner}.",
        "a key that nobody reads would change nothing, silently.",
        fix,
        touches,
    )


def _missing_key(path: KeyPath, root: Node) -> Finding:
    schema = schema_at(path, root) or {}
    needed = ", ".join(schema.get("required", []))
    example = f" with {needed}" if needed else f": {words_for(schema)}"
    return Finding((path,), f"{dotted(path)} is missing.", _purpose(path, root), f"add {dotted(path)}{example}")


def _purpose(path: KeyPath, root: Node) -> str:
    schema = schema_at(path, root) or {}
    about = str(schema.get("description", "")).split("\n", maxsplit=1)[0]
    return f"it stands for: {about}" if about or len(path) < 2 else _purpose(path[:-1], root)


def _wrong_value(path: KeyPath, root: Node) -> Finding:
    schema, node = schema_at(path, root) or {}, node_at(root, path)[0]
    takes = words_for(schema)
    kind = kind_of(plain(node))
    note = "" if kind in takes else f" ({kind})"
    return Finding(
        (path,),
        f"{dotted(path)} is {show(node)}{note}; it takes {takes}.",
        _purpose(path, root),
        _fix_value(dotted(path), node, takes, choices_of(schema)),
    )


def _fix_value(key: str, node: Node, takes: str, choices: list[str]) -> str:
    value = node.value
    if isinstance(value, str):
        if close := difflib.get_close_matches(value, choices, n=1):
            return f"write `{key}: {close[0]}`"
        if takes == NAME_WORDS:
            return f"write `{key}: {re.sub('[^A-Za-z0-9._-]+', '-', value).strip('._-')[:100] or 'my-run'}`"
        if "number" in takes and not isinstance(parse_scalar(value), str):
            return f"write `{key}: {value}`, without quotes"
    elif (takes.startswith("text") or takes == NAME_WORDS) and isinstance(value, int | float):
        return f'quote it: `{key}: "{node.written}"`'
    elif value is None:
        return f"give {key} a value, or remove the line"
    return f"write {key} as {takes}"


def show(node: Node) -> str:
    """A value as it was written, on one short line."""
    if isinstance(node.value, dict | list):
        text = json.dumps(plain(node), ensure_ascii=False)
    else:
        text = node.written or "empty"
    return text if len(text) <= 60 else f"{text[:57]}..."
