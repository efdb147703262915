"""Names of the NVIDIA GPUs that CUDA would use here, without torch."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Final

from packhorse.errors import UserError

SMI_SECONDS: Final = 120
"""Without persistence mode nvidia-smi starts the driver of each GPU, which takes half a minute on 8 GPUs."""


def visible_gpus() -> tuple[str, ...]:
    """Return the name of each GPU, in CUDA's order; a part of a GPU (MIG) has the name `MIG`.

    Raises:
        UserError: nvidia-smi does not answer.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return _of_driver()
    query = [command, "--query-gpu=uuid,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"nvidia-smi does not answer within {SMI_SECONDS} s.",
            "it lists the GPUs of this machine, without which the run would go to the CPU.",
            "run `nvidia-smi -pm 1` as root, which keeps the driver loaded, or restart the machine.",
        ) from error
    lines = answer.stdout.splitlines() if answer.returncode == 0 else []
    rows = [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = range(len(rows)) if visible is None else visible_devices([row[0] for row in rows], visible)
    return tuple(rows[device][-1] if isinstance(device, int) else "MIG" for device in chosen)


def visible_devices(uuids: Sequence[str], visible: str) -> list[int | str]:
    """Return the devices that CUDA_VISIBLE_DEVICES leaves: places in nvidia-smi's list, or the word of a part (MIG).

    Where a cgroup hides devices, nvidia-smi lists only those of the job, and Slurm numbers them from 0.

    Args:
        uuids: UUID of each GPU, as nvidia-smi lists them.
        visible: Value of the variable.
    """
    chosen: list[int | str] = []
    for word in (part.strip() for part in visible.split(",")):
        by_uuid = next((place for place, uuid in enumerate(uuids) if word and uuid.startswith(word)), None)
        if word.startswith("MIG-"):  # nvidia-smi does not list parts of a GPU as devices
            chosen.append(word)
        elif word.isdecimal() and int(word) < len(uuids):
            chosen.append(int(word))
        elif by_uuid is not None:
            chosen.append(by_uuid)
        else:
            break  # as CUDA does at the first word that names no device
    return chosen


def _of_driver() -> tuple[str, ...]:
    """Return the names by CUDA's driver library: a container may have that and no nvidia-smi."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    names = []
    for index in range(count.value):
        driver.cuDeviceGetName(name, len(name), index)  # devices are numbers from 0
        names.append(name.value.decode())
    return tuple(names)
