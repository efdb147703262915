"""`packhorse recipes`: what is shipped."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from packhorse.errors import EXIT_OK, UserError
from packhorse.recipe.describe import reference, summary
from packhorse.recipe.load import load_recipe
from packhorse.recipe.shipped import copy_recipe, find_recipe, list_recipes, unknown_recipe


def recipes(action: str, name: str, target: str) -> int:
    """Lists, shows or copies shipped recipes.

    Raises:
        UserError: No such action or recipe, or the target exists.
    """
    console = Console()
    if action == "list":
        console.print(_table())
    elif action == "show":
        path = find_recipe(name)
        if path is None:
            raise unknown_recipe(name)
        console.print(path.read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
        for label, text in summary(load_recipe(name, check_environment=False)):
            console.print(f"# {label}: {text}", style="dim", markup=False, soft_wrap=True)
    elif action == "copy":
        written = copy_recipe(name, target or f"{name.replace('/', '-')}.yaml")
        console.print(f"{written} is yours; next: packhorse check {written}", soft_wrap=True)
    elif action == "reference":
        console.print(reference(), markup=False, highlight=False, soft_wrap=True)
    else:
        raise UserError(
            f"packhorse recipes has no action {action}.",
            "it has list, show, copy and reference.",
            "see `packhorse recipes --help`.",
        )
    return EXIT_OK


def _table() -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("recipe", "what it does", "GPUs"):
        table.add_column(heading, overflow="fold")
    for recipe in list_recipes():
        table.add_row(recipe.name, recipe.title, recipe.gpus)
    return table
