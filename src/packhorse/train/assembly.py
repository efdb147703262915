"""The model that trains, put together unit by unit: weights, adapter and shards of one before those of the next.

So the most that a device holds while it loads is its shards and one unit (a decoder layer, or the embedding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from packhorse.model.streaming import Weights
from packhorse.model.units import units_of
from packhorse.recipe.methods import AdapterMethod, LoraMethod, Method, QloraMethod
from packhorse.train.engine.sharding import Placement

Attach = Callable[[PreTrainedModel], nn.Module]
BetweenUnits = Callable[[], None]
STARTS_FROM_WEIGHTS = ("pissa", "olora", "loftq")


def _nothing() -> None:
    """Between two units, where nobody asks for more."""


def can_stream(method: Method) -> bool:
    """Whether the method's adapter can be attached before all weights are there: its start is not made from them."""
    if not isinstance(method, LoraMethod):
        return True
    quantized_dora = method.dora and isinstance(method, QloraMethod)
    return method.initialization not in STARTS_FROM_WEIGHTS and not quantized_dora


def place_whole(
    model: PreTrainedModel, attach: Attach, placement: Placement, between_units: BetweenUnits = _nothing
) -> nn.Module:
    """Places a model whose weights are all there.

    Args:
        model: A transformers model.
        attach: Adds the method's adapter.
        placement: Where each unit goes.
        between_units: Called before each unit; what it raises ends the loading.

    Returns:
        What `attach` returned.
    """
    units = units_of(model)
    adapted = attach(model)
    for unit in units:
        between_units()
        placement.unit([model.get_submodule(name) for name in unit.names], unit.is_last)
    placement.root(adapted)
    return adapted


def place_streamed(
    weights: Weights,
    attach: Attach,
    placement: Placement,
    method: Method,
    seed: int,
    device: torch.device,
    between_units: BetweenUnits = _nothing,
) -> nn.Module:
    """Loads and places a model one unit at a time.

    Args:
        weights: An open checkpoint with its empty model.
        attach: Adds the method's adapter; called when the embedding is there, which prompts start from.
        placement: Where each unit goes.
        method: Of the recipe.
        seed: Of adapters that are drawn.
        device: Where adapters go.
        between_units: Called before each unit; what it raises ends the loading.

    Returns:
        What `attach` returned.
    """
    model = weights.model
    first = weights.units[0]
    weights.fill(first)
    adapted = attach(model)
    pending = {module: name for name, module in adapted.named_modules()}

    def make_real(modules: Sequence[nn.Module]) -> None:
        parts = [part for module in modules for part in module.modules() if part in pending]
        named = {pending.pop(part): part for part in parts}
        if isinstance(method, AdapterMethod):
            _room().make_adapters(named, method, seed, device)

    for unit in weights.units:
        between_units()
        if unit is not first:
            weights.fill(unit)
        modules = [model.get_submodule(name) for name in unit.names]
        make_real(modules)
        placement.unit(modules, unit.is_last)
    weights.fill_rest()
    make_real([adapted])
    _prove_real(adapted)
    placement.root(adapted)
    return adapted


def _room() -> Any:  # noqa: ANN401
    """By name: peft takes seconds to import, which full fine-tuning never needs."""
    return import_module("packhorse.model.methods.meta")


def _prove_real(model: nn.Module) -> None:
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise RuntimeError(f"{len(empty)} weights were never loaded, such as {empty[0]}")
