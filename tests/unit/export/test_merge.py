"""Merged models equal peft's own merge in fp32, and what would be the base or another model is refused."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from gguf_models import EXPERTS, FAMILIES, SMALL, write_model
from packhorse.errors import UserError
from packhorse.export.merge import merge as merge_module
from packhorse.export.merge.export import MergeRequest, export_merged
from packhorse.model.load import ModelRequest, Quantization, add_rows, load_model
from packhorse.run_folder.layout import MERGE_FILE

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it

ROWS = [[7 * at % 509 + 1 for at in range(40)], [11 * at % 509 + 1 for at in range(24)]]
CONFIGS = {
    "llama": FAMILIES["llama"],
    "qwen2": FAMILIES["qwen2, tied"],
    "gemma3": FAMILIES["gemma3"],
    "mixtral": MixtralConfig(**SMALL, **EXPERTS, num_local_experts=4),
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "v_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "new tokens": {"trainable_token_indices": {"embed_tokens": [510, 511]}},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{at}": at for at in range(514)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), eos_token="w2", bos_token="w1"
    )


def base_of(name: str, folder: Path) -> ModelRequest:
    write_model(CONFIGS[name], folder)
    return ModelRequest(str(folder), None, None, 0, torch.float32, "eager", None, False, torch.device("cpu"))


def adapted(base: ModelRequest, config: Any, folder: Path, scale: float = 0.05) -> Any:
    """peft's model with random weights in the adapter, which is also saved."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base.source, dtype=torch.float32, attn_implementation="eager")
    if base.new_tokens:
        add_rows(model, base.new_tokens, 514)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    return peft_model.eval()


def request(base: ModelRequest, folder: Path, tokenizer: Any, **changes: Any) -> MergeRequest:
    whole = MergeRequest(base, folder / "adapter", tokenizer, torch.float32, False, folder / "merged", ROWS)
    return replace(whole, **changes)


def merged(asked: MergeRequest) -> Any:
    export_merged(asked, lambda done, total: None)
    model, info = AutoModelForCausalLM.from_pretrained(asked.out, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values())
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_equals_pefts(name: str, method: str, tmp_path: Path, tokenizer: Any) -> None:
    base = base_of(name, tmp_path / "base")
    targets = ATTENTION if name == "mixtral" else LINEAR
    theirs = adapted(
        base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **METHODS[method]), tmp_path / "adapter"
    )
    ours = merged(request(base, tmp_path, tokenizer))
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-4
    expected = deepcopy(theirs).merge_and_unload().state_dict()
    for key, value in ours.state_dict().items():
        assert torch.allclose(value, expected[key], rtol=1e-6, atol=2e-7), key


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("name", "trained_whole", "tied"),
    [("llama", ["lm_head"], False), ("qwen2", ["lm_head"], False), ("qwen2", ["embed_tokens", "lm_head"], False)],
)
def test_modules_trained_whole_are_in_the_merge(
    name: str, trained_whole: list[str], tied: bool, tmp_path: Path, tokenizer: Any
) -> None:
    """A head that moves away from a tied embedding becomes a tensor beside it."""
    base = base_of(name, tmp_path / "base")
    theirs = adapted(base, LoraConfig(target_modules=ATTENTION, modules_to_save=trained_whole), tmp_path / "adapter")
    ours = merged(request(base, tmp_path, tokenizer))
    assert ours.config.tie_word_embeddings is tied
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-4


def test_rows_of_new_tokens_start_as_in_training(tmp_path: Path, tokenizer: Any) -> None:
    base = replace(base_of("llama", tmp_path / "base"), new_tokens={512: (3, 5), 513: (7,)})
    rows = {"embed_tokens": [512, 513], "lm_head": [512, 513]}
    theirs = adapted(base, LoraConfig(target_modules=ATTENTION, trainable_token_indices=rows), tmp_path / "adapter")
    ours = merged(request(base, tmp_path, tokenizer, rows=[[512, 4, 513, 9]]))
    assert ours.config.vocab_size == 514
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["experts", "ia3"])
def test_what_peft_merges_is_proven_too(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    base = base_of("mixtral" if kind == "experts" else "llama", tmp_path / "base")
    config = (
        LoraConfig(target_modules=ATTENTION, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
        if kind == "experts"
        else IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    theirs = adapted(base, config, tmp_path / "adapter")
    assert (logits(merged(request(base, tmp_path, tokenizer))) - logits(theirs)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_qlora_merges_into_what_training_saw(kind: Any, tmp_path: Path, tokenizer: Any) -> None:
    base = replace(base_of("llama", tmp_path / "base"), quantization=Quantization(kind, True, torch.float32))
    adapted(base, LoraConfig(target_modules=LINEAR), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(load_model(base, 512), str(tmp_path / "adapter")).eval()  # as training does
    expected = logits(theirs).log_softmax(-1)
    found = logits(merged(request(base, tmp_path, tokenizer))).log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert abs(divergence) < 1e-6
    plain = merged(request(base, tmp_path, tokenizer, unrounded=True, out=tmp_path / "plain"))
    elsewhere = logits(plain).log_softmax(-1)
    assert (expected.exp() * (expected - elsewhere)).sum(-1).mean() > 10 * abs(divergence)


def test_a_merge_in_16_bits_is_held_against_the_rounding_of_16_bits(tmp_path: Path, tokenizer: Any) -> None:
    base = base_of("llama", tmp_path / "base")
    adapted(base, LoraConfig(target_modules=LINEAR), tmp_path / "adapter")
    merged(request(base, tmp_path, tokenizer, dtype=torch.bfloat16))
    proof = json.loads((tmp_path / "merged" / MERGE_FILE).read_text())["proof"]
    assert 0 < proof["adapter_to_merged"] < proof["rounding_floor"] < proof["base_to_adapter"]


def test_an_update_that_rounding_swallows_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    base = base_of("llama", tmp_path / "base")
    adapted(base, LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter", scale=1e-4)
    with pytest.raises(UserError, match="rounding to bfloat16 swallows the update"):
        export_merged(request(base, tmp_path, tokenizer, dtype=torch.bfloat16), lambda *_: None)
    assert not (tmp_path / "merged").exists()


def rewrite(adapter: Path, change: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(dict(change(key, value) for key, value in load_file(file).items()), file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda key, value: (key.replace("base_model.model.", "model."), value),
            "does not begin with base_model.model.",
        ),
        (lambda key, value: (key, value * 0 if "lora_B" in key else value), "B matrices of the adapter in .* is zero"),
        (lambda key, value: (key, value * 0 if "layers.1.self_attn.q_proj.lora_B" in key else value), "by nothing"),
        (lambda key, value: (key.replace("layers.1", "layers.7"), value), "which .* does not have"),
    ],
)
def test_silent_failures_are_refused(change: Any, message: str, tmp_path: Path, tokenizer: Any) -> None:
    base = base_of("llama", tmp_path / "base")
    adapted(base, LoraConfig(target_modules=ATTENTION), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", change)
    with pytest.raises(UserError, match=message):
        export_merged(request(base, tmp_path, tokenizer), lambda *_: None)
    assert not (tmp_path / "merged").exists()


def test_a_base_of_which_a_shard_is_missing_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    base = base_of("llama", tmp_path / "base")
    adapted(base, LoraConfig(target_modules=ATTENTION), tmp_path / "adapter")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        export_merged(request(base, tmp_path, tokenizer), lambda *_: None)


def test_an_interrupted_merge_continues_with_the_next_file(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base.source)
    model.save_pretrained(base.source, max_shard_size="200kB")
    (tmp_path / "base" / "model.safetensors").unlink(missing_ok=True)
    theirs = adapted(base, LoraConfig(target_modules=LINEAR), tmp_path / "adapter")
    written: list[str] = []
    real = merge_module.write_safetensors

    def broken(file: Path, *words: Any) -> str:
        if len(written) == 2:
            file.write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(file.name)
        return real(file, *words)

    monkeypatch.setattr(merge_module, "write_safetensors", broken)
    with pytest.raises(KeyboardInterrupt):
        export_merged(request(base, tmp_path, tokenizer), lambda *_: None)
    assert not (tmp_path / "merged").exists()
    again: list[str] = []

    def whole(file: Path, *words: Any) -> str:
        again.append(file.name)
        return real(file, *words)

    monkeypatch.setattr(merge_module, "write_safetensors", whole)
    assert (logits(merged(request(base, tmp_path, tokenizer))) - logits(theirs)).abs().max() < 1e-4
    assert not set(written) & set(again)
    manifest = json.loads((tmp_path / "merged" / MERGE_FILE).read_text())
    assert len(manifest["change_by_weight"]) == 2 * len(LINEAR)
    assert manifest["files"].keys() == set(written) | set(again)


def test_an_interrupted_merge_of_another_adapter_or_type_is_not_continued(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the adapter before would be part of the new model, and of a large one not every layer is compared."""
    base = base_of("llama", tmp_path / "base")
    adapted(base, LoraConfig(target_modules=LINEAR), tmp_path / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "_write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_merged(request(base, tmp_path, tokenizer), lambda *_: None)
    theirs = adapted(base, LoraConfig(target_modules=ATTENTION), tmp_path / "adapter", scale=0.2)
    assert (logits(merged(request(base, tmp_path, tokenizer))) - logits(theirs)).abs().max() < 1e-4


def test_sizes_that_differ_end_before_weights_are_written(tmp_path: Path, tokenizer: Any) -> None:
    base = base_of("llama", tmp_path / "base")
    adapted(base, LoraConfig(target_modules=ATTENTION), tmp_path / "adapter")
    write_model(LlamaConfig(**{**SMALL, "num_hidden_layers": 1}), tmp_path / "base")
    with pytest.raises(UserError, match="does not have"):
        export_merged(request(base, tmp_path, tokenizer), lambda *_: None)
