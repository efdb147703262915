"""How many parameters a model has and trains, as a whole and by kind of module."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

WRAPPERS: Final = re.compile(r"\.(default|weight|base_layer|original_module|modules_to_save|token_adapter)(?=\.|$)")

BELOW: Final = ("lora_", "ia3_", "bias", "trainable_tokens", "embedding")  # parts that their module's name tells apart


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: all of them, and those that are trained."""

    total: int
    trainable: int


@dataclass(frozen=True)
class TrainedKind:
    """Trained parameters of modules that are called alike.

    Attributes:
        name: Such as `q_proj.lora_A`; layers are not told apart.
        num_modules: How many there are.
        num_parameters: Of all of them together.
    """

    name: str
    num_modules: int
    num_parameters: int

    def __str__(self) -> str:
        return f"{self.name}: {self.num_modules} modules, {self.num_parameters:,}"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts parameters; a quantised weight counts as the numbers it stands for."""
    total = trainable = 0
    for parameter in model.parameters():
        size = _size(parameter)
        total += size
        trainable += size if parameter.requires_grad else 0
    return ParameterCount(total, trainable)


def trained_kinds(model: nn.Module) -> list[TrainedKind]:
    """Trained parameters by kind of module, in the model's order."""
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sizes[_kind(name)].append(_size(parameter))
    return [TrainedKind(name, len(each), sum(each)) for name, each in sizes.items()]


def _kind(name: str) -> str:
    """`base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight` -> `up_proj.lora_A`."""
    parts = [part for part in WRAPPERS.sub("", name).split(".") if not part.isdigit()]
    return ".".join(parts[-2:]) if len(parts) > 1 and parts[-1].startswith(BELOW) else parts[-1]


def _size(parameter: Any) -> int:  # noqa: ANN401
    state = getattr(parameter, "quant_state", None)
    size: int = state.shape.numel() if state is not None else parameter.numel()
    # ZeRO-3 leaves an empty tensor on each rank and keeps the true size beside it.
    return int(getattr(parameter, "ds_numel", size))
