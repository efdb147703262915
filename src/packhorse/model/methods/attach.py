"""Applies any method to a model: freezes what it does not train, and adds what it trains.

full           every weight
partial        some of the weights
lora, qlora    low-rank adapters (lora.py)
ia3            factors on channels (ia3.py)
prompt_tuning, prefix_tuning
               embeddings, or keys and values, before each document (prompts.py)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Final

import torch
from torch import nn

from packhorse.model.parameters import names_of_model
from packhorse.model_spec.method_names import chosen_weights
from packhorse.recipe.methods import FullMethod, Method, PartialMethod

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


def attach(model: nn.Module, method: Method, start: Start) -> nn.Module:
    """Freeze what the method does not train, and add what it trains.

    Plain LoRA (`initialization` default, gaussian or orthogonal, no DoRA, no new tokens) reads no weight, and accepts
    a model on the meta device: its adapters are then on meta too, until `lora.make_adapters` creates them.

    Args:
        model: The base, before it is sharded.
        method: Method of the recipe.
        start: What an adapter starts from.

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
    adapted: nn.Module = _module(ADAPTERS[method.kind]).attach(model, method, start)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            # peft makes its own matrices float32; copies of whole modules and rows of new tokens have the base's dtype.
            parameter.data = parameter.data.float()
    return adapted


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Load a saved adapter into one that was attached with the same method.

    Raises:
        UserError: The folder holds another adapter.
    """
    _module("adapter_files").load_adapter(model, folder)


def stored_adapter(model: nn.Module, folder: Path) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Return each trained parameter of a model from `attach` with its value in a saved adapter, on the CPU.

    Raises:
        UserError: The folder holds another adapter.
    """
    pairs: list[tuple[nn.Parameter, torch.Tensor]] = _module("adapter_files").stored_adapter(model, folder)
    return pairs


def with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Put a finished adapter on its base, which has rows for new tokens, for evaluation."""
    adapted: nn.Module = _module("adapter_files").with_adapter(model, folder)
    return adapted


def is_adapted(model: nn.Module) -> bool:
    """Return whether the model is a peft model around a base."""
    return hasattr(model, "peft_config")


def adapter_writer(model: nn.Module, weights: dict[str, torch.Tensor], for_base: bool) -> Callable[[Path], None]:
    """Return a function that writes an adapter in peft's form into a folder, which it creates if needed.

    The model is read now and not by the function, because a step may be changing it by then.

    Args:
        model: Model from `attach`.
        weights: Whole tensors of the trained parameters, by the model's names.
        for_base: Where the method changed the base at the start (PiSSA, OLoRA), write an adapter of twice the rank for
            the unchanged base; otherwise write the trained adapter unchanged.
    """
    writer: Callable[[Path], None] = _module("adapter_files").adapter_writer(model, weights, for_base)
    return writer


def _module(name: str) -> ModuleType:
    return import_module(f"{PACKAGE}.{name}")
