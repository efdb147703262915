"""What ZeRO's optimizer keeps, out of its flat pieces by parameter name and back: two real ranks, real DeepSpeed."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn

from packhorse.recipe.schema import Recipe
from packhorse.train.checkpoint.optimizer_state import load_states
from packhorse.train.checkpoint.weights import gather_saved_weights
from packhorse.train.checkpoint.zero_state import has_master_weight, set_master_weight
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.optimizer import make_optimizer
from saved_states import save_states

RANKS = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [
    (1, "fp32", "adamw"),
    (2, "bf16", "adamw"),
    (3, "bf16", "adamw"),
    (3, "fp32", "lion"),
    (2, "bf16", "adamw_8bit"),
]


class Layers(nn.Module):
    """Sizes that no two ranks share equally, and two groups: matrices decay, biases do not."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(33, 301)
        self.narrow = nn.Linear(301, 5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.relu(self.wide(rows)))  # type: ignore[no-any-return]


def recipe(name: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {"id": "m"},
            "method": "full",
            "data": {"sources": [{"path": "rows.jsonl"}]},
            "optimizer": {"name": name, "learning_rate": 1e-2},
            "steps": 9,
        }
    )


def started(stage: int, precision: str, name: str, weights: dict[str, torch.Tensor] | None = None) -> Engine:
    import deepspeed

    torch.manual_seed(0)
    model = Layers()
    model.load_state_dict(weights or model.state_dict())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if stage == 3:
        deepspeed.zero.Init(module=model.to(DTYPES[precision]), config_dict_or_path=config)
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model, recipe(name)), config=config)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), unwrap_model=lambda model: model.module)
    return Engine(accelerator, wrapped, wrapped.optimizer, gradient_factor=1.0, clip_norm=None, control=None)


def steps(engine: Engine, numbers: range, dtype: torch.dtype) -> None:
    for number in numbers:
        draw = torch.Generator().manual_seed(RANKS * number + dist.get_rank())
        rows = torch.randn(16, 33, generator=draw).to(dtype)
        engine.backward(engine.model(rows).float().square().mean())


def goes_on(stage: int, precision: str, name: str, folder: Path) -> None:
    """Trains, saves, and goes on both with what trained and with a fresh engine that loads."""
    engine = started(stage, precision, name)
    steps(engine, range(3), DTYPES[precision])
    folder.mkdir(exist_ok=True)
    save_states(engine, folder)
    weights = [gather_saved_weights(engine, is_main=True)]
    dist.barrier()
    fresh = started(stage, precision, name, weights[0])
    load_states(fresh, folder)
    for parameter_name, parameter in fresh.model.module.named_parameters():  # type: ignore[union-attr, operator]
        assert has_master_weight(parameter) == (precision == "bf16")
        if has_master_weight(parameter):
            set_master_weight(parameter, weights[0][parameter_name])
    for each in (engine, fresh):
        steps(each, range(3, 6), DTYPES[precision])
    expected, actual = gather_saved_weights(engine, is_main=True), gather_saved_weights(fresh, is_main=True)
    assert all(value.dtype == torch.float32 for value in expected.values())
    assert any(not torch.equal(weights[0][key], expected[key]) for key in expected)
    for key, value in expected.items():
        assert torch.equal(value, actual[key]), (stage, precision, name, key)


def rank_main(rank: int, folder: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), RANKS, rank)
    for stage, precision, name in CASES:
        goes_on(stage, precision, name, Path(folder) / f"{stage} {precision} {name}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks saved; they have compared already what went on."""
    place = tmp_path_factory.mktemp("zero")
    mp.spawn(rank_main, (str(place),), nprocs=RANKS)
    return place


def stored(place: Path) -> dict[str, torch.Tensor]:
    files = [load_file(file) for file in place.glob("optimizer-*.safetensors")]
    return {key: value for file in files for key, value in file.items()}


@pytest.mark.parametrize(("stage", "precision", "name"), CASES[:3], ids=["zero1", "zero2", "zero3"])
def test_a_run_goes_on_bit_for_bit_and_its_files_are_those_of_torch(
    folder: Path, stage: int, precision: str, name: str
) -> None:
    model = Layers()
    optimizer = make_optimizer(model, recipe(name))
    model(torch.ones(1, 33)).sum().backward()
    optimizer.step()
    accelerator: Any = SimpleNamespace(scaler=None, unwrap_model=lambda model: model)
    engine = Engine(accelerator, model, optimizer, gradient_factor=1.0, clip_norm=None, control=None)
    save_states(engine, folder)
    own, torchs = (
        {key: value for file in place.glob("optimizer-*.safetensors") for key, value in load_file(file).items()}
        for place in (folder / f"{stage} {precision} {name}", folder)
    )
    assert {key: (value.shape, value.dtype) for key, value in own.items()} == {
        key: (value.shape, value.dtype) for key, value in torchs.items()
    }
    assert all(own[f"{parameter}/step"] == 3 for parameter, _ in model.named_parameters())
    load_states(engine, folder / f"{stage} {precision} {name}")
    (loaded,) = {float(state["step"]) for state in optimizer.state.values()}
    assert loaded == 3
    assert all(torch.equal(optimizer.state[p]["exp_avg"], own[f"{n}/exp_avg"]) for n, p in model.named_parameters())


def test_states_in_8_bits_are_stored_by_rank(folder: Path) -> None:
    files = (folder / "2 bf16 adamw_8bit").glob("optimizer-*.safetensors")
    keys = {key for file in files for key in load_file(file)}
    assert {"rank 0 of 2/group 1/state1", "rank 1 of 2/group 0/absmax1"} <= keys
    assert not any(key.startswith("wide") for key in keys)
