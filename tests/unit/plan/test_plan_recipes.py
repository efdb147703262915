"""Every shipped recipe is planned on 1 to 64 GPUs, and a plan survives its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.errors import UserError
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import DataFacts, read_plan, write_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from packhorse.recipe.shipped import list_recipes

LOGIN_NODE = Hardware(num_cores=2, gpus=())
NAMES = [recipe.name for recipe in list_recipes()]
# The quickstart's steps are too small to share: 4 packs, for the 2 processes of a laptop.
LARGE = [name for name in NAMES if not name.startswith("quickstart/")]


WORLDS = [(name, gpus) for name in LARGE for gpus in (1, 2, 8, 16, 64) if gpus <= load_recipe(name).batch.packs]


@pytest.mark.parametrize(("name", "gpus"), WORLDS)
def test_a_shipped_recipe_is_planned(name: str, gpus: int) -> None:
    recipe = load_recipe(name)
    plan = make_plan(recipe, DeviceRequest(gpus=gpus), LOGIN_NODE, None)
    split = plan.batch
    assert plan.topology.world_size == gpus
    assert gpus * split.accumulation_steps * split.micro_packs == recipe.batch.packs
    assert plan.argv[:3] == ("accelerate", "launch", "--config_file")
    assert Path(plan.argv[3]).name == f"{recipe.parallel.engine}.yaml"
    assert Path(plan.argv[3]).is_file()
    assert (plan.deepspeed is not None) == recipe.parallel.engine.startswith("zero")
    if plan.deepspeed:
        assert plan.deepspeed["gradient_accumulation_steps"] == split.accumulation_steps
        assert plan.deepspeed["gradient_clipping"] == recipe.optimizer.clip_norm
    assert all(decision.reason for decision in plan.decisions)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("quickstart/")])
def test_a_quickstart_recipe_is_planned_on_a_laptop(name: str) -> None:
    plan = make_plan(load_recipe(name), DeviceRequest(), LOGIN_NODE, None)
    assert (plan.topology.device, plan.topology.world_size) == ("cpu", 2)


def test_a_plan_survives_its_file_and_counts_steps(tmp_path: Path) -> None:
    facts = DataFacts(
        folder="/data",
        content_hash="0" * 16,
        tokenizer="/tokenizer",
        num_rows=1000,
        num_packs=65,
        num_tokens=10,
        num_supervised_tokens=5,
        fill=0.99,
    )
    recipe = load_recipe("qwen2.5-7b/lora", ["epochs=3"])
    plan = make_plan(recipe, DeviceRequest(gpus=8), LOGIN_NODE, facts)
    assert plan.steps_per_epoch == -(-65 // recipe.batch.packs)
    assert plan.num_steps == 3 * plan.steps_per_epoch
    write_plan(plan, tmp_path)
    assert read_plan(tmp_path) == plan


def test_a_plan_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="its version is 99"):
        read_plan(tmp_path)


def test_varlen_attention_is_refused_where_it_cannot_run() -> None:
    recipe = load_recipe("quickstart/full", ["model.attention=varlen"])
    with pytest.raises(UserError, match="model.attention is varlen, and the run is on the CPU"):
        make_plan(recipe, DeviceRequest(), LOGIN_NODE, None)
