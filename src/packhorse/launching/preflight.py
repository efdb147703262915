"""What can be refused before a row is read or a device taken."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from packhorse.durable import size
from packhorse.errors import UserError
from packhorse.estimate.checkpoint_size import CheckpointSpace
from packhorse.plan.command import nvme_folder
from packhorse.plan.compatibility import NO_RESUME_FROM_NVME
from packhorse.plan.optimizer_pairs import IN_8_BITS
from packhorse.plan.run_plan import PLAN_FILE, RunPlan
from packhorse.recipe.locate import expand, path_of
from packhorse.run_folder.checkpoints.listing import complete_checkpoints, newest_complete
from packhorse.run_folder.checkpoints.manifest import read_manifest
from packhorse.run_folder.folder import relative


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
        _refuse_pickled_weights(path, folder)
        return
    run = path_of(path)
    if (run / PLAN_FILE).is_file():
        state = "trained an adapter" if (run / "adapter").is_dir() else "has not finished"
        raise UserError(
            f"model.path {path} is a run that {state}: it has no model folder.",
            "a run can start from a finished run of full fine-tuning.",
            f"finish it with `packhorse resume {path}`, or name another model.",
        )
    raise UserError(
        f"model.path {path} " + ("holds no config.json." if folder.is_dir() else "does not exist."),
        "a model folder in Hugging Face form has config.json beside its weights.",
        "name such a folder or a finished run (train that one first), or set model.id to a hub name.",
    )


def _refuse_pickled_weights(path: str, folder: Path) -> None:
    pickles = sorted(file.name for file in folder.glob("*.bin") if file.name.startswith("pytorch_model"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model.path {path} has its weights in {pickles[0]}, and no safetensors.",
            "a .bin file is a pickle, which can run code when it is opened; Packhorse reads none.",
            "name a model with safetensors; where you trust the file, load it with transformers once and save it "
            "again: save_pretrained writes safetensors.",
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


def room_to_come(plan: RunPlan, room: CheckpointSpace) -> CheckpointSpace:
    """What the run's checkpoints still need beside those that stand.

    Args:
        plan: As it would run.
        room: What they take in all.
    """
    standing = len(complete_checkpoints(Path(plan.run_folder) / "checkpoints"))
    return replace(room, count=max(1, room.count - standing))


def check_disk(plan: RunPlan, room: CheckpointSpace | None) -> None:
    """Refuses a disk that the run's checkpoints would fill; those that stand already need no more room.

    Where the model's parameters cannot be counted ahead nothing is checked, which `packhorse plan` says.

    Args:
        plan: As it would run.
        room: What its checkpoints take; None where that is not known.

    Raises:
        UserError: Fewer bytes are free than the checkpoints need.
    """
    if room is None:
        return
    room = room_to_come(plan, room)
    needed, run_folder = room.total_bytes, Path(plan.run_folder)
    existing = next(parent for parent in (run_folder, *run_folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return
    section = plan.recipe.checkpoint
    best = ", the best one (checkpoint.keep_best)" if section.keep_best else ""
    raise UserError(
        f"{size(free)} are free in {existing}, and the checkpoints need {size(needed)}: {room.count} of "
        f"{size(room.each_bytes)}.",
        f"the newest {section.keep_last} (checkpoint.keep_last){best} and the one that is being written stand there.",
        f"free {size(needed - free)} there, keep fewer, or set runs_folder to a larger disk.",
    )


def check_resumable(plan: RunPlan) -> None:
    """Refuses to go on with a run where its optimizer states cannot be had.

    Args:
        plan: As it would go on.

    Raises:
        UserError: Its engine is `zero3_nvme`; or its optimizer keeps states in 8 bits, one engine is ZeRO, and the
            newest checkpoint was written by another or on another number of processes.
    """
    if plan.topology.engine == "zero3_nvme":
        raise UserError(
            f"{plan.recipe.name} would go on with parallel.engine zero3_nvme.",
            NO_RESUME_FROM_NVME,
            "train under another name from what was learned (model.path=RUN/checkpoints/STEP/model), or with "
            "parallel.engine zero3_offload.",
        )
    newest = newest_complete(Path(plan.run_folder) / "checkpoints")
    manifest = read_manifest(newest) if newest is not None else None
    if newest is None or manifest is None:
        return
    written, engine, world = manifest.run, plan.topology.engine, plan.topology.world_size
    if written.engine == "zero3_nvme":
        raise UserError(
            f"{relative(newest)} was written under zero3_nvme, and {engine} would go on from it.",
            NO_RESUME_FROM_NVME,
            f"train under another name from its weights: model.path={relative(newest)}/model.",
        )
    by_rank = plan.recipe.optimizer.name in IN_8_BITS and "zero" in (written.engine[:4], engine[:4])
    if by_rank and (written.engine, written.world_size) != (engine, world):
        raise UserError(
            f"{relative(newest)} was written under {written.engine} on {written.world_size} processes, and "
            f"{engine} on {world} would go on from it; optimizer.name is {plan.recipe.optimizer.name}.",
            "ZeRO keeps states of 8 bits in pieces that only the same engine on as many processes cuts alike.",
            f"set parallel.engine to {written.engine} and parallel.processes to {written.world_size}.",
        )


def _compiles(program: str, *words: str) -> bool:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return False
    command = [compiler, "-x", "c++", "-", "-o", os.devnull, *words]
    return subprocess.run(command, input=program.encode(), capture_output=True, check=False).returncode == 0  # noqa: S603
