"""Load a site profile; one error lists every mistake in it, with file and line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from packhorse.errors import Mistake, UserError
from packhorse.launching.slurm.site import SITE_FILE, SiteProfile
from packhorse.recipe.findings import dotted, node_at, show
from packhorse.recipe.schema_view import KeyPath, join_words
from packhorse.recipe.secrets import secret_mistakes
from packhorse.recipe.shipped import shipped_folder
from packhorse.yaml_source.nodes import Node, kind_of, parse_yaml, plain

SCHEMA: dict[str, Any] = SiteProfile.model_json_schema()
TYPES = {"string": "text", "boolean": "true or false", "integer": "a whole number", "number": "a number"}


def load_site(name_or_path: str | None) -> SiteProfile:
    """Load a profile.

    Args:
        name_or_path: A YAML file, or the name of a shipped profile; None for `site.yaml` in this folder.

    Raises:
        UserError: There is no such profile, or it has mistakes.
    """
    path = _locate(name_or_path)
    shown = os.path.relpath(path) if not os.path.relpath(path).startswith("..") else str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{shown} cannot be read: {error}.",
            "it describes the cluster.",
            "give a text file that you may read.",
            f"{shown}:1",
        ) from None
    root, mistakes = parse_yaml(text, shown)
    if not isinstance(root.value, dict):
        raise UserError(
            f"the file holds {kind_of(root.value)}, not keys with values.",
            "a site profile is a mapping such as `partition: gpu`.",
            f"copy a shipped one ({join_words(shipped_sites())}), or run `packhorse site`.",
            f"{shown}:1",
        )
    return _checked(root, mistakes)


def shipped_sites() -> list[str]:
    """Return the names of the shipped profiles."""
    return sorted(path.stem for path in (shipped_folder("slurm") / "sites").glob("*.yaml"))


def _locate(name_or_path: str | None) -> Path:
    path = Path(name_or_path or SITE_FILE)
    if path.is_file():
        return path
    shipped = shipped_folder("slurm") / "sites" / f"{path.name.removesuffix('.yaml')}.yaml"
    if name_or_path and path.name == name_or_path and shipped.is_file():
        return shipped
    if not name_or_path:
        raise UserError(
            f"there is no {SITE_FILE} here, and --site is not given.",
            "it defines how jobs are requested on this cluster: partition, account, GPUs per node.",
            "write a first one with `packhorse site`, read it, and try again.",
        )
    close = difflib.get_close_matches(path.stem, shipped_sites(), n=1)
    raise UserError(
        f"there is no file {name_or_path}, and no shipped profile of that name.",
        f"shipped are {', '.join(shipped_sites())}.",
        f"write --site {close[0]}." if close else "give the path of a profile; `packhorse site` writes one.",
    )


def _checked(root: Node, mistakes: list[Mistake]) -> SiteProfile:
    profile = None
    try:
        profile = SiteProfile.model_validate(plain(root))
    except ValidationError as error:
        mistakes += _mistakes(error, root)
    mistakes += [_of_site(mistake) for mistake in secret_mistakes(root)]
    if mistakes or profile is None:
        raise UserError.of(sorted(dict.fromkeys(mistakes), key=_line))
    return profile


def _mistakes(error: ValidationError, root: Node) -> Iterator[Mistake]:
    for detail in error.errors(include_url=False, include_context=False):
        path: KeyPath = tuple(step for step in detail["loc"] if step != "[key]")
        node, _ = node_at(root, path)
        if detail["type"] == "value_error":
            fact = detail["msg"].removeprefix("Value error, ")
            yield Mistake(f"{fact}.", "each setting has one place.", "remove one of the two.", f"{node.file}:1")
        elif detail["type"] == "missing":
            yield Mistake(f"{dotted(path)} is missing.", _purpose(path), f"add {dotted(path)}.", node.where)
        elif detail["type"] == "extra_forbidden":
            yield _unknown(path, node)
        else:
            value = str(path[-1]) if detail["loc"][-1] == "[key]" else show(node)
            yield Mistake(
                f"{dotted(path)} is {value!a}; it takes {_takes(path, detail['loc'][-1] == '[key]')}.",
                _purpose(path),
                f"write {dotted(path)} in that form.",
                node.where,
            )


def _unknown(path: KeyPath, node: Node) -> Mistake:
    fields = list((_schema_at(path[:-1]) or {}).get("properties", {}))
    close = difflib.get_close_matches(str(path[-1]), fields, n=1)
    return Mistake(
        f"{dotted(path)} is not a field of a site profile.",
        "an unknown key would be ignored without a message.",
        f"write `{close[0]}`." if close else f"remove it, or use one of {', '.join(fields)}.",
        node.where,
    )


def _of_site(mistake: Mistake) -> Mistake:
    why = "the profile becomes part of every job script, which other users of the cluster may read."
    return Mistake(mistake.fact, why, mistake.fix, mistake.where)


def _schema_at(path: KeyPath) -> dict[str, Any] | None:
    schema: dict[str, Any] | None = SCHEMA
    for step in path:
        if schema is None:
            return None
        options = [_resolved(option) for option in schema.get("anyOf", [schema])]
        children = [
            option.get("properties", {}).get(step)
            or next(iter(option.get("patternProperties", {}).values()), None)
            or option.get("items")
            for option in options
        ]
        schema = next((_resolved(child) for child in children if isinstance(child, dict)), None)
    return schema


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    return {**SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], **schema}


def _takes(path: KeyPath, of_key: bool) -> str:
    if of_key:
        return "names of variables: letters, digits and `_`, no digit first"
    schema = _schema_at(path) or {}
    options = [option for option in map(_resolved, schema.get("anyOf", [schema])) if option.get("type") != "null"]
    return join_words([_describe(option) for option in options])


def _describe(schema: dict[str, Any]) -> str:
    if "takes" in schema:
        return str(schema["takes"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "pattern" in schema:
        return "letters, digits and . _ -, a letter or digit first"
    kind = schema.get("type", "")
    if kind in ("integer", "number"):
        low, high = schema.get("minimum"), schema.get("maximum")
        least = f" above {schema['exclusiveMinimum']}" if "exclusiveMinimum" in schema else ""
        return TYPES[kind] + (f" from {low} to {high}" if high is not None else least)
    return {"array": "a list", "object": "a section"}.get(kind) or TYPES.get(kind, "another value")


def _purpose(path: KeyPath) -> str:
    about = str((_schema_at(path) or {}).get("description", "")).split("\n", maxsplit=1)[0]
    return f"it means: {about}" if about or len(path) < 2 else _purpose(path[:-1])


def _line(mistake: Mistake) -> int:
    line = mistake.where.rpartition(":")[2]
    return int(line) if line.isdigit() else 0
