"""Load the tokenizer with the template that rows are trained with, and find its stop tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from packhorse.data.render.clock import with_fixed_clock
from packhorse.data.resolve import NAMED_TEMPLATES, template_path
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe
from packhorse.torch_on_demand import torch_on_demand

with torch_on_demand():
    from transformers import AutoTokenizer

HOW_TO_MARK: Final = """put the markers around what the assistant says and its stop token:
  before: {{ message['content'] + eos_token }}
  after:  {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"""


def tokenizer_of(recipe: Recipe, folder: Path) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer from a local folder (see `load_tokenizer`)."""
    model = recipe.model
    data = recipe.data
    return load_tokenizer(folder, data.template, model.trust_remote_code, model.new_tokens, data.template_date)


def load_tokenizer(
    folder: Path,
    template: str,
    trust_remote_code: bool = False,
    new_tokens: Sequence[str] = (),
    template_date: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and set the template that rows are trained with, so that it is saved with the model.

    Args:
        folder: Local folder in Hugging Face form.
        template: `data.template` of the recipe.
        trust_remote_code: Whether to run Python code that comes with the tokenizer.
        new_tokens: `model.new_tokens`, added as plain tokens without a special meaning.
        template_date: `data.template_date`, which the template then writes in place of the current date.

    Raises:
        UserError: The folder has no usable tokenizer, the named template needs tokens that it lacks, or a new token
            is in its vocabulary already.
    """
    tokenizer = _load(folder, trust_remote_code)
    _add_tokens(tokenizer, new_tokens, folder)
    path = template_path(template)
    if path is not None:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if template_date is not None:
        _fix_clock(tokenizer, template_date)
    if template in NAMED_TEMPLATES:
        _set_stop_token(tokenizer, template, folder)
    return tokenizer


def _fix_clock(tokenizer: PreTrainedTokenizerBase, day: str) -> None:
    given = tokenizer.chat_template
    if isinstance(given, dict):
        # Some tokenizers have a separate template for chats with tools.
        tokenizer.chat_template = {name: with_fixed_clock(source, day) for name, source in given.items()}
    elif given:
        tokenizer.chat_template = with_fixed_clock(given, day)


def pieces_before(
    folder: Path, new_tokens: Sequence[str], trust_remote_code: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the ids that the tokenizer in the folder gives for each new token's text before it is added."""
    tokenizer = _load(folder, trust_remote_code)
    return {token: tuple(tokenizer(token, add_special_tokens=False)["input_ids"]) for token in new_tokens}


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder as transformers reads it."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _load(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    _refuse_files_elsewhere(folder)
    try:
        tokenizer = read_tokenizer(folder, trust_remote_code)
    except Exception as error:  # a broken tokenizer.json raises exactly this type
        if "trust_remote_code" in str(error):
            raise UserError(
                f"the tokenizer in {folder} comes with Python code, and model.trust_remote_code is false.",
                "that code can do anything that you may do on this machine.",
                "read it, then set model.trust_remote_code: true; or name another folder in model.tokenizer.",
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the tokenizer in {folder} cannot be loaded: {reason}",
            "rows become token ids with it.",
            "set model.tokenizer to a folder with tokenizer.json and tokenizer_config.json.",
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer in {folder} is a slow one ({type(tokenizer).__name__}).",
            "the mask needs the characters of each token, which only a fast tokenizer provides.",
            "convert it to tokenizer.json (tokenizers library) and name that folder in model.tokenizer.",
        )
    return tokenizer


def _refuse_files_elsewhere(folder: Path) -> None:
    """Refuse a configuration that names a vocabulary file elsewhere: its contents would be saved with the result."""
    try:
        fields = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # absent, or refused by the loader
    named = fields.items() if isinstance(fields, dict) else ()
    for key, value in named:
        if not key.endswith("_file") or not isinstance(value, str):
            continue
        here = (folder / value).absolute()
        is_inside = here.is_file() and ".." not in here.parts and here.is_relative_to(folder.absolute())
        # A path left over from another machine, which does not exist here, does no harm.
        if not is_inside and (here.is_file() or Path(value).is_file()):
            raise UserError(
                f"{folder / 'tokenizer_config.json'} sets {key} to {value}, a file outside that folder.",
                "it would be read as a vocabulary and published with the result, whatever it contains.",
                f"remove {key} from tokenizer_config.json, or use another tokenizer.",
            )


def _add_tokens(tokenizer: PreTrainedTokenizerBase, new_tokens: Sequence[str], folder: Path) -> None:
    vocabulary = tokenizer.get_vocab() if new_tokens else {}
    for token in new_tokens:
        if token in vocabulary:
            raise UserError(
                f"model.new_tokens has {token!r}, which is token {vocabulary[token]} of the tokenizer in {folder}.",
                "it is not new, and its embedding would be overwritten.",
                f"remove {token!r} from model.new_tokens.",
            )
    # Not special, so that they are found in the text of rows and stay in answers.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new_tokens])


def require_stop_token(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise UserError for a tokenizer that has no stop token."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {folder} has no eos_token.",
            "without a stop token a model never learns to stop.",
            "set eos_token in its tokenizer_config.json.",
        )


def stop_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> frozenset[int]:
    """Return the tokens at which generation stops: eos_token, and those of generation_config.json."""
    stops = {int(tokenizer.eos_token_id)}
    file = folder / "generation_config.json"
    if file.is_file():
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        stops |= set(named) if isinstance(named, list) else {named} - {None}
    return frozenset(stops)


def require_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise UserError for a tokenizer that has no chat template."""
    if tokenizer.chat_template:
        return
    known = [f"{name}, whose tokens this tokenizer has" for name in fitting_templates(tokenizer)]
    raise UserError(
        f"the tokenizer in {folder} has no chat template.",
        "the template turns messages into text and marks what is trained.",
        f"set data.template to {'; or to '.join(known)}; or to your own Jinja file; in it, {HOW_TO_MARK}",
    )


def fitting_templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the named templates whose tokens the tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    return [name for name, marks in NAMED_TEMPLATES.items() if all(token in vocabulary for token in marks)]


def _set_stop_token(tokenizer: PreTrainedTokenizerBase, template: str, folder: Path) -> None:
    marks = NAMED_TEMPLATES[template]
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in marks if token not in vocabulary]
    if missing:
        others = fitting_templates(tokenizer)
        raise UserError(
            f"data.template is {template}, and the tokenizer in {folder} has no token {' and no '.join(missing)}.",
            "split into letters, the marks would not separate turns, and nothing would end an answer.",
            f"set data.template to {' or '.join(others)}, write a Jinja file with marks that this tokenizer has, or "
            "use a tokenizer that has these tokens.",
        )
    if marks:
        tokenizer.eos_token = marks[-1]
