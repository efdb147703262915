"""Base class of the models that YAML files are checked against, and their JSON schema in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from packhorse.yaml_source.nodes import KeyPath, Node, child_of

JsonSchema = dict[str, Any]
KeyFix = Callable[[KeyPath, Node], tuple[str, KeyPath] | None]
ValueFix = Callable[[KeyPath, Node], str | None]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
NAME_WORDS = "a name of letters, digits, `.`, `_`, `-`, a letter or digit first, at most 100"
TYPE_WORDS = {"string": "text", "boolean": "true or false", "object": "a section", "null": "null"}


class Section(BaseModel):
    """Part of a YAML file: immutable and strict; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True)


class SchemaView:
    """JSON schema of a model, with the questions that messages and reference pages ask about it.

    Attributes:
        root: The JSON schema as pydantic writes it; read-only.
        title: What messages call the whole file, such as `the recipe`.
        extra_keys: Keys at the top of the file that are not fields of the model.
        key_words: What the keys of a section with free keys must be.
        fix_for_key: Returns the fix for an unknown key that it knows from elsewhere and the field it sets, else None.
        fix_for_value: Returns the fix for a wrong value that it knows from elsewhere, else None.
    """

    def __init__(
        self,
        model: type[BaseModel],
        title: str,
        *,
        extra_keys: Sequence[str] = (),
        key_words: str = "text",
        fix_for_key: KeyFix = lambda path, node: None,
        fix_for_value: ValueFix = lambda path, node: None,
    ) -> None:
        self.root: JsonSchema = model.model_json_schema()
        self.title = title
        self.extra_keys = tuple(extra_keys)
        self.key_words = key_words
        self.fix_for_key, self.fix_for_value = fix_for_key, fix_for_value

    def resolve(self, schema: JsonSchema) -> JsonSchema:
        """Follow a reference; what is given next to the reference (default, description) has priority."""
        if "$ref" not in schema:
            return schema
        target: JsonSchema = self.root["$defs"][schema["$ref"].rpartition("/")[2]]
        return {**target, **{key: value for key, value in schema.items() if key != "$ref"}}

    def at(self, path: KeyPath, root: Node) -> JsonSchema | None:
        """Return the schema of the field at a path, None for an unknown field.

        Args:
            path: Keys from the root.
            root: The file as written; it says which kind of a union is meant.
        """
        schema: JsonSchema | None = self.root
        node: Node | None = root
        for step in path:
            schema = self._child(self._branch(self.resolve(schema), node), step) if schema is not None else None
            node = child_of(node, step)
        return None if schema is None else self._branch(self.resolve(schema), node)

    def words_for(self, schema: JsonSchema) -> str:
        """Return what a field takes, in words: `a whole number above 0 or auto`."""
        if "anyOf" in schema:
            return join_words([self.words_for(self.resolve(branch)) for branch in schema["anyOf"]])
        choices = choices_of(schema)
        if "discriminator" in schema:
            return f"{join_words(choices)}, or a section with `kind`"
        if choices:
            return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
        if "pattern" in schema:
            return str(schema.get("takes", NAME_WORDS))
        kind = schema.get("type", "")
        if kind in {"integer", "number"}:
            return ("a whole number" if kind == "integer" else "a number") + _bounds(schema)
        return self._list_words(schema) if kind == "array" else TYPE_WORDS.get(kind, "another value")

    def fields(self, schema: JsonSchema | None = None, prefix: str = "") -> Iterator[tuple[str, JsonSchema]]:
        """Yield the dotted path and the schema of every field in a section (not in a list), in schema order."""
        for name, field in fields_of(self.root if schema is None else schema).items():
            field_schema = self.resolve(field)
            yield f"{prefix}{name}", field_schema
            for part in [field_schema, *map(self.resolve, field_schema.get("oneOf", []))]:
                yield from self.fields(part, f"{prefix}{name}.")

    def paths_named(self, name: str) -> list[str]:
        """Return the dotted paths of the fields with this name, to suggest where a misplaced key belongs."""
        return [path for path, _ in self.fields() if path.rpartition(".")[2] == name]

    def kinds_with_field(self, path: KeyPath) -> list[str]:
        """Return the kinds of a union that have the field at the end of the path."""
        mapping = (self.at(path[:-1], Node({}, "")) or {}).get("discriminator", {}).get("mapping", {})
        return [kind for kind, ref in mapping.items() if path[-1] in fields_of(self.resolve({"$ref": ref}))]

    def _list_words(self, schema: JsonSchema) -> str:
        if "prefixItems" in schema:
            parts = schema["prefixItems"]
            return f"a list of {len(parts)} items, each {self.words_for(self.resolve(parts[0]))}"
        item = self.resolve(schema["items"])
        kinds = {"string": "texts", "object": "sections"}
        least = "a list of " if schema.get("minItems", 0) == 0 else "a list of one or more "
        return least + kinds.get(item.get("type", ""), "values")

    def _branch(self, schema: JsonSchema, node: Node | None) -> JsonSchema:
        """Return the kind of a union that the file names; the union itself if it names none."""
        if "discriminator" not in schema:
            return schema
        kind = child_of(node, schema["discriminator"]["propertyName"])
        reference = schema["discriminator"]["mapping"].get(str(kind.value)) if kind else None
        return self.resolve({"$ref": reference}) if reference else schema

    def _child(self, schema: JsonSchema, step: str | int) -> JsonSchema | None:
        if isinstance(step, int):
            items = schema.get("prefixItems", [])
            found = items[step] if step < len(items) else schema.get("items")
        elif "discriminator" in schema and step == schema["discriminator"]["propertyName"]:
            found = {"enum": choices_of(schema)}
        else:
            free = [*schema.get("patternProperties", {}).values(), schema.get("additionalProperties")]
            found = fields_of(schema).get(step) or next((part for part in free if isinstance(part, dict)), None)
        if found is not None:
            return dict(found)
        branches = map(self.resolve, schema.get("anyOf", []))
        return next((child for branch in branches if (child := self._child(branch, step)) is not None), None)


def fields_of(schema: JsonSchema) -> dict[str, JsonSchema]:
    """Return the fields of a section by name; empty for any other schema."""
    fields: dict[str, JsonSchema] = schema.get("properties", {})
    return fields


def choices_of(schema: JsonSchema) -> list[str]:
    """Return the words that a field takes, such as `auto`; empty if it takes any value."""
    if "const" in schema:
        return [str(schema["const"])]
    if "discriminator" in schema:
        return list(schema["discriminator"]["mapping"])
    options = [choice for branch in schema.get("anyOf", []) for choice in choices_of(branch)]
    return [*map(str, schema.get("enum", [])), *options]


def join_words(words: Sequence[str]) -> str:
    """Join words as in a sentence: `a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _bounds(schema: JsonSchema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']}" + (f", at most {high}" if high is not None else "")
    below = f", below {schema['exclusiveMaximum']}" if "exclusiveMaximum" in schema else ""
    return f" of {low} or more{below}" if low is not None else ""
