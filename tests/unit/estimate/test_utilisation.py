"""MFU and HFU of a run against PaLM's formula (arXiv 2204.02311, appendix B), done by hand for Llama 3.1 8B."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from packhorse.estimate.gpus import find_gpu
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate
from packhorse.model_spec.configuration import published
from packhorse.model_spec.parameters import read_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import FlopCounts, RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe
from packhorse.track.meter import Meter
from packhorse.train.worker import _utilisation

MODEL = dict(published()["meta-llama/Llama-3.1-8B"])
LENGTH, LAYERS, WIDTH, RANK = 4096, 32, 4096, 16
LAYER = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
LAYER |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
LINEAR = LAYERS * sum(rows * columns for rows, columns in LAYER.values())
ADAPTERS = LAYERS * RANK * sum(rows + columns for rows, columns in LAYER.values())
HEAD = 128256 * 4096 * (LENGTH - 1) / LENGTH  # a document's last token has no label
ATTENTION = 12 * LAYERS * WIDTH * LENGTH / 2  # PaLM's 12 L H Q T, halved: a causal query sees half of the keys


def planned(method: Any, gpus: int = 8, **parallel: Any) -> RunPlan:
    recipe = Recipe.model_validate(
        {
            "name": "utilisation",
            "model": {"config": MODEL},
            "method": method,
            "data": {"sources": [{"path": "rows.jsonl"}]},
            "batch": {"length": LENGTH, "packs": 16, "micro": 1},
            "steps": 10,
            "optimizer": {"learning_rate": 1e-4},
            "parallel": parallel,
        }
    )
    plan = make_plan(recipe, DeviceRequest(gpus), Hardware(2, ()), None)
    shape = read_shape(MODEL)
    assert shape is not None
    return PlanEstimate(plan, EstimateInputs(shape, PackFigures.full(LENGTH), find_gpu("H100"))).predicted_plan()


def flops(plan: RunPlan) -> FlopCounts:
    assert plan.predicted is not None
    assert plan.predicted.flops is not None
    return plan.predicted.flops


def test_full_training_takes_six_flops_per_weight_and_token() -> None:
    found = flops(planned("full", engine="fsdp2"))
    assert found.model_per_token == pytest.approx(6 * (LINEAR + HEAD) + ATTENTION, rel=1e-9)


def test_lora_takes_four_per_frozen_weight_and_recomputation_counts_as_hardware_only() -> None:
    # With checkpointing the backward pass runs down to the first layer's input.
    found = flops(planned({"kind": "lora", "rank": RANK, "dropout": 0.0}, engine="fsdp2", checkpointing=True))
    assert found.model_per_token == pytest.approx(4 * (LINEAR + HEAD) + 6 * ADAPTERS + ATTENTION, rel=1e-9)
    # Forward once more, except the layer's last product: the B of the adapter on `down`. FlashAttention's backward pass
    # is 2.5 times its forward pass (arXiv 2307.08691, 4.1), where PaLM counts 2; the head computes its logits again.
    not_again = LAYERS * RANK * 4096
    again = 2 * (LINEAR + HEAD + ADAPTERS - not_again) + ATTENTION / 3 * 1.5
    assert found.hardware_per_token == pytest.approx(found.model_per_token + again, rel=1e-9)


def test_a_run_logs_mfu_from_its_real_tokens_and_the_time_of_its_steps() -> None:
    now = [0.0]
    meter = Meter(clock=lambda: now[0], utilisation=partial(_utilisation, planned("full", engine="fsdp2")))
    now[0] += 4.0
    meter.count_step(num_tokens=60_000, num_supervised_tokens=100, num_slots=65_536)
    with meter.other():  # an evaluation
        now[0] += 100.0
    figures = meter.read(1.0, 1e-4, 1.0, 0.1)
    # 60,000 tokens in 4 s on 8 H100 of 989.4 TFLOP/s; the padding of 5,536 tokens is no work.
    mfu = (6 * (LINEAR + HEAD) + ATTENTION) * 60_000 / 4.0 / (8 * 989.4e12)
    assert figures["speed/mfu"] == pytest.approx(mfu, rel=1e-9)
    assert mfu < figures["speed/hfu"] < 1.1 * mfu


def test_where_the_gpus_are_not_known_there_is_no_mfu() -> None:
    plan = planned("full", engine="fsdp2").model_copy(update={"predicted": None})
    assert _utilisation(plan, 100.0) == {}
