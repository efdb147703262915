"""Predicted and published memory: torchtune's README, Llama 3.1 8B on one RTX 4090, 2 packs of 2,048 tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from packhorse.estimate.gpus import find_gpu
from packhorse.estimate.memory import MemoryEstimate
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate
from packhorse.model_spec.configuration import published
from packhorse.model_spec.parameters import read_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe

PAGE = Path(__file__).parents[3] / "docs" / "plan.md"
LORA = {"kind": "lora", "rank": 8, "dropout": 0.0}


@dataclass(frozen=True)
class Row:
    """A published run as a recipe: layers recomputed, weights in 16 bit; adapters are float32 here."""

    name: str
    gib: float
    method: Any
    optimizer: dict[str, Any]
    reason: str = ""

    def estimate(self) -> MemoryEstimate:
        config = dict(published()["meta-llama/Llama-3.1-8B"])
        recipe = Recipe.model_validate(
            {
                "name": "published",
                "model": {"config": config, "dtype": "bfloat16"},
                "method": self.method,
                "data": {"sources": [{"path": "rows.jsonl"}]},
                "batch": {"length": 2048, "packs": 2, "micro": 2},
                "optimizer": {"learning_rate": 1e-4, **self.optimizer},
                "steps": 100,
                "parallel": {"engine": "single", "checkpointing": True},
            }
        )
        plan = make_plan(recipe, DeviceRequest(1), Hardware(2, ()), None)
        shape = read_shape(config)
        assert shape is not None
        return PlanEstimate(plan, EstimateInputs(shape, PackFigures.full(2048), find_gpu("H100"))).memory

    @property
    def predicted(self) -> float:
        """GiB of torch's allocator, as the published ones."""
        return self.estimate().peak.bytes / 2**30

    @property
    def gap(self) -> float:
        return self.predicted / self.gib - 1

    @property
    def line(self) -> str:
        return f"| {self.name} | {self.gib:.1f} | {self.predicted:.1f} | {self.gap:+.0%} | {self.reason} |"


IN_BACKWARD = {"name": "paged_adamw_8bit", "in_backward": True, "clip_norm": None}
ROWS = [
    Row("8B full, stepped in the backward pass", 18.9, "full", IN_BACKWARD),
    Row("8B LoRA", 16.2, LORA, {}),
    Row("8B QLoRA", 7.4, {**LORA, "kind": "qlora"}, {}),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_predicted_beside_published_memory(row: Row) -> None:
    assert abs(row.gap) < 0.13
    assert bool(row.reason) == (abs(row.gap) > 0.10)


def test_the_table_of_the_documentation_is_this() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for row in ROWS:
        assert row.line in lines


if __name__ == "__main__":
    print("\n".join(row.line for row in ROWS))
