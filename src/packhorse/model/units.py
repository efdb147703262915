"""Units: the parts in which a model is loaded, quantised and sharded, one decoder layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

SCORE: Final = "score"
"""Head of a reward model: transformers' name in models for sequence classification."""


@dataclass(frozen=True)
class Unit:
    """Modules that are whole in memory at the same time.

    Attributes:
        names: Names of the modules in the model without adapters.
        is_last: The weights are used at the end of the forward pass and at the start of the backward pass, so that
            resharding them in between would gain nothing.
    """

    names: tuple[str, ...]
    is_last: bool = False


def units_of(model: PreTrainedModel) -> list[Unit]:
    """Return embedding, each decoder layer, and last norm with output head; the rest belongs to no unit.

    A head that is tied to the embedding shares its unit, because one weight cannot be sharded twice.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, score = model.get_input_embeddings(), score_name(model)
    head = model.get_output_embeddings() if score is None else model.get_submodule(score)
    norm = _last_norm(model)
    tail = tuple(names[module] for module in (norm, head) if module is not None)
    layers = [Unit((name,)) for name in layers_of(model)]
    if head is not None and embedding.weight is head.weight:
        return [Unit((names[embedding], *tail), is_last=True), *layers]
    return [Unit((names[embedding],)), *layers, *([Unit(tail, is_last=True)] if tail else [])]


def layers_of(model: PreTrainedModel) -> list[str]:
    """Return the names of the decoder layers: outermost modules of the classes that transformers must not split."""
    kinds = set(model._no_split_modules or ())
    layers: list[str] = []
    for name, module in model.named_modules():
        # FSDP2 puts its name before that of a class.
        if type(module).__name__.removeprefix("FSDP") in kinds and not (layers and name.startswith(f"{layers[-1]}.")):
            layers.append(name)
    return layers


def _last_norm(model: PreTrainedModel) -> nn.Module | None:
    """Return the norm before the output head: the last one among the decoder's direct children."""
    decoder = getattr(model, model.base_model_prefix, model)
    norms = [part for part in decoder.children() if "Norm" in type(part).__name__]
    return norms[-1] if norms else None


def copy_tree(module: nn.Module) -> nn.Module:
    """Return a copy of the module tree with the same leaves and parameters.

    Adapters wrap parts of the model later; in the snapshot the parts keep the names of the checkpoint, and weights that
    are loaded through it are in the model too.
    """
    if not module._modules:
        return module
    return _container(module, {name: copy_tree(part) for name, part in module._modules.items() if part is not None})


def select_branches(tree: nn.Module, keep: Callable[[str], bool], path: str = "") -> nn.Module | None:
    """Return a snapshot with only the branches whose name `keep` selects; None where nothing is left."""
    if path and keep(path):
        return tree
    kept = {}
    for name, part in tree._modules.items():
        below = select_branches(part, keep, f"{path}.{name}" if path else name) if part is not None else None
        if below is not None:
            kept[name] = below
    return _container(tree, kept) if kept or not path else None


def _container(module: nn.Module, parts: dict[str, nn.Module]) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__["_modules"] = parts
    return twin


def score_name(model: nn.Module) -> str | None:
    """Return the name of the score head; None for a language model."""
    if model.get_output_embeddings() is not None:  # type: ignore[operator]
        return None
    return next((name for name, _ in model.named_modules() if name.rpartition(".")[2] == SCORE), None)


def score_weight(model: nn.Module) -> str | None:
    """Return the name of the score head's weight; None for a language model."""
    name = score_name(model)
    return f"{name}.weight" if name is not None else None


def draw_score(model: Any, seed: int, device: torch.device, dtype: torch.dtype) -> None:  # noqa: ANN401
    """Draw the score head of a transformers model as transformers draws a new linear layer.

    Args:
        model: The model, or a part of it that has the head.
        seed: Seed of the recipe.
        device: Device of the weight.
        dtype: Type of the weight.
    """
    head = model.get_submodule(SCORE)
    generator = torch.Generator().manual_seed(seed)
    std = model.config.get_text_config().initializer_range
    drawn = torch.empty(head.weight.shape).normal_(0.0, std, generator=generator)
    head.weight = nn.Parameter(drawn.to(device, dtype), head.weight.requires_grad)
