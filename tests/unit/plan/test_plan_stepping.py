"""Optimizers, precisions and memory settings that an engine or a device cannot keep: refused by the plan, by name."""

from __future__ import annotations

from typing import Any

import pytest

from packhorse.errors import UserError
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import DataFacts, RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe

LAPTOP = Hardware(num_cores=8, gpus=())
BOX = Hardware(num_cores=96, gpus=("H100",) * 2)
LION = {"name": "lion", "betas": [0.9, 0.99]}
IN_BACKWARD = {"in_backward": True, "clip_norm": None}


def plan(
    here: Hardware, optimizer: dict[str, Any], parallel: dict[str, Any], data: DataFacts | None = None, **more: Any
) -> RunPlan:
    fields = {
        "name": "r",
        "model": {"id": "o/m"},
        "method": "full",
        "data": {"sources": [{"path": "r.jsonl"}]},
        "batch": {"packs": 16, "micro": 8},
        "steps": 10,
        "optimizer": {"learning_rate": 1e-4, **optimizer},
        "parallel": {"processes": 2, **parallel},
    }
    return make_plan(Recipe.model_validate({**fields, **more}), DeviceRequest(), here, data)


REFUSED: dict[str, tuple[Hardware, dict[str, Any], dict[str, Any], dict[str, Any], str, str]] = {
    "muon on zero": (BOX, {"name": "muon"}, {"engine": "zero2"}, {}, "is muon, and parallel.engine is zero2", "fsdp2"),
    "adafactor on zero": (BOX, {"name": "adafactor"}, {"engine": "zero3"}, {}, "adafactor, and parallel", "ddp"),
    "adafactor on fsdp2": (BOX, {"name": "adafactor"}, {"engine": "fsdp2"}, {}, "adafactor, and parallel", "ddp"),
    "lion on fsdp2": (BOX, LION, {"engine": "fsdp2"}, {}, "is lion, and parallel.engine is fsdp2", "zero2 or zero3"),
    "8 bit on hsdp": (
        BOX,
        {"name": "adamw_8bit"},
        {"engine": "hsdp"},
        {},
        "is adamw_8bit, and parallel.engine is hsdp",
        "zero2 or zero3",
    ),
    "8 bit offloaded": (BOX, {"name": "adamw_8bit"}, {"engine": "zero3_offload"}, {}, "is zero3_offload", "zero3."),
    "paged on a CPU": (LAPTOP, {"name": "paged_adamw_8bit"}, {}, {}, "the run is on the CPU", "to adamw_8bit"),
    "in backward on ddp": (BOX, IN_BACKWARD, {}, {}, "in_backward is true, and parallel.engine is ddp", "fsdp2"),
    "in backward on zero": (BOX, IN_BACKWARD, {"engine": "zero3"}, {}, "parallel.engine is zero3", "fsdp2"),
    "in backward in two passes": (
        BOX,
        IN_BACKWARD,
        {"engine": "fsdp2"},
        {"batch": {"packs": 16, "micro": 4}},
        "a step has 2 backward passes",
        "batch.micro to 8 (or batch.packs to 8)",
    ),
    "fp16 on zero on a CPU": (LAPTOP, {}, {"engine": "zero2"}, {"precision": "fp16"}, "zero2 on the CPU", "bf16"),
    "tf32 on a CPU": (LAPTOP, {}, {}, {"precision": "fp32", "tf32": True}, "tf32 is true", "tf32 to false"),
    "offload on a CPU": (
        LAPTOP,
        {},
        {"checkpointing": True, "offload_activations": True},
        {},
        "parallel.offload_activations is true, and the run is on the CPU",
        "to false",
    ),
    "noise on fsdp2": (
        BOX,
        {},
        {"engine": "fsdp2"},
        {"track": {"noise_scale": True}},
        "parallel.engine is fsdp2",
        "ddp",
    ),
    "noise of one pass": (BOX, {}, {}, {"track": {"noise_scale": True}}, "a step is one backward pass", "micro to 4"),
}


@pytest.mark.parametrize(("here", "optimizer", "parallel", "more", "fact", "fix"), REFUSED.values(), ids=REFUSED)
def test_refused(
    here: Hardware, optimizer: dict[str, Any], parallel: dict[str, Any], more: dict[str, Any], fact: str, fix: str
) -> None:
    with pytest.raises(UserError) as caught:
        plan(here, optimizer, parallel, **more)
    (mistake,) = caught.value.mistakes
    assert fact in mistake.fact
    assert fix in mistake.fix


ALLOWED: dict[str, tuple[Hardware, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "muon on fsdp2": (BOX, {"name": "muon"}, {"engine": "fsdp2"}, {}),
    "8 bit on zero3": (BOX, {"name": "adamw_8bit"}, {"engine": "zero3"}, {}),
    "paged on a GPU": (BOX, {"name": "paged_adamw"}, {}, {}),
    "lion on a CPU": (LAPTOP, LION, {"engine": "zero1"}, {}),
    "in backward on fsdp2": (BOX, IN_BACKWARD, {"engine": "fsdp2"}, {}),
    "fp16 on a CPU": (LAPTOP, {}, {}, {"precision": "fp16"}),
    "fp16 on zero": (BOX, {}, {"engine": "zero3"}, {"precision": "fp16"}),
    "offload on a GPU": (BOX, {}, {"checkpointing": 2, "offload_activations": True}, {}),
    "noise of two passes": (BOX, {}, {}, {"track": {"noise_scale": True}, "batch": {"packs": 16, "micro": 4}}),
}


@pytest.mark.parametrize(("here", "optimizer", "parallel", "more"), ALLOWED.values(), ids=ALLOWED)
def test_allowed(here: Hardware, optimizer: dict[str, Any], parallel: dict[str, Any], more: dict[str, Any]) -> None:
    plan(here, optimizer, parallel, **more)


def test_a_warmup_longer_than_the_epochs_is_refused_once_their_steps_are_known() -> None:
    facts = DataFacts(
        folder="/d", content_hash="0", tokenizer="t", num_rows=9, num_packs=160, num_tokens=9, num_supervised_tokens=9,
        fill=1.0,
    )  # fmt: skip
    more: dict[str, Any] = {"steps": None, "epochs": 1, "schedule": {"warmup_steps": 10}}
    plan(BOX, {}, {}, **more)
    with pytest.raises(UserError, match="schedule.warmup_steps is 10, and 1 epochs are 10 steps"):
        plan(BOX, {}, {}, facts, **more)


@pytest.mark.parametrize(
    ("precision", "clip_norm", "expected"),
    [("fp16", 1.0, (True, False, 1.0)), ("bf16", None, (False, True, 0.0)), ("fp32", 0.5, (False, False, 0.5))],
)
def test_deepspeed_scales_and_clips_by_itself(
    precision: str, clip_norm: float | None, expected: tuple[bool, bool, float]
) -> None:
    config = plan(BOX, {"clip_norm": clip_norm}, {"engine": "zero2"}, precision=precision).deepspeed
    assert config is not None
    assert (config["fp16"]["enabled"], config["bf16"]["enabled"], config["gradient_clipping"]) == expected


@pytest.mark.parametrize(
    ("precision", "method", "dtype"),
    [
        ("fp16", "full", "float32"),
        ("fp16", "lora", "float16"),
        ("bf16", "lora", "bfloat16"),
        ("fp32", "lora", "float32"),
    ],
)
def test_trained_weights_are_stored_in_float32(precision: str, method: str, dtype: str) -> None:
    assert plan(BOX, {}, {}, precision=precision, method=method).chosen("model.dtype") == dtype
