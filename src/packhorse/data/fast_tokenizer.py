"""The recipe's tokenizer by its one file, where that lies on this machine: for plans, which fetch and write nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from tokenizers import Tokenizer

from packhorse.data.resolve import BUILTIN
from packhorse.quickstart.files import VOCABULARY_SIZE
from packhorse.recipe.locate import locate, path_of
from packhorse.recipe.schema import Recipe

TOKENIZER_FILE: Final = "tokenizer.json"


def fast_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """The tokenizer; None where its file is not here, or is Packhorse's own, which is made when rows are prepared.

    Raises:
        UserError: Its path names an environment variable that is not set.
    """
    model = recipe.model
    name = model.tokenizer or model.path or model.id
    if name is None or name.startswith(BUILTIN):
        return None
    folder = locate(name, path_of(recipe.runs_folder))
    file = folder / TOKENIZER_FILE
    if not folder.is_dir():
        revision = model.revision if model.tokenizer is None else None
        cached = try_to_load_from_cache(name, TOKENIZER_FILE, cache_dir=HF_HUB_CACHE, revision=revision)
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    return Tokenizer.from_file(str(file)) if file.is_file() else None


def vocabulary_size(recipe: Recipe) -> int | None:
    """Ids that the tokenizer can give, which a fresh model has embeddings for; None where it is not here."""
    if (recipe.model.tokenizer or "").startswith(BUILTIN):
        return VOCABULARY_SIZE
    tokenizer = fast_tokenizer(recipe)
    return None if tokenizer is None else int(tokenizer.get_vocab_size(with_added_tokens=True))
