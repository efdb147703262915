"""The recipe's schema as plain dicts and words: what fields a section has, what a field takes, in plain English."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from packhorse.recipe.schema import Recipe
from packhorse.yaml_source.nodes import Node, child_of

JsonSchema = dict[str, Any]
KeyPath = tuple[str | int, ...]
NAME_WORDS = "a name of letters, digits, `.`, `_`, `-`, a letter or digit first, at most 100"
SIMPLE_WORDS = {"string": "text", "boolean": "true or false", "object": "a section", "null": "null"}


@cache
def recipe_schema() -> JsonSchema:
    """JSON schema of the recipe, as pydantic writes it; treat it as read-only."""
    return Recipe.model_json_schema()


def resolve(schema: JsonSchema) -> JsonSchema:
    """Follows a reference; what stands beside the reference (default, description) wins."""
    if "$ref" not in schema:
        return schema
    target: JsonSchema = recipe_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    return {**target, **{key: value for key, value in schema.items() if key != "$ref"}}


def schema_at(path: KeyPath, root: Node) -> JsonSchema | None:
    """Schema of the field at a path; `root`, the recipe as written, says which kind of method is meant."""
    schema: JsonSchema | None = recipe_schema()
    node: Node | None = root
    for step in path:
        schema = _child(_branch(resolve(schema), node), step) if schema is not None else None
        node = child_of(node, step)
    return None if schema is None else _branch(resolve(schema), node)


def fields_of(schema: JsonSchema) -> dict[str, JsonSchema]:
    """The fields of a section, by name; empty for anything else."""
    fields: dict[str, JsonSchema] = schema.get("properties", {})
    return fields


def choices_of(schema: JsonSchema) -> list[str]:
    """The words that a field takes, such as `auto`; empty where it takes any value."""
    if "const" in schema:
        return [str(schema["const"])]
    if "discriminator" in schema:
        return list(schema["discriminator"]["mapping"])
    options = [choice for branch in schema.get("anyOf", []) for choice in choices_of(branch)]
    return [*map(str, schema.get("enum", [])), *options]


def words_for(schema: JsonSchema) -> str:
    """What a field takes, in words: `a whole number above 0 or auto`."""
    if "anyOf" in schema:
        return join_words([words_for(resolve(branch)) for branch in schema["anyOf"]])
    if "discriminator" in schema:
        return f"{join_words(choices_of(schema))}, or a section with `kind`"
    if choices := choices_of(schema):
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if "pattern" in schema:
        return NAME_WORDS
    kind = schema.get("type", "")
    if kind in {"integer", "number"}:
        return ("a whole number" if kind == "integer" else "a number") + _bounds(schema)
    return _list_words(schema) if kind == "array" else SIMPLE_WORDS[kind]


def join_words(words: Sequence[str]) -> str:
    """Joins words as a sentence does: `a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def paths_named(name: str) -> list[str]:
    """Dotted paths of every field with this name, to tell where a misplaced key belongs."""
    return [path for path, _ in walk_fields() if path.rpartition(".")[2] == name]


def kinds_with_field(path: KeyPath) -> list[str]:
    """Kinds of a union that have a field of this name, where another kind was chosen."""
    mapping = (schema_at(path[:-1], Node({}, "")) or {}).get("discriminator", {}).get("mapping", {})
    return [kind for kind, reference in mapping.items() if path[-1] in fields_of(resolve({"$ref": reference}))]


def walk_fields(schema: JsonSchema | None = None, prefix: str = "") -> Iterator[tuple[str, JsonSchema]]:
    """Every field that sits in a section (not in a list), with its dotted path, in the order of the schema."""
    for name, field in fields_of(recipe_schema() if schema is None else schema).items():
        field_schema = resolve(field)
        yield f"{prefix}{name}", field_schema
        for part in [field_schema, *map(resolve, field_schema.get("oneOf", []))]:
            yield from walk_fields(part, f"{prefix}{name}.")


def _bounds(schema: JsonSchema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']}"
    return f" of {low} or more" if low is not None else ""


def _list_words(schema: JsonSchema) -> str:
    if "prefixItems" in schema:
        parts = schema["prefixItems"]
        return f"a list of {len(parts)} items, each {words_for(resolve(parts[0]))}"
    item = resolve(schema["items"])
    kinds = {"string": "texts", "object": "sections"}
    return ("a list of " if schema.get("minItems", 0) == 0 else "a list of one or more ") + kinds[item["type"]]


def _branch(schema: JsonSchema, node: Node | None) -> JsonSchema:
    """Of a union, the kind that the recipe names; the union itself where it names none."""
    if "discriminator" not in schema:
        return schema
    kind = child_of(node, schema["discriminator"]["propertyName"])
    reference = schema["discriminator"]["mapping"].get(str(kind.value)) if kind else None
    return resolve({"$ref": reference}) if reference else schema


def _child(schema: JsonSchema, step: str | int) -> JsonSchema | None:
    if isinstance(step, str) and step in fields_of(schema):
        return fields_of(schema)[step]
    if isinstance(step, str) and "discriminator" in schema and step == schema["discriminator"]["propertyName"]:
        return {"enum": choices_of(schema)}
    if isinstance(step, int) and step < len(schema.get("prefixItems", [])):
        found: JsonSchema = schema["prefixItems"][step]
        return found
    if isinstance(step, int) and "items" in schema:
        return dict(schema["items"])
    branches = map(resolve, schema.get("anyOf", []))
    return next((child for branch in branches if (child := _child(branch, step)) is not None), None)
