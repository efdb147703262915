"""Part `training`: the real worker on a tiny model. Probe, four steps beside the CPU's, and a stopped run resumed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from packhorse.run_folder.layout import ADAPTER_FOLDER, CHECKPOINTS_FOLDER, MODEL_FOLDER, step_folder_name
from runs import TINY, Run, make_run, train, write_model
from setting import Case, Figures, Setting

STEPS = 4
BOUND = 2**-7
"""Largest relative difference of a loss from the CPU's: one step of bf16, whose products are added in another order."""
NO_DROPOUT = {"dropout": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "LoRA": {"method": {"kind": "lora", **NO_DROPOUT}},
    "QLoRA nf4": {"method": {"kind": "qlora", **NO_DROPOUT}},
    "QLoRA int8": {"method": {"kind": "qlora", "quantization": "int8", **NO_DROPOUT}},
    "full, fp16": {"method": "full", "precision": "fp16"},
    "full, every layer recomputed": {"method": "full", "parallel": {"checkpointing": True}},
    "full, sdpa": {"method": "full", "model": {"attention": "sdpa"}},
}


def cases(setting: Setting) -> Iterator[Case]:
    """Yield each method; all are trained side by side, since each leaves a GPU nearly idle."""
    base = write_model(setting.folder / "base", TINY, replace(setting, device="cpu"))
    names = ["LoRA"] if setting.smoke else list(METHODS)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as threads:
        futures = {name: threads.submit(_figures, setting, name, base) for name in names}
        for name, future in futures.items():
            yield name, future.result


def _figures(setting: Setting, name: str, base: Path) -> Figures:
    run = _run(setting, base, name, setting.gpus)
    if error := _error(train(run.plan)):
        return {"error": error}
    unbroken = _digest(run)
    lines = run.figures()
    _undo_second_half(run)
    resumed = _error(train(run.plan, attempt=2))
    figures: Figures = {"resumed with the same bits": resumed or _digest(run) == unbroken}
    figures |= {key.partition("/")[2]: value for key, value in lines[0].items() if key.startswith("proof/")}
    losses = _losses(lines)
    if setting.is_cuda:
        on_cpu = _run(setting, base, f"{name} on the CPU", ())
        if error := _error(train(on_cpu.plan)):
            return figures | {"error": error}
        others = _losses(on_cpu.figures())
        worst = max(abs(loss / other - 1) for loss, other in zip(losses, others, strict=True))
        figures |= {"largest difference from the CPU": worst, "within a step of bf16": worst <= BOUND}
    return figures | {"first loss": losses[0], "last loss": losses[-1]}


def _run(setting: Setting, base: Path, name: str, gpus: tuple[str, ...]) -> Run:
    sections = METHODS[name.removesuffix(" on the CPU")]
    model = {"path": str(base), "tokenizer": "builtin:tokenizer", **sections.get("model", {})}
    every = {"checkpoint": {"every_steps": STEPS // 2}, "evaluation": {"max_answered_rows": 0, "every_steps": 2}}
    folder = name.replace(" ", "-").replace(",", "")
    return make_run(
        setting, folder, base, (120, 72), packs=2, steps=STEPS, gpus=gpus, **sections | every | {"model": model}
    )


def _losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["train/loss"] for line in lines if "train/loss" in line]


def _error(record: dict[str, Any]) -> str:
    return "" if record["exit_code"] == 0 else f"exit code {record['exit_code']}: {record['message'][-800:]}"


def _undo_second_half(run: Run) -> None:
    """Leave what a run has that was stopped after its first checkpoint."""
    for name in (f"{CHECKPOINTS_FOLDER}/{step_folder_name(STEPS)}", MODEL_FOLDER, ADAPTER_FOLDER):
        shutil.rmtree(run.folder / name, ignore_errors=True)


def _digest(run: Run) -> str:
    """Return a hash of the published weights."""
    digest = hashlib.sha256()
    for name in (MODEL_FOLDER, ADAPTER_FOLDER):
        for file in sorted((run.folder / name).glob("*.safetensors")):
            for key, tensor in sorted(load_file(file).items()):
                digest.update(key.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
