"""`packhorse check RECIPE`: what the recipe does and what the model would see."""

from __future__ import annotations

from collections.abc import Sequence

from packhorse.errors import EXIT_OK
from packhorse.recipe.load import load_recipe


def check(recipe: str, overrides: Sequence[str]) -> int:
    """Show the recipe, its model and its rows, and write data.html. Prepares nothing."""
    loaded = load_recipe(recipe, overrides)
    # Only here: a mistake of the recipe is shown before transformers is imported, which takes two seconds.
    from packhorse.cli.show.checked import show_check

    show_check(loaded, recipe)
    return EXIT_OK
