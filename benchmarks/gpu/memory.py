"""Part `memory`: the peak of torch's allocator beside the plan's, for the cases of tests/gpu."""

from __future__ import annotations

import multiprocessing as mp
import os
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import torch
from peak_memory import LARGE, SMALL, Case, Measured, base_folder, cases_for, measure

import setting as gpu
from runs import TINY, write_model

GIB_OF_A_CASE = 24
CASE_CORES = 3


def cases(setting: gpu.Setting) -> Iterator[gpu.Case]:
    """Yield each case of one card; as many run side by side as the card and the cores hold."""
    measured = [case for case in cases_for(1) if case.processes == 1]
    if setting.smoke:
        measured = [replace(case, config=TINY, length=256, validation=256) for case in measured[:1]]
    for config in (SMALL, LARGE) if not setting.smoke else (TINY,):
        write_model(base_folder(config, setting.folder), config, setting)
    with ExitStack() as stack:
        pool: Executor | None = None
        if setting.is_cuda:
            workers = max(1, min(_fitting(), (os.cpu_count() or 1) // CASE_CORES))
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp.get_context("spawn")))
        started = [_start(pool, case, setting) for case in measured]
        for case, future in zip(measured, started, strict=True):
            yield case.name, lambda future=future: _figures(future.result())


def _fitting() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory / 2**30 / GIB_OF_A_CASE)


def _start(pool: Executor | None, case: Case, setting: gpu.Setting) -> Future[Measured]:
    if pool is not None:
        return pool.submit(measure, case, setting.folder, setting.gpus)
    future: Future[Measured] = Future()
    future.set_result(measure(case, setting.folder, setting.gpus))
    return future


def _figures(found: Measured) -> gpu.Figures:
    return {
        "plan GiB": found.told / 2**30,
        "measured GiB": found.peak / 2**30,
        "plan ÷ measured - 1": found.gap,
        "within -3 to +5 %": -0.03 <= found.gap <= 0.05,
        "plan's phase": found.estimate.peak.name,
        "measured in": max(found.phases, key=lambda name: found.phases[name]),
    }
