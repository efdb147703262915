"""A model's parts, as plans count them, and what is measured of a model that no description of ours covers.

The measuring needs torch and is done elsewhere (`train/anatomy.py`); what it finds is told in plain numbers here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from packhorse.errors import UserError
from packhorse.recipe.methods import Method


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: As `named_parameters` of the transformers model has it.
        shape: Of a linear layer [outputs, inputs], of an embedding [V, H], of fused experts [E, outputs, inputs].
        linear: Whether it is the weight of a linear layer, and so takes a LoRA adapter.
    """

    name: str
    shape: tuple[int, ...]
    linear: bool = False

    @property
    def size(self) -> int:
        """Number of weights."""
        size = 1
        for side in self.shape:
            size *= side
        return size

    @property
    def module(self) -> str:
        """Name of the module that holds it: without `.weight` and `.bias`, whole for fused experts."""
        return self.name.removesuffix(".weight").removesuffix(".bias")


@dataclass(frozen=True)
class Names:
    """What an architecture calls its parts.

    Attributes:
        embedding: Weight of the token embedding.
        head: Weight of the output head; where that is tied, the embedding's.
        norm: Weight of the last norm.
        layers: What the names of all parameters in decoder layers begin with, before the layer's number.
    """

    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    norm: str = "model.norm.weight"
    layers: str = "model.layers."

    def layer_of(self, name: str) -> int | None:
        """Number of the decoder layer that a parameter or module belongs to; None outside of them."""
        return self.split(name)[0]

    def in_layer(self, name: str) -> str:
        """The name as it is in every layer: `mlp.up_proj.weight`."""
        return self.split(name)[1]

    def split(self, name: str) -> tuple[int | None, str]:
        """Both."""
        if not name.startswith(self.layers):
            return None, name
        number, _, rest = name[len(self.layers) :].partition(".")
        return int(number), rest


LLAMA: Final = Names()


@dataclass(frozen=True)
class Formats:
    """In which numbers, and by which kernels, a forward pass is run; each width in bytes of a number.

    Attributes:
        compute: In matrix products.
        autocast: Whether these are made by autocast.
        base: Of a base weight as the forward pass meets it.
        adapter: Of an adapter's weight as the forward pass meets it.
        quantized: Whether linear layers of the base are quantised.
        on_cuda: Whether CUDA's kernels run.
        varlen: Whether attention is torch's varlen kernel.
        keeps_inputs: Whether linear layers keep their input even where the weight is frozen, as ZeRO-3's own do.
        input_gradients: Whether the first layer's input is asked for a gradient, as it is where layers are recomputed.
        sequence: Ranks that share a row.
        documents: In the row, where something stands before each; else 1.
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


PLAIN: Final = Formats(4, False, 4, 4, False, False, False, False, False, 1, 1)
"""As on a CPU in float32."""


@dataclass(frozen=True)
class Line:
    """Bytes that grow with the tokens of a row.

    Attributes:
        fixed: Whatever their number.
        per_token: For each.
    """

    fixed: float = 0.0
    per_token: float = 0.0

    def at(self, tokens: int) -> int:
        """Bytes with so many tokens, without the fixed ones."""
        return round(self.per_token * tokens)


@dataclass(frozen=True)
class LayerKept:
    """What one decoder layer keeps for the backward pass.

    Attributes:
        attention: By attention itself: queries, keys, values and output.
        rest: By everything else.
        input: Its input, all that is kept where it is recomputed.
    """

    attention: Line
    rest: Line
    input: Line


@dataclass(frozen=True)
class Kept:
    """What a forward pass up to the output head keeps for the backward pass.

    Attributes:
        before: Ahead of the first layer.
        shared: By layers that are not recomputed, of what all of them are given, such as rotary angles.
        layers: From first to last.
        after: Behind the last layer: the last norm.
        width: Bytes of a number of what the output head is given.
        has_grad: Whether the backward pass reaches that.
    """

    before: Line
    shared: Line
    layers: tuple[LayerKept, ...]
    after: Line
    width: int
    has_grad: bool


class NotMeasuredError(UserError):
    """Why a model's parts cannot be told without loading it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"memory and time are not known: {reason}.",
            "they are counted on the model's own forward pass, run without numbers.",
            "name a model of another type, or train it without them.",
        )


class Meter(Protocol):
    """Measures passes of one model without memory; its answers are kept."""

    def kept(self, method: Method, formats: Formats) -> Kept:
        """What a pass keeps under a method.

        Raises:
            UserError: The method cannot be done on this model, in the words that training would say it.
            NotMeasuredError: The model cannot be run without numbers under this method.
        """


@dataclass(frozen=True)
class Anatomy:
    """What was found in a model that was made without memory.

    Attributes:
        parameters: All of them, as `named_parameters` lists them.
        stages: By name below the layer, in which order parameters are met: those of one input share a number.
        queries_stage: The stage after which attention runs.
        norm_widths: Numbers that go through the norms of one layer, for each token.
        scores_kept: How often SDPA keeps a number for each query and key on the CPU, where none of its kernels but the
            plain one takes what the model asks for: once, or three times with dropout.
        meter: Measures what passes keep.
    """

    parameters: tuple[Parameter, ...]
    stages: Mapping[str, int]
    queries_stage: int
    norm_widths: int
    scores_kept: int
    meter: Meter

    def takes(self, method: Method) -> bool:
        """Whether the method can be done on this model, and measured."""
        try:
            self.meter.kept(method, PLAIN)
        except UserError:
            return False
        return True
