"""What a checkpoint takes, on disk and on the host, is what was counted before anything was loaded."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from packhorse.estimate import checkpoint_size as saved
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.checkpoints.pinned_slabs import pinned_bytes, slabs_bytes
from packhorse.train.checkpoint import saved_tensor
from packhorse.train.checkpoint.model_files import model_files
from packhorse.train.checkpoint.snapshot import HostBuffers
from saving_cases import SMALL, Trainer, buffers_of, make_run, save_at, weights_of

# Some matrices of 4,096 numbers and more, from which on bitsandbytes keeps 8 bits of each.
WIDE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
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
    assert 0.96 < saved.space_of(plan, held).each_bytes / taken < 1.0, "headers of safetensors are the rest"
    assert saved.buffers_bytes(plan, held) == pytest.approx(buffers_of(trainer), rel=2e-3)


def plain(key: str, tensor: torch.Tensor) -> saved_tensor.SavedTensor:
    whole = partial(saved_tensor.held_whole, tensor)
    return saved_tensor.SavedTensor(key, tuple(tensor.shape), tensor.nbytes, whole)


@pytest.mark.parametrize("file_bytes", [2**32, 100_000], ids=["one file", "a file for each layer"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("world", [2, 3, 16])
def test_the_ranks_write_what_is_assigned_to_them(
    engine: str, world: int, file_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "FILE_BYTES", file_bytes)
    monkeypatch.setattr(saved_tensor, "MAX_FILE_BYTES", file_bytes)
    plan = make_run(tmp_path, 2, engine, make=False)
    plan = plan.model_copy(update={"topology": plan.topology.model_copy(update={"processes_per_node": world})})
    held = weights_of(plan, **WIDE)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **WIDE}))
    weights = [plain(name, value) for name, value in model.named_parameters()]
    loads = [0] * world
    dealt = saved_tensor.deal_files(model_files(model, weights, "model"), loads)
    states = [plain(str(at), torch.empty(each.shape)) for at, each in enumerate(saved.saved_states(plan, held))]
    dealt = [own + files for own, files in zip(dealt, saved_tensor.deal_states(states, loads), strict=True)]
    assert [[sum(each.bytes for each in file) for file in files] for files in saved._files_of_ranks(plan, held)] == [
        [file.num_bytes for file in files] for files in dealt
    ]


def test_pinned_memory_is_that_of_the_slabs_that_copies_lie_in(tmp_path: Path) -> None:
    plan = make_run(tmp_path)
    trainer = Trainer(plan, **WIDE)
    save_at(trainer, 2)
    held = weights_of(plan, **WIDE)
    pinned = plan.model_copy(update={"topology": plan.topology.model_copy(update={"device": "cuda"})})
    slabs = [len(memory) for memory in trainer.checkpoints._buffers._memory]
    assert all(size.bit_count() == 1 for size in slabs), "torch would round them up"
    assert saved.buffers_bytes(pinned, held) == sum(slabs)
    assert buffers_of(trainer) < sum(slabs) < 1.2 * buffers_of(trainer)


def test_copies_in_one_slab_do_not_touch_each_other() -> None:
    buffers = HostBuffers()
    sizes = [(3, 5), (700,), (1, 1), (64, 64), (0, 4), (2**18,)]
    tensors = {
        f"{dtype} {shape}": torch.randn(shape).to(dtype) for shape in sizes for dtype in (torch.float32, torch.bfloat16)
    }
    kept = {name: buffers.copy(name, tensor) for name, tensor in tensors.items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
    assert len(buffers._memory) < len(tensors), "they share slabs"
    storages = {room.untyped_storage().data_ptr() for room in kept.values() if room.numel()}
    assert len(storages) == len(tensors) - 2, "what writes files clones tensors of one storage"
    assert all(room.untyped_storage().nbytes() == room.nbytes for room in kept.values())


QWEN_7B = [(152064, 3584), *[(3584, 3584), (512, 3584), (512, 3584), (3584, 3584), *[(18944, 3584)] * 3] * 28]
"""Qwen2.5-7B's matrices but the last; its MLP's are just above a power of two."""


@pytest.mark.parametrize("ranks", [1, 8])
def test_little_is_rounded_up(ranks: int) -> None:
    weights = [4 * rows * columns // ranks for rows, columns in QWEN_7B]
    sizes = [*weights, *(size for size in weights for _ in range(2))]
    assert sum(map(pinned_bytes, sizes)) > 1.8 * sum(sizes)
    assert slabs_bytes(sizes) < 1.15 * sum(sizes)


def test_files_are_as_large_as_they_are_written() -> None:
    assert saved.FILE_BYTES == saved_tensor.MAX_FILE_BYTES
