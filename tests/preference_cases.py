"""Small models and rows of ids for preference objectives, as a micro-batch without files."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from packhorse.data.packs.loader import MicroBatch, lay_out
from packhorse.model.attention import register_attention
from packhorse.train.objectives.documents import log_probabilities
from packhorse.train.objectives.token_loss import install_loss_head

CPU = torch.device("cpu")
CONFIG = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_labels": 1,
    "pad_token_id": 0,
}


class OneProcess:
    """What an objective asks of an engine."""

    device = CPU

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return values


def policy_of(kind: Any) -> tuple[nn.Module, nn.Module]:
    """A policy, and the reference that it has moved away from, with transformers' own attention."""
    torch.manual_seed(0)
    reference = kind.from_config(LlamaConfig(**CONFIG), attn_implementation="sdpa")
    policy = deepcopy(reference)
    with torch.no_grad():
        for mine, start in zip(policy.parameters(), reference.parameters(), strict=True):
            if mine.dim() > 1:
                start.mul_(8)  # fresh weights hardly look at other tokens
                mine.copy_(start + 0.02 * torch.randn_like(start))
    return policy, reference


def packed(model: nn.Module) -> nn.Module:
    """The same weights as Packhorse trains them."""
    ours: Any = deepcopy(model)
    ours.set_attn_implementation(register_attention("sdpa"))
    install_loss_head(ours)
    return ours  # type: ignore[no-any-return]


def micro_batch(documents: Sequence[list[int]], num_prompt: Sequence[int], **values: Tensor) -> MicroBatch:
    """Documents end to end, supervised after their prompts; a null pack where there is none."""
    ids = [np.array(each, np.uint16) for each in documents]
    masks = [
        (np.arange(len(each)) >= start).astype(np.uint8) for each, start in zip(documents, num_prompt, strict=True)
    ]
    made = lay_out(ids or [np.zeros(2, np.uint16)], masks or [np.zeros(2, np.uint8)])
    return replace(
        made,
        documents=torch.arange(len(ids)),
        values=torch.stack(list(values.values()), 1).double() if values else None,
        value_names=tuple(values),
    )


def reference_of(model: nn.Module, documents: Sequence[list[int]], num_prompt: Sequence[int]) -> Tensor:
    """Log-probability of each document's answer."""
    if not documents:
        return torch.zeros(0, dtype=torch.float64)
    with torch.no_grad():
        return log_probabilities(packed(model), micro_batch(documents, num_prompt), CPU, None).whole
