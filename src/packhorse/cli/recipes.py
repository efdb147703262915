"""`packhorse recipes`: the shipped recipes, and recipes from files of other trainers."""

from __future__ import annotations

from pathlib import Path

from packhorse.cli.show.text import open_console, plain_table, print_plain
from packhorse.errors import EXIT_OK, UserError
from packhorse.recipe.describe import reference, summary
from packhorse.recipe.importers.importer import TRAINERS, import_recipe, write_import
from packhorse.recipe.load import load_recipe
from packhorse.recipe.shipped import copy_recipe, find_recipe, list_recipes, unknown_recipe


def recipes(action: str, name: str, target: str, out: str, trainer: str, gpus: int | None) -> int:
    """List, show or copy shipped recipes, import a file of another trainer, or print the reference of all fields.

    Raises:
        UserError: There is no such action or recipe, the target exists, or the file cannot be imported.
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
        copy = copy_recipe(name, target or out or f"{name.replace('/', '-')}.yaml")
        print_plain(f"wrote {copy}; next: packhorse check {copy}")
    elif action == "import":
        _import(name, Path(target or out or f"packhorse-{Path(name).stem}.yaml"), trainer, gpus or 1)
    elif action == "reference":
        print_plain(reference())
    else:
        raise UserError(
            f"packhorse recipes has no action {action}.",
            "the actions are list, show, copy, import and reference.",
            "see `packhorse recipes --help`.",
        )
    return EXIT_OK


def _import(name: str, target: Path, trainer: str, num_gpus: int) -> None:
    if not name:
        raise UserError(
            "packhorse recipes import names no file.",
            "it translates the file of another trainer.",
            "write `packhorse recipes import axolotl.yml --out my.yaml`.",
        )
    if trainer and trainer not in TRAINERS:
        raise UserError(
            f"--trainer is {trainer}.", f"it must be one of {', '.join(TRAINERS)}.", f"write --trainer {TRAINERS[0]}."
        )
    imported = import_recipe(Path(name), trainer, num_gpus)
    write_import(imported, target)
    print_plain(
        f"wrote {target} from a file of {imported.trainer}; keys without a counterpart: {imported.num_unmatched}"
    )
    print_plain(f"next: read the comments in {target}, then packhorse check {target}")
