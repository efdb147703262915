"""Out of memory, the plan names the smallest change that it would itself allow."""

from __future__ import annotations

from typing import Any

import pytest

from packhorse.plan.batch import smaller_micro, suggest_less_memory
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe

BOX = Hardware(num_cores=96, gpus=("H100",) * 8)
RECIPE: dict[str, Any] = {
    "name": "r",
    "model": {"id": "meta-llama/Llama-3.1-8B"},
    "data": {"sources": [{"path": "r.jsonl"}]},
    "optimizer": {"learning_rate": 1e-4},
    "batch": {"length": 8192, "packs": 16, "micro": 1},
    "steps": 9,
}


def plan(gpus: int = 8, **sections: Any) -> RunPlan:
    return make_plan(Recipe.model_validate(RECIPE | sections), DeviceRequest(gpus=gpus), BOX, None)


CHECKPOINTED = {"checkpointing": True}
CASES = {
    "smaller passes": ({"batch": {"length": 2048, "packs": 16, "micro": 2}}, "set batch.micro to 1: 2 passes per step"),
    "checkpointing": ({}, "set parallel.checkpointing to true"),
    "sharding": ({"parallel": CHECKPOINTED}, "set parallel.engine to zero2"),
    "sharding weights": ({"parallel": {**CHECKPOINTED, "engine": "zero2"}}, "set parallel.engine to fsdp2"),
    "only where it runs": (
        {"parallel": {**CHECKPOINTED, "engine": "zero2"}, "optimizer": {"name": "adamw_8bit", "learning_rate": 1e-4}},
        "set parallel.engine to zero3",
    ),
    "sequence": ({"parallel": {**CHECKPOINTED, "engine": "fsdp2"}}, "set parallel.sequence to 2"),
    "in one pass": (
        {
            "batch": {"length": 2048, "packs": 16, "micro": 2},
            "optimizer": {"learning_rate": 1e-4, "in_backward": True, "clip_norm": None},
            "parallel": {"engine": "fsdp2"},
        },
        "set parallel.checkpointing to true",
    ),
}


@pytest.mark.parametrize(("sections", "expected"), CASES.values(), ids=CASES)
def test_the_smallest_change_comes_first(sections: dict[str, Any], expected: str) -> None:
    assert suggest_less_memory(plan(**{"method": "full", **sections})).startswith(expected)


@pytest.mark.parametrize(
    ("method", "expected"), [("full", "method to lora"), ("lora", "method to qlora"), ("qlora", "more memory")]
)
def test_on_one_device_the_maths_must_change(method: str, expected: str) -> None:
    alone = plan(1, method=method, parallel={**CHECKPOINTED, "engine": "single"})
    assert suggest_less_memory(alone).startswith("lower batch.length (it is 8192)")
    assert expected in suggest_less_memory(alone)


@pytest.mark.parametrize(("packs", "micro", "smaller"), [(16, 1, None), (16, 2, 1), (48, 6, 3), (24, 3, 1), (40, 5, 1)])
def test_a_smaller_pass_still_divides_the_share(packs: int, micro: int, smaller: int | None) -> None:
    assert smaller_micro(plan(batch={"length": 128, "packs": packs, "micro": micro})) == smaller
