"""Number of weights that each method trains, before anything is loaded: exact, or None.

r is the rank of LoRA; a linear layer has `outputs` and `inputs`.

    lora, qlora    r x (inputs + outputs) per layer, + outputs under DoRA, x number of experts; + whole modules
    ia3            outputs per layer, or inputs of those in `feedforward`
    prompt_tuning  virtual tokens x H
    prefix_tuning  virtual tokens x layers x 2 x key/value heads x head width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Final

from packhorse.model_spec.measured_model import Names, Parameter
from packhorse.model_spec.parameters import Shape, list_parameters
from packhorse.recipe.methods import (
    Ia3Method,
    LoraMethod,
    Method,
    PartialMethod,
    PrefixTuningMethod,
    PromptTuningMethod,
)

# peft's choice for each architecture (peft.utils.constants): all targets, and those that are scaled at the input.
IA3_TARGETS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "llama": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "mistral": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    # peft also names w2, which the fused experts of transformers 5 no longer have.
    "mixtral": (("k_proj", "v_proj"), ()),
    "gemma": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gemma3_text": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "qwen2": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "qwen3": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
}


@dataclass(frozen=True)
class ModuleCount:
    """Modules of one kind.

    Attributes:
        name: Name inside the layers.
        count: Number of modules.
        shape: Shape of one module's weight.
        total: Parameters of all modules together.
        trainable: Trained weights of all modules and their adapters together.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    total: int
    trainable: int


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, and how many a method trains.

    Attributes:
        base: Parameters of the model alone.
        trainable: Trained weights.
        total: Parameters of the model, its adapters and trained copies.
        modules: Counts by kind of module, in the model's order.
    """

    base: int
    trainable: int
    total: int
    modules: tuple[ModuleCount, ...]


def count_shape(shape: Shape, method: Method) -> ParameterCounts | None:
    """Count the parameters of a shape; None where peft decides what the method trains."""
    parameters = list_parameters(shape)
    base = sum(parameter.size for parameter in parameters)
    if isinstance(method, (PromptTuningMethod, PrefixTuningMethod)):
        size = prod(virtual_shape(method, shape))
        added = ModuleCount(method.kind, 1, virtual_shape(method, shape), size, size)
        return ParameterCounts(base, size, base + size, (*_by_module(parameters, {}, shape.names), added))
    trained = trained_by_name(parameters, method, shape)
    if trained is None:
        return None
    trainable = sum(trained.values())
    total = base if method.trains_base else base + trainable
    return ParameterCounts(base, trainable, total, _by_module(parameters, trained, shape.names))


def trained_by_name(parameters: Sequence[Parameter], method: Method, shape: Shape) -> dict[str, int] | None:
    """Return the number of trained weights by the name of their parameter, or of the one that their adapter changes.

    None where peft decides what is trained. Prompt and prefix tuning train weights without such a parameter.
    """
    if isinstance(method, (PromptTuningMethod, PrefixTuningMethod)):
        return {}
    if isinstance(method, LoraMethod):
        return _lora(parameters, method, shape)
    if isinstance(method, Ia3Method):
        return _ia3(parameters, method, shape)
    if isinstance(method, PartialMethod):
        return {parameter.name: parameter.size for parameter in parameters if _is_trained(parameter, method, shape)}
    return {parameter.name: parameter.size for parameter in parameters}


def _is_trained(parameter: Parameter, method: PartialMethod, shape: Shape) -> bool:
    layer = shape.names.layer_of(parameter.name)
    chosen = method.last_layers is None and not method.train
    if method.last_layers is not None and layer is not None:
        chosen = layer >= shape.layers - method.last_layers
    chosen = chosen or any(fnmatchcase(parameter.name, pattern) for pattern in method.train)
    return chosen and not any(fnmatchcase(parameter.name, pattern) for pattern in method.freeze)


def _lora(parameters: Sequence[Parameter], method: LoraMethod, shape: Shape) -> dict[str, int]:
    trained: dict[str, int] = {}
    # peft compares the ends of whole names here: `norm` is also input_layernorm.
    whole = [parameter for parameter in parameters if parameter.module.endswith(tuple(method.train_also))]
    for parameter in parameters:
        targeted = parameter.linear and (method.target == "all-linear" or _ends_with(parameter.module, method.target))
        if targeted:
            outputs, inputs = parameter.shape
            trained[parameter.name] = method.rank * (inputs + outputs) + (outputs if method.dora else 0)
        elif method.experts and len(parameter.shape) == 3:
            experts, outputs, inputs = parameter.shape
            trained[parameter.name] = method.rank * experts * (inputs + outputs)
    return trained | {parameter.name: parameter.size for parameter in whole}


def _ia3(parameters: Sequence[Parameter], method: Ia3Method, shape: Shape) -> dict[str, int] | None:
    if method.target != "auto":
        targets, feedforward = tuple(method.target), tuple(method.feedforward)
    elif shape.family in IA3_TARGETS:
        targets, feedforward = IA3_TARGETS[shape.family]
    else:
        return None
    return {
        parameter.name: parameter.shape[1 if _ends_with(parameter.module, feedforward) else 0]
        for parameter in parameters
        if parameter.linear and _ends_with(parameter.module, targets)
    }


def virtual_shape(method: PromptTuningMethod | PrefixTuningMethod, shape: Shape) -> tuple[int, int]:
    """Return the shape of what prompt and prefix tuning train: one row per virtual token."""
    if isinstance(method, PromptTuningMethod):
        return method.virtual_tokens, shape.hidden
    return method.virtual_tokens, shape.layers * 2 * shape.key_value_heads * shape.head_width


def _ends_with(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_module(parameters: Sequence[Parameter], trained: Mapping[str, int], names: Names) -> tuple[ModuleCount, ...]:
    groups: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(_kind(parameter, names), []).append(parameter)
    return tuple(_one_kind(name, group, trained) for name, group in groups.items())


def _one_kind(name: str, group: Sequence[Parameter], trained: Mapping[str, int]) -> ModuleCount:
    return ModuleCount(
        name=name,
        count=len({parameter.module for parameter in group}),
        shape=max((parameter.shape for parameter in group), key=len),
        total=sum(parameter.size for parameter in group),
        trainable=sum(trained.get(parameter.name, 0) for parameter in group),
    )


def _kind(parameter: Parameter, names: Names) -> str:
    return names.in_layer(parameter.module).removeprefix(f"{names.layers.split('.')[0]}.")
