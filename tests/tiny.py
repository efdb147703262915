"""A recipe that trains in seconds: a tiny fresh Llama on the quickstart's own rows, fp32, trackers off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
        "tokenizer": "builtin:tokenizer",
    },
    "method": "full",
    "data": {"sources": [{"path": "builtin:core.messages.jsonl"}]},
    "batch": {"length": 256, "packs": 8},
    "optimizer": {"learning_rate": 1e-2},
    "schedule": {"name": "constant", "warmup_ratio": 0.0},
    "steps": 6,
    "precision": "fp32",
    "parallel": {"processes": 1},
    "evaluation": {"max_answered_rows": 8, "max_new_tokens": 16},
    "track": {"wandb": "off"},
}


def write_tiny(folder: Path, **sections: Any) -> Path:
    """Write the tiny recipe as `tiny.yaml`, with whole sections replaced."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **sections}, sort_keys=False), encoding="utf-8")
    return path
