"""What the plan says of a GPU's memory, held against what torch's allocator counts; needs a card of 24 GB."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peak_memory import Case, cases_for, measure, plan_of

NUM_GPUS = torch.cuda.device_count()
GPUS = tuple(torch.cuda.get_device_name(index) for index in range(NUM_GPUS))
TINY = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.gpu
@pytest.mark.skipif(NUM_GPUS == 0, reason="no GPU here")
@pytest.mark.parametrize("case", cases_for(NUM_GPUS), ids=lambda case: case.name)
def test_peak_of_the_allocator(case: Case, folder: Path) -> None:
    found = measure(case, folder, GPUS)
    print(" | ".join(found.row), found.phases)
    assert -0.03 <= found.gap <= 0.05


def test_twelve_cases_fit_a_card_of_24_gb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the plan has them, on GPUs that are only named; the models are not made."""
    monkeypatch.setattr("peak_memory.save_model", lambda *_: None)
    cases = cases_for(2)
    assert len([case for case in cases if case.processes == 1]) >= 12
    for case in cases:
        _, estimate = plan_of(case, folder / "named", ("NVIDIA L4",) * case.processes)
        assert estimate.required_bytes < 22 * 2**30, case.name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_same_on_a_cpu(method: str, folder: Path) -> None:
    """All but the reading of CUDA's allocator, in place of which tensors are counted as operators make them."""
    case = Case(f"cpu, {method}", TINY, method, 1024, checkpointing=True)
    found = measure(case, folder, ())
    assert set(found.phases) >= {"load", "forward", "backward", "optimizer", "evaluate"}
    print(found.row, found.phases, {phase.name: phase.bytes for phase in found.estimate.phases})
    assert -0.03 <= found.gap <= 0.06
