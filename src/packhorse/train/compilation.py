"""Compiles the decoder layers with torch.compile, and reports what that takes.

One graph serves all layers of a kind and packs of any documents: sizes are dynamic, and weights are its inputs.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

from torch import nn

from packhorse.run_folder.heartbeat import HeartbeatWriter
from packhorse.run_folder.layout import COMPILED_FOLDER

CACHE_VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"
COMPILE_SECONDS: Final = 1800.0
"""Longest time of one compilation, after which it counts as hung like any other phase."""
MOST_GRAPHS: Final = 64
"""Graphs of one layer's code; torch then stops compiling, by default after 8: training and evaluation, kinds of layers
and types of inputs each have their own."""


def compile_layers(layers: Sequence[nn.Module], runs_folder: Path, backend: str = "inductor") -> None:
    """Let each layer be compiled when it first runs; names of weights stay the same.

    Call this before the layers are sharded, so that the engine's hooks stay outside of the compiled code.

    Args:
        layers: Decoder layers, with their adapters.
        runs_folder: Folder of the run folders; compiled code is kept there for other ranks, attempts and runs.
        backend: Compiler of torch.
    """
    # torch sets the variable to its default when it is first imported; another value is the user's.
    default = import_module("torch._inductor.runtime.cache_dir_utils").default_cache_dir()
    if os.environ.get(CACHE_VARIABLE, default) == default:
        os.environ[CACHE_VARIABLE] = str(runs_folder / COMPILED_FOLDER)
    # By name: it takes seconds to import, which no other run needs.
    config = import_module("torch._dynamo").config
    config.recompile_limit = MOST_GRAPHS
    # DDP would cut each layer's graph at its buckets, to overlap their exchange with the backward pass; one layer at a
    # time overlaps anyway.
    config.optimize_ddp = False
    # Round as eager torch does, where several operations of a 16-bit type become one kernel.
    options = {"emulate_precision_casts": True} if backend == "inductor" else None
    for layer in layers:
        layer.compile(backend=backend, dynamic=True, options=options)


def watch_compilation(pulse: HeartbeatWriter) -> Callable[[], None]:
    """Log the time of each compilation, and let the heartbeat allow for it.

    Returns:
        Function that ends this.
    """
    handler = import_module("torch._dynamo.callback").callback_handler
    began = 0.0

    def start(_: object) -> None:
        nonlocal began
        began = time.monotonic()
        pulse.extend(COMPILE_SECONDS)

    def end(_: object) -> None:
        pulse.extend(0.0)
        logging.info("compiled a graph of the decoder layers in %.1f s", time.monotonic() - began)

    def remove() -> None:
        handler.remove_start_callback(start)
        handler.remove_end_callback(end)

    handler.register_start_callback(start)
    handler.register_end_callback(end)
    return remove
