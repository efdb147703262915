"""What can be refused before a row is read or a device taken."""

from __future__ import annotations

import tempfile
from pathlib import Path

from packhorse.errors import UserError
from packhorse.plan.run_plan import PLAN_FILE, RunPlan
from packhorse.recipe.locate import expand


def check_writable(folder: Path) -> None:
    """Refuses a place for runs that cannot be written.

    Raises:
        UserError: The nearest folder that exists is not writable.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        # Tried, not asked: for root, os.access says yes even where nothing can be written.
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {existing}: {error.strerror}.",
            "run folders and prepared data are kept there.",
            "set runs_folder to a folder that you may write.",
        ) from error


def check_base_model(plan: RunPlan) -> None:
    """Refuses a local folder that holds no model.

    Raises:
        UserError: The folder is absent, holds no config.json, or is a run that has not finished or trained an adapter.
    """
    path = plan.recipe.model.path
    if path is None or plan.base_model is None:
        return
    folder = Path(expand(plan.base_model))
    if (folder / "config.json").is_file():
        return
    run = Path(expand(path)).expanduser()
    if (run / PLAN_FILE).is_file():
        state = "trained an adapter" if (run / "adapter").is_dir() else "has not finished"
        raise UserError(
            f"model.path {path} is a run that {state}: it has no model folder.",
            "a run can start from a finished run of full fine-tuning.",
            f"finish it with `packhorse train {path} --resume`, or name another model.",
        )
    raise UserError(
        f"model.path {path} " + ("holds no config.json." if folder.is_dir() else "does not exist."),
        "a model folder in Hugging Face form has config.json beside its weights.",
        "name such a folder or a finished run (train that one first), or set model.id to a hub name.",
    )
