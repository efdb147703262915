"""Paths as a recipe writes them: `${env:NAME}`, `~` and run folders, resolved when they are used."""

from __future__ import annotations

import os
import re
from pathlib import Path

from packhorse.errors import UserError
from packhorse.run_folder.layout import MODEL_FOLDER, PLAN_FILE
from packhorse.yaml_source.environment import ENVIRONMENT_REFERENCE


def expand(text: str) -> str:
    """Replace each `${env:NAME}` by the value of the variable.

    Raises:
        UserError: A variable is not set.
    """
    return ENVIRONMENT_REFERENCE.sub(_value, text)


def path_of(text: str) -> Path:
    """Return the path that a text stands for, with `${env:NAME}` and `~` expanded.

    Raises:
        UserError: A variable is not set, or `~name` names no user of this machine.
    """
    path = Path(expand(text))
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{text} begins with {path.parts[0]}, and this machine has no home folder of that name.",
            "a path that begins with ~ is below a home folder.",
            f"write the whole path, or ./{text} for a file of that very name.",
        ) from error


def locate(text: str, runs_folder: Path) -> Path:
    """Return the path that a recipe means by `text`, without opening it.

    A relative path is relative to the current folder. A bare name that does not exist there but names a run in
    `runs_folder` means that run. A run folder (it contains `plan.json`) means its `model` folder.

    Raises:
        UserError: A variable is not set, or `~name` names no user of this machine.
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
            "the recipe takes this value from the environment, so that no file contains it.",
            f"run `export {name}=VALUE` before the command, or write the value in the recipe.",
        )
    return os.environ[name]
