"""Memory and time of an evaluation: weights by hand, and what sharding and more GPUs change."""

from __future__ import annotations

from typing import Any

import pytest

from packhorse.cli.show.plan import evaluation_words
from packhorse.estimate.evaluation import estimate_evaluation
from packhorse.estimate.gpus import find_gpu
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate
from packhorse.model_spec.configuration import published
from packhorse.model_spec.parameters import read_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe

LLAMA_70B, LLAMA_8B = 70_553_706_496, 8_030_261_248
"""Parameters by the model cards' safetensors."""
EMBEDDING_70B = 128_256 * 8_192


def case(model: str, engine: str, gpus: int, packs: int | None = 100, **evaluation: Any) -> PlanEstimate:
    config = dict(published()[model])
    recipe = Recipe.model_validate(
        {
            "name": "evaluated",
            "model": {"config": config},
            "method": {"kind": "lora", "rank": 8},
            "data": {"sources": [{"path": "rows.jsonl"}]},
            "batch": {"length": 1024, "packs": 32, "micro": 1},
            "steps": 10,
            "optimizer": {"learning_rate": 1e-4},
            "parallel": {"engine": engine},
            "evaluation": {"max_answered_rows": 64, "max_new_tokens": 100, **evaluation},
        }
    )
    plan = make_plan(recipe, DeviceRequest(gpus), Hardware(2, ()), None)
    shape = read_shape(config)
    assert shape is not None
    figures = PackFigures(1024, packs, 1000.0, 1024, 500.0, 600, 1e6, 10**6, 1024)
    return PlanEstimate(plan, EstimateInputs(shape, figures, find_gpu("H100-80GB"), validation=figures))


def test_sharded_weights_are_an_eighth_and_two_gathered_units() -> None:
    sharded = estimate_evaluation(case("meta-llama/Llama-3.3-70B-Instruct", "zero3", 8))
    whole = estimate_evaluation(case("meta-llama/Llama-3.3-70B-Instruct", "ddp", 8))
    saved = 2 * LLAMA_70B * 7 / 8 - 2 * 2 * EMBEDDING_70B  # bf16; the adapter is small
    assert whole.required_bytes - sharded.required_bytes == pytest.approx(1.03 * saved, rel=0.01)
    assert (sharded.engine, sharded.ranks, sharded.fits, whole.fits) == ("zero3", 8, True, False)
    assert "--endpoint" in evaluation_words(case("meta-llama/Llama-3.3-70B-Instruct", "ddp", 8))


def test_two_nodes_are_evaluated_on_one() -> None:
    words = evaluation_words(case("meta-llama/Llama-3.3-70B-Instruct", "fsdp2", 16))
    assert words.startswith("8 GPUs of one node, fsdp2")


def test_keys_and_values_grow_with_the_answers() -> None:
    # 8B: 32 layers, 8 key/value heads of 128, keys and values in bf16.
    short, long = (case("meta-llama/Llama-3.1-8B", "single", 1, max_new_tokens=tokens) for tokens in (100, 300))
    more = estimate_evaluation(long).required_bytes - estimate_evaluation(short).required_bytes
    assert more == pytest.approx(64 * 200 * 32 * 2 * 8 * 128 * 2 * 1.03, rel=1e-6)  # 3 % of fragmentation


def test_an_answer_token_takes_no_less_than_reading_the_weights_once() -> None:
    short, long = (case("meta-llama/Llama-3.1-8B", "single", 1, max_new_tokens=tokens) for tokens in (100, 300))
    seconds = [estimate_evaluation(each).seconds for each in (short, long)]
    assert seconds[0] is not None
    assert seconds[1] is not None
    token = (seconds[1] - seconds[0]) / 2 / 200
    assert 2 * LLAMA_8B / 3.35e12 < token < 5 * 2 * LLAMA_8B / 3.35e12  # the memory of an H100 SXM: 3.35 TB/s


def test_losses_take_two_flops_per_weight_and_token() -> None:
    seconds = [
        estimate_evaluation(case("meta-llama/Llama-3.1-8B", "single", 1, packs)).seconds for packs in (0, 10_000)
    ]
    assert seconds[0] is not None
    assert seconds[1] is not None
    forward = 2 * 2 * LLAMA_8B * 10_000 * 1000 / 989e12  # two models at the H100's peak in bf16
    assert forward < seconds[1] - seconds[0] < 2.5 * forward


def test_before_the_data_is_prepared_only_memory_is_known() -> None:
    unprepared = case("meta-llama/Llama-3.1-8B", "single", 1, None)
    assert estimate_evaluation(unprepared).seconds is None
    assert evaluation_words(unprepared).endswith("known when the data is prepared")
