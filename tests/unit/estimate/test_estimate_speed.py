"""Time of a step: what each engine sends, what each choice costs, and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest

from packhorse.estimate.communication import CONTENTION, RING_NODE_SECONDS, RING_SHARE, Group, Links, Transfer
from packhorse.estimate.gpus import find_gpu
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate
from packhorse.estimate.search.scaling import COUNTS, MemoryByScale, Mode, Scaling, scale
from packhorse.estimate.speed import (
    SpeedEstimate,
    measured_step_seconds,
    scaled,
)
from packhorse.model_spec.configuration import find_configuration, published
from packhorse.model_spec.parameters import list_parameters, read_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from packhorse.recipe.schema import Recipe
from packhorse.recipe.shipped import list_recipes

MODEL = dict(published()["meta-llama/Llama-3.1-8B"])
SHAPE = read_shape(MODEL)
assert SHAPE is not None
WEIGHTS = sum(parameter.size for parameter in list_parameters(SHAPE))
LORA = {"kind": "lora", "rank": 16, "dropout": 0.0}


def estimate(method: Any = "full", count: int = 8, packs: int = 32, **more: Any) -> SpeedEstimate:
    length = more.pop("length", 4096)
    top = {key: more.pop(key) for key in ("precision", "optimizer", "steps") if key in more}
    recipe = Recipe.model_validate(
        {
            "name": "speed",
            "model": {"config": MODEL},
            "method": method,
            "data": {"sources": [{"path": "rows.jsonl"}]},
            "batch": {"length": length, "packs": packs, "micro": more.pop("micro", 1)},
            "steps": 1000,
            **top,
            "optimizer": {"learning_rate": 1e-4, **top.get("optimizer", {})},
            "parallel": {key: more.pop(key) for key in list(more) if key in PARALLEL},
        }
    )
    plan = make_plan(recipe, DeviceRequest(count, more.pop("nodes", None)), Hardware(2, ()), None)
    packs_of = more.pop("figures", PackFigures.full(length))
    assert SHAPE is not None
    return PlanEstimate(plan, EstimateInputs(SHAPE, packs_of, find_gpu(more.pop("gpu", "H100")), **more)).speed


PARALLEL = {"engine", "checkpointing", "sequence", "shard_group", "offload_activations", "nvme"}


def moved(found: SpeedEstimate, *names: str) -> float:
    return sum(each.bytes * each.times for each in found.transfers if not names or each.name in names)


def seconds(found: SpeedEstimate, name: str) -> float:
    return sum(part.seconds for part in found.parts if part.name == name)


@pytest.mark.parametrize(
    ("engine", "weights", "gradients"),
    [
        # Rajbhandari et al. 2020, section 7, in bytes of a weight over (R - 1)/R; 4 passes. DDP's gradients are
        # float32, those of ZeRO bfloat16; DeepSpeed all-reduces in stage 1 and 2, in stage 2 with each pass.
        ("ddp", 0, 2 * 4),
        ("zero1", 2, 2 * 2),
        ("zero2", 2, 4 * 2 * 2),
        ("zero3", 4 * 2 * 2, 4 * 2),
        ("fsdp2", 4 * 2 * 2, 4),
    ],
)
def test_bytes_that_each_engine_sends(engine: str, weights: float, gradients: float) -> None:
    found = estimate(engine=engine)
    unit = WEIGHTS * 7 / 8
    assert moved(found, "gradients") == pytest.approx(gradients * unit, rel=1e-9)
    # What the forward pass ended with is not gathered again for the backward pass.
    assert moved(found, "weights") == pytest.approx(weights * unit, rel=0.07)
    if engine == "ddp":
        assert moved(found, "weights") == 0


def test_an_adapter_sends_its_own_gradients_only() -> None:
    adapter = 41_943_040
    assert moved(estimate(LORA, engine="ddp"), "gradients") == pytest.approx(8 * adapter * 7 / 8)
    assert moved(estimate(LORA, engine="fsdp2"), "gradients") == pytest.approx(4 * adapter * 7 / 8)


def test_quantised_weights_are_gathered_as_they_are_stored() -> None:
    plain = moved(estimate(LORA, engine="fsdp2"), "weights")
    packed = moved(estimate({**LORA, "kind": "qlora"}, engine="fsdp2"), "weights")
    assert 0.27 < packed / plain < 0.40  # a quarter, but for embedding, head and adapters


def test_hsdp_gathers_within_a_node_and_sums_shards_between_nodes() -> None:
    flat = estimate(count=64, nodes=8, packs=64, engine="fsdp2")
    mesh = estimate(count=64, nodes=8, packs=64, engine="hsdp")
    between = [each for each in mesh.transfers if each.name == "gradients between copies"]
    assert [each.bytes for each in between] == [pytest.approx(2 * 4 * WEIGHTS / 8 * 7 / 8)]
    gathers = {
        name: sum(e.seconds for e in one.transfers if e.name == "weights")
        for name, one in (("flat", flat), ("mesh", mesh))
    }
    assert gathers["mesh"] < gathers["flat"]


def test_a_ring_within_a_node_takes_what_its_links_give() -> None:
    links = Links(find_gpu("H100"), 50e9)
    one = links.gather(8e9, Group(8, 8))
    assert one == pytest.approx(7e9 / (450e9 * 0.8) / RING_SHARE + 7 * RING_NODE_SECONDS * CONTENTION + 20e-6)
    # Between nodes the network decides: 7/8 of it into a node of 8 GPUs with 50 GB/s each.
    assert links.gather(64e9, Group(64, 8)) == pytest.approx(56e9 / (8 * 50e9 * 0.85) / RING_SHARE, rel=0.07)
    assert links.gather(8e9, Group(1, 1)) == 0


def test_parts_add_up_and_speed_follows() -> None:
    found = estimate()
    assert found.step_seconds == pytest.approx(sum(part.seconds for part in found.parts))
    assert len({part.name for part in found.parts}) == len(found.parts)
    assert all(part.reason and part.seconds > 0 for part in found.parts)
    assert found.tokens_per_second_per_gpu == pytest.approx(32 * 4096 / found.step_seconds / 8)
    assert found.mfu == pytest.approx(found.model_flops / found.step_seconds / 8 / 989.4e12)
    assert found.hours == pytest.approx(1000 * found.step_seconds / 3600)
    assert found.energy_kwh == pytest.approx(found.hours * 8 * 0.7)
    assert found.price is None
    assert estimate(price_per_gpu_hour=2.5).price == pytest.approx(found.hours * 8 * 2.5)


def test_steps_that_are_not_known_yet_cost_nothing_yet() -> None:
    recipe = load_recipe("llama3.1-8b/lora", [], check_environment=False)
    plan = make_plan(recipe, DeviceRequest(8), Hardware(2, ()), None)
    assert SHAPE is not None
    basis = EstimateInputs(SHAPE, PackFigures.full(4096), find_gpu("H100"), price_per_gpu_hour=2.0)
    found = PlanEstimate(plan, basis).speed
    assert (found.num_steps, found.hours, found.energy_kwh, found.price) == (None, None, None, None)


def test_checkpointing_costs_about_a_third_of_the_arithmetic() -> None:
    kept, again, second = (estimate(engine="fsdp2", checkpointing=each) for each in (False, True, 2))
    assert kept.step_seconds < second.step_seconds < again.step_seconds
    assert again.mfu < kept.mfu
    assert again.model_flops == kept.model_flops
    # Without the last product of each layer, which torch does not run again.
    assert 1.2 < again.hardware_flops / kept.hardware_flops < 1.3


def test_attention_costs_by_the_documents_and_not_by_the_packs() -> None:
    short = PackFigures(65536, 10, 65536.0, 65536, 65535.0, 65535, 64 * 1024.0**2, 64 * 1024**2, 1024)
    whole = estimate(packs=8, engine="fsdp2", length=65536, checkpointing=True)
    split = estimate(packs=8, engine="fsdp2", length=65536, checkpointing=True, figures=short)
    assert seconds(whole, "attention") == pytest.approx(64 * seconds(split, "attention"))


def test_a_head_that_few_tokens_need_is_cheap() -> None:
    chat = PackFigures(4096, 10, 4096.0, 4096, 400.0, 400, 4096.0**2, 4096**2, 4096)
    assert estimate(figures=chat).model_flops < 0.95 * estimate().model_flops


def test_quantised_weights_cost_time_to_unpack_and_full_precision_more() -> None:
    plain, packed = estimate(LORA), estimate({**LORA, "kind": "qlora"})
    assert seconds(packed, "dequantisation") > 0 == seconds(plain, "dequantisation")
    assert packed.step_seconds > plain.step_seconds
    assert estimate(precision="fp32").step_seconds > 5 * estimate().step_seconds


def test_offload_waits_for_the_host_and_is_told_less_surely() -> None:
    held, offloaded = estimate(engine="zero3"), estimate(engine="zero3_offload")
    on_disk = estimate(engine="zero3_nvme", nvme="/disk")
    assert held.step_seconds < offloaded.step_seconds < on_disk.step_seconds
    assert seconds(offloaded, "optimizer") == 0 < seconds(offloaded, "optimizer on the host")
    assert seconds(on_disk, "optimizer states on the disk") > 0
    assert held.uncertainty < offloaded.uncertainty


def test_offloaded_activations_and_shared_packs_are_paid_for() -> None:
    kept = estimate(engine="fsdp2", checkpointing=True)
    away = estimate(engine="fsdp2", checkpointing=True, offload_activations=True)
    # The copies run beside the layers: 32 MiB per layer, at 64 GB/s, hide behind 4,096 tokens of an 8B.
    assert moved(away, "activations") == 2 * 4 * 32 * 4096 * 4096 * 2
    assert kept.step_seconds < away.step_seconds < 1.01 * kept.step_seconds
    shared = estimate(engine="fsdp2", checkpointing=True, sequence=4)
    # The same arithmetic in all; queries, outputs and as many keys and values are sent.
    assert shared.model_flops == pytest.approx(kept.model_flops)
    tokens, width = 4096 / 4, 2 * 2 * (32 + 8) * 128
    sent = [each.bytes for each in shared.transfers if each.name == "sequence" and each.phase == "forward"]
    assert sent == [pytest.approx(32 * tokens * width)]


def test_muon_pays_for_its_iterations() -> None:
    plain, muon = estimate(engine="ddp"), estimate(engine="ddp", optimizer={"name": "muon"})
    # A matrix of 4,096 x 14,336: five times 4 m² n + 2 m³, all of it on each rank under ddp, a part under fsdp2.
    one = 5 * (4 * 4096**2 * 14336 + 2 * 4096**3)
    assert seconds(muon, "orthogonalisation") > 3 * 32 * one / 989.4e12
    assert muon.step_seconds > plain.step_seconds
    sharded = estimate(engine="fsdp2", optimizer={"name": "muon"})
    assert seconds(sharded, "orthogonalisation") == pytest.approx(seconds(muon, "orthogonalisation") / 8)
    assert seconds(sharded, "matrices of Muon") > 0


def test_a_forward_pass_is_a_part_of_a_step() -> None:
    found = estimate(packs=8)
    assert 0.25 < found.forward_seconds / found.step_seconds < 0.4
    assert scaled(found, 2.0, "").forward_seconds == 2 * found.forward_seconds


def test_a_small_model_waits_for_python() -> None:
    small = {**MODEL, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    shape = read_shape(small)
    assert shape is not None
    recipe = load_recipe("llama3.1-8b/lora", ["parallel.engine=single"], check_environment=False)
    plan = make_plan(recipe, DeviceRequest(1), Hardware(2, ()), None)
    found = PlanEstimate(plan, EstimateInputs(shape, PackFigures.full(4096), find_gpu("H100"))).speed
    assert seconds(found, "launches") > 0.2 * found.step_seconds


def test_a_measured_step_corrects_this_plan_and_others() -> None:
    found = estimate()
    measured = scaled(found, 1.5, "runs/one")
    assert measured.step_seconds == pytest.approx(1.5 * found.step_seconds)
    assert measured.uncertainty < found.uncertainty
    assert "runs/one" in measured.uncertainty_reason
    assert measured.mfu == pytest.approx(found.mfu / 1.5)
    other = estimate(checkpointing=True)
    assert scaled(other, measured.factor, "runs/one").step_seconds == pytest.approx(1.5 * other.step_seconds)


def test_metrics_give_the_median_step_without_the_first_and_without_evaluations() -> None:
    lines: list[dict[str, object]] = [
        {"step": 1, "speed/step_seconds": 30.0, "speed/other_seconds": 0.0},
        {"step": 2, "speed/step_seconds": 2.0, "speed/other_seconds": 0.0},
        {"step": 2, "evaluation/loss": 1.0},
        {"step": 3, "speed/step_seconds": 9.0, "speed/other_seconds": 7.0},
        {"step": 4, "speed/step_seconds": 2.2, "speed/other_seconds": 0.0},
    ]
    assert measured_step_seconds(lines) == 2.0
    assert measured_step_seconds(lines[:1]) is None


@pytest.mark.parametrize("name", [recipe.name for recipe in list_recipes() if not recipe.name.startswith("quickstart")])
def test_every_shipped_recipe_has_an_estimate(name: str) -> None:
    recipe = load_recipe(name, [], check_environment=False)
    shape = read_shape(find_configuration(recipe))
    assert shape is not None
    plan = make_plan(recipe, DeviceRequest(8), Hardware(2, ()), None)
    basis = EstimateInputs(shape, PackFigures.full(recipe.batch.length), find_gpu("H100"))
    found = PlanEstimate(plan, basis).speed
    assert 0.1 < found.mfu < found.hfu < 0.6


def points(found: Scaling) -> dict[int, float]:
    return {point.gpus: point.efficiency for point in found.points if point.estimate is not None}


def test_what_one_mode_has_counted_is_what_the_other_would_count() -> None:
    """Strong scaling from one GPU on has several passes a step, then one; weak scaling always as many."""
    recipe = load_recipe("llama3.1-8b/full", ["parallel.engine=fsdp2", "batch.micro=1"], check_environment=False)
    shape = read_shape(find_configuration(recipe))
    assert shape is not None
    counted: MemoryByScale = {}

    def found(mode: Mode, counted: MemoryByScale | None) -> Scaling:
        basis = EstimateInputs(shape, PackFigures.full(2048), find_gpu("H100"))
        return scale(recipe, basis, mode, (8, 32, 64), counted)

    assert found("weak", counted) == found("weak", None)
    assert found("strong", counted) == found("strong", None)
    assert len(counted) == 4, "of six points two are shared, as one pass a step needs less"


@pytest.mark.parametrize("mode", ["weak", "strong"])
@pytest.mark.parametrize("name", ["llama3.3-70b/lora", "llama3.3-70b/qlora"])
def test_a_70b_from_1_to_4096_gpus(name: str, mode: Any) -> None:
    recipe = load_recipe(name, [], check_environment=False)
    shape = read_shape(find_configuration(recipe))
    assert shape is not None
    found = scale(recipe, EstimateInputs(shape, PackFigures.full(recipe.batch.length), find_gpu("H100")), mode)
    efficiency = points(found)
    if mode == "strong":
        # A step's packs are the maths of the run: no more GPUs than packs.
        assert (found.stopped_by, found.stopped_at) == ("batch", 2 * recipe.batch.packs)
        assert max(efficiency) == recipe.batch.packs
        return
    assert list(efficiency) == list(COUNTS)
    assert efficiency[512] > 0.75
    assert list(efficiency.values()) == sorted(efficiency.values(), reverse=True)
    if "qlora" in name:  # FSDP2 moves a quarter, a layer at a time
        assert efficiency[4096] > 0.5
    else:
        assert found.stopped_by == "communication"
        assert found.stopped_at in (1024, 2048)
        assert "waiting for" in found.reason


def test_a_faster_network_and_copies_of_the_weights_carry_further() -> None:
    recipe = load_recipe("llama3.3-70b/lora", ["method=full", "parallel.engine=fsdp2"], check_environment=False)
    shape = read_shape(find_configuration(recipe))
    assert shape is not None

    def at_512(engine: str, network_gb: float) -> float:
        parallel = recipe.parallel.model_copy(update={"engine": engine})
        changed = recipe.model_copy(update={"parallel": parallel})
        basis = EstimateInputs(shape, PackFigures.full(4096), find_gpu("H100"), network_gb=network_gb)
        return points(scale(changed, basis, "weak", (8, 512)))[512]

    assert at_512("fsdp2", 3.0) < at_512("fsdp2", 50.0)
    assert at_512("fsdp2", 3.0) < at_512("hsdp", 3.0)


def test_every_transfer_has_a_reason() -> None:
    for engine in ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"):
        for each in estimate(engine=engine).transfers:
            assert isinstance(each, Transfer)
            assert each.reason
            assert each.seconds > 0
