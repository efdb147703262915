"""One entry to every method: the model goes in, and comes out with what is trained set apart from what is not.

full           every weight
partial        some of the weights (partial.py)
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

from packhorse.model.methods.partial import freeze_others
from packhorse.recipe.methods import FullMethod, Method, PartialMethod

# By name, and only when they are asked for: peft takes six CPU seconds to import, which full fine-tuning never needs.
ROOM: Final = "packhorse.model.methods"
ADAPTERS: Final = {
    "lora": "lora",
    "qlora": "lora",
    "ia3": "ia3",
    "prompt_tuning": "prompts",
    "prefix_tuning": "prompts",
}


@dataclass(frozen=True)
class Start:
    """What an adapter starts from beside its method.

    Attributes:
        seed: Of what is drawn at random; every rank draws the same.
        tokenizer: Folder that the text of `prompt_tuning` is cut with.
        new_token_ids: Rows of the embedding that are trained beside low-rank adapters.
        source: Folder of the base's own weights, which LoftQ compares the quantised ones with.
        resumed: Trained adapter weights will be loaded over what is drawn.
    """

    seed: int = 0
    tokenizer: Path | None = None
    new_token_ids: tuple[int, ...] = ()
    source: Path | None = None
    resumed: bool = False


def attach(model: nn.Module, method: Method, start: Start) -> nn.Module:
    """Freezes what the method does not train and adds what it trains.

    Plain LoRA (`initialization` default, gaussian or orthogonal, no DoRA, no new tokens) reads no weight, and takes
    a model on the meta device: its adapters then lie there too, to be drawn by `lora.draw_adapter` once they are real.

    Args:
        model: The base, before it is sharded.
        method: Of the recipe.
        start: What an adapter starts from.

    Returns:
        The model itself, or a peft model around it. Everything that is trained is float32.

    Raises:
        UserError: The method names modules or weights that this model does not have, or cannot be done on it.
    """
    if isinstance(method, FullMethod):
        return model
    if isinstance(method, PartialMethod):
        freeze_others(model, method)
        return model
    adapted: nn.Module = _module(ADAPTERS[method.kind]).attach(model, method, start)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            # peft lifts its own matrices; copies of whole modules and rows of new tokens come in the base's type.
            parameter.data = parameter.data.float()
    return adapted


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Loads a saved adapter over one that was attached with the same method.

    Raises:
        UserError: The folder holds another adapter.
    """
    _module("saved").load_adapter(model, folder)


def stored_adapter(model: nn.Module, folder: Path) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Each trained parameter of a model from `attach` with what a saved adapter holds for it, on the CPU.

    Raises:
        UserError: The folder holds another adapter.
    """
    pairs: list[tuple[nn.Parameter, torch.Tensor]] = _module("saved").stored_adapter(model, folder)
    return pairs


def with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Puts a finished adapter on its base, to be evaluated.

    Args:
        model: The base, with rows for new tokens.
        folder: RUN/adapter.
    """
    reopened: nn.Module = _module("saved").with_adapter(model, folder)
    return reopened


def is_adapted(model: nn.Module) -> bool:
    """Whether a peft model stands around the base."""
    return hasattr(model, "peft_config")


def adapter_writer(model: nn.Module, weights: dict[str, torch.Tensor], for_base: bool) -> Callable[[Path], None]:
    """What writes an adapter in peft's form into a folder, which it makes if it is absent.

    The model's parameters are looked at now, not when it writes: then they may be in the middle of a step.

    Args:
        model: From `attach`.
        weights: Whole tensors of the trained parameters, by the model's names.
        for_base: Where the method changed the base at the start (PiSSA, OLoRA), write an adapter of twice the rank
            that stands on the unchanged base; else what is trained, as it is.
    """
    writer: Callable[[Path], None] = _module("saved").adapter_writer(model, weights, for_base)
    return writer


def _module(name: str) -> ModuleType:
    return import_module(f"{ROOM}.{name}")
