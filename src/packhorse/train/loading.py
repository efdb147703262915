"""Loads a model unit by unit: weights, adapter and shards of one unit before those of the next.

While loading, a device therefore holds at most its shards and one unit (a decoder layer, or the embedding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import nn
from transformers import PreTrainedModel

from packhorse.model.streaming import StreamedWeights
from packhorse.model.units import units_of
from packhorse.recipe.methods import AdapterMethod, LoraMethod, Method, PromptTuningMethod, QloraMethod
from packhorse.train.engine.sharding import Placement

Attach = Callable[[PreTrainedModel], nn.Module]
BeforeUnit = Callable[[], None]
STARTS_FROM_WEIGHTS = ("pissa", "olora", "loftq")


def can_stream(method: Method) -> bool:
    """Return whether the adapter can be attached before all weights are loaded: its start is not made from them."""
    if not isinstance(method, LoraMethod):
        return True
    quantized_dora = method.dora and isinstance(method, QloraMethod)
    return method.initialization not in STARTS_FROM_WEIGHTS and not quantized_dora


def place_whole(model: PreTrainedModel, attach: Attach, placement: Placement, before_unit: BeforeUnit) -> nn.Module:
    """Place a model whose weights are all loaded.

    Returns:
        The module that `attach` returned.
    """
    units = units_of(model)
    adapted = attach(model)
    for unit in units:
        before_unit()
        placement.unit([model.get_submodule(name) for name in unit.names], unit.is_last)
    placement.root(adapted)
    return adapted


def place_streamed(
    weights: StreamedWeights,
    attach: Attach,
    placement: Placement,
    method: Method,
    seed: int,
    device: torch.device,
    before_unit: BeforeUnit,
) -> nn.Module:
    """Load and place a model one unit at a time.

    Args:
        weights: An open checkpoint with its empty model.
        attach: Adds the method's adapter; called once the embedding is loaded, from which prompts start.
        placement: Places each unit.
        method: Method of the recipe.
        seed: Seed of adapters that are drawn.
        device: Device of the adapters.
        before_unit: Called before each unit; an exception from it ends the loading.

    Returns:
        The module that `attach` returned.
    """
    model = weights.model
    if not _reads_weights(method):
        weights.kept_rows = placement.kept_rows
    first = weights.units[0]
    weights.fill(first)
    adapted = attach(model)
    pending = {module: name for name, module in adapted.named_modules()}

    def make_real(modules: Sequence[nn.Module]) -> None:
        parts = [part for module in modules for part in module.modules() if part in pending]
        named = {pending.pop(part): part for part in parts}
        if isinstance(method, AdapterMethod):
            # By name: peft takes seconds to import, which full fine-tuning never needs.
            import_module("packhorse.model.methods.lora").make_adapters(named, method, seed, device)

    for unit in weights.units:
        before_unit()
        if unit is not first:
            weights.fill(unit)
        modules = [model.get_submodule(name) for name in unit.names]
        make_real(modules)
        placement.unit(modules, unit.is_last)
    weights.fill_rest()
    make_real([adapted])
    _assert_loaded(adapted)
    placement.root(adapted)
    return adapted


def _reads_weights(method: Method) -> bool:
    """Return whether the adapter starts from weights of its unit: DoRA's norms, a prompt's embeddings."""
    return isinstance(method, PromptTuningMethod) or (isinstance(method, LoraMethod) and method.dora)


def _assert_loaded(model: nn.Module) -> None:
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise RuntimeError(f"{len(empty)} weights were never loaded, such as {empty[0]}")
