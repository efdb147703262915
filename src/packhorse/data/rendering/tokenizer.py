"""The tokenizer: loaded, with the template that rows are trained with, and the tokens at which it stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from packhorse.data.places import NAMED_TEMPLATES, template_path
from packhorse.errors import UserError

HOW_TO_MARK: Final = """put the markers around what the assistant says and its stop token:
  before: {{ message['content'] + eos_token }}
  after:  {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"""


def load_tokenizer(folder: Path, template: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer and set the template that rows are trained with; so it is saved with the model.

    Args:
        folder: Local folder in Hugging Face form.
        template: `data.template` of the recipe.
        trust_remote_code: Run Python code that comes with the tokenizer.

    Raises:
        UserError: The folder holds no usable tokenizer, or the named template needs tokens that it lacks.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken tokenizer.json raises exactly this type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the tokenizer in {folder} cannot be loaded: {reason}",
            "rows become token ids with it.",
            "set model.tokenizer to a folder with tokenizer.json and tokenizer_config.json.",
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer in {folder} is a slow one ({type(tokenizer).__name__}).",
            "only a fast one knows which characters a token stands for, which the mask needs.",
            "convert it to tokenizer.json (tokenizers library) and name that folder in model.tokenizer.",
        )
    path = template_path(template)
    if path is not None:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if template in NAMED_TEMPLATES:
        _set_stop_token(tokenizer, template, folder)
    return tokenizer


def require_stop_token(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a tokenizer that has no stop token.

    Raises:
        UserError: It has no eos_token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {folder} has no eos_token.",
            "without a stop token a model never learns to stop.",
            "set eos_token in its tokenizer_config.json.",
        )


def stop_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> frozenset[int]:
    """Return the tokens at which generation stops: eos_token, and what generation_config.json names."""
    stops = {int(tokenizer.eos_token_id)}
    file = folder / "generation_config.json"
    if file.is_file():
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        stops |= set(named) if isinstance(named, list) else {named} - {None}
    return frozenset(stops)


def require_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a tokenizer that has no chat template.

    Raises:
        UserError: There is none.
    """
    if tokenizer.chat_template:
        return
    known = [f"{name}, whose tokens this tokenizer has" for name in fitting_templates(tokenizer)]
    raise UserError(
        f"the tokenizer in {folder} has no chat template.",
        "the template turns messages into text and marks what is trained.",
        f"set data.template to {'; or to '.join(known)}; or to a Jinja file of your own; in it, {HOW_TO_MARK}",
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
            "split into letters, the marks would not tell turns apart, and nothing would end an answer.",
            f"set data.template to {' or '.join(others)}, write a Jinja file with marks that this tokenizer has, or "
            "use a tokenizer that has these tokens.",
        )
    if marks:
        tokenizer.eos_token = marks[-1]
