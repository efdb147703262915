"""One step as a rank of 32 in one process: the real engines, meshes and batch split, without the other ranks.

Each runs in a separate process, because DeepSpeed changes torch permanently.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cli import packhorse
from packhorse.cli.rehearse import too_much
from packhorse.errors import UserError
from packhorse.estimate.measure.miniature import make_miniature, small_fields
from packhorse.estimate.measure.rehearse import Rehearsal, rehearse
from packhorse.estimate.training_state import touched_by_rank
from packhorse.estimate.weights import list_weights
from packhorse.model_spec.configuration import find_configuration, published
from packhorse.model_spec.parameters import read_shape
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from ranks import IMPORTED
from tiny import write_tiny

WORLD = 32
UNITS = 4
"""Embedding, two layers, and the head with the last norm."""


@dataclass(frozen=True)
class Case:
    words: tuple[str, ...]
    rank: int
    groups: dict[str, list[int]]
    report: dict[str, str]
    collectives: dict[str, int]
    shares: dict[str, float]
    """Bytes a parameter of the whole model, of each component."""
    recipe: str = "llama3.1-8b/lora"
    passes: int = 2


def words(engine: str, *more: str) -> tuple[str, ...]:
    own = ("method=full", "batch.packs=64", "batch.micro=1", "parallel.checkpointing=true")
    return (f"parallel.engine={engine}", *own, *more)


def zero(stage: int, accumulation: int = 2) -> dict[str, str]:
    return {
        "class": "DeepSpeedEngine",
        "ZeRO stage": str(stage),
        "data-parallel ranks": str(WORLD),
        "accumulation": str(accumulation),
        "bf16": "True",
        "clipping": "1.0",
    }


ALL = {"shard": list(range(WORLD))}
FSDP2 = {"all-gather": 2 * (2 * UNITS - 1), "reduce-scatter": UNITS, "all-reduce": 1}
"""Each unit in both directions of two passes, but the last, which stays; gradients once; and the norm."""
CASES = {
    "ddp": Case(
        words("ddp"), 5, {}, {"class": "DistributedDataParallel"}, {"all-reduce": 1},
        {"weights": 4, "gradients": 4, "optimizer": 8},
    ),
    "zero1": Case(words("zero1"), 0, ALL, zero(1), {"all-gather": 2}, {"weights": 2, "optimizer": 12 / WORLD}),
    "zero2": Case(
        words("zero2"), 31, ALL, zero(2), {"all-gather": 2},
        {"weights": 2, "gradients": 4 / WORLD, "optimizer": 12 / WORLD},
    ),
    "zero3": Case(
        words("zero3"), 17, ALL, zero(3), {"reduce-scatter": 2},
        {"weights": 2 / WORLD, "gradients": 4 / WORLD, "optimizer": 12 / WORLD},
    ),
    "fsdp2": Case(
        words("fsdp2"), 17, ALL, {"mesh": "32 shard"}, FSDP2,
        {"weights": 4 / WORLD, "gradients": 4 / WORLD, "optimizer": 8 / WORLD},
    ),
    "hsdp": Case(
        words("hsdp"), 17, {"copy": [1, 9, 17, 25], "shard": list(range(16, 24))}, {"mesh": "4 copy x 8 shard"},
        {**FSDP2, "all-reduce": 1 + UNITS}, {"weights": 4 / 8, "gradients": 4 / 8, "optimizer": 8 / 8},
    ),
    "sequence": Case(
        words("fsdp2", "parallel.sequence=2"), 17, {**ALL, "sequence": [16, 17]}, {"mesh": "32 shard"},
        # Before and after the attention of two layers, in the forward pass, again, and back.
        {"all-to-all": 4 * 2 * 2 * 3, "reduce-scatter": UNITS},
        {"weights": 4 / WORLD, "gradients": 4 / WORLD, "optimizer": 8 / WORLD}, passes=4,
    ),
    "zero3, sequence": Case(
        words("zero3", "parallel.sequence=2"), 0, {**ALL, "sequence": [0, 1]}, zero(3, 4), {"reduce-scatter": 4},
        {"weights": 2 / WORLD, "gradients": 4 / WORLD, "optimizer": 12 / WORLD}, passes=4,
    ),
    "qlora": Case(
        (), 0, ALL, {"mesh": "32 shard"}, {"all-gather": 2 * (2 * UNITS - 1)}, {}, recipe="llama3.3-70b/qlora"
    ),
}  # fmt: skip


def planned(case: Case) -> RunPlan:
    recipe = load_recipe(case.recipe, case.words, check_environment=False)
    return make_plan(recipe, DeviceRequest(gpus=WORLD), Hardware(2, ()), None)


def rehearsed(plan: RunPlan, rank: int, folder: Path) -> dict[str, Any]:
    context = mp.get_context("forkserver")
    with mock.patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}):
        context.set_forkserver_preload(IMPORTED)
        child = context.Process(target=in_child, args=(plan.model_dump_json(), rank, folder))
        child.start()
    child.join(120)
    child.kill()
    found: dict[str, Any] = json.loads((folder / "rehearsal.json").read_text(encoding="utf-8"))
    return found


def in_child(plan_text: str, rank: int, folder: Path) -> None:
    plan = RunPlan.model_validate_json(plan_text)
    done = rehearse(plan, find_configuration(plan.recipe), rank)
    (folder / "rehearsal.json").write_text(json.dumps(asdict(done)), encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_a_rank_of_32(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    plan = planned(case)
    found = rehearsed(plan, case.rank, tmp_path)
    assert (found["world_size"], found["rank"]) == (WORLD, case.rank)
    assert found["groups"] == case.groups
    assert case.report.items() <= found["runs"].items()
    assert case.collectives.items() <= found["collectives"].items()
    assert len(found["passes"]) == case.passes == plan.batch.accumulation_steps
    assert sum(found["passes"]) * plan.topology.data_ranks == plan.batch.packs_per_step
    for part, share in case.shares.items():
        assert found["held"][part] == pytest.approx(share * found["num_parameters"], rel=0.02), part
    # Of the gradients ZeRO-1 keeps, each rank has others; the plan tells of the fullest, which is another rank.
    parts = {"weights", "optimizer"} | ({"gradients"} if name != "zero1" else set())
    for part in parts:
        assert found["planned"][part] == pytest.approx(found["held"][part], rel=0.02), part


def test_zero1_keeps_whole_gradients_of_what_it_steps_a_part_of(tmp_path: Path) -> None:
    plan = planned(CASES["zero1"])
    shape = read_shape({**small_fields(find_configuration(plan.recipe) or {})})
    assert shape is not None
    held = list_weights(plan, shape)
    assert held is not None
    touched = touched_by_rank([each for each in held if each.trained], WORLD)
    fullest = touched.index(max(touched))
    found = rehearsed(plan, fullest, tmp_path)
    assert found["held"]["gradients"] == pytest.approx(found["planned"]["gradients"], rel=0.02)
    assert max(touched) > 5 * sum(each.size for each in held) / WORLD


@pytest.mark.parametrize("kind", [name for name in published() if "70B" in name or "Qwen3-30B" in name])
def test_the_small_model_keeps_heads_and_experts(kind: str) -> None:
    whole = published()[kind]
    small = small_fields(whole)
    kept = ("model_type", "num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok")
    assert {key: small.get(key) for key in kept} == {key: whole.get(key) for key in kept}
    shape = read_shape(small)
    assert shape is not None
    assert shape.layers == 2


def test_a_family_that_is_not_described_is_counted_too(tmp_path: Path) -> None:
    model = {"config": {"model_type": "olmo2", "vocab_size": 512}, "tokenizer": "builtin:tokenizer"}
    sections = {"model": model, "parallel": {"engine": "zero3"}, "batch": {"length": 256, "packs": 32}}
    recipe = load_recipe(str(write_tiny(tmp_path, **sections)))
    found = rehearsed(make_plan(recipe, DeviceRequest(gpus=16), Hardware(2, ()), None), 0, tmp_path)
    assert found["held"] == pytest.approx(found["planned"], rel=0.02)


def test_the_command_shows_what_a_rank_holds_beside_the_plan(tmp_path: Path) -> None:
    done = packhorse(tmp_path, "plan", "qwen3-30b-a3b/lora", "--gpus", "16xH100-80GB", "--dry-run", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["world_size"] == 16
    assert found["held"] == pytest.approx(found["planned"], rel=0.02)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_does_not_compile(tmp_path: Path) -> None:
    recipe = load_recipe(str(write_tiny(tmp_path, parallel={"processes": 1, "compile": True})))
    plan = make_plan(recipe, DeviceRequest(), Hardware(2, ()), None)
    assert plan.compiles_layers
    assert not make_miniature(plan, find_configuration(recipe, 512), tmp_path).compiles_layers


def test_more_than_the_plan_counts_is_told() -> None:
    done = Rehearsal(0, 2, {}, {}, (1,), 10, {"weights": 103, "optimizer": 50}, {"weights": 100, "optimizer": 90}, {})
    assert too_much(done) == ["weights"]
    assert too_much(replace(done, planned=None)) == []


def test_what_is_not_rehearsed_is_said() -> None:
    plan = planned(Case(words("zero3_offload"), 0, {}, {}, {}, {}))
    with pytest.raises(UserError, match="cannot be rehearsed"):
        rehearse(plan, find_configuration(plan.recipe))
    with pytest.raises(UserError, match="architecture of .* is not known"):
        rehearse(planned(CASES["fsdp2"]), None)
