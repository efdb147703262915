"""Files of weights are read again: what is missing, empty, cut, of another type or no number is no result."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from packhorse.errors import UserError
from packhorse.train.checkpoint.model_files import index_of, model_files
from packhorse.train.checkpoint.saved_tensor import SavedTensor, deal_files, gather_files, held_whole
from packhorse.train.checkpoint.verify_weights import verify_weights
from packhorse.train.checkpoint.weights import adapter_files_writer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}
NORM = "model.norm.weight"


def tied_llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))


def mixtral() -> nn.Module:
    """Its experts are fused in the model, and single in its files."""
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=2))


def held(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def write_model(model: Any, folder: Path, dtype: torch.dtype | None = None, ranks: int = 1) -> list[int]:
    """Write each rank's files, one rank after another, and the index; return how many each has written."""
    weights = [
        SavedTensor(name, tuple(value.shape), value.nbytes, partial(held_whole, value))
        for name, value in held(model).items()
    ]
    files = model_files(model, weights, ".", dtype)
    dealt = deal_files(files, [0] * ranks)
    for rank in range(ranks):

        def fetch(tensor: SavedTensor, owner: int, own: int = rank) -> Tensor | None:
            with tensor.whole() as value:
                return value.to(dtype or value.dtype) if owner == own else None

        for file, tensors in gather_files(dealt, rank, fetch):
            file.write(folder / file.name, tensors)
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(index_of(model, files, dtype))
    return [len(own) for own in dealt]


@pytest.mark.parametrize("make", [tied_llama, mixtral], ids=["tied", "experts"])
def test_files_of_several_ranks_load_with_transformers(
    make: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are cut between layers: what is fused, such as experts, is written whole."""
    monkeypatch.setattr("packhorse.train.checkpoint.saved_tensor.MAX_FILE_BYTES", 9_000)
    monkeypatch.setitem(SHAPE, "num_hidden_layers", 3)
    model = make()
    assert min(write_model(model, tmp_path, ranks=3)) > 0
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in held(model).values())
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    layers = [{".".join(name.split(".")[:3]) for name in load_file(tmp_path / file)} for file in files]
    for number in range(3):
        assert sum(f"model.layers.{number}" in names for names in layers) == 1
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    expected = held(model)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as it is", "bf16"])
@pytest.mark.parametrize("make", [tied_llama, mixtral])
def test_a_model_as_it_was_written_passes(
    make: Callable[[], nn.Module], dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model = make()
    write_model(model, tmp_path, dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype or torch.float32}
    assert sum(value.numel() for value in stored.values()) == sum(value.numel() for value in model.parameters())


def broken_missing(tensors: dict[str, Tensor]) -> None:
    del tensors[NORM]


def broken_empty(tensors: dict[str, Tensor]) -> None:
    tensors[NORM] = torch.zeros(0)


def broken_shape(tensors: dict[str, Tensor]) -> None:
    tensors[NORM] = tensors[NORM][:16]


def broken_number(tensors: dict[str, Tensor]) -> None:
    tensors[NORM][3] = torch.nan


def broken_type(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: value.half() for name, value in tensors.items()})


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (broken_missing, "tensors, and the model has 11; model.norm.weight is missing"),
        (broken_empty, "model.norm.weight in .* has 0 elements"),
        (broken_shape, r"has shape \(16,\), and \(32,\) in the model"),
        (broken_number, "has 1 of 32 numbers that are not finite"),
        (broken_type, "bytes of weights instead of"),
    ],
    ids=["missing", "empty", "cut", "not a number", "another type"],
)
def test_a_damaged_file_is_refused(damage: Callable[[dict[str, Tensor]], None], fact: str, tmp_path: Path) -> None:
    model = tied_llama()
    write_model(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=fact):
        verify_weights(tmp_path, held(model), model, None)


def test_an_adapter_that_lost_a_matrix_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tied_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    adapter_files_writer(model, trained)(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="bytes of weights, and .* were trained"):
        verify_weights(tmp_path, trained, model, None)


def test_an_adapter_whose_b_matrices_never_left_zero_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tied_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    adapter_files_writer(model, trained)(tmp_path / "before")  # as it is drawn, B is zero
    with pytest.raises(UserError, match="each of 2 B matrices of the adapter in .* is zero after a step"):
        adapter_files_writer(model, trained, was_stepped=True)(tmp_path / "after")
    next(value for name, value in trained.items() if "lora_B" in name)[0, 0] = 1e-6
    adapter_files_writer(model, trained, was_stepped=True)(tmp_path / "moved")
