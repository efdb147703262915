"""`parallel.compile`: where layers are compiled, where that is refused, and what building their kernels needs."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from packhorse.errors import UserError
from packhorse.launching import preflight
from packhorse.launching.preflight import check_compiler
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def plan(gpus: int | None = 8, method: Any = "lora", model: Any = None, **parallel: Any) -> RunPlan:
    fields = {
        "name": "r",
        "model": model or {"id": LLAMA},
        "method": method,
        "data": {"sources": [{"path": "r.jsonl"}]},
        "optimizer": {"learning_rate": 1e-4},
        "steps": 9,
        "parallel": parallel,
    }
    return make_plan(Recipe.model_validate(fields), DeviceRequest(gpus=gpus), Hardware(num_cores=4, gpus=()), None)


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "fsdp2"])
def test_auto_compiles_on_gpus(engine: str) -> None:
    assert plan(compile="auto", engine=engine).compiles_layers
    assert not plan(gpus=None, compile="auto", engine=engine).compiles_layers
    assert not plan(engine=engine).compiles_layers


OBSTACLES: dict[str, dict[str, Any]] = {
    "parallel.engine is zero3": {"engine": "zero3"},
    "method is lora, dora": {"method": {"kind": "lora", "dora": True}},
    "method is qlora int8": {"method": {"kind": "qlora", "quantization": "int8"}},
    "parallel.checkpointing is selective": {"checkpointing": "selective"},
    "method is prefix_tuning": {"method": "prefix_tuning"},
    "model.attention is sdpa": {"model": {"id": LLAMA, "attention": "sdpa"}},
}


@pytest.mark.parametrize("fact", OBSTACLES)
def test_what_cannot_be_compiled_is_refused_by_name_and_left_off_by_auto(fact: str) -> None:
    with pytest.raises(UserError, match=f"parallel.compile is true, and {fact}"):
        plan(**OBSTACLES[fact], compile=True)
    left_off = plan(**OBSTACLES[fact], compile="auto")
    assert not left_off.compiles_layers
    reason = next(each.reason for each in left_off.decisions if each.name == "parallel.compile")
    assert reason.startswith(fact)


def test_auto_leaves_an_unknown_architecture_and_quantised_weights_eager() -> None:
    assert not plan(model={"id": "someone/unknown"}, compile="auto").compiles_layers
    assert plan(model={"id": "someone/unknown"}, compile=True).compiles_layers
    assert not plan(method="qlora", compile="auto").compiles_layers
    assert plan(method="qlora", compile=True).compiles_layers


def test_a_machine_that_cannot_build_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(compile="auto")
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="parallel.compile is auto, and triton is not installed"):
        check_compiler(made)
    check_compiler(plan())
    check_compiler(plan(gpus=None, compile=True))
    monkeypatch.setattr(preflight, "find_spec", lambda name: importlib.util.find_spec("pytest"))
    monkeypatch.setenv("CC", "true")  # compilers that only succeed, or fail
    check_compiler(made)
    for compiler in ("false", "no-such-compiler"):
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(UserError, match=f"{compiler} cannot build a program with Python.h"):
            check_compiler(made)
