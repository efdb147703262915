"""Planned memory compared with what the real model, engine and optimizer hold: each part within 2 %."""

from __future__ import annotations

import json
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState

from measured_memory import (
    METHODS,
    Case,
    Figures,
    figures_of,
    make_extensions_free,
    measure_ranks,
    measured,
    measured_peak,
    plan_of,
    predicted,
    save_model,
    shape_of,
)
from packhorse.estimate import activations
from packhorse.estimate.gpus import find_gpu
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate
from packhorse.train.objectives import token_loss as objective

# Of peft, bitsandbytes and DeepSpeed, about names that torch has changed.
pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
NARROW = {**LLAMA, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 32},
    "phi3": {},
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
}
LENGTHS = [(64,), (200, 56), (512, 256, 256)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder, LLAMA)
    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Any:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def assert_close(found: Figures, planned: Figures) -> None:
    for part, size in found.items():
        assert planned[part] == pytest.approx(size, rel=0.02), part
    assert sum(planned.values()) == pytest.approx(sum(found.values()), rel=0.05)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "qlora int8"])
def test_one_process(llama: Path, method: str, precision: str, checkpointing: bool, lengths: tuple[int, ...]) -> None:
    parallel = {"checkpointing": checkpointing}
    plan = plan_of(llama, lengths, method=METHODS[method], precision=precision, parallel=parallel)
    assert_close(measured(plan, lengths), predicted(plan, llama, lengths))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("full", "lora", "qlora", "qlora int8")])
def test_every_method(llama: Path, method: str, precision: str) -> None:
    plan = plan_of(llama, (200, 56), method=METHODS[method], precision=precision)
    assert_close(measured(plan, (200, 56)), predicted(plan, llama, (200, 56)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, method: str, precision: str, tmp_path: Path) -> None:
    save_model(tmp_path, {**NARROW, **FAMILIES[family], "model_type": family})
    plan = plan_of(tmp_path, (100, 100), method=METHODS[method], precision=precision)
    assert_close(measured(plan, (100, 100)), predicted(plan, tmp_path, (100, 100)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapted_experts_are_added_up_whole(precision: str, tmp_path: Path) -> None:
    save_model(tmp_path, {**NARROW, **FAMILIES["mixtral"], "model_type": "mixtral"})
    method = {"kind": "lora", "experts": True, "dropout": 0.0}
    plan = plan_of(tmp_path, (100, 100), method=method, precision=precision)
    assert_close(measured(plan, (100, 100)), predicted(plan, tmp_path, (100, 100)))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion", "lion_8bit", "adafactor", "muon"])
def test_every_optimizer(llama: Path, name: str) -> None:
    betas = {"betas": [0.9, 0.99]} if "lion" in name else {}
    optimizer = {"name": name, "learning_rate": 1e-4, **betas}
    plan = plan_of(llama, (64,), method="full", precision="fp32", optimizer=optimizer)
    assert_close(measured(plan, (64,)), predicted(plan, llama, (64,)))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor", "muon"])
def test_trained_weights_in_16_bit_have_gradients_and_states_in_16_bit(llama: Path, name: str) -> None:
    optimizer, model = {"name": name, "learning_rate": 1e-4}, {"path": str(llama), "dtype": "bfloat16"}
    plan = plan_of(llama, (64,), method="full", precision="bf16", optimizer=optimizer, model=model)
    assert_close(measured(plan, (64,)), predicted(plan, llama, (64,)))


WIDE = {**LLAMA, "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704}


@pytest.mark.parametrize("checkpointing", [False, True, "selective"], ids=["kept", "recomputed", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_fullest_moment(method: str, precision: str, checkpointing: bool | str, tmp_path: Path) -> None:
    """Every tensor that exists at once, including gradients in transit; the plan is never more than 3 % too low."""
    save_model(tmp_path, WIDE)
    parallel = {"checkpointing": checkpointing}
    plan = plan_of(tmp_path, (1024,), method=METHODS[method], precision=precision, parallel=parallel)
    estimate = PlanEstimate(plan, EstimateInputs(shape_of(tmp_path), figures_of((1024,)), find_gpu("H100"))).memory
    # In float32 the loss makes its gradients in the forward pass, where its logits are not seen.
    phases = ("loss", "backward") if precision == "bf16" else ("backward",)
    planned = max(estimate.phase(name).bytes for name in phases)
    found = measured_peak(plan, (1024,))
    print(f"{method} {precision} {checkpointing}: {planned:,} of {found:,}")
    assert 0.97 * found < planned < 1.06 * found


# ZeRO-3 last: DeepSpeed leaves its own linear function in torch, for the rest of the process.
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SOME: list[Case] = [
    *((engine, "full", "bf16") for engine in ENGINES),
    ("zero2", "qlora int8", "bf16"),
    *(("fsdp2", method, "bf16") for method in ("qlora", "qlora dora with dropout")),
    *(("zero3", method, "bf16") for method in ("lora", "qlora", "dora with dropout")),
]
QUANTIZED = ("qlora", "qlora int8", "qlora dora with dropout")
REFUSED = [("fsdp2", "qlora int8"), ("zero3", "qlora int8"), ("zero3", "qlora dora with dropout")]
OTHERS: list[Case] = [
    (engine, method, precision)
    for engine in ENGINES
    for method in ("full", "lora", "dora", "dora with dropout", *QUANTIZED)
    for precision in ("fp32", "bf16")
    if (engine, method) not in REFUSED
]


@pytest.mark.parametrize("cases", [SOME, pytest.param(OTHERS, marks=pytest.mark.matrix)], ids=["some", "all"])
def test_two_processes(llama: Path, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank holds its share, and leaves to the backward pass what the plan counts and no gathered weight more."""
    (tmp_path / "model").symlink_to(llama)
    make_extensions_free()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    mp.spawn(measure_ranks, (2, str(tmp_path), free_ports(len(cases)), cases, [200, 56]), nprocs=2)
    results = json.loads((tmp_path / "measured.json").read_text(encoding="utf-8"))
    assert len(results) == len(cases)
    for case, (found, planned) in zip(cases, results, strict=True):
        print(case, {part: f"{planned[part]:,} of {size:,}" for part, size in found.items()})
        assert_close(found, planned)


def free_ports(count: int) -> list[int]:
    """Held all at once, so that none is found twice."""
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_works_in_chunks_of_the_size_that_the_plan_knows(
    device: str, is_trained: bool, dtype: torch.dtype
) -> None:
    planned = activations.chunk_tokens(device == "cuda", dtype.itemsize, is_trained)
    assert planned == objective.chunk_tokens(device, dtype, is_trained)
