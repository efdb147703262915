"""From the text of a path in a recipe to the path: `${env:NAME}`, `~`, run folders."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from packhorse.errors import UserError
from packhorse.run_folder.layout import MODEL_FOLDER, PLAN_FILE

ENVIRONMENT_REFERENCE: Final = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


def expand(text: str) -> str:
    """Replace each `${env:NAME}` by the variable's value, at the point of use.

    Raises:
        UserError: A variable is not set.
    """
    return ENVIRONMENT_REFERENCE.sub(_value, text)


def path_of(text: str) -> Path:
    """Return the path that a text means, with `${env:NAME}` and `~` expanded.

    Raises:
        UserError: A variable is not set, or `~name` names nobody.
    """
    path = Path(expand(text))
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{text} begins with {path.parts[0]}, and this machine has no home folder of that name.",
            "a path that begins with ~ means somebody's home folder.",
            f"write the whole path, or ./{text} for a file of that very name.",
        ) from error


def locate(text: str, runs_folder: Path) -> Path:
    """Return the path that a recipe means by `text`.

    A relative path is relative to the current directory. A bare name that is not there and names a run in
    `runs_folder` means that run. A run folder (it holds `plan.json`) means its `model` folder. Nothing is
    opened: whoever reads the path says when it is missing.

    Raises:
        UserError: As `path_of`.
    """
    path = path_of(text)
    if not path.exists() and (runs_folder / path / PLAN_FILE).is_file():
        path = runs_folder / path
    return path / MODEL_FOLDER if (path / PLAN_FILE).is_file() else path


def _value(reference: re.Match[str]) -> str:
    name = reference.group(1)
    if name not in os.environ:
        raise UserError(
            f"{reference.group(0)} is used, and the environment variable {name} is not set.",
            "the recipe takes this value from the environment, so that it is never written down.",
            f"export {name}=… before the command, or write the value in the recipe.",
        )
    return os.environ[name]
