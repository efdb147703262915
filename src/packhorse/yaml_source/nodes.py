"""Read YAML text as nodes that know their file and line, with scalars as in YAML 1.2.

PyYAML's own constructor follows YAML 1.1, where `1e-4` is text, `off` is false and `010` is eight. So PyYAML only
parses here, and `parse_scalar` reads the values.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from packhorse.errors import Mistake, UserError

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]
KeyPath = tuple[str | int, ...]
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
NUMBER = re.compile(r"[-+]?([0-9]+(_[0-9]+)*(\.([0-9]+(_[0-9]+)*)?)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
PLAIN_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")
KIND_NAMES = {int: "a whole number", float: "a number", str: "text", list: "a list", tuple: "a list", dict: "a section"}
LONGEST_SHOWN = 60
# Words of PyYAML's message -> the fact and the fix in plain English.
SYNTAX_MESSAGES = (
    ("'\\t'", "a tab is used where YAML needs spaces", "indent with spaces"),
    ("mapping values are not allowed", "the value contains a second `: `", "quote the value, or fix the indent"),
    ("could not find expected ':'", "a key has no `:` after it", "write `key: value`"),
    ("found undefined alias", "an alias (`*name`) refers to no anchor (`&name`)", "quote text that starts with `*`"),
    ("expected <block end>", "the indent does not line up with the lines above", "indent keys of a section equally"),
    ("while scanning a quoted scalar", "a quote is opened and not closed", "close the quote"),
    ("expected a single document", "the file contains several documents", "remove the second `---`"),
    ("cannot start any token", "a value starts with a character that YAML reserves", "quote the value"),
)


@dataclass(frozen=True)
class Node:
    """A value of a YAML file and its location.

    Attributes:
        value: Text, number, bool or None; or a list or dict of nodes.
        file: The file as the user knows it, or `override KEY=VALUE`.
        line: Line of the key (of the item in a list), counted from 1; 0 in an override.
        written: The characters of the file, for a scalar.
        layer: Rank among the files and overrides that were joined: 0 for the file at the root of `extends`, higher
            for later ones.
    """

    value: Any
    file: str
    line: int = 0
    written: str = ""
    layer: int = 0

    @property
    def where(self) -> str:
        """Location in the form `file:line`."""
        return f"{self.file}:{self.line}" if self.line else self.file

    def children(self) -> Iterator[tuple[str | int, Node]]:
        """Yield the key or index and the node of each child; none for a scalar."""
        if isinstance(self.value, dict):
            yield from self.value.items()
        elif isinstance(self.value, list):
            yield from enumerate(self.value)


@dataclass(frozen=True)
class FileKind:
    """How messages describe one kind of YAML file.

    Attributes:
        name: With its article, such as `a recipe`.
        example: One line of such a file.
        start: How to begin one, as an imperative without the full stop.
    """

    name: str
    example: str
    start: str


def child_of(node: Node | None, step: str | int) -> Node | None:
    """Return the node at a key or index, None if there is none."""
    return dict(node.children()).get(step) if node is not None else None


def node_at(root: Node, path: KeyPath) -> tuple[Node, bool]:
    """Return the node at a path and True, or its nearest ancestor and False."""
    node = root
    for step in path:
        child = child_of(node, step)
        if child is None:
            return node, False
        node = child
    return node, True


def plain(node: Node) -> Plain:
    """Return the node's value as dicts, lists and scalars, without locations."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    scalar: Scalar = node.value
    return scalar


def dotted(path: KeyPath) -> str:
    """Return `("data", "sources", 0)` as users write it: `data.sources.0`."""
    return ".".join(map(str, path))


def show(node: Node) -> str:
    """Return a value as it was written, on one short line without control characters."""
    if isinstance(node.value, dict | list):
        text = json.dumps(plain(node), ensure_ascii=False)
    else:
        text = node.written or "empty"
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def kind_of(value: object) -> str:
    """Return the type of a value in plain words, such as `a whole number`."""
    if value is None:
        return "nothing"
    return "true or false" if isinstance(value, bool) else KIND_NAMES[type(value)]


def parse_scalar(text: str) -> Scalar:
    """Return the value of an unquoted scalar: null, true or false, a number, else text.

    A number with a leading zero (`007`) and one too large for a float (`1e999`) stay text.
    """
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    if NUMBER.fullmatch(text) and not LEADING_ZERO.fullmatch(text):
        number = float(text.replace("_", ""))
        return number if math.isfinite(number) else text
    return text


def shown_path(path: Path) -> str:
    """Return the path for messages: relative if it is below the current folder, else unchanged."""
    normal = os.path.normpath(path)
    relative = os.path.relpath(normal)
    return normal if relative.startswith("..") else relative


def read_yaml(path: Path, shown: str, kind: FileKind) -> tuple[Node, list[Mistake]]:
    """Read a file that contains one mapping.

    Args:
        path: The file.
        shown: Name of the file in messages.
        kind: What the file is, for messages.

    Returns:
        The root node, and mistakes in single keys (duplicates, tags).

    Raises:
        UserError: The file cannot be read, is not YAML, is empty or is not a mapping.
    """
    root, mistakes = parse_yaml(_read_text(path, shown, kind), shown)
    if not isinstance(root.value, dict):
        raise UserError(
            f"{shown} is empty." if root.value is None else f"{shown} contains {kind_of(root.value)}.",
            f"{kind.name} contains keys with values, such as `{kind.example}`.",
            f"{kind.start}.",
            root.where,
        )
    return root, mistakes


def parse_yaml(text: str, shown: str) -> tuple[Node, list[Mistake]]:
    """Parse YAML text of any form.

    Args:
        text: The YAML text.
        shown: Name of the file in messages.

    Returns:
        The root node (value None for empty text), and mistakes in single keys.

    Raises:
        UserError: The text is not YAML.
    """
    try:
        tree = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, shown) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"the file contains the character U+{ord(text[error.position]):04X}.",
            "YAML does not allow control characters; they often come from copying.",
            "delete the character and type this part again.",
            f"{shown}:{line}",
        ) from None
    except RecursionError:
        raise UserError(
            "the file nests too deeply to be read.",
            "the files that Packhorse reads have three or four levels.",
            "remove brackets or indents.",
            f"{shown}:1",
        ) from None
    if tree is None:
        return Node(None, shown, 1), []
    converter = _Converter(shown)
    return converter.node(tree, tree.start_mark.line + 1), converter.mistakes


class _Converter:
    """Converts PyYAML's nodes to ours and collects mistakes."""

    def __init__(self, shown: str) -> None:
        self.shown = shown
        self.mistakes: list[Mistake] = []
        self.open: set[int] = set()

    def node(self, tree: yaml.Node, line: int) -> Node:
        self._check_tag(tree, line)
        if isinstance(tree, yaml.ScalarNode):
            value = parse_scalar(tree.value) if tree.style is None else tree.value
            return Node(value, self.shown, line, tree.value)
        if id(tree) in self.open:
            raise UserError(
                "an alias is used inside the value that it refers to.",
                "the value would never end.",
                "write the value out.",
                f"{self.shown}:{line}",
            )
        self.open.add(id(tree))
        value = self._mapping(tree) if isinstance(tree, yaml.MappingNode) else self._items(tree)
        self.open.discard(id(tree))
        return Node(value, self.shown, line)

    def _items(self, tree: yaml.Node) -> list[Node]:
        return [self.node(item, item.start_mark.line + 1) for item in tree.value]

    def _mapping(self, tree: yaml.MappingNode) -> dict[str, Node]:
        nodes: dict[str, Node] = {}
        for key, value in tree.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self._add(
                    "a key is a list or a section.",
                    "keys are single words.",
                    "write `key: value`, or quote a value that starts with `[` or `{`",
                    line,
                )
            elif key.value == "<<" and key.style is None:
                self._add(
                    "`<<` (merging of anchors) is not supported.",
                    "messages could no longer name the line of a value.",
                    "put the shared part into a separate file and name it with `extends:`",
                    line,
                )
            elif key.value in nodes:
                self._add(
                    f"`{key.value}` is given twice, first in line {nodes[key.value].line}.",
                    "only one of the two could be used.",
                    f"remove one `{key.value}`",
                    line,
                )
            else:
                nodes[key.value] = self.node(value, line)
        return nodes

    def _check_tag(self, tree: yaml.Node, line: int) -> None:
        if tree.tag not in PLAIN_TAGS:
            short = tree.tag.replace("tag:yaml.org,2002:", "!!")
            self._add(
                f"the tag `{short}` is not supported.",
                "only plain values are read, never objects.",
                f"remove `{short}`, or quote text that starts with `!`",
                line,
            )

    def _add(self, fact: str, why: str, fix: str, line: int) -> None:
        self.mistakes.append(Mistake(fact, why, f"{fix}.", f"{self.shown}:{line}"))


def _read_text(path: Path, shown: str, kind: FileKind) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{shown} cannot be read: {error.strerror}.",
            f"the command reads {kind.name} from it.",
            "check the path and its permissions.",
            f"{shown}:1",
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"byte {error.start} (0x{data[error.start]:02X}) is not UTF-8.",
            "YAML files are read as UTF-8 text.",
            "save the file as UTF-8.",
            f"{shown}:{line}",
        ) from None


def _syntax_error(error: yaml.MarkedYAMLError, shown: str) -> UserError:
    mark = error.problem_mark or error.context_mark
    where = f"{shown}:{mark.line + 1}" if mark else f"{shown}:1"
    message = f"{error.context or ''} {error.problem or ''}".strip()
    why = f"the YAML parser reports: {message}."
    for pattern, fact, fix in SYNTAX_MESSAGES:
        if pattern in message:
            return UserError(f"{fact}.", why, f"{fix}.", where)
    return UserError("the file is not YAML.", why, "fix this line or the one above.", where)
