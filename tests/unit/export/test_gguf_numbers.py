"""GGUF files of each family: llama.cpp computes from them what transformers computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Qwen2Config

from gguf_models import FAMILIES, QUANTIZED, VOCABULARY, f32_file, hash_of, write_model
from packhorse.errors import UserError
from packhorse.export.gguf import families
from packhorse.export.gguf.convert import Source, write_gguf
from packhorse.export.gguf.families import family_of
from packhorse.export.gguf.file_types import FILE_TYPES
from packhorse.export.gguf.prove import prove_numbers

HASHES = json.loads((Path(__file__).parent / "gguf_hashes.json").read_text())
ROWS = [[7 * at % 509 + 3 for at in range(60)], [11 * at % 509 + 3 for at in range(24)]]


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    write_model(FAMILIES[name], tmp_path)
    source = Source.open(tmp_path)
    bound = 5e-3 if name == "gemma3" else 5e-5  # ten times sharper than what users' models are held to
    proof = prove_numbers(f32_file(tmp_path), source, ROWS, source.config.num_hidden_layers, bound)
    assert proof.num_positions >= 40


def test_a_tensor_that_is_read_differently_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the interleaving of q and k the file loads and talks, and is another model."""
    write_model(FAMILIES["llama"], tmp_path)
    source = Source.open(tmp_path)
    broken = replace(family_of(source.config), change=lambda _, weights, __: weights)
    monkeypatch.setitem(families.FAMILIES, "LlamaForCausalLM", broken)
    with pytest.raises(UserError, match=r"log-probabilities of llama.cpp and transformers differ by"):
        prove_numbers(f32_file(tmp_path), source, ROWS, 2, broken.bound)


def test_the_first_layers_stand_for_a_large_model(tmp_path: Path) -> None:
    write_model(FAMILIES["gemma3"], tmp_path)
    source = Source.open(tmp_path)
    file = tmp_path / "first.gguf"
    write_gguf(source, VOCABULARY, "F32", file, {}, num_layers=6)
    assert prove_numbers(file, source, ROWS, 6, 5e-3).num_layers == 6


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_type_has_the_bytes_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """tools/gguf_hashes.py made the hashes with llama.cpp's `llama_model_quantize`."""
    write_model(QUANTIZED[name], tmp_path)
    source = Source.open(tmp_path)
    file = tmp_path / "ours.gguf"
    found = {}
    for file_type in FILE_TYPES:
        if file_type != "F32":
            write_gguf(source, VOCABULARY, file_type, file, {})
            found[file_type] = hash_of(file)
    assert found == HASHES[name]


def test_what_llama_cpp_computes_differently_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    for change, message in (
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "architecture Qwen2MoeForCausalLM cannot be written as GGUF"),
        ({"architectures": ["Qwen2ForCausalLM"], "hidden_act": "relu"}, "its activation is relu"),
    ):
        Qwen2Config(**change).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=message):
            Source.open(tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    write_model(FAMILIES["llama"], tmp_path)
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="has no model-00002-of-00002.safetensors"):
        Source.open(tmp_path).tensors()
