"""A model filled unit by unit is the one that transformers loads whole; a checkpoint with gaps is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

from packhorse.errors import UserError
from packhorse.model.load import ModelRequest, Quantization, load_model, open_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2, tied, with biases": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=32, head_dim=16, num_experts_per_tok=2),
}
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save(config: PreTrainedConfig, folder: Path) -> Path:
    """A checkpoint in several files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def request(folder: Path, dtype: torch.dtype = torch.float32, nf4: bool = False) -> ModelRequest:
    return ModelRequest(
        source=str(folder), revision=None, config=None, seed=0, dtype=dtype, attention="sdpa",
        quantization=Quantization("nf4", True, torch.float32) if nf4 else None, trust_remote_code=False,
        device=torch.device("cpu"),
    )  # fmt: skip


def streamed(of: ModelRequest) -> PreTrainedModel:
    weights = open_model(of, 90)
    assert weights is not None
    for unit in weights.units:
        weights.fill(unit)
    weights.fill_rest()
    return weights.model.eval()


def as_bytes(tensor: Tensor) -> Tensor:
    """4-bit weights may be stored as floats that are NaN."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_from_pretrained_bit_for_bit(family: str, dtype: str, nf4: bool, tmp_path: Path) -> None:
    save(FAMILIES[family], tmp_path)
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=STORED[dtype],
    )  # fmt: skip
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=STORED[dtype], attn_implementation="sdpa", quantization_config=bits if nf4 else None
    ).eval()
    model = streamed(request(tmp_path, STORED[dtype], nf4))
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in (*wanted.items(), *expected.named_buffers()):
        other = found[name] if name in found else model.get_buffer(name)
        assert other.dtype == value.dtype, name
        assert torch.equal(as_bytes(other), as_bytes(value)), name
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == FAMILIES[family].tie_word_embeddings
    if not nf4:  # on some CPUs bitsandbytes computes otherwise in from_pretrained's model: see _prepare_quantized
        ids = torch.arange(12)[None]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected(ids).logits)


def test_fused_experts_are_saved_under_the_names_that_they_came_with(tmp_path: Path) -> None:
    save(FAMILIES["mixtral"], tmp_path / "given")
    streamed(request(tmp_path / "given")).save_pretrained(tmp_path / "saved")
    given, saved = (
        {name: value for file in (tmp_path / which).glob("*.safetensors") for name, value in load_file(file).items()}
        for which in ("given", "saved")
    )
    assert given.keys() == saved.keys()
    assert all(torch.equal(given[name], saved[name]) for name in given)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrites a checkpoint as one file, edited."""
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without_head(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"]


def without_an_expert(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name and ".experts." in name]:
        del tensors[name]


def with_a_stranger(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)


def cut_down(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(100, 64)


@pytest.mark.parametrize(
    ("family", "edit", "message"),
    [
        ("llama", without_head, r"lacks lm_head\.weight\."),
        ("mixtral", without_an_expert, r"lacks model\.layers\.1\.mlp\.experts\."),
        ("llama", with_a_stranger, r"holds model\.layers\.0\.self_attn\.q_norm\.weight, which"),
        ("llama", cut_down, r"up_proj\.weight is \[100, 64\] in the checkpoint .* and \[128, 64\] in the model"),
    ],
    ids=["no head", "no experts", "a stranger", "another shape"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    family: str, edit: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    """transformers only warns of the first three, and loads a random head or drops weights."""
    change(save(FAMILIES[family], tmp_path), edit)
    with pytest.raises(UserError, match=message):
        streamed(request(tmp_path))


def test_evaluation_too_refuses_a_model_without_its_head(tmp_path: Path) -> None:
    change(save(FAMILIES["llama"], tmp_path), without_head)
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        load_model(request(tmp_path), 90)


def test_of_tied_weights_one_is_enough(tmp_path: Path) -> None:
    """Checkpoints of tied models hold the embedding, older ones the head as well."""
    folder = save(FAMILIES["qwen2, tied, with biases"], tmp_path)

    def doubled(tensors: dict[str, Tensor]) -> None:
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change(folder, doubled)
    model = streamed(request(folder))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_generation_settings_come_with_the_model(tmp_path: Path) -> None:
    save(FAMILIES["llama"], tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "top_k": 7, "do_sample": True}))
    assert streamed(request(tmp_path)).generation_config.top_k == 7
