"""Planned memory compared with figures of papers and libraries' documentation, computed by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from packhorse.estimate import training_state
from packhorse.estimate.gpus import find_gpu
from packhorse.estimate.memory import MemoryEstimate, Phase
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate
from packhorse.estimate.storage import StorageEstimate
from packhorse.estimate.training_state import total_bytes
from packhorse.estimate.weights import WeightTensor, list_weights
from packhorse.model_spec.configuration import find_configuration
from packhorse.model_spec.parameters import Shape, list_parameters, read_shape
from packhorse.model_spec.trainable import count_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from packhorse.recipe.schema import Recipe
from packhorse.recipe.shipped import list_recipes

GIB = 2**30
EIGHT_B = "meta-llama/Llama-3.1-8B"
EIGHT_B_WEIGHTS = 8_030_261_248
LAPTOP = Hardware(num_cores=2, gpus=())


def planned(
    gpus: int = 8,
    model: str = EIGHT_B,
    engine: str = "zero3",
    nodes: int | None = None,
    attention: str = "auto",
    **more: Any,
) -> RunPlan:
    parallel = {"engine": engine, **more.pop("parallel", {})}
    fields = {
        "name": "r",
        "model": {"id": model, "tokenizer": "builtin:tokenizer", "attention": attention},
        "method": "full",
        "data": {"sources": [{"path": "r.jsonl"}]},
        "optimizer": {"learning_rate": 1e-5},
        "batch": {"length": 2048, "packs": 64, "micro": 1},
        "steps": 9,
        "parallel": parallel,
        **more,
    }
    return make_plan(Recipe.model_validate(fields), DeviceRequest(gpus=gpus, nodes=nodes), LAPTOP, None)


def shape_of(plan: RunPlan) -> Shape:
    shape = read_shape(find_configuration(plan.recipe))
    assert shape is not None
    return shape


def memory(plan: RunPlan, length: int | None = None) -> MemoryEstimate:
    return estimate(plan, length).memory


def estimate(plan: RunPlan, length: int | None = None) -> PlanEstimate:
    packs = PackFigures.full(length or plan.batch.length_tokens)
    return PlanEstimate(plan, EstimateInputs(shape_of(plan), packs, find_gpu("H100")))


def storage(plan: RunPlan) -> StorageEstimate:
    return estimate(plan).storage


def of(phase: Phase, name: str) -> int:
    return sum(part.bytes for part in phase.components if part.name == name)


# Weights, gradients and states of Adam in mixed precision: bytes a weight, R = 8 (ZeRO, arXiv 1910.02054, figure 1).
# Packhorse keeps float32 weights where nothing is DeepSpeed's, and adds gradients up in float32.
BYTES = {
    "single": (4, 4, 8),
    "ddp": (4, 4, 8),
    "zero1": (2, 2 / 8, 12 / 8),
    "zero2": (2, 4 / 8, 12 / 8),
    "zero3": (2 / 8, 4 / 8, 12 / 8),
    "fsdp2": (4 / 8, 4 / 8, 8 / 8),
}


@pytest.mark.parametrize("engine", BYTES)
def test_states_of_a_full_fine_tune_are_those_of_the_zero_paper(engine: str) -> None:
    step = memory(planned(1 if engine == "single" else 8, engine=engine)).phase("optimizer")
    found = (
        of(step, "weights") + of(step, "persistent weights"),
        of(step, "gradients"),
        of(step, "masters") + of(step, "optimizer states"),
    )
    expected_bytes = [each * EIGHT_B_WEIGHTS for each in BYTES[engine]]
    if engine == "zero1":
        # Its part begins and ends within a matrix, whose gradient stays whole.
        assert expected_bytes[1] < found[1] < 1.1 * expected_bytes[1]
        expected_bytes[1] = found[1]
    assert found == pytest.approx(expected_bytes, rel=2e-3)


def test_4_bit_weights_take_half_a_byte_and_their_doubly_quantised_scales_an_eighth_of_a_bit_more_than_an_8th() -> None:
    plan = planned(1, engine="single", method="qlora")
    held = list_weights(plan, shape_of(plan))
    assert held is not None
    packed = [each for each in held if each.storage == "nf4"]
    size = sum(each.size for each in packed)
    assert size == 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    assert sum(each.data_bytes for each in packed) == size // 2
    # QLoRA, section 3: 8/64 + 32/(64 x 256) = 0.127 bits a weight.
    assert sum(each.constant_bytes for each in packed) * 8 / size == pytest.approx(0.127, abs=5e-4)
    single = planned(1, engine="single", method={"kind": "qlora", "double_quantization": False})
    plain = list_weights(single, shape_of(single))
    assert plain is not None
    assert sum(each.constant_bytes for each in plain) * 8 / size == pytest.approx(0.5, abs=5e-4)


def test_experts_are_not_quantised_because_bitsandbytes_takes_linear_layers_only() -> None:
    plan = planned(1, "mistralai/Mixtral-8x7B-v0.1", "single", method={"kind": "qlora", "target": ["q_proj"]})
    held = list_weights(plan, shape_of(plan))
    assert held is not None
    experts = [each for each in held if ".experts." in each.name]
    assert experts
    assert all(each.storage == "plain" and each.width == 2 for each in experts)


OPTIMIZERS = {
    "adamw": 8,
    "adamw_8bit": 2 + 2 * 4 / 256,
    "lion": 4,
    "lion_8bit": 1 + 4 / 256,
    "muon": 4,
    "adafactor": 0,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_keeps_what_its_page_says(name: str) -> None:
    betas = {"betas": [0.9, 0.99]} if "lion" in name else {}
    plan = planned(1, engine="single", optimizer={"name": name, "learning_rate": 1e-5, **betas})
    held = list_weights(plan, shape_of(plan))
    assert held is not None
    expected = OPTIMIZERS[name] * EIGHT_B_WEIGHTS
    if name == "muon":
        expected += 4 * 2 * 128_256 * 4096  # AdamW's for embedding and head
    assert training_state.optimizer_bytes(plan, held) == pytest.approx(expected, rel=2e-3, abs=2e-3 * EIGHT_B_WEIGHTS)


def test_paged_states_lie_on_the_host() -> None:
    plan = planned(1, engine="single", optimizer={"name": "paged_adamw", "learning_rate": 1e-5})
    plan = plan.model_copy(update={"topology": plan.topology.model_copy(update={"device": "cuda"})})
    assert of(memory(plan).phase("optimizer"), "optimizer states") == 0
    assert of(Phase("", storage(plan).host), "optimizer states") == pytest.approx(8 * EIGHT_B_WEIGHTS, rel=1e-3)


def test_recomputed_layers_keep_their_inputs_alone() -> None:
    """2 x t x H bytes a layer, of Korthikanti et al. 2022 (arXiv 2205.05198), section 4; in float32 twice that."""
    plan = planned(1, engine="single", method="lora", parallel={"checkpointing": True})
    kept = memory(plan).activations
    assert [layer.input for layer in kept.layers] == [2 * 2048 * 4096] * 32
    assert kept.recomputed > 20 * kept.layers[0].input
    whole = memory(planned(1, engine="single", method="lora")).activations
    assert whole.kept > 15 * kept.kept
    every_fourth = memory(planned(1, engine="single", method="lora", parallel={"checkpointing": 4})).activations
    assert [layer.recomputed for layer in every_fourth.layers] == [True, False, False, False] * 8
    assert kept.kept < every_fourth.kept < whole.kept


def test_offloaded_inputs_move_from_the_device_to_the_host() -> None:
    on = {"checkpointing": True, "offload_activations": True}
    plan = planned(8, engine="zero3", parallel=on)
    away, here = memory(plan).activations, memory(planned(8, parallel={"checkpointing": True})).activations
    one = 2 * 2048 * 4096
    # One of them is on its way, to the host or back.
    assert (here.kept - away.kept, away.on_host) == (31 * one, 32 * one)
    # torch pins powers of two.
    assert memory(plan, 1536).activations.on_host == 32 * one
    assert of(Phase("", storage(plan).host), "activations") == 8 * away.on_host


def test_activations_grow_with_tokens_and_sequence_ranks_share_them() -> None:
    short, long = (memory(planned(8), length).activations.kept for length in (1024, 4096))
    assert long == pytest.approx(4 * short, rel=2e-2)
    plan = planned(8, parallel={"sequence": 4})
    shared = memory(plan, 4096).activations
    assert shared.tokens == 1024
    assert shared.kept == pytest.approx(short, rel=5e-2)


def test_the_loss_holds_one_chunk_of_logits() -> None:
    # Float32 logits, and their gradient in 16 bits for the products (torch, linear_cross_entropy.py).
    row = 128_256 * (4 + 2)
    for length in (4096, 8192):
        # Beside them the last hidden states, of all tokens and of the supervised ones, in 16 bits.
        hidden = 2 * (length + length - 1) * 4096
        assert memory(planned(8, method="lora"), length).activations.logits - hidden == 512 * row
        weight = 2 * 128_256 * 4096
        assert memory(planned(8), length).activations.logits - hidden - weight == 2048 * row


def test_passes_before_the_last_leave_whole_gradients_under_fsdp2_and_parts_under_zero() -> None:
    several, one = ({"length": 2048, "packs": packs, "micro": 1} for packs in (16, 8))
    assert of(memory(planned(engine="fsdp2", batch=several)).phase("loss"), "gradients") == 4 * EIGHT_B_WEIGHTS
    assert of(memory(planned(engine="fsdp2", batch=one)).phase("loss"), "gradients") == 0
    parts = of(memory(planned(engine="zero2", batch=several)).phase("loss"), "gradients")
    assert parts == pytest.approx(4 * EIGHT_B_WEIGHTS / 8, rel=1e-6)


def test_buckets_are_those_of_the_deepspeed_json() -> None:
    plan = planned(engine="zero2")
    assert plan.deepspeed is not None
    backward = memory(plan).phase("backward")
    assert of(backward, "reduce buckets") == 2 * 200_000_000 * 2  # two, for overlap_comm
    zero = {**plan.deepspeed["zero_optimization"], "reduce_bucket_size": 1000, "overlap_comm": False}
    other = plan.model_copy(update={"deepspeed": {**plan.deepspeed, "zero_optimization": zero}})
    assert of(memory(other).phase("backward"), "reduce buckets") == 2000


def test_zero3_keeps_a_billion_weights_gathered_and_the_json_can_say_less() -> None:
    plan = planned(engine="zero3")
    assert of(memory(plan).phase("loss"), "gathered weights") == pytest.approx(2e9, rel=1e-6)
    assert plan.deepspeed is not None
    zero = {**plan.deepspeed["zero_optimization"], "stage3_max_live_parameters": 10**8}
    less = plan.model_copy(update={"deepspeed": {**plan.deepspeed, "zero_optimization": zero}})
    # Then it is the largest unit, the embedding.
    assert of(memory(less).phase("loss"), "gathered weights") == pytest.approx(2 * 128_256 * 4096, rel=1e-3)


def test_offload_leaves_no_states_on_the_device_and_all_of_them_on_the_host() -> None:
    plan = planned(engine="zero3_offload")
    step = memory(plan).phase("optimizer")
    assert of(step, "weights") + of(step, "masters") + of(step, "optimizer states") + of(step, "gradients") == 0
    host = Phase("", storage(plan).host)
    # 2 weights; 4 gradients, and 4 for the step; 4 masters and 8 states.
    expected = {"weights": 2, "gradients": 4, "step gradients": 4, "optimizer states": 12}
    found = {name: of(host, name) / EIGHT_B_WEIGHTS for name in expected}
    assert found == pytest.approx(expected, rel=1e-3)
    # 4 GB of gradients a rank, twice, are 4 GiB of pinned memory; the weights' parts exist in addition.
    assert 8 * 2 * (4 * GIB - 4 * EIGHT_B_WEIGHTS / 8) + 2 * EIGHT_B_WEIGHTS < of(host, "pinning") < 6 * EIGHT_B_WEIGHTS
    two_nodes = storage(planned(16, engine="zero3_offload", nodes=2))
    assert of(Phase("", two_nodes.host), "weights") == pytest.approx(EIGHT_B_WEIGHTS, rel=1e-3)


def test_the_host_holds_copies_of_a_checkpoint_and_what_comes_out() -> None:
    """12 bytes a weight from the first save on; at the end each rank also has a file of the result, here 2 in all."""
    plan = planned(engine="zero2")
    on_cpu = plan.model_copy(update={"topology": plan.topology.model_copy(update={"device": "cpu"})})
    assert of(Phase("", storage(on_cpu).host), "saving") == pytest.approx((12 + 2) * EIGHT_B_WEIGHTS, rel=1e-3)
    assert of(Phase("", storage(plan).host), "saving") > 14 * EIGHT_B_WEIGHTS, "pinned"
    waiting = planned(engine="zero2", checkpoint={"asynchronous": False})
    files = of(Phase("", storage(waiting).host), "saving")
    assert 8 * 3 * GIB < files <= 8 * 4 * GIB, "one on each rank"


def test_batches_wait_on_the_host() -> None:
    plan = planned()
    assert of(Phase("", storage(plan).host), "batches") == 3 * 32 * 64 * 2048


def test_disk_holds_the_checkpoints_that_are_kept_and_the_one_that_is_written() -> None:
    plan = planned(checkpoint={"every_steps": 2, "keep_last": 3, "keep_best": False})
    (checkpoints,) = [part for part in storage(plan).disk if part.name == "checkpoints"]
    assert checkpoints.bytes == pytest.approx((3 + 1) * 12 * EIGHT_B_WEIGHTS, rel=1e-3)
    (adapter,) = [
        part
        for part in storage(planned(method="lora", checkpoint={"every_steps": 2})).disk
        if part.name == "checkpoints"
    ]
    assert adapter.bytes == pytest.approx(4 * 12 * 83_886_080, rel=1e-3)


def test_whole_weights_are_never_loaded_where_they_are_cut() -> None:
    assert memory(planned(engine="fsdp2")).phase("load").bytes < 4 * EIGHT_B_WEIGHTS / 8 + 3 * GIB
    assert memory(planned(engine="zero2")).phase("load").bytes >= 4 * EIGHT_B_WEIGHTS


@pytest.mark.parametrize("name", [recipe.name for recipe in list_recipes() if "quickstart" not in recipe.name])
def test_every_shipped_recipe_is_estimated_and_every_component_says_why(name: str) -> None:
    recipe = load_recipe(name)
    plan = make_plan(recipe, DeviceRequest(gpus=8), LAPTOP, None)
    shape = shape_of(plan)
    counts = count_shape(shape, recipe.method)
    held = list_weights(plan, shape)
    assert held is not None
    assert counts is not None
    assert (sum(e.size for e in held), sum(e.size for e in held if e.trained)) == (counts.total, counts.trainable)
    estimate = memory(plan)
    assert estimate.required_bytes == estimate.peak.bytes + total_bytes(estimate.outside)
    for phase in estimate.phases:
        assert all(part.bytes > 0 and part.reason and part.name for part in phase.components), phase.name
    assert storage(plan).host_bytes > 0


def test_an_estimate_imports_no_torch() -> None:
    code = (
        "import sys, packhorse.estimate.memory, packhorse.estimate.storage;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=180)
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_held_covers_every_parameter_of_the_model() -> None:
    plan = planned()
    held = list_weights(plan, shape_of(plan))
    assert held is not None
    assert [each.name for each in held if isinstance(each, WeightTensor)] == [
        e.name for e in list_parameters(shape_of(plan))
    ]


def test_many_short_documents_cost_flash_attention_memory_in_the_backward_pass() -> None:
    """torch's flash_api.cpp, mha_varlen_bwd: dq_accum is [total_q + 128 B, H, E] in float32."""
    length = {"length": 8192, "packs": 8, "micro": 1}
    varlen, sdpa = (
        planned(1, engine="single", method="lora", model=EIGHT_B, batch=length, attention=kernel)
        for kernel in ("varlen", "sdpa")
    )

    def workspace(plan: RunPlan, documents: int) -> int:
        packs = replace(PackFigures.full(8192), documents_max=documents)
        inputs = EstimateInputs(shape_of(plan), packs, find_gpu("H100"))
        return PlanEstimate(plan, inputs).memory.activations.layer_workspace

    # With few documents the MLP's gradients are the fullest moment; its results are free when attention's begins.
    assert workspace(varlen, 1) == workspace(varlen, 100) == workspace(sdpa, 1000)
    assert workspace(varlen, 1000) - workspace(varlen, 800) == 128 * 200 * 32 * 128 * 4
