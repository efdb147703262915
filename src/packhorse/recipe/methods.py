"""What is trained: every weight, some of them, or an adapter beside frozen weights.

Adapters are peft's, quantised storage is bitsandbytes'; the fields carry the names that the papers use.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, PositiveInt

from packhorse.recipe.section import Fraction, PositiveFloat, Section

Initialization = Literal["default", "gaussian", "orthogonal", "olora", "pissa", "loftq"]


class FullMethod(Section):
    """Train every weight."""

    trains_base: ClassVar[bool] = True
    kind: Literal["full"] = "full"


class PartialMethod(Section):
    """Train some of the weights and freeze the others; the result is a whole model."""

    trains_base: ClassVar[bool] = True
    kind: Literal["partial"] = "partial"
    last_layers: PositiveInt | None = None
    """Train the last so many layers."""
    train: list[str] = []
    """Train also the weights whose names fit one of these patterns, such as `lm_head.*` or `*.mlp.*`."""
    freeze: list[str] = []
    """Freeze weights whose names fit one of these patterns; alone, all others are trained."""


class Adapter(Section):
    """What is trained stands beside frozen weights, and is kept alone."""

    trains_base: ClassVar[bool] = False


class LoraMethod(Adapter):
    """Train low-rank adapters beside frozen weights (Hu et al. 2021, arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 32
    """Rank r of the adapters."""
    alpha: PositiveFloat = 64.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: Fraction = 0.05
    """Dropout on the adapter's input."""
    target: Literal["all-linear"] | list[str] = "all-linear"
    """Modules that get an adapter: all linear layers but the output head, or names."""
    experts: bool = False
    """Adapters also on the experts of a mixture-of-experts model, which are no linear modules."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank, so that a high rank learns as well as a low one (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train magnitude and direction apart (Liu et al. 2024, arXiv 2402.09353): better at low rank, slower."""
    learning_rate_ratio: PositiveFloat = 1.0
    """LoRA+: learning rate of the B matrices over that of the A matrices (Hayou et al. 2024, arXiv 2402.12354)."""
    initialization: Initialization = "default"
    """Start of the adapters. `pissa`: from the largest singular values; `loftq`: so as to mend 4-bit weights."""
    train_also: list[str] = []
    """Modules that are trained whole and kept with the adapter, such as `lm_head`."""


class QloraMethod(LoraMethod):
    """LoRA beside weights stored in 4 or 8 bits (Dettmers et al. 2023, arXiv 2305.14314)."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    quantization: Literal["nf4", "fp4", "int8"] = "nf4"
    """Type of the frozen weights; `int8` is LLM.int8() (arXiv 2208.07339) without its outlier columns."""
    double_quantization: bool = True
    """Quantise the quantisation constants too: about 0.4 bits less per weight; of 4-bit types only."""


class PromptTuningMethod(Adapter):
    """Train embeddings that stand before each row (Lester et al. 2021, arXiv 2104.08691)."""

    kind: Literal["prompt_tuning"] = "prompt_tuning"
    virtual_tokens: PositiveInt = 20
    """Number of trained embeddings."""
    text: str | None = None
    """Start from the embeddings of this text; absent, from those of words drawn from the vocabulary."""


class PrefixTuningMethod(Adapter):
    """Train keys and values that stand before each row in every layer (Li and Liang 2021, arXiv 2101.00190)."""

    kind: Literal["prefix_tuning"] = "prefix_tuning"
    virtual_tokens: PositiveInt = 20
    """Number of trained positions."""


class Ia3Method(Adapter):
    """Train a factor for each channel of keys, values and MLP (Liu et al. 2022, arXiv 2205.05638)."""

    kind: Literal["ia3"] = "ia3"
    target: Literal["auto"] | list[str] = "auto"
    """Modules whose output is scaled, by name; `auto`: those that peft names for the architecture."""
    feedforward: list[str] = []
    """Those of `target` whose input is scaled in place of their output."""


AdapterMethod = LoraMethod | QloraMethod | PromptTuningMethod | PrefixTuningMethod | Ia3Method


def _kind_alone(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


Method = Annotated[FullMethod | PartialMethod | AdapterMethod, Discriminator("kind"), BeforeValidator(_kind_alone)]
