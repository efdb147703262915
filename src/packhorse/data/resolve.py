"""Resolve the sources, tokenizers and templates of a recipe to files. Only folder listings are read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from glob import has_magic
from pathlib import Path
from typing import Final

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tokenizers import Tokenizer

from packhorse.data.read.listing import form_of, known_endings, list_folder, list_glob
from packhorse.errors import UserError
from packhorse.quickstart.files import BUILTIN_NAMES, CORPUS_VERSION, VOCABULARY_SIZE, materialise
from packhorse.recipe.locate import locate, path_of
from packhorse.recipe.schema import Recipe, Source

BUILTIN: Final = "builtin:"
TOKENIZER_FILE: Final = "tokenizer.json"
TEMPLATES_FOLDER: Final = Path(__file__).parent / "render" / "templates"
TOKENIZER_FILES: Final = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)
# Tokens that each template needs; the last one ends a turn. Alpaca's turns end with the tokenizer's own eos_token.
NAMED_TEMPLATES: Final[Mapping[str, tuple[str, ...]]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<think>", "</think>", "<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]", "</s>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "alpaca": (),
}


def data_root(recipe: Recipe) -> Path:
    """Return the folder of prepared data."""
    return runs_folder_of(recipe) / ".data"


def runs_folder_of(recipe: Recipe) -> Path:
    """Return the folder of runs, with `${env:NAME}` and `~` expanded."""
    return path_of(recipe.runs_folder)


def check_folder(recipe: Recipe) -> Path:
    """Return the folder of what a look at the rows of a recipe finds."""
    return runs_folder_of(recipe) / ".check" / recipe.name


def source_name(source: Source) -> str:
    """Return the name of a source in messages."""
    if source.path is None:
        return f"hub data set {source.id}"
    return f"{source.path} ({source.key})" if source.key else source.path


def source_files(text: str, runs_folder: Path) -> list[Path]:
    """Return the files that a source's `path` names, in the order in which they are read.

    A path is a file, a folder (all files with a known ending below it) or a glob; a file with that exact name has
    precedence over the glob. The order is natural: `shard-2` before `shard-10`.

    Raises:
        UserError: A file does not exist, is empty or has an unknown ending, or there is no file to read.
    """
    if text.startswith(BUILTIN):
        return [_builtin(text, runs_folder)]
    path = locate(text, runs_folder)
    if path.is_dir():
        files = list_folder(path)
    elif has_magic(str(path)) and not path.exists():
        files = list_glob(str(path))
    else:
        files = [_with_known_ending(present(path, "the data source"))]
    return [_with_utf8_name(present(file, "the data source")) for file in files]


def _with_known_ending(path: Path) -> Path:
    if not form_of(path)[0]:
        raise UserError(
            f"the data source {path} ends in {path.suffix or 'no extension'}.",
            "the ending says how to read it.",
            f"use one of the forms {known_endings()}.",
        )
    return path


def _with_utf8_name(path: Path) -> Path:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the name of the data source {str(path)!a} is not UTF-8.",
            "messages and the ledger name the file of each row.",
            "give the file another name.",
        ) from error
    return path


def present(path: Path, what: str) -> Path:
    """Return the path if it is a file that is not empty.

    Raises:
        UserError: The file does not exist or is empty.
    """
    if not path.is_file():
        raise UserError(
            f"{what} {path} does not exist.",
            "it is read before training starts.",
            f"fix the path{_closest(path)}.",
        )
    if path.stat().st_size == 0:
        raise UserError(f"{what} {path} is empty: 0 bytes.", "nothing can be read from it.", "name another file.")
    return path


def template_path(template: str) -> Path | None:
    """Return the file of `data.template`; None for the tokenizer's own template.

    Raises:
        UserError: The recipe names a file that does not exist.
    """
    if template == "tokenizer":
        return None
    if template in NAMED_TEMPLATES:
        return TEMPLATES_FOLDER / f"{template}.jinja"
    path = path_of(template)
    if path.suffix == "" and not path.exists():
        raise UserError(
            f"data.template is {template}, which is neither a known name nor a file.",
            "the template turns messages into text and marks what is trained.",
            f"set data.template to tokenizer, {', '.join(NAMED_TEMPLATES)} or the path of a Jinja file.",
        )
    return present(path, "the template data.template")


def resolve_tokenizer(recipe: Recipe) -> Path:
    """Return the absolute folder of the tokenizer: `model.tokenizer`, else the model's own.

    Raises:
        UserError: No tokenizer is named, its folder does not exist or has no tokenizer, or the hub has none.
    """
    model = recipe.model
    text = model.tokenizer or model.path or model.id
    if text is None:
        raise UserError(
            "model.tokenizer is missing.",
            "a model made from model.config has no tokenizer.",
            "set model.tokenizer to a folder, a hub name or builtin:tokenizer.",
        )
    runs_folder = runs_folder_of(recipe)
    if text.startswith(BUILTIN):
        return _builtin(text, runs_folder).absolute()
    folder = locate(text, runs_folder)
    if folder.is_dir():
        return _with_tokenizer(folder.absolute())
    if text == model.path or not _is_hub_name(text):
        raise UserError(
            f"the tokenizer's folder {folder} does not exist.",
            "rows become token ids with the model's own tokenizer.",
            f"fix {'model.tokenizer' if model.tokenizer else 'model.path'}{_closest(folder)}.",
        )
    return _download_tokenizer(text, model.revision if text == model.id else None)


def local_tokenizer(recipe: Recipe) -> Path | None:
    """Return the folder of the recipe's tokenizer without downloading or writing anything; None if it is not local.

    Raises:
        UserError: Its path names an environment variable that is not set.
    """
    model = recipe.model
    name = model.tokenizer or model.path or model.id
    if name is None or name.startswith(BUILTIN):
        return None
    folder = locate(name, path_of(recipe.runs_folder))
    if folder.is_dir():
        return folder
    revision = model.revision if model.tokenizer is None else None
    cached = try_to_load_from_cache(name, TOKENIZER_FILE, cache_dir=HF_HUB_CACHE, revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def fast_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """Load the recipe's tokenizer.json without downloading or writing anything, for plans; None if it is not local.

    Raises:
        UserError: Its path names an environment variable that is not set.
    """
    file = _tokenizer_file(recipe)
    return None if file is None else Tokenizer.from_file(str(file))


def _tokenizer_file(recipe: Recipe) -> Path | None:
    folder = local_tokenizer(recipe)
    file = None if folder is None else folder / TOKENIZER_FILE
    return file if file is not None and file.is_file() else None


def vocabulary_size(recipe: Recipe) -> int | None:
    """Return the number of ids of the tokenizer, for the embeddings of a fresh model; None if not local."""
    if (recipe.model.tokenizer or "").startswith(BUILTIN):
        return VOCABULARY_SIZE
    file = _tokenizer_file(recipe)
    return None if file is None else _num_ids(file, file.stat().st_mtime_ns)


@cache
def _num_ids(file: Path, _: int) -> int:
    """Return the number of ids of a tokenizer.json of this age; a large one takes half a second to read."""
    return int(Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=True))


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that decide how text becomes ids, sorted by name."""
    return sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})


def _builtin(text: str, runs_folder: Path) -> Path:
    name = text.removeprefix(BUILTIN)
    if name not in BUILTIN_NAMES:
        close = difflib.get_close_matches(name, BUILTIN_NAMES, n=1, cutoff=0.0)
        raise UserError(
            f"{text} is not one of the files that come with Packhorse: {', '.join(BUILTIN_NAMES)}.",
            "a path that begins with builtin: names a file that Packhorse writes.",
            f"write {BUILTIN}{close[0]}, or the path of a file.",
        )
    try:
        return materialise(name, runs_folder / ".builtin" / f"v{CORPUS_VERSION}")
    except OSError as error:
        raise UserError(
            f"{runs_folder} cannot be written: {error.strerror}.",
            "the files that come with Packhorse are written there on first use.",
            "set runs_folder to a folder where you may write.",
        ) from error


def _with_tokenizer(folder: Path) -> Path:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise UserError(
            f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model nor a vocabulary.",
            "rows become token ids with the model's own tokenizer.",
            "set model.tokenizer to a folder that has tokenizer.json.",
        )
    return folder


def _is_hub_name(text: str) -> bool:
    return not text.startswith((".", "/", "~")) and text.count("/") <= 1


def _download_tokenizer(name: str, revision: str | None) -> Path:
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(TOKENIZER_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"the tokenizer {name} (revision {revision or 'main'}) cannot be downloaded: {_first_line(error)}",
            "rows become token ids with the model's own tokenizer.",
            "set model.tokenizer to a local folder; or unset HF_HUB_OFFLINE, check the name, and log in with "
            "`hf auth login`.",
        ) from error
    return _with_tokenizer(Path(folder).absolute())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _closest(path: Path) -> str:
    """Return `: the closest name in FOLDER is X`, or what is missing."""
    if not path.parent.is_dir():
        return f": the folder {path.parent} does not exist either"
    names = sorted(entry.name for entry in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f": the closest name in {path.parent} is {close[0]}" if close else f": {path.parent} has no name like it"
