"""Builds and loads the device of device.cpp, and gives `torch.cuda` what a CPU build of torch lacks.

Proves that the CUDA branches of torch, accelerate, DeepSpeed and Packhorse run. Streams and events do nothing and the
figures of memory are constants: what depends on them is proved on a GPU only.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")
NUM_DEVICES = 8
NAME, MEMORY_BYTES = "NVIDIA H100 80GB HBM3", 80 * 2**30
WAIT_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_KEPT: list[Any] = []  # what C++ or torch keeps a bare pointer to


def compiler() -> str | None:
    """The C++ compiler, None where there is none."""
    return shutil.which("g++")


def build() -> Path:
    """The shared library, compiled once for this source and this version of torch."""
    content = SOURCE.read_bytes() + version("torch").encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "packhorse" / "soft-cuda"
    library = cache / f"{hashlib.sha256(content).hexdigest()[:16]}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    include, lib = _torch_folder() / "include", _torch_folder() / "lib"
    written = library.with_suffix(f".{os.getpid()}")
    found = compiler()
    assert found is not None, "soft CUDA needs g++"
    command = [found, "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(written)]
    command += [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{lib}", "-lc10", "-ltorch_cpu", "-ltorch"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written.replace(library)  # another process may build it at the same time
    return library


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def load() -> None:
    """Make `cuda` a device of this process and of those forked from it. Before anything looks at `torch.cuda`."""
    library = build()
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / name), ctypes.RTLD_GLOBAL)
    device = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    _KEPT.append(device)
    import torch

    _bindings(torch, device)
    _torch_cuda(torch)
    _storages(torch)
    import soft_kernels

    _KEPT.append(soft_kernels.register())


def on_wait(callback: Callable[[str], None]) -> None:
    """Call `callback` with the kind of each wait of the host for the device, in the thread that waits."""
    called = WAIT_CALLBACK(lambda kind: callback(kind.decode()))
    _KEPT.append(called)
    _KEPT[0].soft_cuda_report_waits(called)


def _bindings(torch: Any, device: ctypes.CDLL) -> None:
    """What torch's CUDA build has in `torch._C`, as far as `torch.cuda` calls it here."""
    binding = torch._C
    binding._cuda_getDeviceCount = lambda: NUM_DEVICES
    # Functions of Python: dynamo looks each function of torch up by its hash.
    binding._cuda_getDevice = lambda: device.soft_cuda_exchange(-1)

    def exchange(index: int) -> int:
        return device.soft_cuda_exchange(index)

    binding._cuda_setDevice = torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = exchange
    binding._cuda_getCurrentRawStream = lambda index: 0
    binding._cuda_synchronize = lambda: None
    binding._cuda_emptyCache = lambda: None


def _torch_cuda(torch: Any) -> None:
    cuda = torch.cuda
    torch.version.cuda = "13.0"
    cuda._initialized, cuda._lazy_init = True, lambda: None
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=MEMORY_BYTES, multi_processor_count=132, warp_size=32
    )
    constants = {
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "get_device_name": NAME,
        "is_bf16_supported": True,
        "mem_get_info": (MEMORY_BYTES, MEMORY_BYTES),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "memory_stats": {},
        "synchronize": None,
        "manual_seed": None,  # the device draws from the generator of the CPU, which is seeded beside it
        "manual_seed_all": None,
        "is_current_stream_capturing": False,
        "current_stream": Stream(),
        "default_stream": Stream(),
        "set_stream": None,
    }
    for name, value in constants.items():
        setattr(cuda, name, lambda *_, _value=value, **__: _value)
    cuda.Stream, cuda.Event, cuda.stream, cuda.StreamContext = Stream, Event, _Context, _Context
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.set_rng_state = lambda *_: None
    cuda.default_generators = (torch.default_generator,) * NUM_DEVICES
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *_: 0)
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor"):
        setattr(cuda, name, type(name, (), {}))  # DeepSpeed compares types of tensors with these
    torch.accelerator.current_stream = lambda *_, **__: Stream()
    torch.accelerator.synchronize = lambda *_, **__: None
    torch.Tensor.record_stream = lambda self, stream: None


def _storages(torch: Any) -> None:
    """Resizing of a storage, by which FSDP2 frees what it gathered; torch's own knows no device but the CPU here."""
    on_cpu = torch.UntypedStorage.resize_

    def resize(storage: Any, num_bytes: int) -> Any:
        if storage.device.type != "cuda":
            return on_cpu(storage, num_bytes)
        with torch.no_grad():
            tensor = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            torch.ops.soft_cuda.resize_storage(tensor, num_bytes)
        return storage

    torch.UntypedStorage.resize_ = resize


class _Context:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Stream(_Context):
    """A stream on which everything is done at once."""

    cuda_stream = device_index = 0

    def wait_stream(self, stream: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


class Event(_Context):
    """An event that has happened."""

    def record(self, stream: Stream | None = None) -> None:
        pass

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1.0
