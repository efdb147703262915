"""Names of the NVIDIA GPUs that CUDA would use here, without torch."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
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
    return _chosen([line.strip() for line in lines if line.strip()])


def _chosen(installed: list[str]) -> tuple[str, ...]:
    """Return the names that CUDA_VISIBLE_DEVICES leaves of lines with `uuid, name`."""
    names = [line.split(",")[-1].strip() for line in installed]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(names)
    chosen: list[str] = []
    for word in (part.strip() for part in visible.split(",")):
        if word.isdigit() and int(word) < len(names):
            chosen.append(names[int(word)])
        elif word.startswith("MIG-"):  # nvidia-smi does not list parts of a GPU as devices
            chosen.append("MIG")
        elif word.startswith("GPU-") and any(line.startswith(word) for line in installed):
            chosen.append(next(name for name, line in zip(names, installed, strict=True) if line.startswith(word)))
        else:
            break  # as CUDA does at the first word that names no device
    return tuple(chosen)


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
