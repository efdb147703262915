"""Load a recipe: join the file, the files that it extends and the overrides, and report all mistakes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from packhorse.errors import Mistake, UserError
from packhorse.recipe.rules.training import rule_findings
from packhorse.recipe.schema import Recipe, recipe_view
from packhorse.recipe.shipped import find_recipe, unknown_recipe
from packhorse.yaml_source.environment import environment_mistakes, secret_mistakes
from packhorse.yaml_source.findings import Finding, file_and_line, overlaps, place, schema_findings
from packhorse.yaml_source.nodes import (
    FileKind,
    KeyPath,
    Node,
    kind_of,
    parse_scalar,
    parse_yaml,
    plain,
    read_yaml,
    shown_path,
)
from packhorse.yaml_source.overrides import Override, at_layer, merge, parse_override, set_override

RECIPE_FILE = FileKind(
    "a recipe", "name: my-run", "start from a shipped one: packhorse recipes copy quickstart/full my.yaml"
)
ALTERNATIVES = {"steps": "epochs", "epochs": "steps"}
WHO_READS_A_RECIPE = (
    "the recipe is written into the run folder, the plan and W&B, and all users of a machine can see command lines."
)
# Values for missing keys, so that the rules can check the rest; findings about these keys are not reported.
PLACEHOLDERS: tuple[tuple[KeyPath, Any], ...] = (
    (("name",), "unnamed"),
    (("model",), {}),
    (("data",), {}),
    (("data", "sources"), [{}]),
    (("optimizer",), {}),
    (("optimizer", "learning_rate"), 1e-4),
)


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, check_environment: bool = True) -> Recipe:
    """Load a recipe from a path or by a shipped name such as `quickstart/full`.

    Args:
        name_or_path: A YAML file, or the name of a shipped recipe; a file of the user has priority.
        overrides: Texts such as `optimizer.learning_rate=1e-4`, which have priority over the file.
        check_environment: Whether every variable that the recipe refers to must be set; off if it is only shown.

    Returns:
        The complete recipe. `${env:NAME}` stays a reference, so that the recipe contains no secret.

    Raises:
        UserError: The recipe cannot be read, or has mistakes; all are reported at once, by file and line.
    """
    path = Path(name_or_path)
    file = path if path.is_file() else find_recipe(name_or_path)
    if file is None:
        raise unknown_recipe(name_or_path)
    return _resolve(*_read_chain(file, ()), overrides, check_environment)


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return the recipe with other values, checked as a whole.

    Raises:
        UserError: An override cannot be read, or the result has mistakes.
    """
    return _resolve(*parse_yaml(dump_recipe(recipe), "the run's recipe"), overrides, check_environment=True)


def overridden_fields(overrides: Sequence[str]) -> list[str]:
    """Return the dotted field that each override sets.

    Raises:
        UserError: An override cannot be read.
    """
    return [".".join(parse_override(text).keys) for text in overrides]


def dump_recipe(recipe: Recipe) -> str:
    """Return the whole recipe as YAML, with every default; loading it gives an equal recipe."""
    return yaml.dump(recipe.model_dump(mode="python"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_field(key: str, value: Any) -> str:  # noqa: ANN401
    """Return `key: value` as YAML; a list of sections on several lines, anything else on one."""
    lines = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    style, width = (None, 120) if lines else (True, 10**6)
    field = {key: value}
    text = yaml.dump(
        field, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=style
    ).rstrip()
    return text.replace("\n", "\n  ") if lines else text[1:-1]


class _Dumper(yaml.SafeDumper):
    """Quotes text that our reader would take for a number, null or a truth value."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "'" if parse_scalar(text) != text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def parse_recipe(root: Node, mistakes: Sequence[Mistake] = ()) -> Recipe:
    """Return the recipe of a tree of nodes that is not a file of the user, such as an imported one.

    Raises:
        UserError: `mistakes` are given, or the tree has others; all are reported at once, by file and line.
    """
    return _resolve(root, list(mistakes), (), check_environment=False)


def refused_values(root: Node) -> list[KeyPath]:
    """Return the fields of a tree of nodes whose values have a type that the recipe does not take."""
    root = _with_method_section(root)
    try:
        Recipe.model_validate(plain(root))
    except ValidationError as error:
        return [path for finding in schema_findings(error, root, recipe_view()) for path in finding.paths]
    return []


# --- files and overrides -------------------------------------------------------------------------------------------


def _read_chain(path: Path, above: tuple[Path, ...]) -> tuple[Node, list[Mistake]]:
    """Read a file and the files that it extends; `above` are the files that led here."""
    root, mistakes = read_yaml(path, shown_path(path), RECIPE_FILE)
    keys = {key: node for key, node in root.value.items() if key != "extends"}
    if "extends" not in root.value:
        return replace(root, value=keys), mistakes
    extends: Node = root.value["extends"]
    base_path = _extended_file(extends, path)
    chain = (*above, path.resolve())
    if base_path.resolve() in chain:
        loop = " → ".join(file.name for file in (*chain, base_path))
        raise UserError(
            f"{shown_path(path)} extends itself: {loop}.",
            "the chain of `extends` would never end.",
            "remove one `extends`.",
            extends.where,
        )
    base, base_mistakes = _read_chain(base_path, chain)
    top = at_layer(replace(root, value=keys), base.layer + 1)
    given = {key for key, node in top.value.items() if node.value is not None}
    return merge(_without_alternatives(base, given), top), [*base_mistakes, *mistakes]


def _extended_file(extends: Node, path: Path) -> Path:
    if not isinstance(extends.value, str):
        raise UserError(
            f"extends is {kind_of(extends.value)}, not a file.",
            "a recipe extends one other recipe.",
            "write `extends: other.yaml` or a shipped name.",
            extends.where,
        )
    neighbour = path.parent / extends.value
    file = neighbour if neighbour.is_file() else find_recipe(extends.value)
    if file is None:
        mistake = unknown_recipe(extends.value).mistakes[0]
        raise UserError(
            f"extends names {extends.value}, and there is no such file next to {path.name} and no such shipped recipe.",
            mistake.why,
            mistake.fix,
            extends.where,
        )
    return file


def _without_alternatives(root: Node, given: set[str]) -> Node:
    """Remove `epochs` if a later layer gives `steps` alone, and the reverse."""
    dropped = {other for key, other in ALTERNATIVES.items() if key in given and other not in given}
    return replace(root, value={key: node for key, node in root.value.items() if key not in dropped})


def _with_method_section(root: Node) -> Node:
    """Write `method: lora` as `method: {kind: lora}`, so that there is one form to check."""
    method = root.value.get("method")
    if method is None or not isinstance(method.value, str):
        return root
    return replace(root, value={**root.value, "method": replace(method, value={"kind": method}, written="")})


def _apply(root: Node, texts: Sequence[str]) -> tuple[Node, list[Mistake]]:
    """Set the overrides, later ones over earlier ones; `steps` replaces `epochs` and the reverse."""
    mistakes: list[Mistake] = []
    overrides: list[Override] = []
    for text in texts:
        try:
            overrides.append(parse_override(text))
        except UserError as error:
            mistakes.extend(error.mistakes)
    root = _without_alternatives(root, {override.keys[0] for override in overrides if override.node.value is not None})
    for override in overrides:
        try:
            root = set_override(_with_method_section(root), override)
        except UserError as error:
            mistakes.extend(error.mistakes)
    return _with_method_section(root), mistakes


# --- checks --------------------------------------------------------------------------------------------------------


def _resolve(root: Node, mistakes: list[Mistake], overrides: Sequence[str], check_environment: bool) -> Recipe:
    root, override_mistakes = _apply(root, overrides)
    recipe, findings = _validate(root)
    mistakes += override_mistakes
    mistakes += [place(finding, root) for finding in findings]
    mistakes += secret_mistakes(root, WHO_READS_A_RECIPE)
    if check_environment:
        mistakes += environment_mistakes(root)
    if mistakes or recipe is None:
        raise UserError.of(sorted(dict.fromkeys(mistakes), key=file_and_line))
    return recipe


def _validate(root: Node) -> tuple[Recipe | None, list[Finding]]:
    """Check types, names and rules; the recipe is None if types or names are wrong."""
    try:
        recipe = Recipe.model_validate(plain(root))
    except ValidationError as error:
        findings = schema_findings(error, root, recipe_view())
        return None, [*findings, *_rules_of_the_rest(root, findings)]
    return recipe, rule_findings(recipe)


def _rules_of_the_rest(root: Node, findings: list[Finding]) -> list[Finding]:
    """Return the rules that the valid part breaks, so that the user sees them in the same run."""
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
    """Remove a key; for an item of a list the whole list, because the other items would move."""
    while isinstance(path[-1], int):
        path = path[:-1]
    parent: Any = values
    for step in path[:-1]:
        parent = parent[step] if isinstance(step, int) else parent.get(step, {})
    parent.pop(path[-1], None)
