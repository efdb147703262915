"""Groups of processes that share a pack: what the plan takes, and what it refuses before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from packhorse.errors import UserError
from packhorse.plan.batch import split_batch
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from packhorse.recipe.schema import BatchSection
from tiny import TINY, write_tiny


def planned(folder: Path, sequence: int, heads: int, **sections: Any) -> RunPlan:
    config = {**TINY["model"]["config"], "hidden_size": 48, "num_attention_heads": heads, "num_key_value_heads": 1}
    parallel = {"sequence": sequence, "engine": "fsdp2"}
    path = write_tiny(folder, model={**TINY["model"], "config": config}, parallel=parallel, **sections)
    return make_plan(load_recipe(str(path), []), DeviceRequest(gpus=8), Hardware(num_cores=2, gpus=()), None)


def test_packs_are_dealt_to_groups(tmp_path: Path) -> None:
    plan = planned(tmp_path, sequence=4, heads=4)
    assert plan.topology.data_ranks == 2
    assert plan.batch.micro_packs * plan.batch.accumulation_steps * 2 == TINY["batch"]["packs"]
    assert plan.chosen("parallel.sequence") == "4"


@pytest.mark.parametrize(("heads", "fix"), [(4, "parallel.sequence to 4."), (12, "parallel.sequence to 4.")])
def test_heads_that_the_processes_cannot_share_are_refused(heads: int, fix: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        planned(tmp_path, sequence=8, heads=heads)
    assert f"parallel.sequence is 8, which does not divide the model's {heads} attention heads." in str(caught.value)
    assert fix in str(caught.value)


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_prompts_before_each_row_are_refused(kind: str, tmp_path: Path) -> None:
    model = {"id": "Qwen/Qwen2.5-0.5B"}
    path = write_tiny(tmp_path, model=model, method=kind, parallel={"sequence": 2, "processes": 2})
    with pytest.raises(UserError, match=f"parallel.sequence is 2, and method.kind is {kind}"):
        load_recipe(str(path), [])


def test_fewer_packs_than_groups_are_refused_as_groups() -> None:
    with pytest.raises(UserError, match="batch.packs is 3, and there are 4 groups of 2 processes"):
        split_batch(BatchSection(packs=3), 4, 2)


def test_a_group_takes_as_many_tokens_a_pass_as_its_processes_would() -> None:
    alone, _ = split_batch(BatchSection(packs=8, length=4096), 1)
    shared, decision = split_batch(BatchSection(packs=8, length=4096), 1, 4)
    assert (alone.micro_packs, shared.micro_packs) == (1, 4)
    assert "shared by 4" in decision.reason
