"""Part `speed`: LoRA on 8 billion random weights, packs of 8,192 tokens, with each option that changes the speed."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from packhorse.model_spec.configuration import published
from packhorse.recipe.schema import ModelSection, ParallelSection
from runs import TINY, Run, Stepper, make_run, on_device, peak_gib, stepper, write_config
from setting import Case, Figures, Setting

CONFIG = published()["meta-llama/Llama-3.1-8B"]
DOCUMENTS = (700,) * 11 + (492,)
WARM_UP, STEPS = 2, 4
TOP_KERNELS = 12
KINDS = {
    "products": re.compile(r"gemm|gemv|nvjet|cutlass|xmma|splitk|::(mm|addmm|bmm|baddbmm)$", re.IGNORECASE),
    "attention": re.compile(r"flash|fmha|attention|attn", re.IGNORECASE),
    "copies": re.compile(r"memcpy|memset", re.IGNORECASE),
}
"""Kinds of kernels by their names; all others are elementwise operations and reductions."""


@dataclass(frozen=True)
class Variant:
    """An option beside the shipped recipe's: LoRA of rank 32 with dropout, every layer recomputed."""

    name: str
    method: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


def variants() -> list[Variant]:
    """Return the options to measure, the most telling first; those that the recipe lacks are left out."""
    return [
        Variant("as shipped: every layer recomputed"),
        Variant("nothing recomputed", parallel={"checkpointing": False}),
        Variant("every 4th layer recomputed", parallel={"checkpointing": 4}),
        *_options("parallel", "compile"),
        *_options("model", "kernels"),
        *_options("parallel", "kernels"),
        Variant("dropout 0", method={"dropout": 0.0}),
        Variant("every 2nd layer recomputed", parallel={"checkpointing": 2}),
        Variant("attention sdpa", model={"attention": "sdpa"}),
    ]


def _options(section: Literal["parallel", "model"], name: str) -> list[Variant]:
    """Return a variant for each value of a field other than its default; none where the recipe has no such field."""
    model = {"parallel": ParallelSection, "model": ModelSection}[section]
    if name not in model.model_fields:
        return []
    info = model.model_fields[name]
    values = [value for value in _values(info.annotation) if value not in (info.default, "auto")]
    return [Variant(f"{section}.{name} {value}", **{section: {name: value}}) for value in values]  # type: ignore[arg-type]


def _values(annotation: object) -> list[Any]:
    if annotation is bool:
        return [True, False]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in _values(part)]


def cases(setting: Setting) -> Iterator[Case]:
    """Yield each variant, and after the first one the kernels of a step."""
    base = write_config(setting.folder / "base", TINY if setting.smoke else CONFIG)
    chosen = variants()[:2] if setting.smoke else variants()
    for number, variant in enumerate(chosen):
        yield variant.name, partial(measured, setting, variant, base)
        if number == 0:
            kernels: list[Case] = []
            yield "kernels of one step", partial(_profiled, setting, variant, base, kernels)
            yield from kernels


def measured(setting: Setting, variant: Variant, base: Path, random: bool = True) -> Figures:
    """Return speed and peak of a variant beside the plan's.

    Args:
        random: Whether `base` has config.json alone, and weights are drawn on the device.
    """
    run = run_of(setting, variant, base)
    with on_device() if random else nullcontext(), stepper(run) as steps:
        began = time.perf_counter()
        losses = [float(steps.step()) for _ in range(1 if setting.smoke else WARM_UP)]
        setting.synchronize()
        warm_up = time.perf_counter() - began
        seconds = setting.seconds(steps.step, STEPS, warm_up=0)
        return _figures(setting, run, seconds, losses[0]) | {"warm-up s": warm_up}


def _figures(setting: Setting, run: Run, seconds: float, loss: float) -> Figures:
    predicted = run.estimate.speed
    return {
        "tokens/s": predicted.tokens_per_step / seconds,
        "plan's tokens/s": predicted.tokens_per_second_per_gpu,
        "MFU": predicted.model_flops / (seconds * predicted.peak_flops),
        "HFU": predicted.hardware_flops / (seconds * predicted.peak_flops),
        "ms a step": seconds * 1e3,
        "peak GiB": peak_gib(setting),
        "plan GiB": run.estimate.memory.peak.bytes / 2**30,
        "first loss": loss,
    }


def run_of(setting: Setting, variant: Variant, base: Path) -> Run:
    """Return the run of a variant: one pack a step."""
    lengths = (40, 24) if setting.smoke else DOCUMENTS
    model = {"path": str(base), "tokenizer": "builtin:tokenizer", **variant.model}
    method = {"kind": "lora", **variant.method}
    parallel = {"checkpointing": True, **variant.parallel}
    name = f"run-{len(list(setting.folder.glob('run-*')))}"
    return make_run(setting, name, base, lengths, steps=4, method=method, parallel=parallel, model=model)


# --- where the time goes --------------------------------------------------------------------------


def _profiled(setting: Setting, variant: Variant, base: Path, kernels: list[Case]) -> Figures:
    """Return the time of one step by kind of kernel, and append the longest kernels as cases."""
    with on_device(), stepper(run_of(setting, variant, base)) as steps:
        steps.step()
        setting.synchronize()
        times, counts = _kernel_times(setting, steps)
    for name, milliseconds in times.most_common(TOP_KERNELS):
        row = {"kind": kind_of(name), "ms": milliseconds, "launches": counts[name]}
        kernels.append((f"kernel {_short(name)}", lambda row=row: row))
    by_kind = dict.fromkeys((*KINDS, "elementwise"), 0.0)
    for name, milliseconds in times.items():
        by_kind[kind_of(name)] += milliseconds
    ratio = by_kind["elementwise"] / by_kind["products"] if by_kind["products"] else None
    figures = {f"{kind} ms": milliseconds for kind, milliseconds in by_kind.items()}
    return figures | {"elementwise ÷ products": ratio, "launches": counts.total()}


def _kernel_times(setting: Setting, steps: Stepper) -> tuple[Counter[str], Counter[str]]:
    """Return milliseconds and launches of each kernel of one step; on a CPU, of each operator."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.is_cuda else [])]
    with profile(activities=activities) as profiler:
        steps.step()
        setting.synchronize()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    events = profiler.key_averages()
    # A range that the host has named, such as an optimizer's step, is listed for the GPU too, beside its kernels.
    of_host = {event.key for event in events if event.device_type == DeviceType.CPU}
    for event in events:
        if setting.is_cuda and (event.device_type != DeviceType.CUDA or event.key in of_host):
            continue
        spent = event.self_device_time_total if setting.is_cuda else event.self_cpu_time_total
        times[event.key] += spent / 1e3
        counts[event.key] += event.count
    return times, counts


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel by its name."""
    return next((kind for kind, names in KINDS.items() if names.search(kernel)), "elementwise")


def _short(name: str) -> str:
    return re.sub(r"void |at::native::|\(anonymous namespace\)::|<unnamed>::", "", name)[:90]
