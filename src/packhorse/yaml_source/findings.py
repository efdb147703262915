"""Mistakes by key, and their location: pydantic's errors and broken rules become messages with file and line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from packhorse.errors import Mistake
from packhorse.yaml_source.nodes import KeyPath, Node, child_of, dotted, kind_of, node_at, parse_scalar, plain, show
from packhorse.yaml_source.schema import NAME_WORDS, JsonSchema, SchemaView, choices_of, fields_of, join_words

RULE = "packhorse_rule"
CLOSE_KEY, CLOSE_VALUE = 0.8, 0.75
"""Smallest similarity of a hint: one typing mistake in a short word. At 0.6, `save_steps` would be close to `steps`."""
KEY_MARK = "[key]"
"""Pydantic ends the location of an error with this if the key, not the value, is wrong."""


@dataclass(frozen=True)
class Finding:
    """A mistake, with the keys that it is about.

    Attributes:
        paths: Keys of the values in conflict; the message names the line of the one given last.
        fact: Fact of the message (see `packhorse.errors.Mistake`).
        why: Reason of the message.
        fix: Fix of the message, without the full stop.
        touches: Further keys whose own mistakes would only repeat this one.
    """

    paths: tuple[KeyPath, ...]
    fact: str
    why: str
    fix: str
    touches: tuple[KeyPath, ...] = ()


def place(finding: Finding, root: Node) -> Mistake:
    """Return the finding as a message with file and line."""
    reached = [node_at(root, path) for path in finding.paths]
    given = [node for node, exact in reached if exact] or [reached[0][0]]
    last = max(given, key=lambda node: node.layer)
    return Mistake(finding.fact, finding.why, f"{finding.fix}.", last.where)


def file_and_line(mistake: Mistake) -> tuple[bool, str, int]:
    """Return the sort key that puts mistakes in the order of the files, overrides last."""
    file, _, line = mistake.where.rpartition(":")
    return mistake.where.startswith("override "), file, int(line) if line.isdigit() else 0


def overlaps(finding: Finding, others: Sequence[Finding]) -> bool:
    """Return whether another finding is about the same keys, a part of them or the section around them."""
    taken = [path for other in others for path in (*other.paths, *other.touches)]
    return any(mine[: len(path)] == path[: len(mine)] for mine in finding.paths for path in taken)


def rule_error(finding: Finding) -> PydanticCustomError:
    """Return the error by which a validator of a model reports a finding."""
    return PydanticCustomError(RULE, "{fact}", {"fact": finding.fact, "finding": finding})


def schema_findings(error: ValidationError, root: Node, view: SchemaView) -> list[Finding]:
    """Return one finding for each wrong key of a file.

    Args:
        error: Raised by pydantic for the values of `root`.
        root: The file.
        view: Schema that the file is checked against.
    """
    rules: list[Finding] = []
    by_path: dict[KeyPath, str] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == RULE:
            rules.append(detail["ctx"]["finding"])
        else:
            by_path.setdefault(*_located(detail["loc"], detail["type"], root))
    deepest = {path: kind for path, kind in by_path.items() if not _leads_to_any(path, by_path.keys() - {path})}
    explain = _Explain(root, view)
    findings = {path: explain.finding(path, kind) for path, kind in deepest.items()}
    meant = [path for finding in findings.values() for path in finding.touches]
    repeated = {path for path, kind in deepest.items() if kind == "missing" and _leads_to_any(path, meant)}
    return [finding for path, finding in findings.items() if path not in repeated] + rules


def _located(loc: KeyPath, kind: str, root: Node) -> tuple[KeyPath, str]:
    """Remove the names of union branches from pydantic's location, so that only keys of the file stay."""
    if loc and loc[-1] == KEY_MARK:
        return loc[:-1], KEY_MARK
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


@dataclass(frozen=True)
class _Explain:
    """Writes the message for a wrong key."""

    root: Node
    view: SchemaView

    def finding(self, path: KeyPath, kind: str) -> Finding:
        if kind == "extra_forbidden":
            return self._unknown_key(path)
        if kind == "missing":
            return self._missing_key(path)
        return self._wrong_key(path) if kind == KEY_MARK else self._wrong_value(path)

    def _unknown_key(self, path: KeyPath) -> Finding:
        section, name = path[:-1], str(path[-1])
        fields = [*fields_of(self.view.at(section, self.root) or {}), *([] if section else self.view.extra_keys)]
        close = difflib.get_close_matches(name, fields, n=1, cutoff=CLOSE_KEY)
        touches: tuple[KeyPath, ...] = ()
        known = self.view.fix_for_key(path, node_at(self.root, path)[0])
        elsewhere = [other for other in self.view.paths_named(name) if other != dotted(path)]
        if known:
            fix, field = known
            touches = (field,) if field else ()
        elif close:
            fix, touches = f"write `{dotted((*section, close[0]))}`", ((*section, close[0]),)
        elif elsewhere:
            fix, touches = f"write `{elsewhere[0]}`", (tuple(elsewhere[0].split(".")),)
        elif kinds := self.view.kinds_with_field(path):
            fix = f"remove it, or set {dotted(section)}.kind to {join_words(kinds)}"
        else:
            fix = f"remove it, or use one of {', '.join(fields)}"
        fact = f"{dotted(path)} is not a field of {dotted(section) or self.view.title}."
        return Finding((path,), fact, "an unknown key would have no effect.", fix, touches)

    def _missing_key(self, path: KeyPath) -> Finding:
        schema = self.view.at(path, self.root) or {}
        needed = ", ".join(schema.get("required", []))
        example = f" with {needed}" if needed else f": {self.view.words_for(schema)}"
        return Finding((path,), f"{dotted(path)} is missing.", self._purpose(path), f"add {dotted(path)}{example}")

    def _wrong_key(self, path: KeyPath) -> Finding:
        section = dotted(path[:-1])
        fact = f"{section} has the key {str(path[-1])!a}; its keys are {self.view.key_words}."
        return Finding((path,), fact, self._purpose(path[:-1]), f"rename the key of {section}")

    def _wrong_value(self, path: KeyPath) -> Finding:
        schema, node = self.view.at(path, self.root) or {}, node_at(self.root, path)[0]
        takes = self.view.words_for(schema)
        kind = kind_of(plain(node))
        note = "" if re.search(rf"\b{kind}\b", takes) else f" ({kind})"
        return Finding(
            (path,),
            f"{dotted(path)} is {show(node)}{note}; it takes {takes}.",
            self._purpose(path),
            self.view.fix_for_value(path, node)
            or _nearest_number(dotted(path), node, schema)
            or _fix_value(dotted(path), node, takes, choices_of(schema)),
        )

    def _purpose(self, path: KeyPath) -> str:
        schema = self.view.at(path, self.root) or {}
        about = str(schema.get("description", "")).split("\n", maxsplit=1)[0]
        if about:
            return f"its meaning: {about}"
        return self._purpose(path[:-1]) if len(path) > 1 else "the command uses this value."


def _nearest_number(key: str, node: Node, schema: JsonSchema) -> str | None:
    """Return the fix for a whole number outside its bounds: the bound that it misses."""
    value = node.value
    branches = schema.get("anyOf", [schema])
    whole = next((branch for branch in branches if branch.get("type") == "integer"), None)
    if whole is None or not isinstance(value, int) or isinstance(value, bool):
        return None
    low = whole["exclusiveMinimum"] + 1 if "exclusiveMinimum" in whole else whole.get("minimum", value)
    nearest = max(value, low)
    return f"write `{key}: {min(nearest, whole.get('maximum', nearest))}`"


def _fix_value(key: str, node: Node, takes: str, choices: list[str]) -> str:
    value = node.value
    if isinstance(value, str):
        if close := difflib.get_close_matches(value.lower(), choices, n=1, cutoff=CLOSE_VALUE):
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
