"""YAML text as nodes that know their file and line, with scalars read as YAML 1.2 means them.

PyYAML's own reading follows YAML 1.1: there `1e-4` is text, `off` is false and `010` is eight.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from packhorse.errors import Mistake, UserError

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
NUMBER = re.compile(r"[-+]?([0-9]+(_[0-9]+)*(\.([0-9]+(_[0-9]+)*)?)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
PLAIN_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")
PLAIN_ENGLISH = (
    ("'\\t'", "a tab stands where YAML wants spaces", "indent with spaces"),
    ("mapping values are not allowed", "a second `: ` stands in a value", "quote the value, or mend the indent"),
    ("could not find expected ':'", "a key has no `:` behind it", "write `key: value`"),
    ("found undefined alias", "an alias (`*name`) names no anchor (`&name`)", "quote text that starts with `*`"),
    ("expected <block end>", "the indent does not line up with the lines above", "indent keys of a section equally"),
    ("while scanning a quoted scalar", "a quote is opened and not closed", "close the quote"),
    ("expected a single document", "the file holds several documents", "remove the second `---`"),
    ("cannot start any token", "a value starts with a character that YAML keeps for itself", "quote the value"),
)


@dataclass(frozen=True)
class Node:
    """A value of a YAML file and where it stands.

    Attributes:
        value: Text, number, bool or None; or a list or dict of nodes.
        file: The file as the user knows it, or `override KEY=VALUE`.
        line: Line of the key (of the item in a list), counted from 1; 0 in an override.
        written: The characters of the file, for a scalar.
        layer: How late it was given: 0 the file at the root of `extends`, more for files above it and overrides.
    """

    value: Any
    file: str
    line: int = 0
    written: str = ""
    layer: int = 0

    @property
    def where(self) -> str:
        """`file:line`, as messages say it."""
        return f"{self.file}:{self.line}" if self.line else self.file


def child_of(node: Node | None, step: str | int) -> Node | None:
    """The node behind a key or at an index; None where there is none."""
    found: Node | None = None
    if node is not None and isinstance(node.value, dict):
        found = node.value.get(step)
    elif node is not None and isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
        found = node.value[step]
    return found


def plain(node: Node) -> Plain:
    """The node's value as dicts, lists and scalars, without places."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    scalar: Scalar = node.value
    return scalar


def parse_scalar(text: str) -> Scalar:
    """Reads an unquoted scalar: null, true or false, a number, else text.

    A number with a leading zero (`007`) and one too large to hold (`1e999`) stay text.
    """
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    if NUMBER.fullmatch(text) and not LEADING_ZERO.fullmatch(text):
        number = float(text.replace("_", ""))
        return number if math.isfinite(number) else text
    return text


def read_yaml(path: Path, shown: str) -> tuple[Node, list[Mistake]]:
    """Reads a file that holds one mapping.

    Args:
        path: The file.
        shown: Its name in messages.

    Returns:
        The root node, and what is wrong with single keys (given twice, odd tags).

    Raises:
        UserError: The file cannot be read, is no YAML, is empty or is not a mapping.
    """
    root, mistakes = parse_yaml(_read_text(path, shown), shown)
    if root.value is None:
        raise UserError(
            f"{shown} is empty.",
            "a recipe says at least name, model, data and optimizer.",
            "start from a shipped one: packhorse recipes copy quickstart/full my.yaml.",
            f"{shown}:1",
        )
    if not isinstance(root.value, dict):
        raise UserError(
            f"the file holds {kind_of(root.value)}, not keys with values.",
            "a recipe is a mapping such as `name: my-run`.",
            "write `key: value` lines.",
            root.where,
        )
    return root, mistakes


def parse_yaml(text: str, shown: str) -> tuple[Node, list[Mistake]]:
    """As `read_yaml`, from text and of any form.

    Raises:
        UserError: The text is no YAML.
    """
    try:
        tree = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, shown) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"the character U+{ord(text[error.position]):04X} cannot stand in YAML.",
            "it is a control character, often left over from copying.",
            "remove it and type the place anew.",
            f"{shown}:{line}",
        ) from None
    except RecursionError:
        raise UserError(
            "the file nests too deeply to be read.",
            "a recipe is three or four levels deep.",
            "remove brackets or indents.",
            f"{shown}:1",
        ) from None
    if tree is None:
        return Node(None, shown, 1), []
    reader = _Reader(shown)
    return reader.node(tree, tree.start_mark.line + 1), reader.mistakes


def kind_of(value: object) -> str:
    """What a value is, in plain words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    names = {int: "a whole number", float: "a number", str: "text", list: "a list", tuple: "a list", dict: "a section"}
    return names[type(value)]


class _Reader:
    """Turns composed nodes into ours; gathers mistakes on the way."""

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
                "an alias stands inside the value that it names.",
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
        found: dict[str, Node] = {}
        for key, value in tree.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self._add(
                    "a list or section stands where a key should.",
                    "keys are single words.",
                    "write `key: value`, or quote a value that starts with `[` or `{`",
                    line,
                )
            elif key.value == "<<" and key.style is None:
                self._add(
                    "`<<` (merging of anchors) is not read here.",
                    "the line of a value would be lost.",
                    "put the shared part into a file of its own and name it with `extends:`",
                    line,
                )
            elif key.value in found:
                self._add(
                    f"`{key.value}` is given twice, first in line {found[key.value].line}.",
                    "only one of the two could be used.",
                    f"remove one `{key.value}`",
                    line,
                )
            else:
                found[key.value] = self.node(value, line)
        return found

    def _check_tag(self, tree: yaml.Node, line: int) -> None:
        if tree.tag not in PLAIN_TAGS:
            short = tree.tag.replace("tag:yaml.org,2002:", "!!")
            self._add(
                f"the tag `{short}` is not read here.",
                "a recipe holds plain values only, never objects.",
                f"remove `{short}`, or quote text that starts with `!`",
                line,
            )

    def _add(self, fact: str, why: str, fix: str, line: int) -> None:
        self.mistakes.append(Mistake(fact, why, f"{fix}.", f"{self.shown}:{line}"))


def _read_text(path: Path, shown: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{shown} cannot be read: {error.strerror}.",
            "the recipe stands in this file.",
            "check the path and its permissions.",
            f"{shown}:1",
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"byte {error.start} (0x{data[error.start]:02X}) is not UTF-8.",
            "recipes are read as UTF-8 text.",
            "save the file as UTF-8.",
            f"{shown}:{line}",
        ) from None


def _syntax_error(error: yaml.MarkedYAMLError, shown: str) -> UserError:
    mark = error.problem_mark or error.context_mark
    where = f"{shown}:{mark.line + 1}" if mark else f"{shown}:1"
    said = f"{error.context or ''} {error.problem or ''}".strip()
    for pattern, fact, fix in PLAIN_ENGLISH:
        if pattern in said:
            return UserError(f"{fact}.", f"the YAML parser says: {said}.", f"{fix}.", where)
    return UserError(
        "the file is not YAML.", f"the YAML parser says: {said}.", "mend this line or the one above.", where
    )
