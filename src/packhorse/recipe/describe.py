"""The reference page of all fields, generated from the schema, and the summary of a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator

from packhorse.recipe.methods import LoraMethod
from packhorse.recipe.schema import Recipe, recipe_view
from packhorse.recipe.sweep import expand, is_sweep
from packhorse.yaml_source.schema import JsonSchema, fields_of

TABLE_HEAD = "| field | takes | default | meaning |\n|---|---|---|---|"


def reference() -> str:
    """Return every field of a recipe as Markdown: one table per section, in the order of the schema."""
    return "\n".join(["# Recipe reference", "", *_section("recipe", recipe_view().root)])


def summary(recipe: Recipe) -> list[tuple[str, str]]:
    """Return what a recipe does as pairs of label and text, for one screen."""
    batch, optimizer, schedule = recipe.batch, recipe.optimizer, recipe.schedule
    warmup = f"{schedule.warmup_steps} steps" if schedule.warmup_steps else f"{schedule.warmup_ratio:.0%}"
    length = f"{recipe.steps:,} steps" if recipe.steps else f"{recipe.epochs} epochs"
    auto = " auto" if recipe.parallel.checkpointing == "auto" else ""
    checkpointing = f", checkpointing{auto}" if recipe.parallel.checkpointing else ""
    return [
        ("model", _model_words(recipe)),
        ("method", _method_words(recipe)),
        *([("objective", recipe.objective.kind)] if recipe.objective.kind != "sft" else []),
        ("data", ", ".join(str(source.path or source.id) for source in recipe.data.sources)),
        ("step", f"{batch.packs} packs of {batch.length:,} tokens: {batch.packs * batch.length:,} tokens"),
        ("length", length),
        ("learning rate", f"{optimizer.learning_rate:g}, {schedule.name}, warm-up {warmup}"),
        ("parallel", f"{recipe.parallel.engine}, {recipe.precision}{checkpointing}"),
        *([("sweep", _sweep_words(recipe))] if is_sweep(recipe) else []),
        ("run", f"{recipe.runs_folder}/{recipe.name}"),
    ]


def _model_words(recipe: Recipe) -> str:
    model = recipe.model
    if model.config is not None:
        return f"a fresh {model.config.get('model_type')}"
    code = ", running the model's Python code (model.trust_remote_code)" if model.trust_remote_code else ""
    return f"{model.id or model.path}" + (f" at {model.revision}" if model.revision else "") + code


def _sweep_words(recipe: Recipe) -> str:
    runs = expand(recipe)
    return f"{len(runs)} runs: " + "; ".join(f"{run.number}: {' '.join(run.overrides)}" for run in runs)


def _method_words(recipe: Recipe) -> str:
    method = recipe.method
    if not isinstance(method, LoraMethod):
        return method.kind
    target = method.target if isinstance(method.target, str) else ", ".join(method.target)
    return f"{method.kind}, rank {method.rank}, alpha {method.alpha:g}, {target}"


def _section(title: str, schema: JsonSchema) -> Iterator[str]:
    level = "#" * (2 + title.count("."))
    yield from (f"{level} {title}", "", schema.get("description", "").split("\n\n")[0], "", TABLE_HEAD)
    required = schema.get("required", [])
    parts: list[tuple[str, JsonSchema]] = []
    for name, field in fields_of(schema).items():
        full_schema = recipe_view().resolve(field)
        subsections = list(_sections_of(name, field))
        parts += subsections
        yield _row(name, full_schema, _default(full_schema, name in required, bool(subsections)))
    yield ""
    for name, part in parts:
        yield from _section(name if title == "recipe" else f"{title}.{name}", part)


def _sections_of(name: str, field: JsonSchema) -> Iterator[tuple[str, JsonSchema]]:
    """Yield the sections in a field: the field itself, also an optional one, one per kind, or the items of a list."""
    resolve = recipe_view().resolve
    for option in field.get("anyOf", [field]):
        if fields_of(resolve(option)):
            yield name, resolve(option)
    for kind, reference_name in field.get("discriminator", {}).get("mapping", {}).items():
        yield f"{name} {kind}", resolve({"$ref": reference_name})
    if fields_of(resolve(field.get("items", {}))):
        yield f"{name}[]", resolve(field["items"])


def _row(name: str, schema: JsonSchema, default: str) -> str:
    cells = [f"`{name}`", recipe_view().words_for(schema), default, schema.get("description", "")]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _default(schema: JsonSchema, required: bool, is_section: bool) -> str:
    if required:
        return "required"
    if is_section and isinstance(schema.get("default"), dict):
        return "see below"
    default = schema.get("default")
    return "none" if default is None else f"`{default if isinstance(default, str) else json.dumps(default)}`"
