"""The recipe that an import builds: values with the line of the other trainer's file, and comments."""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from packhorse.recipe.aliases import counterpart, line_for_value
from packhorse.recipe.load import dump_field
from packhorse.recipe.schema import Recipe, recipe_view
from packhorse.secrets import mask
from packhorse.yaml_source.nodes import KeyPath, Node, parse_scalar, parse_yaml, plain, show

TABLE = Path(__file__).with_name("trainers.toml")
COMMENT_COLUMNS = 110
SECRET_NAME = re.compile(r"(^|_)(token|key|secret|password)$")


@cache
def trainers() -> dict[str, Any]:
    """Return the table of trainers, and of their templates, formats, columns and data sets."""
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


@dataclass
class Draft:
    """A recipe under construction.

    Attributes:
        file: The other trainer's file, as the user knows it.
        trainer: Name of the trainer in the table.
        num_gpus: Number of GPUs that the file was meant for; it does not say.
        keys: Keys that nothing has read yet, by their name in the alias table: name in the file, and value.
        values: Values of the recipe, by dotted field.
        notes: Comments above a field.
        unmatched: Keys without a counterpart, as written, with the reason.
        typed: Name in the file of the key that set a field.
    """

    file: str
    trainer: str
    num_gpus: int
    keys: dict[str, tuple[str, Node]]
    values: dict[str, Node] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    unmatched: list[tuple[str, str]] = field(default_factory=list)
    typed: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name of the trainer, as it writes it."""
        return str(trainers()[self.trainer]["title"])

    def take(self, *names: str) -> Node | None:
        """Return the value of the first of these keys that the file sets, which is then read; None if it sets none."""
        return next((self.keys.pop(name)[1] for name in names if name in self.keys), None)

    def take_field(self, path: str) -> Node | None:
        """Return the value of the key that sets this field of a recipe, or the trainer's default; None if neither."""
        name = next((name for name in self.keys if field_of(name) == path), None)
        if name is not None:
            self.typed[path], node = self.keys.pop(name)
            return node
        default = trainers()[self.trainer]["defaults"].get(path)
        if default is None:
            return None
        self.note(path, f"default of {self.title}; the file does not set it")
        return Node(parse_scalar(default) if isinstance(default, str) else default, self.file, 1, str(default))

    def set(self, path: str, value: Any, source: Node | None = None, note: str = "") -> None:  # noqa: ANN401
        """Set a field to a plain value, or to a node of the file; `source` is the node that the value comes from."""
        self.values[path] = value if isinstance(value, Node) else node_of(value, source or Node(None, self.file, 1))
        if note:
            self.note(path, note)

    def set_from(self, path: str, node: Node, name: str = "") -> None:
        """Set a field to a value of the file, or to our word for it; `name` is its key."""
        line = line_for_value(path, node.value)
        if line is None:
            self.set(path, node)
            return
        target, _, value = line.partition(": ")
        self.set(target, plain(parse_yaml(value, self.file)[0]), node, f"from `{name or path}: {show(node)}`")

    def note(self, path: str, text: str) -> None:
        """Add a comment above a field."""
        if text not in self.notes.setdefault(path, []):
            self.notes[path].append(text)

    def omit(self, name: str, node: Node, why: str = "") -> None:
        """Add a key to those without a counterpart."""
        part = trainers()[self.trainer].get("parts", {}).get(name.partition(".")[0])
        reason = why or part or counterpart("sentences", name.rpartition(".")[2]) or "a recipe has no such field"
        value = "***" if SECRET_NAME.search(name) else mask(show(node))
        if (f"{name}: {value}", reason) not in self.unmatched:
            self.unmatched.append((f"{name}: {value}", reason))

    def root(self) -> Node:
        """Return the recipe as the loader reads it, with the lines of the other trainer's file."""
        return node_of(self._nested(), Node(None, self.file, 1))

    def text(self, intro: Iterable[str]) -> str:
        """Return the recipe as YAML with its comments, those of `intro` first."""
        lines = [*_comment(intro), ""]
        for key, value in self._nested().items():
            space = [""] if isinstance(value, dict) else []
            lines += [*space, *_yaml(key, value, (), self.notes), *space]
        if self.unmatched:
            lines += ["", f"# --- keys of {self.file} without a counterpart ---"]
            lines += [line for key, why in self.unmatched for line in _comment([f"{key} -> {why}"])]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"

    def _nested(self) -> dict[str, Any]:
        """Return sections with their values, the sections in the order of the schema."""
        nested: dict[str, Any] = {}
        order = list(Recipe.model_fields)
        for path, node in sorted(self.values.items(), key=lambda item: order.index(item[0].split(".")[0])):
            *sections, name = path.split(".")
            section = nested
            for step in sections:
                section = section.setdefault(step, {})
            section[name] = node
        return nested


def node_of(value: Any, source: Node) -> Node:  # noqa: ANN401
    """Return a plain value as nodes that are all in the line of `source`; nodes inside it stay unchanged."""
    if isinstance(value, Node):
        return value
    if isinstance(value, dict):
        return Node({key: node_of(child, source) for key, child in value.items()}, source.file, source.line)
    if isinstance(value, list):
        return Node([node_of(child, source) for child in value], source.file, source.line)
    return Node(value, source.file, source.line, "null" if value is None else str(value))


@cache
def field_of(name: str) -> str | None:
    """Return the field of a recipe that takes the value of another trainer's key; None if there is none."""
    known = counterpart("fields", name)
    if known is not None:
        return known
    # A field of an objective applies to that objective alone, whatever the other trainer's key is for.
    named = {path for path in recipe_view().paths_named(name) if not path.startswith("objective.")}
    return name if name in named else named.pop() if len(named) == 1 else None


def _yaml(key: str, value: Any, above: KeyPath, notes: dict[str, list[str]]) -> Iterator[str]:  # noqa: ANN401
    indent = "  " * len(above)
    path = (*above, key)
    yield from _comment(notes.get(".".join(map(str, path)), []), indent)
    if isinstance(value, dict):
        yield f"{indent}{key}:"
        for name, child in value.items():
            yield from _yaml(name, child, path, notes)
    else:
        yield textwrap.indent(dump_field(key, plain(value)), indent)


def _comment(texts: Iterable[str], indent: str = "") -> Iterator[str]:
    for text in texts:
        yield from textwrap.wrap(
            text,
            COMMENT_COLUMNS,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}#   ",
            break_on_hyphens=False,
        )
