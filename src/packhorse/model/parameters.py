"""Counts the parameters of a model, in total and by kind of module, and lists the names of its parts."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from packhorse.model.sharded import true_shape
from packhorse.model_spec.method_names import ModelNames, is_expert

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


def names_of_model(model: Any) -> ModelNames:  # noqa: ANN401
    """Return the names of a transformers model, whole or under ZeRO-3's `zero.Init`."""
    modules = [(name, part) for name, part in model.named_modules() if name]
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = (next((name for name, part in modules if part is end), "lm_head") for end in ends)
    aliases: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[id(parameter)].append(name)
    parameters = list(model.named_parameters())
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    is_stack = (name for name, part in modules if isinstance(part, nn.ModuleList) and len(part) == num_layers)
    return ModelNames(
        family=str(model.config.model_type),
        modules=tuple(name for name, _ in modules),
        linear=tuple(name for name, part in modules if isinstance(part, (nn.Linear, Conv1D))),
        embedding=embedding,
        head=head,
        tied=bool(model.config.get_text_config().tie_word_embeddings),
        weights={names[0]: tuple(names) for names in aliases.values()},
        quantized=tuple(name for name, weight in parameters if _is_quantized(weight)),
        experts=tuple(
            sorted(
                {".".join(name.split(".")[-2:]) for name, weight in parameters if is_expert(name, true_shape(weight))}
            )
        ),
        layers=f"{next(is_stack, 'layers')}.",
        num_layers=num_layers,
    )


def _is_quantized(weight: nn.Parameter) -> bool:
    return hasattr(weight, "quant_state") or weight.dtype == torch.int8


def _kind(name: str) -> str:
    """Map `base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight` to `up_proj.lora_A`."""
    parts = [part for part in WRAPPERS.sub("", name).split(".") if not part.isdigit()]
    return ".".join(parts[-2:]) if len(parts) > 1 and parts[-1].startswith(SHOWN_WITH_MODULE) else parts[-1]


def _size(parameter: Any) -> int:  # noqa: ANN401
    state = getattr(parameter, "quant_state", None)
    size: int = state.shape.numel() if state is not None else parameter.numel()
    return int(getattr(parameter, "ds_numel", size))  # ZeRO-3's true size
