"""Adapters that were attached on the meta device: memory and first values, once their unit has its weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from packhorse.model.methods.lora import ADAPTER, draw_adapter
from packhorse.recipe.methods import AdapterMethod, LoraMethod


def make_adapters(parts: Mapping[str, nn.Module], method: AdapterMethod, seed: int, device: torch.device) -> None:
    """Makes real what `attach` left on the meta device, and starts it as `attach` does on a real model.

    Args:
        parts: Modules of a unit by their names in the peft model; the base's weights among them are real.
        method: Of the recipe.
        seed: Of what is drawn.
        device: Where the adapters go.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # what is tied stays tied
    for part in parts.values():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                part._parameters[name] = made.setdefault(parameter, nn.Parameter(empty, parameter.requires_grad))
    _copy_originals([part for part in parts.values() if isinstance(part, ModulesToSaveWrapper)])
    for name, part in parts.items():
        if isinstance(part, IA3Layer):
            part.reset_ia3_parameters(ADAPTER)
        elif isinstance(part, LoraLayer):
            assert isinstance(method, LoraMethod)
            draw_adapter(part, name, method, seed)


def _copy_originals(wrappers: list[ModulesToSaveWrapper]) -> None:
    """Starts copies that are trained whole from their originals; copies of tied weights are tied."""
    copied: dict[nn.Parameter, nn.Parameter] = {}
    for wrapper in wrappers:
        twin = wrapper.modules_to_save[ADAPTER]
        twin.load_state_dict(wrapper.original_module.state_dict())
        for name, original in wrapper.original_module.named_parameters():
            module, _, last = name.rpartition(".")
            setattr(twin.get_submodule(module), last, copied.setdefault(original, twin.get_parameter(name)))
