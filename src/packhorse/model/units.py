"""The parts in which a model is loaded, quantised and sharded: one decoder layer at a time, never all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Unit:
    """Modules that are in memory as a whole at the same time.

    Attributes:
        names: Their names in the model without adapters.
        is_last: Their weights are used at the end of the forward pass and at the start of the backward pass, so that
            giving them up in between would gain nothing.
    """

    names: tuple[str, ...]
    is_last: bool = False


def units_of(model: PreTrainedModel) -> list[Unit]:
    """Embedding, each decoder layer, last norm with output head; what is left belongs to no unit.

    A head that is tied to the embedding shares its unit: one weight cannot be sharded twice. The order is that of the
    model, as random starts of adapters are drawn in it.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norm = _last_norm(model)
    tail = tuple(names[module] for module in (norm, head) if module is not None)
    layers = [Unit((name,)) for name in layers_of(model)]
    if head is not None and embedding.weight is head.weight:
        return [Unit((names[embedding], *tail), is_last=True), *layers]
    return [Unit((names[embedding],)), *layers, *([Unit(tail, is_last=True)] if tail else [])]


def layers_of(model: PreTrainedModel) -> list[str]:
    """Names of the decoder layers: outermost modules of the classes that transformers says must not be split."""
    kinds = set(model._no_split_modules or ())
    found: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__ in kinds and not (found and name.startswith(f"{found[-1]}.")):
            found.append(name)
    return found


def _last_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm before the output head: the last one among the decoder's own parts."""
    decoder = getattr(model, model.base_model_prefix, model)
    norms = [part for part in decoder.children() if "Norm" in type(part).__name__]
    return norms[-1] if norms else None


def snapshot(module: nn.Module) -> nn.Module:
    """The tree as it is now, over the very same leaves and parameters.

    Adapters put themselves between a container and its part; through the snapshot the parts keep the names that the
    checkpoint knows, and what is loaded through it is in the model too.
    """
    if not module._modules:
        return module
    return _container(module, {name: snapshot(part) for name, part in module._modules.items() if part is not None})


def part_of(tree: nn.Module, keep: Callable[[str], bool], path: str = "") -> nn.Module | None:
    """The same tree without the branches that `keep` does not want; None where nothing is left.

    Args:
        tree: A snapshot.
        keep: Whether the module of a name stays, whole.
        path: Name of `tree` itself.
    """
    if path and keep(path):
        return tree
    kept = {}
    for name, part in tree._modules.items():
        found = part_of(part, keep, f"{path}.{name}" if path else name) if part is not None else None
        if found is not None:
            kept[name] = found
    return _container(tree, kept) if kept or not path else None


def _container(module: nn.Module, parts: dict[str, nn.Module]) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__["_modules"] = parts
    return twin
