"""Checks that refuse a run before a row is read or a GPU is taken."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from packhorse.durable import nearest_existing, size
from packhorse.errors import UserError
from packhorse.estimate.checkpoint_size import CheckpointSpace
from packhorse.estimate.teacher import stored_bytes
from packhorse.plan.command import nvme_folder
from packhorse.plan.compatibility import IN_8_BITS, NO_RESUME_FROM_NVME
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.locate import expand, path_of
from packhorse.run_folder.checkpoints.listing import complete_checkpoints, newest_complete
from packhorse.run_folder.checkpoints.manifest import read_manifest
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import ADAPTER_FOLDER, CHECKPOINTS_FOLDER, MODEL_FOLDER, PLAN_FILE


def check_writable(folder: Path) -> None:
    """Refuse a folder for runs that cannot be written.

    Raises:
        UserError: The nearest folder that exists is not writable.
    """
    existing = nearest_existing(folder)
    if error := _write_error(existing):
        raise UserError(
            f"{folder} cannot be written: {existing}: {error.strerror}.",
            "run folders and prepared data are kept there.",
            "set runs_folder to a folder that you may write.",
        ) from error


def _write_error(folder: Path) -> OSError | None:
    """Create the folder if it does not exist; return why it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not os.access: for root it returns true even on a read-only file system.
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error


def check_base_model(plan: RunPlan) -> None:
    """Refuse a local folder that holds no model.

    Raises:
        UserError: The folder is absent, holds no config.json, or is a run that has not finished or trained an adapter.
    """
    path = plan.recipe.model.path
    if path is None or plan.base_model is None:
        return
    folder = Path(expand(plan.base_model))
    if (folder / "config.json").is_file():
        return
    run = path_of(path)
    if (run / PLAN_FILE).is_file():
        state = "trained an adapter" if (run / ADAPTER_FOLDER).is_dir() else "has not finished"
        raise UserError(
            f"model.path {path} is a run that {state}: it has no model folder.",
            "a run can start from a finished run of full fine-tuning.",
            f"finish it with `packhorse resume {path}`, or name another model.",
        )
    raise UserError(
        f"model.path {path} " + ("holds no config.json." if folder.is_dir() else "does not exist."),
        "a model folder in Hugging Face form has config.json next to its weights.",
        "name such a folder or a finished run (train that one first), or set model.id to a hub name.",
    )


def check_teacher_folder(plan: RunPlan) -> None:
    """Refuse a local folder that holds no teacher.

    Raises:
        UserError: The folder of the teacher, or of the model that its adapter belongs to, holds no config.json.
    """
    path = plan.teacher.model.path if plan.teacher is not None else None
    if path is None or (Path(expand(path)) / "config.json").is_file():
        return
    raise UserError(
        f"objective.teacher is in {path}, which "
        + ("holds no config.json." if Path(path).is_dir() else "does not exist."),
        "a model folder in Hugging Face form has config.json next to its weights.",
        "set objective.teacher.path to such a folder or a finished run, or objective.teacher.id to a hub name.",
    )


def check_nvme(plan: RunPlan) -> None:
    """Refuse `zero3_nvme` if its files cannot be written, or DeepSpeed's asynchronous I/O cannot be built.

    Raises:
        UserError: The folder cannot be written, libaio is absent, or too little memory may be locked.
    """
    folder = nvme_folder(plan)
    if folder is None or plan.deepspeed is None:
        return
    weights = plan.deepspeed["zero_optimization"]["offload_param"]
    if error := _write_error(folder):
        raise UserError(
            f"parallel.nvme is {plan.recipe.parallel.nvme}, and {folder} cannot be written: {error.strerror}.",
            "zero3_nvme keeps weights and optimizer states there.",
            "set parallel.nvme to a folder on a local disk that you may write.",
        ) from error
    if not _compiles("#include <libaio.h>\nint main() { return io_queue_init(1, nullptr); }\n", "-laio"):
        raise UserError(
            "parallel.engine is zero3_nvme, and a program that uses libaio cannot be built here.",
            "DeepSpeed builds its asynchronous I/O with a C++ compiler and libaio.",
            "install g++ and libaio-dev (apt) or libaio-devel (dnf), or set CPATH and LIBRARY_PATH to them; "
            "parallel.engine zero3_offload needs neither.",
        )
    if plan.topology.device == "cuda" and not _has_cuda_toolkit():
        raise UserError(
            "parallel.engine is zero3_nvme, and this machine has no CUDA toolkit.",
            "DeepSpeed builds its asynchronous I/O against CUDA's headers and libraries in CUDA_HOME.",
            "set CUDA_HOME to a toolkit with include and lib64, or set parallel.engine to zero3_offload.",
        )
    needed = weights["buffer_count"] * weights["buffer_size"] * (4 if plan.recipe.precision == "fp32" else 2)
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() != 0 and limit != resource.RLIM_INFINITY and limit < needed:
        raise UserError(
            f"parallel.engine is zero3_nvme, with buffers of {needed:,} bytes per process; {limit:,} may be locked.",
            "DeepSpeed locks its buffers in memory, and fails without a message if the limit is lower.",
            "run `ulimit -l unlimited` first, or set parallel.engine to zero3_offload.",
        )


def disk_still_needed(plan: RunPlan, room: CheckpointSpace) -> CheckpointSpace:
    """Return the disk space for the checkpoints that the run will still write.

    Args:
        plan: Plan of the run.
        room: Disk space of all its checkpoints.
    """
    existing = len(complete_checkpoints(Path(plan.run_folder) / CHECKPOINTS_FOLDER))
    return replace(room, count=max(1, room.count - existing))


def check_teacher_disk(plan: RunPlan, room: CheckpointSpace | None) -> None:
    """Refuse a disk that checkpoints and the teacher's stored tokens would fill together, for a run that begins.

    Args:
        plan: Plan of the run.
        room: Disk space of its checkpoints; None if it is not known.

    Raises:
        UserError: Fewer bytes are free than both need.
    """
    stored = stored_bytes(plan)
    checkpoints = 0 if room is None else disk_still_needed(plan, room).total_bytes
    existing = nearest_existing(Path(plan.run_folder))
    free = shutil.disk_usage(existing).free
    if stored and free < stored + checkpoints:
        raise UserError(
            f"{size(free)} are free in {existing}, and the teacher's most probable tokens need {size(stored)}, the "
            f"checkpoints {size(checkpoints)}.",
            "objective.top tokens of the teacher are stored for each supervised token before training.",
            f"free {size(stored + checkpoints - free)} there, set a smaller objective.top, or set runs_folder to a "
            "larger disk.",
        )


def check_disk(plan: RunPlan, room: CheckpointSpace | None) -> None:
    """Refuse a disk that the run's checkpoints would fill, except those that exist already.

    Args:
        plan: Plan of the run.
        room: Disk space of its checkpoints; None if the model's parameters cannot be counted in advance. Then nothing
            is checked, as `packhorse plan` reports.

    Raises:
        UserError: Fewer bytes are free than the checkpoints need.
    """
    if room is None:
        return
    room = disk_still_needed(plan, room)
    needed, run_folder = room.total_bytes, Path(plan.run_folder)
    existing = nearest_existing(run_folder)
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return
    section = plan.recipe.checkpoint
    best = ", the best one (checkpoint.keep_best)" if section.keep_best else ""
    raise UserError(
        f"{size(free)} are free in {existing}, and the checkpoints need {size(needed)}: {room.count} of "
        f"{size(room.each_bytes)}.",
        f"the newest {section.keep_last} (checkpoint.keep_last){best} and the one being written are on disk together.",
        f"free {size(needed - free)} there, keep fewer, or set runs_folder to a larger disk.",
    )


def check_resumable(plan: RunPlan) -> None:
    """Refuse to resume a run if its optimizer states cannot be loaded.

    Args:
        plan: Plan of the next attempt.

    Raises:
        UserError: The engine is `zero3_nvme`; or the optimizer keeps states in 8 bits, one engine is ZeRO, and the
            newest checkpoint was written by another engine or on another number of processes.
    """
    if plan.topology.engine == "zero3_nvme":
        raise UserError(
            f"{plan.recipe.name} would resume with parallel.engine zero3_nvme.",
            NO_RESUME_FROM_NVME,
            "train under another name from its weights (model.path=RUN/checkpoints/STEP/model), or with "
            "parallel.engine zero3_offload.",
        )
    newest = newest_complete(Path(plan.run_folder) / CHECKPOINTS_FOLDER)
    manifest = read_manifest(newest) if newest is not None else None
    if newest is None or manifest is None:
        return
    written, engine, world_size = manifest.run, plan.topology.engine, plan.topology.world_size
    if written.engine == "zero3_nvme":
        raise UserError(
            f"{relative(newest)} was written under zero3_nvme, and {engine} would resume from it.",
            NO_RESUME_FROM_NVME,
            f"train under another name from its weights: model.path={relative(newest / MODEL_FOLDER)}.",
        )
    sharded_by_zero = plan.recipe.optimizer.name in IN_8_BITS and "zero" in (written.engine[:4], engine[:4])
    if sharded_by_zero and (written.engine, written.world_size) != (engine, world_size):
        raise UserError(
            f"{relative(newest)} was written under {written.engine} on {written.world_size} processes, and "
            f"{engine} on {world_size} would resume from it; optimizer.name is {plan.recipe.optimizer.name}.",
            "only the same engine on the same number of processes divides ZeRO's 8-bit states in the same way.",
            f"set parallel.engine to {written.engine} and parallel.processes to {written.world_size}.",
        )


def check_compiler(plan: RunPlan) -> None:
    """Refuse to compile layers on GPUs if triton cannot build their kernels here.

    Raises:
        UserError: triton, a C compiler or the headers of Python are absent.
    """
    if not plan.compiles_layers or plan.topology.device == "cpu":
        return
    wish = str(plan.recipe.parallel.compile).lower()
    if find_spec("triton") is None:
        raise UserError(
            f"parallel.compile is {wish}, and triton is not installed.",
            "torch's compiler writes GPU kernels with triton, which comes with the CUDA builds of torch.",
            "run `pip install triton`, or set parallel.compile to false.",
        )
    # As triton does (triton/runtime/build.py).
    compiler = os.environ.get("CC") or ("gcc" if shutil.which("gcc") else "clang")
    headers = f"-I{sysconfig.get_path('include')}"
    if not _compiles("#include <Python.h>\nint main() { return 0; }\n", headers, compiler=compiler, language="c"):
        raise UserError(
            f"parallel.compile is {wish}, and {compiler} cannot build a program with Python.h here.",
            "triton builds a small library in C for each kernel.",
            "install gcc and python3-dev (apt) or python3-devel (dnf), set CC to another compiler, or set "
            "parallel.compile to false.",
        )


def _has_cuda_toolkit() -> bool:
    """Look where torch looks (torch/utils/cpp_extension.py, CUDA_HOME)."""
    compiler = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or (compiler and Path(compiler).parents[1])
    return all((Path(home or "/usr/local/cuda") / part).is_dir() for part in ("include", "lib64"))


def _compiles(program: str, *words: str, compiler: str = "", language: str = "c++") -> bool:
    path = shutil.which(compiler or os.environ.get("CXX", "c++"))
    if path is None:
        return False
    command = [path, "-x", language, "-", "-o", os.devnull, *words]
    return subprocess.run(command, input=program.encode(), capture_output=True, check=False).returncode == 0  # noqa: S603
