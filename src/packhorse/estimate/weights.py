"""The weight tensors of a run: which are frozen, trained or quantised, and in how many bytes they are stored.

A number format is given by its width: 4 bytes for float32, 2 for bfloat16 and float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Final, Literal

from packhorse.model_spec.measured_model import Parameter
from packhorse.model_spec.parameters import Shape, list_parameters
from packhorse.model_spec.trainable import trained_by_name, virtual_shape
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.methods import (
    Ia3Method,
    LoraMethod,
    PrefixTuningMethod,
    PromptTuningMethod,
    QloraMethod,
)

WIDTHS: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK: Final = 64
"""Weights that share one scale in 4 bits (bitsandbytes; QLoRA, arXiv 2305.14314)."""
SCALE_BLOCK: Final = 256
"""Scales that share one second-level scale under double quantisation."""

Kind = Literal["base", "adapter"]
Storage = Literal["plain", "nf4", "fp4", "int8"]


@dataclass(frozen=True)
class WeightTensor:
    """One weight tensor.

    Attributes:
        name: Name of the parameter; an adapter has the name of the parameter that it changes.
        unit: The unit that it is loaded and sharded with: `embedding`, `layer N` or `head`.
        shape: Shape in the model.
        width: Bytes per weight on the device, where it is not quantised.
        trained: Whether it has gradients and optimizer states.
        kind: Part of the base model or of an adapter.
        storage: Quantisation format, or `plain`.
        double: Whether the scales of 4-bit weights are quantised too.
    """

    name: str
    unit: str
    shape: tuple[int, ...]
    width: int
    trained: bool
    kind: Kind
    storage: Storage = "plain"
    double: bool = False

    @cached_property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @cached_property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor; 4-bit weights are packed two per byte into elements of `width` bytes."""
        if self.storage in ("nf4", "fp4"):
            return (-(-self.size // (2 * self.width)), 1)
        return self.shape

    @cached_property
    def data_size(self) -> int:
        """Number of stored elements."""
        return prod(self.data_shape)

    @cached_property
    def data_bytes(self) -> int:
        """Bytes of the stored tensor, without scales."""
        return self.size if self.storage == "int8" else self.data_size * self.width

    @property
    def constant_bytes(self) -> int:
        """Bytes of the scales of quantised weights, which no engine shards.

        4 bits: one scale per 64 weights, in float32 or, doubly quantised, in 8 bits with one float32 per 256 scales
        (QLoRA, arXiv 2305.14314, section 3), and 16 code values and their mean. 8 bits: one float32 per row.
        """
        if self.storage == "plain":
            return 0
        if self.storage == "int8":
            return 4 * self.shape[0]
        blocks = -(-self.size // BLOCK)
        code = 16 * 4
        return blocks + 4 * -(-blocks // SCALE_BLOCK) + 4 + code if self.double else 4 * blocks + code


def list_weights(plan: RunPlan, shape: Shape) -> tuple[WeightTensor, ...] | None:
    """List every weight tensor, unsharded, in the model's order.

    Returns:
        None where peft alone decides what the method trains, or the method cannot be used on the model.
    """
    method = plan.recipe.method
    parameters = list_parameters(shape)
    trained = trained_by_name(parameters, method, shape)
    if trained is None or (shape.measured_model is not None and not shape.measured_model.supports(method)):
        return None
    width = base_width(plan)
    weights: list[WeightTensor] = []
    for parameter in parameters:
        weights.append(_base(plan, shape, parameter, width, method.trains_base and parameter.name in trained))
        if not method.trains_base and parameter.name in trained:
            weights += _adapters_of(plan, shape, parameter)
    if isinstance(method, (PromptTuningMethod, PrefixTuningMethod)):
        weights.append(_adapter(plan, method.kind, "head", virtual_shape(method, shape)))
    weights += _token_rows(plan, shape)
    return tuple(weights)


def compute_width(plan: RunPlan) -> int:
    """Return the bytes per element in matrix products."""
    return 4 if plan.recipe.precision == "fp32" else 2


def casts_weights(plan: RunPlan) -> bool:
    """Return whether the engine itself casts weights to 16 bits; otherwise autocast copies them at each use."""
    sharded = plan.topology.engine in ("fsdp2", "hsdp") or plan.topology.engine.startswith("zero")
    return sharded and plan.recipe.precision != "fp32"


def casts_adapter_inputs(plan: RunPlan) -> bool:
    """Return whether adapters cast their inputs to float32 under autocast; peft's cast is off for LoRA without DoRA."""
    method = plan.recipe.method
    has_no_cast = isinstance(method, LoraMethod) and not method.dora
    return compute_width(plan) == 2 and not casts_weights(plan) and not has_no_cast


def base_width(plan: RunPlan) -> int:
    """Return the bytes of a base weight on the device, as the engine keeps it."""
    if plan.topology.engine.startswith("zero") and plan.recipe.precision != "fp32":
        return 2
    return WIDTHS[plan.chosen("model.dtype")]


def unit_of(parameter: Parameter, shape: Shape) -> str:
    """Return the unit that a parameter is loaded and sharded with, as `model/units.py` divides the model."""
    layer = shape.names.layer_of(parameter.name)
    if layer is not None:
        return f"layer {layer}"
    in_tail = parameter.module in (shape.names.head.removesuffix(".weight"), shape.names.norm.removesuffix(".weight"))
    return "head" if in_tail and not shape.tied else "embedding"


def _base(plan: RunPlan, shape: Shape, parameter: Parameter, width: int, trained: bool) -> WeightTensor:
    method = plan.recipe.method
    storage: Storage = "plain"
    # bitsandbytes quantises linear layers; the output head, embeddings, norms and fused experts stay unchanged.
    if isinstance(method, QloraMethod) and parameter.linear and len(parameter.shape) == 2:
        storage = method.quantization
    return WeightTensor(
        name=parameter.name,
        unit=unit_of(parameter, shape),
        shape=parameter.shape,
        width=width,
        trained=trained,
        kind="base",
        storage=storage,
        double=isinstance(method, QloraMethod) and method.double_quantization,
    )


def _adapters_of(plan: RunPlan, shape: Shape, parameter: Parameter) -> Iterator[WeightTensor]:
    method, unit = plan.recipe.method, unit_of(parameter, shape)
    if isinstance(method, Ia3Method):
        scaled = 1 if _scales_inputs(parameter, shape, method) else 0
        yield _adapter(plan, parameter.name, unit, (parameter.shape[scaled],))
        return
    assert isinstance(method, LoraMethod)
    if parameter.module.endswith(tuple(method.train_also)) and method.train_also:
        yield _adapter(plan, parameter.name, unit, parameter.shape)
        return
    outputs, inputs = parameter.shape[-2:]
    rank = method.rank * (parameter.shape[0] if len(parameter.shape) == 3 else 1)
    yield _adapter(plan, parameter.name, unit, (rank, inputs))
    yield _adapter(plan, parameter.name, unit, (outputs, rank))
    if method.dora and parameter.linear:
        yield _adapter(plan, parameter.name, unit, (outputs,))


def _scales_inputs(parameter: Parameter, shape: Shape, method: Ia3Method) -> bool:
    trained = trained_by_name([parameter], method, shape)
    assert trained is not None
    outputs, inputs = parameter.shape
    return outputs != inputs and trained[parameter.name] == inputs


def _token_rows(plan: RunPlan, shape: Shape) -> Iterator[WeightTensor]:
    """Yield the rows of embedding and head that are trained together with low-rank adapters for new tokens."""
    new = len(plan.recipe.model.new_tokens)
    if new and isinstance(plan.recipe.method, LoraMethod):
        for unit in ("embedding",) if shape.tied else ("embedding", "head"):
            yield _adapter(plan, "new tokens", unit, (new, shape.hidden))


def _adapter(plan: RunPlan, name: str, unit: str, shape: tuple[int, ...]) -> WeightTensor:
    in_16_bit = plan.topology.engine.startswith("zero") and plan.recipe.precision != "fp32"
    return WeightTensor(name=name, unit=unit, shape=shape, width=2 if in_16_bit else 4, trained=True, kind="adapter")
