"""The launch is compared with the plan: a model that is not sharded as planned does not train."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from packhorse.errors import UserError
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe
from packhorse.train.engine.launch_proof import assert_device_as_planned, assert_sharded_as_planned

LAPTOP = Hardware(num_cores=4, gpus=())
FIELDS: dict[str, Any] = {
    "name": "r",
    "model": {"id": "o/m"},
    "data": {"sources": [{"path": "r.jsonl"}]},
    "optimizer": {"learning_rate": 1e-4},
    "steps": 9,
}


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plan(**parallel: Any) -> RunPlan:
    return make_plan(Recipe.model_validate(FIELDS | {"parallel": parallel}), DeviceRequest(), LAPTOP, None)


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_shards_on_the_planned_mesh_pass() -> None:
    model = fully_shard(layers(), mesh=init_device_mesh("cpu", (1,)))
    assert_sharded_as_planned(model, plan(engine="fsdp2", processes=1))


def test_a_weight_that_every_process_holds_whole_is_refused() -> None:
    model = layers()
    fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))  # type: ignore[index]
    with pytest.raises(UserError, match=r"mesh of the weights should be \[\(1,\)\] and is \[\(\), \(1,\)\]"):
        assert_sharded_as_planned(model, plan(engine="fsdp2", processes=1))


def test_another_mesh_than_planned_is_refused() -> None:
    model = fully_shard(layers(), mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("copy", "shard")))
    wanted = plan(engine="hsdp", processes=4, shard_group=2)
    with pytest.raises(
        UserError, match=r"engine is hsdp, and mesh of the weights should be \[\(2, 2\)\] and is \[\(1, 1\)"
    ):
        assert_sharded_as_planned(model, wanted)


def test_processes_that_do_not_share_gradients_are_refused() -> None:
    with pytest.raises(UserError, match="engine is ddp, and model should be DistributedDataParallel and is bare model"):
        assert_sharded_as_planned(layers(), plan(engine="ddp", processes=2))
    assert_sharded_as_planned(DistributedDataParallel(layers()), plan(engine="ddp", processes=2))
    assert_sharded_as_planned(layers(), plan(engine="single"))


@pytest.mark.parametrize(
    ("capability", "sections", "fact"),
    [
        (None, {}, "finds none here"),
        ((7, 5), {"precision": "fp16"}, "model.attention is varlen, and Tesla T4 has compute capability 7.5"),
        ((7, 5), {"model": {"id": "o/m", "attention": "sdpa"}, "precision": "bf16"}, "precision is bf16, and Tesla T4"),
        ((7, 5), {"model": {"id": "o/m", "attention": "sdpa"}, "precision": "fp16"}, ""),
        ((9, 0), {"precision": "bf16"}, ""),
    ],
)
def test_a_plan_for_gpus_is_refused_where_torch_or_the_gpu_cannot_run_it(
    capability: tuple[int, int] | None, sections: dict[str, Any], fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    recipe = Recipe.model_validate(FIELDS | sections)
    with pytest.raises(UserError, match=fact) if fact else contextlib.nullcontext():
        assert_device_as_planned(make_plan(recipe, DeviceRequest(gpus=1), LAPTOP, None))
