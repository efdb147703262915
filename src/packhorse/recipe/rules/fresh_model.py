"""Rules on `model.config`, the configuration of a fresh model: its type, its keys and the numbers in it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from packhorse.recipe.config_class import Fields, config_fields, model_types
from packhorse.recipe.schema import Recipe
from packhorse.yaml_source.findings import Finding

SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
TYPE_WORDS: Final = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a section",
    type(None): "null",
}


def fresh_model_rules(recipe: Recipe) -> Iterator[Finding]:
    """Yield the rules on a fresh model that the recipe breaks."""
    config = recipe.model.config
    if config is None:
        return
    kind = config.get("model_type")
    if not isinstance(kind, str):
        yield Finding(
            (("model", "config"),),
            "model.config has no model_type.",
            "it selects the architecture that the other fields configure.",
            "add model_type to model.config, e.g. model_type: llama",
        )
    elif kind not in model_types():
        near = difflib.get_close_matches(kind, model_types(), n=1)
        yield Finding(
            (("model", "config", "model_type"),),
            f"model.config.model_type is {kind!r}, and transformers has no causal language model of this type.",
            "it selects the architecture of the fresh model.",
            f"write `model.config.model_type: {near[0] if near else 'llama'}`",
        )
    else:
        fields = config_fields(kind) or {}
        if fields:
            yield from _key_rules(kind, config, fields)
        # A class whose head_dim is never null has a width of its heads that does not follow from hidden_size.
        yield from _number_rules(config, has_own_width=fields.get("head_dim") == (int,))
    if recipe.model.tokenizer is None:
        yield Finding(
            (("model", "tokenizer"),),
            "model.config is given without model.tokenizer.",
            "a fresh model comes without a tokenizer.",
            "add model.tokenizer: a folder, a hub name, or builtin:tokenizer",
        )
    if not recipe.method.trains_base:
        yield Finding(
            (("method",), ("model", "config")),
            f"method is {recipe.method.kind}, but model.config starts from random weights.",
            "an adapter adjusts trained weights, and frozen random weights have learned nothing.",
            "set method: full, or give model.id or model.path",
        )


def _key_rules(kind: str, config: Mapping[str, Any], fields: Fields) -> Iterator[Finding]:
    for name, value in config.items():
        path = (("model", "config", name),)
        if name not in fields:
            near = difflib.get_close_matches(name, [field for field in fields if not field.startswith("_")], n=1)
            yield Finding(
                path,
                f"model.config.{name} is not a field of a {kind} model.",
                "transformers silently keeps an unknown key, and the model would not have what it says.",
                f"write `model.config.{near[0]}`" if near else f"remove model.config.{name}",
            )
        elif (types := fields[name]) is not None and not _is_of(value, types):
            takes = " or ".join(dict.fromkeys(TYPE_WORDS[one] for one in types if (one, float) != (int, types[0])))
            yield Finding(
                path,
                f"model.config.{name} is {value!r}; it takes {takes}.",
                f"the configuration of a {kind} model has values of fixed types.",
                f"write `model.config.{name}` as {takes}",
            )


def _is_of(value: object, types: tuple[type, ...]) -> bool:
    # In Python, true is a whole number too.
    return type(value) in types if isinstance(value, bool) else isinstance(value, types)


def _number_rules(config: Mapping[str, Any], has_own_width: bool) -> Iterator[Finding]:
    sizes = {name: config[name] for name in SIZES if isinstance(config.get(name), int)}
    for name, value in sizes.items():
        if value < 1:
            yield Finding(
                (("model", "config", name),),
                f"model.config.{name} is {value}.",
                "a model has at least one of each.",
                f"write `model.config.{name}` as a whole number above 0",
            )
    if any(value < 1 for value in sizes.values()):
        return
    heads, hidden = sizes.get("num_attention_heads"), sizes.get("hidden_size")
    if heads and hidden and hidden % heads and "head_dim" not in sizes and not has_own_width:
        yield Finding(
            (("model", "config", "hidden_size"), ("model", "config", "num_attention_heads")),
            f"model.config.hidden_size is {hidden}, which num_attention_heads {heads} does not divide.",
            "each head has an equal share of the width.",
            f"set model.config.hidden_size to {hidden // heads * heads or heads}",
        )
    groups = sizes.get("num_key_value_heads")
    if heads and groups and heads % groups:
        fitting = max(size for size in range(1, groups) if heads % size == 0)
        yield Finding(
            (("model", "config", "num_key_value_heads"), ("model", "config", "num_attention_heads")),
            f"model.config.num_key_value_heads is {groups}, which does not divide num_attention_heads {heads}.",
            "each key/value head serves an equal number of query heads.",
            f"set model.config.num_key_value_heads to {fitting}",
        )
