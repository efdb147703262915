"""Applies any method to a model: freezes what it does not train, and adds what it trains.

full           every weight
partial        some of the weights
lora, qlora    low-rank adapters (lora.py)
ia3            factors on channels (ia3.py)
prompt_tuning, prefix_tuning
               embeddings, or keys and values, before each document (prompts.py)
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

import torch
from torch import nn

from packhorse.model.parameters import names_of_model
from packhorse.model_spec.method_names import chosen_weights
from packhorse.recipe.methods import FullMethod, LoraMethod, Method, PartialMethod

# Imported by name when needed: peft takes six CPU seconds to import, which full fine-tuning never needs.
PACKAGE: Final = "packhorse.model.methods"
ADAPTERS: Final = {
    "lora": "lora",
    "qlora": "lora",
    "ia3": "ia3",
    "prompt_tuning": "prompts",
    "prefix_tuning": "prompts",
}


@dataclass(frozen=True)
class Start:
    """What an adapter starts from, besides its method.

    Attributes:
        seed: Seed of random values, equal on every rank.
        tokenizer: Folder of the tokenizer for the text of `prompt_tuning`.
        new_token_ids: Rows of the embedding that are trained with low-rank adapters.
        source: Folder of the base's weights, which LoftQ compares with the quantised ones.
        resumed: Trained adapter weights will overwrite the start.
    """

    seed: int = 0
    tokenizer: Path | None = None
    new_token_ids: tuple[int, ...] = ()
    source: Path | None = None
    resumed: bool = False


def attach(model: nn.Module, method: Method, start: Start, autocast: bool = False) -> nn.Module:
    """Freeze what the method does not train, and add what it trains.

    Plain LoRA (`initialization` default, gaussian or orthogonal, no DoRA, no new tokens) reads no weight, and accepts
    a model on the meta device: its adapters are then on meta too, until `lora.make_adapters` creates them.

    Args:
        model: The base, before it is sharded.
        method: Method of the recipe.
        start: What an adapter starts from.
        autocast: Whether autocast rounds the inputs of products; LoRA then does not cast them to float32 before.

    Returns:
        The model itself, or a peft model around it. Everything that is trained is float32.

    Raises:
        UserError: The method names modules or weights that this model does not have, or does not work on it.
    """
    if isinstance(method, FullMethod):
        return model
    if isinstance(method, PartialMethod):
        chosen = chosen_weights(method, names_of_model(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        return model
    module = import_module(f"{PACKAGE}.{ADAPTERS[method.kind]}")
    adapted: nn.Module = module.attach(model, method, start)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            # peft makes its own matrices float32; copies of whole modules and rows of new tokens have the base's dtype.
            parameter.data = parameter.data.float()
    if autocast and isinstance(method, LoraMethod) and not method.dora:
        module.keep_input_dtype(adapted)
    return adapted


def is_adapted(model: nn.Module) -> bool:
    """Return whether the model is a peft model around a base."""
    return hasattr(model, "peft_config")
