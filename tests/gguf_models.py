"""Small models of each family whose weights are numbers of a fixed generator, in Hugging Face form."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, TokenType
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from packhorse.export.gguf.convert import Source, write_gguf
from packhorse.export.gguf.vocabulary import Vocabulary

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "vocab_size": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1 + 0.1 * at for at in range(8)],
    "long_factor": [1.5 + 0.2 * at for at in range(8)],
    "original_max_position_embeddings": 256,  # llama.cpp rounds its context up to 256
}
EXPERTS = {"num_experts_per_tok": 2}
QWEN_EXPERTS = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": True}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama, rope llama3": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama, rope linear": LlamaConfig(**SMALL, rope_parameters=LINEAR),
    "mistral, wide heads": MistralConfig(**SMALL, head_dim=32, sliding_window=None),
    "mixtral": MixtralConfig(**SMALL, **EXPERTS, num_local_experts=4),
    "qwen2, tied": Qwen2Config(**{**SMALL, "tie_word_embeddings": True}),
    "qwen2, yarn": Qwen2Config(**SMALL, rope_parameters=YARN),
    "qwen3, wide heads": Qwen3Config(**SMALL, head_dim=32),
    "qwen3 moe": Qwen3MoeConfig(**SMALL, **QWEN_EXPERTS, head_dim=32),
    "gemma3": Gemma3TextConfig(
        **{**SMALL, "tie_word_embeddings": True, "num_hidden_layers": 7},
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
    ),
    "phi3": Phi3Config(**SMALL, pad_token_id=0),
    "phi3, longrope": Phi3Config(
        **{**SMALL, "max_position_embeddings": 1024},
        pad_token_id=0,
        original_max_position_embeddings=256,
        rope_parameters=LONGROPE,
    ),
}


def write_model(config: PretrainedConfig, folder: Path) -> None:
    """Write config.json and safetensors files, with the same numbers on every machine."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    numbers = np.random.Philox(7)
    with torch.no_grad():
        for parameter in model.parameters():
            raw = numbers.random_raw(parameter.numel()).astype(np.float64) / 2**63 - 1  # from -1 to 1
            values = torch.from_numpy((0.2 * raw).astype(np.float32)).view_as(parameter)
            parameter.copy_(values if parameter.ndim > 1 else parameter + values)
    model.save_pretrained(folder)


WIDE: dict[str, Any] = {**SMALL, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8}
FOUR: dict[str, Any] = {**WIDE, "num_hidden_layers": 4}
QUANTIZED: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**WIDE),
    "tied": Qwen2Config(**{**WIDE, "tie_word_embeddings": True}),
    "rows of 320": LlamaConfig(**{**FOUR, "hidden_size": 320, "intermediate_size": 480}),
    "eight experts": MixtralConfig(**FOUR, **EXPERTS, num_local_experts=8),
    "fused qkv": Phi3Config(**WIDE, pad_token_id=0),
}
"""Models whose tensors get every type of llama.cpp's mix."""


SPECIAL = ("<unk>", "<s>", "</s>", "<|endoftext|>")
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
NUM_WORDS = SMALL["vocab_size"] - len(SPECIAL) - len(BYTES)
VOCABULARY = Vocabulary(
    model="llama",
    pre_tokenizer="default",
    tokens=(*SPECIAL, *BYTES, "a", *(f"word{at}" for at in range(NUM_WORDS - 1))),
    types=(
        TokenType.UNKNOWN,
        *[TokenType.CONTROL] * (len(SPECIAL) - 1),
        *[TokenType.BYTE] * len(BYTES),
        *[TokenType.NORMAL] * NUM_WORDS,
    ),
    merges=(),
    scores=tuple(float(-at) for at in range(SMALL["vocab_size"])),
    space_first=False,
    special={"bos": 1, "eos": 2, "unk": 0},
    chat_template=None,
)
"""Tokens of the small models; llama.cpp asks for the special ones of Phi 3."""


def f32_file(folder: Path) -> Path:
    """Write the model in a folder as an f32 GGUF file."""
    source = Source.open(folder)
    target = folder / "f32.gguf"
    write_gguf(source, VOCABULARY, "F32", target, {})
    return target


def hash_of(file: Path) -> str:
    """SHA-256 over name, type and bytes of each tensor of a GGUF file, in the order of names."""
    digest = hashlib.sha256()
    for tensor in sorted(GGUFReader(file).tensors, key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name} {tensor.tensor_type.name} ".encode())
        digest.update(np.ascontiguousarray(tensor.data).view(np.uint8).data)
    return digest.hexdigest()
