"""Configuration (config.json) of the recipe's model: from the recipe, a folder, the hub's cache or a shipped table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE

from packhorse.recipe.locate import locate, path_of
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.layout import MODEL_FOLDER, PLAN_FILE

TABLE: Final = Path(__file__).with_name("configurations.yaml")
CONFIG_FILE: Final = "config.json"
HUB_CACHE: Final = HF_HUB_CACHE

Configuration = Mapping[str, Any]


def find_configuration(recipe: Recipe, vocab_size: int | None = None) -> Configuration | None:
    """Return the configuration of the recipe's model; None where it is not on this machine.

    Nothing is downloaded. A folder or the hub's cache takes precedence over the shipped table.

    Args:
        recipe: Recipe with the model.
        vocab_size: Size of the tokenizer, which a fresh model takes where its configuration has none.

    Raises:
        UserError: `model.path` names an environment variable that is not set.
    """
    model = recipe.model
    if model.config is not None:
        return model.config if vocab_size is None else {"vocab_size": vocab_size, **model.config}
    folder = model_folder(recipe)
    if folder is not None:
        return _read(folder / CONFIG_FILE)
    assert model.id is not None, "the recipe's rules require one of id, path and config"
    return published().get(model.id)


def widest_head(fields: Configuration) -> int | None:
    """Return the width of the model's widest attention head, of queries or values; None where it is not given."""
    if fields.get("qk_rope_head_dim") is not None:
        # Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries and values differ in width.
        query = fields.get("qk_nope_head_dim", 0) + fields["qk_rope_head_dim"]
        return int(max(query, fields.get("v_head_dim") or 0))
    if fields.get("head_dim") is not None:
        return int(fields["head_dim"])
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    return int(hidden // heads) if hidden and heads else None


def model_folder(recipe: Recipe) -> Path | None:
    """Return the folder of the recipe's model on this machine: of the recipe, of an earlier run, or the hub's cache.

    Returns:
        A folder, which need not exist; None for a fresh model and for one that is not in the cache.
    """
    model = recipe.model
    if model.path is not None:
        folder = locate(model.path, path_of(recipe.runs_folder))
        return folder / MODEL_FOLDER if (folder / PLAN_FILE).is_file() else folder
    if model.id is None:
        return None
    cached = try_to_load_from_cache(model.id, CONFIG_FILE, cache_dir=HUB_CACHE, revision=model.revision)
    return Path(cached).parent if isinstance(cached, str) else None


@cache
def published() -> Mapping[str, Configuration]:
    """Return the shipped table: hub name -> configuration."""
    table: Mapping[str, Configuration] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return table


def _read(path: Path) -> Configuration | None:
    # Loading the model reports what is wrong with the folder; without the file it only cannot be counted.
    try:
        configuration = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return configuration if isinstance(configuration, dict) else None
