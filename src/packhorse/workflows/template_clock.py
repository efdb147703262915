"""Find a template that writes the current date before a row is read, as a plan needs no rows."""

from __future__ import annotations

from pathlib import Path

from packhorse.data.resolve import local_tokenizer, template_path
from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe

CLOCK = b"strftime_now"
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template*", "additional_chat_templates/*")


def refuse_clock(recipe: Recipe) -> None:
    """Raise UserError if the template is on this machine and writes the current date into the chats of the recipe."""
    if recipe.data.template_date is not None:
        return
    try:
        folder = local_tokenizer(recipe)
        named = template_path(recipe.data.template)
    except UserError:
        return  # the preparation reports what is missing
    if folder is None or not any(CLOCK in file.read_bytes() for file in _template_files(folder, named)):
        return
    # Only here: most templates have no clock, and transformers takes seconds to import.
    from packhorse.data.gather.gather import may_have_chats
    from packhorse.data.render.prove_template import prove_recipe_clock

    if may_have_chats(recipe):
        prove_recipe_clock(recipe, folder)


def _template_files(folder: Path, named: Path | None) -> list[Path]:
    if named is not None:
        return [named]
    return [file for pattern in TEMPLATE_FILES for file in folder.glob(pattern) if file.is_file()]
