"""Counts the parameters of a model, in total and by kind of module, and finds modules by name."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

WRAPPERS: Final = re.compile(r"\.(default|weight|base_layer|original_module|modules_to_save|token_adapter)(?=\.|$)")

# Last parts of a name that say too little without the module before them.
SHOWN_WITH_MODULE: Final = ("lora_", "ia3_", "bias", "trainable_tokens", "embedding")


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters of a model: all of them, and the trained ones."""

    total: int
    trainable: int


@dataclass(frozen=True)
class TrainedKind:
    """Trained parameters of modules with the same name.

    Attributes:
        name: Name such as `q_proj.lora_A`, without the layer.
        num_modules: Number of these modules.
        num_parameters: Number of parameters of all of them together.
    """

    name: str
    num_modules: int
    num_parameters: int

    def __str__(self) -> str:
        return f"{self.name}: {self.num_modules} modules, {self.num_parameters:,}"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count parameters; a quantised weight counts as the values that it represents."""
    total = trainable = 0
    for parameter in model.parameters():
        size = _size(parameter)
        total += size
        trainable += size if parameter.requires_grad else 0
    return ParameterCount(total, trainable)


def trained_kinds(model: nn.Module) -> list[TrainedKind]:
    """Return the trained parameters by kind of module, in the model's order."""
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sizes[_kind(name)].append(_size(parameter))
    return [TrainedKind(name, len(counts), sum(counts)) for name, counts in sizes.items()]


def module_names(model: nn.Module, kind: type[nn.Module] = nn.Module) -> list[str]:
    """Return the names of all modules of a kind."""
    return [name for name, part in model.named_modules() if name and isinstance(part, kind)]


def closest(wanted: str, names: Iterable[str]) -> str:
    """Return up to five last parts of names, the most similar first."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in names} - {""})
    near = difflib.get_close_matches(wanted, ends, n=5, cutoff=0.3)
    return ", ".join(near or [end for end in ends if not end.isdigit()][:5])


def _kind(name: str) -> str:
    """Map `base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight` to `up_proj.lora_A`."""
    parts = [part for part in WRAPPERS.sub("", name).split(".") if not part.isdigit()]
    return ".".join(parts[-2:]) if len(parts) > 1 and parts[-1].startswith(SHOWN_WITH_MODULE) else parts[-1]


def _size(parameter: Any) -> int:  # noqa: ANN401
    state = getattr(parameter, "quant_state", None)
    size: int = state.shape.numel() if state is not None else parameter.numel()
    return int(getattr(parameter, "ds_numel", size))  # ZeRO-3's true size
