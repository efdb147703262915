"""Part `checkpoint`: what a checkpoint costs the step loop, the rate of copies, and activations kept on the host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch

from packhorse.model_spec.configuration import published
from packhorse.run_folder.layout import CHECKPOINTS_FOLDER
from packhorse.train.checkpoint.checkpoints import Checkpoints
from packhorse.train.state import TrainState
from runs import TINY, make_run, on_device, stepper, write_config
from setting import Case, Figures, Setting
from speed import CONFIG, Variant, measured

SAVED = published()["Qwen/Qwen2.5-0.5B"]
SAVES = 3
LAYERS = 8


def cases(setting: Setting) -> Iterator[Case]:
    """Yield the stalls of a run, the copy rates, and steps with and without activations on the host."""
    yield "checkpoints of full fine-tuning", lambda: _stalls(setting)
    yield "copies", lambda: _copies(setting)
    config = TINY if setting.smoke else {**CONFIG, "num_hidden_layers": LAYERS}
    base = write_config(setting.folder / "base", config)
    for offload in (False, True) if setting.is_cuda else (False,):
        words = f"{LAYERS} layers of an 8B, activations {'on the host' if offload else 'on the GPU'}"
        yield words, partial(measured, setting, Variant(words, parallel={"offload_activations": offload}), base)


def _stalls(setting: Setting) -> Figures:
    """Save a few times, and train on while the files are written; each save begins when the last one is on disk."""
    base = write_config(setting.folder / "saved", TINY if setting.smoke else SAVED)
    run = make_run(setting, "saves", base, (320, 192), method="full", checkpoint={"keep_last": 1})
    stalls, seconds = [], []
    with on_device(), stepper(run) as steps:
        steps.step()
        alone = setting.seconds(steps.step, 5)
        checkpoints = Checkpoints(run.plan, steps.engine, is_main=True)
        began, before = time.perf_counter(), steps.done
        for number in range(1, SAVES + 1):
            checkpoints.save(TrainState(step=number))
            while not (saved := checkpoints.take_figures()):
                float(steps.step())
                checkpoints.publish(checkpoints.pending_done())
            stalls.append(saved["checkpoint/stall_seconds"])
            seconds.append(saved["checkpoint/seconds"])
        beside = (time.perf_counter() - began - sum(stalls)) / (steps.done - before)
    size = sum(file.stat().st_size for file in (run.folder / CHECKPOINTS_FOLDER).rglob("*") if file.is_file())
    return {
        "checkpoint GiB": size / 2**30,
        "first stall s": stalls[0],
        "later stalls s": max(stalls[1:]),
        "later GiB/s": size / 2**30 / max(stalls[1:]),
        "on disk after s": max(seconds),
        "ms a step alone": alone * 1e3,
        "ms a step while files are written": beside * 1e3,
    }


def _copies(setting: Setting) -> Figures:
    size = 2**20 if setting.smoke else 2**30
    device = torch.ones(size, dtype=torch.uint8, device=setting.device)
    figures: Figures = {}
    for pinned in (True, False) if setting.is_cuda else (False,):
        host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for name, source, target in (("to the host", device, host), ("to the GPU", host, device)):
            copy = partial(target.copy_, source, non_blocking=pinned)
            figures[f"{'pinned' if pinned else 'pageable'} {name} GB/s"] = size / setting.seconds(copy, 5) / 1e9
    return figures
