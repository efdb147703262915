"""Loads a recipe: layers joined, every mistake found at once; and writes it out again."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import yaml
from pydantic import ValidationError

from packhorse.errors import Mistake, UserError
from packhorse.recipe.findings import Finding, overlaps, place, schema_findings
from packhorse.recipe.layers import apply_overrides, read_layers
from packhorse.recipe.locate import ENVIRONMENT_REFERENCE
from packhorse.recipe.rules import rule_findings
from packhorse.recipe.schema import Recipe
from packhorse.recipe.schema_view import KeyPath
from packhorse.recipe.secrets import secret_mistakes
from packhorse.yaml_source.nodes import Node, parse_scalar, parse_yaml, plain

ANY_REFERENCE = re.compile(r"\$\{[^}]*\}?")
# Stand in for what is missing while the rules look at the rest; findings about them are not told.
PLACEHOLDERS: tuple[tuple[KeyPath, Any], ...] = (
    (("name",), "unnamed"),
    (("model",), {}),
    (("data",), {}),
    (("data", "sources"), [{}]),
    (("optimizer",), {}),
    (("optimizer", "learning_rate"), 1e-4),
)


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, check_environment: bool = True) -> Recipe:
    """Loads a recipe from a path or by a shipped name such as `quickstart/full`.

    Args:
        name_or_path: A YAML file, or a shipped recipe's name.
        overrides: `optimizer.learning_rate=1e-4`, and so on; they win over the file.
        check_environment: Whether every variable that the recipe names must be set; off where it is only shown.

    Returns:
        The recipe, complete. `${env:NAME}` stays a reference, so no secret is in it.

    Raises:
        UserError: The recipe cannot be read, or has mistakes; all are told at once, by file and line.
    """
    return _resolve(*read_layers(name_or_path), overrides, check_environment)


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The same with other values, checked as a whole.

    Raises:
        UserError: As `load_recipe`.
    """
    return _resolve(*parse_yaml(dump_recipe(recipe), "the run's recipe"), overrides, check_environment=True)


def _resolve(root: Node, mistakes: list[Mistake], overrides: Sequence[str], check_environment: bool) -> Recipe:
    root, override_mistakes = apply_overrides(root, overrides)
    mistakes += override_mistakes
    root = _with_method_section(root)
    recipe, findings = validate(root)
    mistakes += [place(finding, root) for finding in findings]
    mistakes += secret_mistakes(root)
    if check_environment:
        mistakes += environment_mistakes(root)
    if mistakes or recipe is None:
        raise UserError.of(sorted(dict.fromkeys(mistakes), key=_file_and_line))
    return recipe


def validate(root: Node) -> tuple[Recipe | None, list[Finding]]:
    """Checks types, names and rules; the recipe is None where types or names are wrong."""
    try:
        recipe = Recipe.model_validate(plain(root))
    except ValidationError as error:
        findings = schema_findings(error, root)
        return None, [*findings, *_rules_of_the_rest(root, findings)]
    return recipe, rule_findings(recipe)


def environment_mistakes(root: Node) -> list[Mistake]:
    """Finds references to variables that are not set, and `${…}` that is no such reference."""
    return [mistake for node in _texts(root) for mistake in _reference_mistakes(node)]


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, every default written out; loading it gives an equal recipe."""
    values = recipe.model_dump(mode="python")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Quotes text that our reader would take for a number, null or a truth value."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "'" if parse_scalar(text) != text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def _with_method_section(root: Node) -> Node:
    """Writes `method: lora` as `method: {kind: lora}`, so that there is one form to check."""
    method = root.value.get("method")
    if method is None or not isinstance(method.value, str):
        return root
    return replace(root, value={**root.value, "method": replace(method, value={"kind": method}, written="")})


def _rules_of_the_rest(root: Node, findings: list[Finding]) -> list[Finding]:
    """Rules on what is sound, so that the user need not load once more to see them."""
    values: Any = plain(root)
    for path in [path for finding in findings for path in finding.paths]:
        _drop(values, path)
    for path, placeholder in PLACEHOLDERS:
        parent = values if len(path) == 1 else values[path[0]]
        parent.setdefault(path[-1], placeholder)
    try:
        rest = Recipe.model_validate(values)
    except ValidationError:
        return []
    return [finding for finding in rule_findings(rest) if not overlaps(finding, findings)]


def _drop(values: dict[str, Any], path: KeyPath) -> None:
    """Removes a key; for an item of a list the whole list, as the other items would move."""
    while isinstance(path[-1], int):
        path = path[:-1]
    parent: Any = values
    for step in path[:-1]:
        parent = parent[step] if isinstance(step, int) else parent.get(step, {})
    parent.pop(path[-1], None)


def _texts(node: Node) -> Iterator[Node]:
    if isinstance(node.value, str):
        yield node
    elif isinstance(node.value, dict | list):
        children = node.value.values() if isinstance(node.value, dict) else node.value
        for child in children:
            yield from _texts(child)


def _reference_mistakes(node: Node) -> Iterator[Mistake]:
    for reference in ANY_REFERENCE.findall(node.value):
        name = ENVIRONMENT_REFERENCE.fullmatch(reference)
        if name is None:
            yield Mistake(
                f"`{reference}` is not understood.",
                "only the environment can be referred to.",
                "write ${env:NAME}.",
                node.where,
            )
        elif name.group(1) not in os.environ:
            yield Mistake(
                f"the environment has no variable {name.group(1)}.",
                "the recipe refers to it.",
                f"export {name.group(1)}=… before you run this.",
                node.where,
            )


def _file_and_line(mistake: Mistake) -> tuple[bool, str, int]:
    file, _, line = mistake.where.rpartition(":")
    is_override = mistake.where.startswith("override ")
    return is_override, file, int(line) if line.isdigit() else 0
