"""Part `facts`: what this machine is, what its libraries have, and the rates on which all other figures rest."""

from __future__ import annotations

import inspect
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from setting import Case, Figures, Setting

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "safetensors", "tokenizers",
    "pydantic", "numpy", "liger-kernel", "flash-attn",
)  # fmt: skip
NAMES = (
    "torch.nn.attention.varlen:varlen_attn",
    "torch.nn.functional:linear_cross_entropy",
    "torch.nn:LinearCrossEntropyOptions",
    "transformers:PreTrainedModel.activation_checkpointing_enable",
)


def cases(setting: Setting) -> Iterator[Case]:
    """Yield the machine, the versions, the names that Packhorse calls, and the rates."""
    yield "machine", lambda: _machine(setting)
    yield "versions", _versions
    for name in NAMES:
        yield name.partition(":")[2], lambda name=name: {"signature": _signature(name)}
    yield "names of library_hooks.toml", _missing_hooks
    yield "rates", lambda: _rates(setting)


def _machine(setting: Setting) -> Figures:
    import torch

    figures: Figures = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "host memory GiB": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "torch built for CUDA": torch.version.cuda,
        "gcc": shutil.which("gcc") is not None,
    }
    if setting.is_cuda:
        from packhorse.estimate.gpus import gpu_of_device

        properties = torch.cuda.get_device_properties(0)
        profile = gpu_of_device(properties.name)
        figures |= {
            "GPU": properties.name,
            "GPUs": torch.cuda.device_count(),
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory GiB": properties.total_memory / 2**30,
            "driver": _driver(),
            "cuDNN": torch.backends.cudnn.version(),
            "NCCL": _nccl(),
            "profile in gpus.yaml": profile.name if profile else None,
        }
    return figures


def _nccl() -> str | None:
    import torch
    import torch.distributed as dist

    return ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known: {type(error).__name__}"


def _versions() -> Figures:
    found: Figures = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _signature(name: str) -> str:
    module, _, path = name.partition(":")
    found = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return str(inspect.signature(found)) if callable(found) else repr(found)


def _missing_hooks() -> Figures:
    from packhorse.library_hooks import library_hooks, missing_names

    missing = missing_names(library_hooks())
    return {"missing": ", ".join(f"{library} {name}" for library, name in missing) or "none"}


def _rates(setting: Setting) -> Figures:
    import torch

    size, side = (2**20, 256) if setting.smoke else (2**31, 8192)
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    small = torch.ones(1, device=setting.device)
    figures = {"copy on the device GB/s": 2 * size / setting.seconds(lambda: target.copy_(source)) / 1e9}
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, dtype in types.items():
        # Random values: zeros draw less power, and clocks stay higher.
        matrix = torch.randn(side, side, device=setting.device).to(dtype)
        figures[f"product {name} TFLOP/s"] = 2 * side**3 / _timed(setting, lambda m=matrix: m @ m) / 1e12
    figures["launch of a small kernel µs"] = setting.seconds(lambda: small.add_(1), 1000) * 1e6
    return figures


def _timed(setting: Setting, work: Callable[[], object]) -> float:
    return setting.seconds(work, 5, 2)
