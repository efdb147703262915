"""The teacher of a distillation as the model of a recipe, for whatever reads one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from packhorse.errors import UserError
from packhorse.recipe.locate import locate, path_of
from packhorse.recipe.methods import FullMethod
from packhorse.recipe.objectives import DistilObjective, SftObjective
from packhorse.recipe.schema import ModelSection, Recipe
from packhorse.run_folder.layout import ADAPTER_FOLDER, MODEL_FOLDER, PLAN_FILE


def teacher_of(recipe: Recipe) -> tuple[ModelSection, str | None]:
    """Return the weights of the recipe's teacher, and the folder of an adapter on them, if it has one.

    Folders are absolute, except where a variable of the environment is part of them.

    Raises:
        UserError: The teacher is a run that has not finished, or an adapter on a model that has no name.
    """
    assert isinstance(recipe.objective, DistilObjective)
    teacher = recipe.objective.teacher
    if teacher.path is None:
        return ModelSection(id=teacher.id, revision=teacher.revision), None
    folder = locate(teacher.path, path_of(recipe.runs_folder)).absolute()
    is_run = folder.name == MODEL_FOLDER and (folder.parent / PLAN_FILE).is_file()
    if not is_run or folder.is_dir():
        return ModelSection(path=_without_values(teacher.path, folder, MODEL_FOLDER if is_run else "")), None
    adapter = folder.with_name(ADAPTER_FOLDER)
    return _base_of(folder.parent, adapter), _without_values(teacher.path, adapter, ADAPTER_FOLDER)


def teacher_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with the teacher in place of the model, whole and without an adapter.

    Raises:
        UserError: See `teacher_of`.
    """
    model, _ = teacher_of(recipe)
    return recipe.model_copy(update={"model": model, "method": FullMethod(), "objective": SftObjective()})


def _without_values(text: str, folder: Path, below: str) -> str:
    """Return the folder, or the recipe's own text where it takes a value from the environment, which no plan holds."""
    return str(Path(text) / below) if "${env:" in text else str(folder)


def _base_of(run: Path, adapter: Path) -> ModelSection:
    """Return the model on which a run trained its adapter."""
    if not adapter.is_dir():
        raise UserError(
            f"objective.teacher.path {run} is a run that has not finished.",
            "it has neither a model nor an adapter folder yet.",
            f"finish it with `packhorse resume {run}`, or name another teacher.",
        )
    plan: dict[str, Any] = json.loads((run / PLAN_FILE).read_text(encoding="utf-8"))
    model = ModelSection.model_validate(plan["recipe"]["model"])
    if model.config is not None or model.new_tokens:
        raise UserError(
            f"objective.teacher.path {run} is a run that trained an adapter on a fresh model, or new tokens.",
            "its base model cannot be loaded by name.",
            "name a run of full fine-tuning, or a folder with the merged model.",
        )
    return model if model.path is None else model.model_copy(update={"path": plan["base_model"]})
