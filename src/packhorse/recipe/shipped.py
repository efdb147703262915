"""Files shipped with Packhorse: recipes, accelerate configs, the job script and the launched scripts."""

from __future__ import annotations

import difflib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packhorse.errors import UserError

Kind = Literal["recipes", "accelerate_configs", "slurm", "launch"]
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with Packhorse.

    Attributes:
        name: Name on the command line, e.g. `llama3.1-8b/lora`.
        path: File of the recipe.
        title: First comment line.
        gpus: Text of the comment line `GPUs:`.
        command: Text of the comment line `Run:`.
    """

    name: str
    path: Path
    title: str
    gpus: str
    command: str


def shipped_folder(kind: Kind) -> Path:
    """Return the folder of one kind: inside an installed package, or at the top of a checkout."""
    installed = PACKAGE / "shipped" / kind
    return installed if installed.is_dir() else PACKAGE.parents[1] / kind


def shipped_path(kind: Kind, name: str) -> Path:
    """Return the file `name` of a kind, e.g. `("accelerate_configs", "ddp.yaml")`.

    Raises:
        UserError: There is no such file.
    """
    folder = shipped_folder(kind)
    path = folder / name
    if path.is_file():
        return path
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    raise UserError(
        f"Packhorse ships no {kind}/{name}.",
        f"{folder} contains {', '.join(names) or 'nothing'}.",
        _closest_or_first(name, names) or "reinstall Packhorse; its files are missing.",
    )


def list_recipes() -> list[ShippedRecipe]:
    """Return every shipped recipe in the order of the names."""
    return [_describe(name, path) for name, path in _recipe_files().items()]


def find_recipe(name: str) -> Path | None:
    """Return the file of a shipped recipe, named with or without `.yaml`; None if there is none."""
    return _recipe_files().get(name.removesuffix(".yaml").removeprefix("recipes/"))


def copy_recipe(name: str, target: str | Path) -> Path:
    """Copy a shipped recipe with its comments to a new file, and return the file.

    A shipped recipe extends others by their shipped names only, so the copy works in any folder.

    Raises:
        UserError: There is no such recipe, or the target exists or cannot be written.
    """
    source, path = find_recipe(name), Path(target)
    if source is None:
        raise unknown_recipe(name)
    if path.is_dir():
        path = path / source.name
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} already exists.", "a copy would overwrite it.", "give another file name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}.",
            "the recipe is copied to this file.",
            "give a file in a folder that you may write to.",
        ) from None
    return path


def unknown_recipe(name: str) -> UserError:
    """Return the error for a name that is neither a file nor a shipped recipe."""
    names = list(_recipe_files())
    return UserError(
        f"there is no file {name} and no shipped recipe of that name.",
        f"the shipped recipes are {', '.join(names) or 'none'}.",
        _closest_or_first(name.removesuffix(".yaml"), names) or "give the path of a recipe.",
    )


def _closest_or_first(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5) or names[:1]
    return f"write {close[0]}." if close else ""


def _recipe_files() -> dict[str, Path]:
    folder = shipped_folder("recipes")
    files = sorted(folder.rglob("*.yaml"))
    return {path.relative_to(folder).as_posix().removesuffix(".yaml"): path for path in files}


def _describe(name: str, path: Path) -> ShippedRecipe:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]

    def after(label: str) -> str:
        return next((line.removeprefix(label).strip() for line in comments if line.startswith(label)), "")

    return ShippedRecipe(name, path, comments[0] if comments else "", after("GPUs:"), after("Run:"))
