"""Adapters that are made unit by unit start like those that peft adds to a whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from packhorse.model.load import ModelRequest, Quantization, load_model, open_model
from packhorse.model.methods.attach import Start, attach
from packhorse.recipe.methods import (
    FullMethod,
    Ia3Method,
    LoraMethod,
    Method,
    PartialMethod,
    PrefixTuningMethod,
    PromptTuningMethod,
    QloraMethod,
)
from packhorse.train.engine.sharding import Placement
from packhorse.train.loading import can_stream, place_streamed

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CPU = torch.device("cpu")
METHODS: dict[str, Method] = {
    "full": FullMethod(),
    "partial": PartialMethod(last_layers=1),
    "lora": LoraMethod(rank=4),
    "lora gaussian": LoraMethod(rank=4, initialization="gaussian"),
    "lora orthogonal": LoraMethod(rank=4, initialization="orthogonal"),
    "dora": LoraMethod(rank=4, dora=True),
    "dora orthogonal": LoraMethod(rank=4, dora=True, initialization="orthogonal"),
    "lora and whole ends": LoraMethod(rank=4, train_also=["lm_head", "embed_tokens"]),
    "qlora": QloraMethod(rank=4),
    "ia3": Ia3Method(),
    "prompt": PromptTuningMethod(virtual_tokens=4),
    "prefix": PrefixTuningMethod(virtual_tokens=4),
}


def as_bytes(tensor: Tensor) -> Tensor:
    """4-bit weights may be stored as floats that are NaN."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("name", METHODS)
def test_streamed_start_is_that_of_a_whole_model(name: str, tied: bool, tmp_path: Path) -> None:
    method = METHODS[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    request = ModelRequest(
        source=str(tmp_path), revision=None, config=None, seed=0, dtype=torch.bfloat16, attention="sdpa",
        quantization=Quantization("nf4", True, torch.float32) if isinstance(method, QloraMethod) else None,
        trust_remote_code=False, device=CPU,
    )  # fmt: skip

    def attached(base: PreTrainedModel) -> nn.Module:
        return attach(base, method, Start(seed=1))

    expected = dict(attached(load_model(request, 90)).named_parameters())
    weights = open_model(request, 90)
    assert can_stream(method)
    assert weights is not None
    found = dict(place_streamed(weights, attached, Placement(), method, 1, CPU, lambda: None).named_parameters())
    assert found.keys() == expected.keys()  # a copy that is no longer tied would be one more
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].requires_grad == value.requires_grad, key
        assert torch.equal(as_bytes(found[key]), as_bytes(value)), key


@pytest.mark.parametrize(
    "method",
    [
        LoraMethod(initialization="pissa"),
        LoraMethod(initialization="olora"),
        QloraMethod(initialization="loftq"),
        QloraMethod(dora=True),
    ],
    ids=["pissa", "olora", "loftq", "dora on quantised weights"],
)
def test_starts_that_are_made_from_weights_are_not_streamed(method: Method) -> None:
    """On the meta device they would start from nothing."""
    assert not can_stream(method)
