"""The weights of a run, tensor by tensor: what is frozen, trained or quantised, and in how many bytes it is stored.

A number format is written as its width: 4 bytes for float32, 2 for bfloat16 and float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Final, Literal

from packhorse.model_spec.anatomy import Parameter
from packhorse.model_spec.parameters import Shape, list_parameters
from packhorse.model_spec.trainable import trained_by_name
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
"""Weights that share a scale in 4 bits (bitsandbytes; QLoRA, arXiv 2305.14314)."""
SCALE_BLOCK: Final = 256
"""Scales that share a scale of their own under double quantisation."""

Kind = Literal["base", "adapter"]
Storage = Literal["plain", "nf4", "fp4", "int8"]


@dataclass(frozen=True)
class Held:
    """A tensor of weights.

    Attributes:
        name: Of the parameter that it is, or stands beside.
        unit: What is loaded and sharded with it: `embedding`, `layer N` or `head`.
        shape: As the model has it.
        width: Bytes of a weight on the device, where it is not quantised.
        trained: Whether it has gradients and optimizer states.
        kind: Of the base model, or beside it.
        storage: How it is packed.
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
        """Shape of the tensor as it is stored; 4-bit weights lie two to a byte in elements of `width` bytes."""
        if self.storage in ("nf4", "fp4"):
            return (-(-self.size // (2 * self.width)), 1)
        return self.shape

    @cached_property
    def data_bytes(self) -> int:
        """Bytes of the numbers."""
        if self.storage == "int8":
            return self.size
        return prod(self.data_shape) * self.width

    @property
    def constant_bytes(self) -> int:
        """Bytes of the scales that belong to quantised numbers, which no engine shards.

        4 bits: one scale for 64 weights, in float32 or, doubly quantised, in 8 bits with a float32 for 256 of these
        (QLoRA, arXiv 2305.14314, section 3), beside 16 code values and their mean. 8 bits: a float32 a row.
        """
        if self.storage == "plain":
            return 0
        if self.storage == "int8":
            return 4 * self.shape[0]
        blocks = -(-self.size // BLOCK)
        code = 16 * 4
        return blocks + 4 * -(-blocks // SCALE_BLOCK) + 4 + code if self.double else 4 * blocks + code


def held_weights(plan: RunPlan, shape: Shape) -> tuple[Held, ...] | None:
    """Every tensor of weights that a rank would hold if nothing were sharded, in the model's order.

    Args:
        plan: Of the run.
        shape: Of its model.

    Returns:
        None where only the library knows what the method trains.
    """
    method = plan.recipe.method
    listed = list_parameters(shape)
    virtual = isinstance(method, (PromptTuningMethod, PrefixTuningMethod))
    trained = {} if virtual else trained_by_name(listed, method, shape)
    if trained is None or (shape.anatomy is not None and not shape.anatomy.takes(method)):
        return None
    held: list[Held] = []
    for parameter in listed:
        held.append(_base(plan, shape, parameter, method.trains_base and parameter.name in trained))
        if not method.trains_base and parameter.name in trained:
            held += _beside(plan, shape, parameter)
    if isinstance(method, PromptTuningMethod):
        held.append(_adapter(plan, "prompt", "head", (method.virtual_tokens, shape.hidden)))
    if isinstance(method, PrefixTuningMethod):
        width = 2 * shape.layers * shape.key_value_heads * shape.head_width
        held.append(_adapter(plan, "prefix", "head", (method.virtual_tokens, width)))
    held += _token_rows(plan, shape)
    return tuple(held)


def compute_width(plan: RunPlan) -> int:
    """Bytes of a number in matrix products."""
    return 4 if plan.recipe.precision == "fp32" else 2


def casts_weights(plan: RunPlan) -> bool:
    """Whether the engine itself computes with 16-bit weights; else autocast makes copies as it meets them."""
    sharded = plan.topology.engine in ("fsdp2", "hsdp") or plan.topology.engine.startswith("zero")
    return sharded and plan.recipe.precision != "fp32"


def base_width(plan: RunPlan) -> int:
    """Bytes of a base weight on the device, as the engine keeps it."""
    if plan.topology.engine.startswith("zero") and plan.recipe.precision != "fp32":
        return 2
    return WIDTHS[plan.chosen("model.dtype")]


def unit_of(parameter: Parameter, shape: Shape) -> str:
    """The unit that a parameter is loaded and sharded with, as `model/units.py` cuts the model."""
    layer = shape.names.layer_of(parameter.name)
    if layer is not None:
        return f"layer {layer}"
    tail = parameter.name.removesuffix(".bias") in (_stem(shape.names.head), _stem(shape.names.norm))
    return (
        "head" if not shape.tied and (tail or parameter.name in (shape.names.head, shape.names.norm)) else "embedding"
    )


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def _base(plan: RunPlan, shape: Shape, parameter: Parameter, trained: bool) -> Held:
    method = plan.recipe.method
    storage: Storage = "plain"
    # bitsandbytes takes linear layers; the output head, embeddings, norms and fused experts stay as they are.
    if isinstance(method, QloraMethod) and parameter.linear and len(parameter.shape) == 2:
        storage = method.quantization
    return Held(
        name=parameter.name,
        unit=unit_of(parameter, shape),
        shape=parameter.shape,
        width=base_width(plan),
        trained=trained,
        kind="base",
        storage=storage,
        double=isinstance(method, QloraMethod) and method.double_quantization,
    )


def _beside(plan: RunPlan, shape: Shape, parameter: Parameter) -> Iterator[Held]:
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


def _token_rows(plan: RunPlan, shape: Shape) -> Iterator[Held]:
    """Rows of embedding and head that are trained beside low-rank adapters for new tokens."""
    new = len(plan.recipe.model.new_tokens)
    if new and isinstance(plan.recipe.method, LoraMethod):
        for unit in ("embedding",) if shape.tied else ("embedding", "head"):
            yield _adapter(plan, "new tokens", unit, (new, shape.hidden))


def _adapter(plan: RunPlan, name: str, unit: str, shape: tuple[int, ...]) -> Held:
    in_16_bit = plan.topology.engine.startswith("zero") and plan.recipe.precision != "fp32"
    return Held(name=name, unit=unit, shape=shape, width=2 if in_16_bit else 4, trained=True, kind="adapter")
