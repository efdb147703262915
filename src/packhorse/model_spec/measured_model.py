"""A model's parameters by name and shape, and what is measured of a model whose family is not described.

The measurement needs torch and is in `estimate/measure/`; its results are plain numbers, defined here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Final, Protocol

from packhorse.errors import UserError
from packhorse.recipe.methods import Method


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: Name in `named_parameters` of the transformers model.
        shape: [outputs, inputs] of a linear layer, [V, H] of an embedding, [E, outputs, inputs] of fused experts.
        linear: Whether it is the weight of a linear layer, which can have a LoRA adapter.
    """

    name: str
    shape: tuple[int, ...]
    linear: bool = False

    @property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def module(self) -> str:
        """Name of the module that holds it: without `.weight` and `.bias`, unchanged for fused experts."""
        return self.name.removesuffix(".weight").removesuffix(".bias")


@dataclass(frozen=True)
class Names:
    """Names of an architecture's parts.

    Attributes:
        embedding: Weight of the token embedding.
        head: Weight of the output head; the embedding's where the head is tied.
        norm: Weight of the last norm.
        layers: Prefix of all parameters in decoder layers, in front of the layer's number.
    """

    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    norm: str = "model.norm.weight"
    layers: str = "model.layers."

    def layer_of(self, name: str) -> int | None:
        """Return the number of the decoder layer that a parameter or module belongs to; None outside of layers."""
        return self.split(name)[0]

    def in_layer(self, name: str) -> str:
        """Return the name inside its layer, such as `mlp.up_proj.weight`."""
        return self.split(name)[1]

    def split(self, name: str) -> tuple[int | None, str]:
        """Return the layer's number and the name inside the layer."""
        if not name.startswith(self.layers):
            return None, name
        number, _, rest = name[len(self.layers) :].partition(".")
        return int(number), rest


LLAMA: Final = Names()


@dataclass(frozen=True)
class PassFormats:
    """Number formats and kernels of a forward pass; each width in bytes per element.

    Attributes:
        compute: Width in matrix products.
        autocast: Whether autocast casts the inputs of matrix products.
        base: Width of a base weight in the forward pass.
        adapter: Width of an adapter's weight in the forward pass.
        quantized: Whether linear layers of the base are quantised.
        on_cuda: Whether CUDA's kernels run.
        varlen: Whether attention is torch's varlen kernel.
        keeps_inputs: Whether linear layers save their input even where the weight is frozen, as under ZeRO-3.
        input_gradients: Whether the first layer's input has a gradient, as it does where layers are recomputed.
        sequence: Ranks that share a row.
        documents: Documents in the row, where virtual tokens are in front of each; otherwise 1.
    """

    compute: int
    autocast: bool
    base: int
    adapter: int
    quantized: bool
    on_cuda: bool
    varlen: bool
    keeps_inputs: bool
    input_gradients: bool
    sequence: int
    documents: int


CPU_FLOAT32: Final = PassFormats(4, False, 4, 4, False, False, False, False, False, 1, 1)
"""Formats of a pass on a CPU in float32."""


@dataclass(frozen=True)
class LinearBytes:
    """Bytes as a linear function of the tokens of a row.

    Attributes:
        fixed: Bytes that do not depend on the tokens.
        per_token: Bytes per token.
    """

    fixed: float = 0.0
    per_token: float = 0.0

    def at(self, tokens: int) -> int:
        """Return the bytes that grow with the tokens, without the fixed ones."""
        return round(self.per_token * tokens)


@dataclass(frozen=True)
class LayerKeptBytes:
    """Bytes that one decoder layer keeps for the backward pass.

    Attributes:
        attention: Kept by attention itself: queries, keys, values and output.
        rest: Kept by everything else.
        input: Input of the layer, all that is kept where the layer is recomputed.
    """

    attention: LinearBytes
    rest: LinearBytes
    input: LinearBytes


@dataclass(frozen=True)
class KeptBytes:
    """Bytes that a forward pass up to the output head keeps for the backward pass.

    Attributes:
        before: Kept in front of the first layer.
        shared: Inputs that all layers share, such as rotary angles; kept once.
        layers: Decoder layers from first to last.
        after: Kept behind the last layer: the last norm.
        width: Bytes per element of the output head's input.
        has_grad: Whether the backward pass reaches that input.
    """

    before: LinearBytes
    shared: LinearBytes
    layers: tuple[LayerKeptBytes, ...]
    after: LinearBytes
    width: int
    has_grad: bool


class NotMeasuredError(UserError):
    """A model cannot be measured without loading it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"memory and time are not known: {reason}.",
            "the plan counts them on the model's own forward pass, run on tensors without data.",
            "set model.id to a model of another type; or train without an estimate.",
        )


class KeptBytesMeter(Protocol):
    """Measures forward passes of one model on fake tensors, each combination once."""

    def kept(self, method: Method, formats: PassFormats) -> KeptBytes:
        """Return the bytes that a pass keeps under a method.

        Raises:
            UserError: The method cannot be used on this model; training would refuse it with the same message.
            NotMeasuredError: The model cannot run on fake tensors under this method.
        """


@dataclass(frozen=True)
class MeasuredModel:
    """Facts measured on a model that was built on the meta device.

    Attributes:
        parameters: All parameters, in the order of `named_parameters`.
        stages: Order in which a layer uses its parameters, by name inside the layer; those of one input share a number.
        queries_stage: Stage after which attention runs.
        norm_widths: Elements per token that pass through the norms of one layer.
        scores_kept: Times that SDPA on the CPU saves an element for each query and key, because only its plain kernel
            supports what the model needs: 1, or 3 with dropout; otherwise 0.
        meter: Measures what forward passes keep.
    """

    parameters: tuple[Parameter, ...]
    stages: Mapping[str, int]
    queries_stage: int
    norm_widths: int
    scores_kept: int
    meter: KeptBytesMeter

    def supports(self, method: Method) -> bool:
        """Return whether the method can be used on this model and measured."""
        try:
            self.meter.kept(method, CPU_FLOAT32)
        except UserError:
            return False
        return True
