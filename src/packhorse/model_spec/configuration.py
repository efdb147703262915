"""Shape of the recipe's model, as its config.json says it: from the recipe, a folder, the hub's cache or our table."""

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

TABLE: Final = Path(__file__).with_name("configurations.yaml")
CONFIG_FILE: Final = "config.json"
HUB_CACHE: Final = HF_HUB_CACHE

Configuration = Mapping[str, Any]


def find_configuration(recipe: Recipe, vocab_size: int | None = None) -> Configuration | None:
    """Configuration of the model that the recipe starts from; None where nothing here knows it.

    Nothing is downloaded. What lies on this machine, a folder or the hub's cache, wins over the shipped table.

    Args:
        recipe: Its `model` is looked up.
        vocab_size: Size of the tokenizer, which a fresh model takes where its configuration names none.

    Raises:
        UserError: `model.path` names an environment variable that is not set.
    """
    model = recipe.model
    if model.config is not None:
        return model.config if vocab_size is None else {"vocab_size": vocab_size, **model.config}
    if model.path is not None:
        return _read(locate(model.path, path_of(recipe.runs_folder)) / CONFIG_FILE)
    assert model.id is not None, "the recipe's rules ask for one of id, path and config"
    cached = try_to_load_from_cache(model.id, CONFIG_FILE, cache_dir=HUB_CACHE, revision=model.revision)
    if isinstance(cached, str):
        return _read(Path(cached))
    return published().get(model.id)


@cache
def published() -> Mapping[str, Configuration]:
    """The shipped table: hub name -> configuration. Read once: comparing plans asks for it a hundred times."""
    table: Mapping[str, Configuration] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return table


def _read(path: Path) -> Configuration | None:
    # What is wrong with the folder is said by whoever loads the model; here it only cannot be counted.
    try:
        configuration = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return configuration if isinstance(configuration, dict) else None
