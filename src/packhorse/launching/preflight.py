"""What can be refused before a row is read or a device taken."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

from packhorse.errors import UserError
from packhorse.plan.command import nvme_folder
from packhorse.plan.pairs import NO_RESUME_FROM_NVME
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


def check_nvme(plan: RunPlan) -> None:
    """Refuses `zero3_nvme` where its files cannot be written, or DeepSpeed's asynchronous I/O cannot be built.

    Raises:
        UserError: The folder cannot be written, libaio is absent, or too little memory may be locked.
    """
    folder = nvme_folder(plan)
    if folder is None or plan.deepspeed is None:
        return
    weights = plan.deepspeed["zero_optimization"]["offload_param"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"parallel.nvme is {plan.recipe.parallel.nvme}, and {folder} cannot be written: {error.strerror}.",
            "zero3_nvme keeps weights and optimizer states there.",
            "set parallel.nvme to a folder on a local disk that you may write.",
        ) from error
    if not _compiles("#include <libaio.h>\nint main() { return io_queue_init(1, nullptr); }\n", "-laio"):
        raise UserError(
            "parallel.engine is zero3_nvme, and a program that uses libaio cannot be built here.",
            "DeepSpeed builds its asynchronous I/O with a C++ compiler and libaio.",
            "install g++ and libaio-dev (apt) or libaio-devel (dnf), or point CPATH and LIBRARY_PATH to them; "
            "parallel.engine zero3_offload needs neither.",
        )
    needed = weights["buffer_count"] * weights["buffer_size"] * (4 if plan.recipe.precision == "fp32" else 2)
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() != 0 and limit != resource.RLIM_INFINITY and limit < needed:
        raise UserError(
            f"parallel.engine is zero3_nvme, with buffers of {needed:,} bytes a process; {limit:,} may be locked.",
            "DeepSpeed locks its buffers in memory, and fails without a reason where it may not.",
            "run `ulimit -l unlimited` first, or set parallel.engine to zero3_offload.",
        )


def check_resumable(plan: RunPlan) -> None:
    """Refuses to go on with a run that would not be the same.

    Raises:
        UserError: Its engine is `zero3_nvme`.
    """
    if plan.topology.engine == "zero3_nvme":
        raise UserError(
            f"{plan.recipe.name} ran with parallel.engine zero3_nvme.",
            NO_RESUME_FROM_NVME,
            "train under another name from what was learned (model.path=RUN/checkpoints/STEP/model), or with "
            "parallel.engine zero3_offload.",
        )


def _compiles(program: str, *words: str) -> bool:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return False
    command = [compiler, "-x", "c++", "-", "-o", os.devnull, *words]
    return subprocess.run(command, input=program.encode(), capture_output=True, check=False).returncode == 0  # noqa: S603
