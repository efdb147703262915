"""`packhorse recipes`: the shipped recipes."""

from __future__ import annotations

from packhorse.cli.show.text import open_console, plain_table, print_plain
from packhorse.errors import EXIT_OK, UserError
from packhorse.recipe.describe import reference, summary
from packhorse.recipe.load import load_recipe
from packhorse.recipe.shipped import copy_recipe, find_recipe, list_recipes, unknown_recipe


def recipes(action: str, name: str, target: str) -> int:
    """List, show or copy shipped recipes, or print the reference of all fields.

    Raises:
        UserError: There is no such action or recipe, or the target exists.
    """
    if action == "list":
        table = plain_table("recipe", "what it does", "GPUs")
        for recipe in list_recipes():
            table.add_row(recipe.name, recipe.title, recipe.gpus)
        open_console().print(table)
    elif action == "show":
        path = find_recipe(name)
        if path is None:
            raise unknown_recipe(name)
        print_plain(path.read_text(encoding="utf-8"))
        for label, text in summary(load_recipe(name, check_environment=False)):
            print_plain(f"# {label}: {text}")
    elif action == "copy":
        copy = copy_recipe(name, target or f"{name.replace('/', '-')}.yaml")
        print_plain(f"wrote {copy}; next: packhorse check {copy}")
    elif action == "reference":
        print_plain(reference())
    else:
        raise UserError(
            f"packhorse recipes has no action {action}.",
            "the actions are list, show, copy and reference.",
            "see `packhorse recipes --help`.",
        )
    return EXIT_OK
