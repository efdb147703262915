"""Steps on weights that FSDP2 has sharded, on two processes, against the same on one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from packhorse.recipe.schema import Recipe
from packhorse.train.engine.joint_optimizer import InBackwardOptimizer
from packhorse.train.engine.optimizer import make_optimizer

RANKS, STEPS = 2, 3
MESHES = {"fsdp2": (RANKS,), "hsdp": (RANKS, 1)}
RECIPE = {
    "name": "r",
    "model": {"id": "o/m"},
    "method": "full",
    "data": {"sources": [{"path": "r.jsonl"}]},
    "epochs": 1,
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 17), nn.LayerNorm(17), nn.Linear(17, 5))


def batch(step: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def recipe(**optimizer: object) -> Recipe:
    return Recipe.model_validate({**RECIPE, "optimizer": {"learning_rate": 1e-2, **optimizer}})


def sharded(mesh: DeviceMesh) -> nn.Module:
    model = network()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> list[Tensor]:
    return [parameter.full_tensor() for parameter in model.parameters()]


def steps_in_backward(rank: int, mesh: DeviceMesh) -> tuple[list[Tensor], list[float]]:
    model = sharded(mesh)
    optimizer = make_optimizer(model, recipe(in_backward=True, clip_norm=None))
    assert isinstance(optimizer, InBackwardOptimizer)
    optimizer.step_in_backward()
    norms = []
    for step in range(STEPS):
        model(batch(step)[rank::RANKS]).pow(2).sum().backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        norms.append(optimizer.take_norm().item())
    return whole(model), norms


def scaled_steps(rank: int, mesh: DeviceMesh) -> list[bool]:
    """One rank alone meets an infinite gradient in the second step; which steps moved the weights."""
    model = sharded(mesh)
    optimizer = make_optimizer(model, recipe())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    moved = []
    for step in range(STEPS):
        before = whole(model)
        scaler.scale(model(batch(step)[rank::RANKS]).pow(2).sum()).backward()
        if step == 1 and rank == 1:
            next(model.parameters()).grad.to_local().fill_(float("inf"))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(not all(torch.equal(a, b) for a, b in zip(before, whole(model), strict=True)))
    return moved


def work(rank: int, folder: str, port: int) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=RANKS, rank=rank)
    torch.set_num_threads(1)
    found = {}
    for name, shape in MESHES.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
        weights, norms = steps_in_backward(rank, mesh)
        found[name] = {"weights": weights, "norms": norms}
    found["fsdp2"]["moved"] = scaled_steps(rank, init_device_mesh("cpu", (RANKS,)))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, list]]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (str(folder), port), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("engine", MESHES)
def test_a_sharded_weight_is_stepped_in_the_backward_pass_as_after_it(engine: str, found: list[dict]) -> None:
    model = network()
    optimizer = make_optimizer(model, recipe(clip_norm=None))
    norms = []
    for step in range(STEPS):
        (model(batch(step)).pow(2).sum() / RANKS).backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(RANKS):
        assert found[rank][engine]["norms"] == pytest.approx(norms, rel=1e-5)
        for one, other in zip(found[rank][engine]["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-7)


def test_all_ranks_leave_out_a_step_that_overflows_on_one(found: list[dict]) -> None:
    assert [found[rank]["fsdp2"]["moved"] for rank in range(RANKS)] == [[True, False, True]] * RANKS
