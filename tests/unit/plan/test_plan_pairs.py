"""The table of methods and engines: what it refuses is refused by the plan, and the documentation shows the same."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, get_args

import pytest

from packhorse.errors import UserError
from packhorse.plan.compatibility import METHODS, REFUSALS, name_of, pairs_table
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.methods import AdapterMethod, FullMethod, PartialMethod
from packhorse.recipe.schema import Engine, Recipe

BOX = Hardware(num_cores=96, gpus=("H100",) * 8)
DOCUMENTATION = Path(__file__).resolve().parents[3] / "docs" / "engines.md"
RECIPE: dict[str, Any] = {
    "name": "r",
    "model": {"id": "o/m"},
    "data": {"sources": [{"path": "r.jsonl"}]},
    "optimizer": {"learning_rate": 1e-4},
    "steps": 9,
}
EXAMPLES: dict[str, Any] = {
    "full": "full",
    "partial": {"kind": "partial", "last_layers": 1},
    "lora": "lora",
    "lora, dora": {"kind": "lora", "dora": True},
    "lora, pissa or olora": {"kind": "lora", "initialization": "pissa"},
    "qlora nf4 or fp4": {"kind": "qlora", "quantization": "fp4"},
    "qlora nf4 or fp4, dora": {"kind": "qlora", "dora": True},
    "qlora nf4 or fp4, loftq": {"kind": "qlora", "initialization": "loftq"},
    "qlora int8": {"kind": "qlora", "quantization": "int8"},
    "ia3": "ia3",
    "prompt_tuning": "prompt_tuning",
    "prefix_tuning": "prefix_tuning",
}


def recipe(method: Any, engine: str, parallel: dict[str, Any] | None = None, **more: Any) -> Recipe:
    nvme = "/scratch" if engine == "zero3_nvme" else None
    section = {"engine": engine, "nvme": nvme, **(parallel or {})}
    return Recipe.model_validate({**RECIPE, "method": method, "parallel": section, **more})


def test_every_method_of_the_recipe_is_in_the_table() -> None:
    kinds = {kind.model_fields["kind"].default for kind in (FullMethod, PartialMethod, *get_args(AdapterMethod))}
    assert {name.split()[0].rstrip(",") for name in METHODS} == kinds
    assert [name_of(recipe(EXAMPLES[name], "ddp").method) for name in METHODS] == list(METHODS)
    assert {engine for refusal in REFUSALS for engine in refusal.engines} <= set(get_args(Engine))


NO_SHARD, NO_PARTITION, NO_CPU = (
    "bitsandbytes keeps 8-bit weights",
    "on a CPU peft replaces the weight",
    "peft computes LoftQ on a GPU",
)
PAIRS = [
    ("lora", "zero1", "cpu", None),
    ("ia3", "ddp", "cuda", None),
    ("prompt_tuning", "zero2", "cpu", None),
    ("full", "zero3_nvme", "cuda", None),
    ("partial", "hsdp", "cpu", None),
    ("lora, pissa or olora", "zero3", "cpu", None),
    ("qlora nf4 or fp4", "zero3_offload", "cpu", None),
    ("qlora nf4 or fp4", "fsdp2", "cuda", None),
    ("prefix_tuning", "single", "cuda", None),
    ("qlora int8", "zero2", "cuda", None),
    ("qlora int8", "zero3", "cuda", NO_SHARD),
    ("qlora int8", "zero3_offload", "cpu", NO_SHARD),
    ("qlora int8", "fsdp2", "cpu", NO_SHARD),
    ("qlora int8", "hsdp", "cuda", NO_SHARD),
    ("qlora nf4 or fp4, dora", "zero3", "cpu", NO_PARTITION),
    ("qlora nf4 or fp4, dora", "zero3", "cuda", None),
    ("qlora nf4 or fp4, dora", "fsdp2", "cpu", None),
    ("lora, dora", "zero3", "cpu", None),
    ("qlora nf4 or fp4, loftq", "single", "cpu", NO_CPU),
    ("qlora nf4 or fp4, loftq", "ddp", "cuda", None),
]
"""Method, engine and device, and how the refusal begins to say why; None where the pair is planned."""


@pytest.mark.parametrize(("method", "engine", "device", "why"), PAIRS)
def test_a_pair_is_planned_or_refused_by_name(method: str, engine: str, device: str, why: str | None) -> None:
    requested = recipe(EXAMPLES[method], engine, {"processes": 1 if engine == "single" else 4})
    here = Hardware(num_cores=4, gpus=("H100",) * 4 if device == "cuda" else ())
    if why is None:
        topology = make_plan(requested, DeviceRequest(), here, None).topology
        assert (topology.engine, topology.device) == (engine, device)
        return
    with pytest.raises(UserError) as caught:
        make_plan(requested, DeviceRequest(), here, None)
    assert f"method is {method}, and parallel.engine is {engine}" in str(caught.value)
    assert why in str(caught.value)


def test_the_pairs_tried_hold_every_method_and_engine() -> None:
    assert {pair[0] for pair in PAIRS} >= set(METHODS)
    assert {pair[1] for pair in PAIRS} >= set(get_args(Engine))


def test_checkpoints_to_resume_from_are_refused_if_states_are_in_files() -> None:
    requested = recipe("lora", "zero3_nvme", checkpoint={"every_steps": 100})
    with pytest.raises(UserError, match="checkpoint.every_steps is 100, and parallel.engine is zero3_nvme"):
        make_plan(requested, DeviceRequest(gpus=8), BOX, None)


def test_a_type_that_deepspeed_would_not_keep_is_refused() -> None:
    requested = recipe("lora", "zero2", model={"id": "o/m", "dtype": "float32"})
    with pytest.raises(UserError, match="model.dtype is float32, precision is bf16, and parallel.engine is zero2"):
        make_plan(requested, DeviceRequest(gpus=8), BOX, None)
    kept = recipe("lora", "zero2", model={"id": "o/m", "dtype": "float32"}, precision="fp32")
    assert make_plan(kept, DeviceRequest(gpus=8), BOX, None).chosen("model.dtype") == "float32"


def test_the_documentation_shows_this_table() -> None:
    assert pairs_table() in DOCUMENTATION.read_text(encoding="utf-8")


def test_new_tokens_with_an_adapter_are_refused_under_zero3_alone() -> None:
    model = {"id": "o/m", "new_tokens": ["<call>"]}
    here = Hardware(num_cores=4, gpus=("H100",) * 4)
    with pytest.raises(UserError, match="model.new_tokens adds 1 tokens, method is lora, and parallel.engine is zero3"):
        make_plan(recipe("lora", "zero3", model=model), DeviceRequest(), here, None)
    for method, engine in (("full", "zero3"), ("lora", "fsdp2"), ("lora", "zero2")):
        assert make_plan(recipe(method, engine, model=model), DeviceRequest(), here, None).topology.engine == engine


@pytest.mark.parametrize(
    ("dtype", "precision", "quantization", "is_refused"),
    [
        ("bfloat16", "fp16", "nf4", True),
        ("float32", "bf16", "nf4", True),
        ("bfloat16", "bf16", "nf4", False),
        ("auto", "fp16", "fp4", False),
    ],
)
def test_fsdp2_never_casts_the_elements_that_hold_4_bit_weights(
    dtype: str, precision: str, quantization: str, is_refused: bool
) -> None:
    sections = {
        "model": {"id": "o/m", "dtype": dtype},
        "method": {"kind": "qlora", "quantization": quantization},
        "precision": precision,
        "parallel": {"engine": "fsdp2"},
    }
    recipe = Recipe.model_validate(RECIPE | sections)
    with pytest.raises(UserError, match="set model.dtype to auto") if is_refused else contextlib.nullcontext():
        make_plan(recipe, DeviceRequest(gpus=2), Hardware(num_cores=4, gpus=()), None)


def test_an_adapter_on_a_reward_model_is_refused_where_its_head_is_sharded() -> None:
    lora = {"kind": "lora", "dropout": 0.0}
    with pytest.raises(UserError, match="objective is reward, method is lora, and parallel.engine is fsdp2"):
        make_plan(recipe(lora, "fsdp2", objective="reward"), DeviceRequest(8), BOX, None)
    for method, engine in ((lora, "zero2"), ("full", "fsdp2")):
        make_plan(recipe(method, engine, objective="reward"), DeviceRequest(8), BOX, None)
