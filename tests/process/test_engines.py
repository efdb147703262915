"""Sharded runs that go on from a checkpoint: the same curve and the same weights, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from cli import curve
from packhorse.plan.run_plan import write_plan
from packhorse.run_folder.folder import open_run
from packhorse.run_folder.status import read_status, write_status
from ranks import to_the_end, trained
from tiny import TINY, write_tiny

KEPT = {"every_steps": 3}


def resumed_in_the_middle(run: Path) -> Path:
    """A copy of a finished run that was stopped at its first checkpoint, gone on with."""
    first, last = sorted((run / "checkpoints").glob("step-*"))
    copy = run.with_name(f"{run.name}-again")
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / last.name)
    for result in ("model", "adapter"):
        shutil.rmtree(copy / result, ignore_errors=True)
    status = read_status(copy)
    assert status is not None
    write_status(copy, status.model_copy(update={"state": "stopped", "step": int(first.name[-6:])}))
    write_plan(open_run(str(copy)), copy)
    to_the_end(copy, attempt=2)
    return copy


def same(run: Path, again: Path, weights: str) -> bool:
    assert curve(run) == curve(again)
    assert curve(run, "train/grad_norm") == curve(again, "train/grad_norm")
    expected, actual = load_file(run / weights), load_file(again / weights)
    return expected.keys() == actual.keys() and all(torch.equal(expected[name], actual[name]) for name in expected)


def write_base(folder: Path) -> dict[str, str]:
    """A base model for adapters, as the recipe's `model`; its widths are 64 at least, as blocks of 64 are quantised."""
    shape = {key: value for key, value in TINY["model"]["config"].items() if key != "model_type"}
    torch.manual_seed(0)
    fields = {**shape, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 2048}
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(folder / "base")
    return {"path": str(folder / "base"), "tokenizer": "builtin:tokenizer"}


def test_two_copies_of_the_weights_on_four_processes(tmp_path: Path) -> None:
    """hsdp, a mesh of 2 x 2."""
    words = ("parallel.engine=hsdp", "parallel.processes=4", "parallel.shard_group=2")
    run = trained(write_tiny(tmp_path, checkpoint=KEPT), "tiny", *words)
    assert same(run, resumed_in_the_middle(run), "model/model.safetensors")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_beside_a_quantised_base_that_is_sharded(tmp_path: Path) -> None:
    """qlora under zero3: accelerate's own way of saving and loading fails on quantised weights."""
    recipe = write_tiny(
        tmp_path,
        model=write_base(tmp_path),
        method={"kind": "qlora", "rank": 4},
        checkpoint=KEPT,
        parallel={"processes": 2, "engine": "zero3"},
    )
    run = trained(recipe, "tiny")
    assert same(run, resumed_in_the_middle(run), "adapter/adapter_model.safetensors")
    assert curve(run)[-1] < curve(run)[0]


@pytest.mark.parametrize(
    ("engine", "method", "weights"),
    [("zero3", "full", "model/model.safetensors"), ("zero1", "lora", "adapter/adapter_model.safetensors")],
    ids=["zero3 full", "zero1 lora"],
)
def test_bf16_under_zero_goes_on_from_float32_weights(engine: str, method: str, weights: str, tmp_path: Path) -> None:
    """DeepSpeed would make its float32 weights from rounded ones; with accumulation."""
    words = (f"parallel.engine={engine}", "parallel.processes=2", "batch.micro=1", f"method={method}", "precision=bf16")
    recipe = write_tiny(tmp_path, checkpoint=KEPT, evaluation={"max_answered_rows": 0}, model=write_base(tmp_path))
    run = trained(recipe, "tiny", *words)
    kept = f"checkpoints/step-000006/{weights}"
    assert {value.dtype for value in load_file(run / kept).values()} == {torch.float32}
    assert same(run, resumed_in_the_middle(run), kept)
