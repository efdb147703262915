"""What a checkpoint takes, on disk and on the host, is what was counted before anything was loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from packhorse.plan.cost import saved
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.schema import Recipe
from packhorse.train import saving
from saving_cases import Trainer, buffers_of, make_run, save_at, weights_of

# Some matrices of 4,096 numbers and more, from which on bitsandbytes keeps 8 bits of each.
WIDE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}
OPTIMIZERS = ("adamw", "adamw_8bit", "lion", "lion_8bit", "muon", "adafactor")


def with_optimizer(plan: RunPlan, name: str) -> RunPlan:
    betas = {"betas": [0.9, 0.99]} if "lion" in name else {}
    fields = plan.recipe.model_dump() | {"optimizer": {"name": name, "learning_rate": 1e-3, **betas}}
    return plan.model_copy(update={"recipe": Recipe.model_validate_json(json.dumps(fields))})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_count_is_what_a_checkpoint_takes(name: str, tmp_path: Path) -> None:
    plan = with_optimizer(make_run(tmp_path), name)
    trainer = Trainer(plan, **WIDE)
    save_at(trainer, 2)
    (checkpoint,) = trainer.checkpoints.folder.iterdir()
    taken = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    held = weights_of(plan, **WIDE)
    assert 0.96 < saved.room_of(plan, held).each_bytes / taken < 1.0, "headers of safetensors are the rest"
    assert saved.buffers_bytes(plan, held) == pytest.approx(buffers_of(trainer), rel=2e-3)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("world", [2, 3, 16])
def test_the_ranks_write_what_was_dealt_to_them(engine: str, world: int, tmp_path: Path) -> None:
    plan = make_run(tmp_path, 2, engine, make=False)
    plan = plan.model_copy(update={"topology": plan.topology.model_copy(update={"processes_per_node": world})})
    held = weights_of(plan, **WIDE)
    loads = [sum(each.bytes for each in saved.saved_weights(plan, held)), *[0] * (world - 1)]
    states = [(str(at), torch.empty(each.shape)) for at, each in enumerate(saved.saved_states(plan, held))]
    dealt = list(saving.dealt(states, loads, {}))
    owned = saved._owned(plan, held)
    assert [sum(each.bytes for each in of_rank) for of_rank in owned] == [
        sum(value.nbytes for _, value, owner in dealt if owner == rank) for rank in range(world)
    ]


def test_memory_that_is_pinned_comes_in_powers_of_two(tmp_path: Path) -> None:
    plan = make_run(tmp_path, make=False)
    held = weights_of(plan, **WIDE)
    pinned = plan.model_copy(update={"topology": plan.topology.model_copy(update={"device": "cuda"})})
    tensors = [*saved.saved_weights(plan, held), *saved.saved_states(plan, held)]
    expected = sum(2 ** (each.bytes - 1).bit_length() for each in tensors)
    assert saved.buffers_bytes(pinned, held) == expected > saved.buffers_bytes(plan, held)


def test_files_are_as_large_as_they_are_written() -> None:
    assert saved.FILE_BYTES == saving.LARGEST_FILE_BYTES
