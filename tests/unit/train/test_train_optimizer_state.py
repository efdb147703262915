"""An optimizer that was saved and loaded goes on as if nothing had happened, bit for bit, whichever it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from packhorse.errors import UserError
from packhorse.recipe.schema import Recipe
from packhorse.train.checkpoint.optimizer_state import load_states
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.joint_optimizer import InBackwardOptimizer
from packhorse.train.engine.optimizer import make_optimizer
from saved_states import save_states

OPTIMIZERS = ["adamw", "adafactor", "muon", "lion", "lion_8bit", "adamw_8bit"]


def recipe(name: str, **optimizer: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {"id": "m"},
            "method": "full",
            "data": {"sources": [{"path": "rows.jsonl"}]},
            "optimizer": {"name": name, "learning_rate": 1e-2, **optimizer},
            "steps": 9,
        }
    )


class Layers(nn.Module):
    """A matrix wide enough for 8-bit states, a small one, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(64, 128, bias=False)
        self.narrow = nn.Linear(128, 8)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.relu(self.wide(rows)))  # type: ignore[no-any-return]


def engine(model: nn.Module, optimizer: Optimizer, scaler: Any = None) -> Engine:
    accelerator: Any = SimpleNamespace(scaler=scaler, unwrap_model=lambda model: model)
    return Engine(accelerator, model, optimizer, gradient_factor=1.0, clip_norm=None, control=None)


def steps(model: nn.Module, optimizer: Optimizer, numbers: range) -> None:
    for number in numbers:
        rows = torch.randn(16, 64, generator=torch.Generator().manual_seed(number))
        model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def started(name: str, **settings: Any) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = Layers()
    optimizer = make_optimizer(model, recipe(name, **settings))
    if isinstance(optimizer, InBackwardOptimizer):
        optimizer.step_in_backward()
    return model, optimizer


@pytest.mark.parametrize("in_backward", [False, True], ids=["", "in the backward pass"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_where_it_was(name: str, in_backward: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"in_backward": in_backward, "clip_norm": None}
    model, optimizer = started(name, **settings)
    steps(model, optimizer, range(3))
    save_states(engine(model, optimizer), tmp_path)
    resumed, fresh = started(name, **settings)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    load_states(engine(resumed, fresh), tmp_path)
    steps(model, optimizer, range(3, 6))
    steps(resumed, fresh, range(3, 6))
    for expected, actual in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, actual)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sharded_states_are_saved_whole_and_sharded_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small enough that the states fill several files.
    monkeypatch.setattr("packhorse.train.checkpoint.saved_tensor.MAX_FILE_BYTES", 40_000)
    mesh = init_device_mesh("cpu", (1,))

    def sharded() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = fully_shard(Layers(), mesh=mesh)
        return model, make_optimizer(model, recipe(name))

    model, optimizer = sharded()
    steps(model, optimizer, range(3))
    save_states(engine(model, optimizer), tmp_path)
    resumed, fresh = sharded()
    with torch.no_grad():
        for target, source in zip(resumed.parameters(), model.parameters(), strict=True):
            target.copy_(source)
    load_states(engine(resumed, fresh), tmp_path)
    assert len(list(tmp_path.glob("optimizer-*.safetensors"))) == {"adamw": 3, "muon": 1}[name]
    steps(model, optimizer, range(3, 5))
    steps(resumed, fresh, range(3, 5))
    for expected, actual in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected.full_tensor(), actual.full_tensor())  # type: ignore[attr-defined]


def test_the_loss_scale_of_fp16_goes_on(tmp_path: Path) -> None:
    model, optimizer = started("adamw")
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1024.0, "_growth_tracker": 7})
    steps(model, optimizer, range(1))
    save_states(engine(model, optimizer, scaler), tmp_path)
    fresh = torch.amp.GradScaler("cpu")
    load_states(engine(model, optimizer, fresh), tmp_path)
    assert (fresh.state_dict()["scale"], fresh.state_dict()["_growth_tracker"]) == (1024.0, 7)


def test_states_of_weights_that_are_not_trained_are_refused(tmp_path: Path) -> None:
    model, optimizer = started("adamw")
    steps(model, optimizer, range(1))
    save_states(engine(model, optimizer), tmp_path)
    model.wide.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"of 3 parameters, and 2 are trained; wide.weight is not among them"):
        load_states(engine(model, optimizer), tmp_path)
