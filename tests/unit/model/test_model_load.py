"""Weights in four bits, as bitsandbytes stores them on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from packhorse.model.load import ModelRequest, Quantization, load_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model whose width of 88 is no multiple of the block of 64 weights that share a scale."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=88, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_evaluation_leaves_weights_in_four_bits_as_they_were(saved: Path) -> None:
    request = ModelRequest(
        source=str(saved), revision=None, config=None, seed=0, dtype=torch.float32, attention="eager",
        quantization=Quantization("nf4", True, torch.float32), trust_remote_code=False, device=torch.device("cpu"),
    )  # fmt: skip
    model = load_model(request, vocab_size=64)
    ids = torch.arange(12)[None]
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    in_training = model.train()(ids).logits
    with torch.no_grad():
        first, second = (model.eval()(ids).logits for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, in_training, atol=1e-6, rtol=1e-6)
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name]), name
