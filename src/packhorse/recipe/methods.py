"""The `method` section: full fine-tuning, partial fine-tuning, and adapters on frozen weights.

Adapters are peft's and quantised storage is bitsandbytes'; fields have the names of the papers.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, PositiveInt

from packhorse.yaml_source.schema import Fraction, PositiveFloat, Section

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
    """Train the last N layers."""
    train: list[str] = []
    """Also train the weights whose names match one of these patterns, such as `lm_head.*` or `*.mlp.*`."""
    freeze: list[str] = []
    """Freeze the weights whose names match one of these patterns; if given alone, all others are trained."""


class Adapter(Section):
    """Base of the adapter methods: the base weights are frozen, and only the adapter is trained and saved."""

    trains_base: ClassVar[bool] = False


class LoraMethod(Adapter):
    """Train low-rank adapters on frozen weights (Hu et al. 2021, arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 32
    """Rank r of the adapters."""
    alpha: PositiveFloat = 64.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: Fraction = 0.05
    """Dropout on the adapter's input; 0 by default where the objective compares two answers."""
    target: Literal["all-linear"] | list[str] = "all-linear"
    """Modules that get an adapter: all linear layers except the output head, or a list of names."""
    experts: bool = False
    """Also train adapters on the experts of a mixture-of-experts model, which are not linear modules."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank, so that a high rank learns as well as a low one (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train magnitude and direction separately (Liu et al. 2024, arXiv 2402.09353): better at low rank, slower."""
    learning_rate_ratio: PositiveFloat = 1.0
    """LoRA+: learning rate of the B matrices over that of the A matrices (Hayou et al. 2024, arXiv 2402.12354)."""
    initialization: Initialization = "default"
    """Initial adapters. `pissa`: from the largest singular values; `loftq`: to compensate 4-bit quantisation."""
    train_also: list[str] = []
    """Modules that are trained whole and saved with the adapter, such as `lm_head`."""


class QloraMethod(LoraMethod):
    """Train LoRA adapters on weights stored in 4 or 8 bits (Dettmers et al. 2023, arXiv 2305.14314)."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    quantization: Literal["nf4", "fp4", "int8"] = "nf4"
    """Type of the frozen weights; `int8`: one scale per row (arXiv 2208.07339), inputs stay in 16 bits."""
    double_quantization: bool = True
    """Also quantise the quantisation constants: about 0.4 bits less per weight; for 4-bit types only."""


class PromptTuningMethod(Adapter):
    """Train embeddings that are put before each row (Lester et al. 2021, arXiv 2104.08691)."""

    kind: Literal["prompt_tuning"] = "prompt_tuning"
    virtual_tokens: PositiveInt = 20
    """Number of trained embeddings."""
    text: str | None = None
    """Text whose embeddings are the start; default: random words of the vocabulary."""


class PrefixTuningMethod(Adapter):
    """Train keys and values that are put before each row in every layer (Li and Liang 2021, arXiv 2101.00190)."""

    kind: Literal["prefix_tuning"] = "prefix_tuning"
    virtual_tokens: PositiveInt = 20
    """Number of trained positions."""


class Ia3Method(Adapter):
    """Train a factor for each channel of keys, values and MLP (Liu et al. 2022, arXiv 2205.05638)."""

    kind: Literal["ia3"] = "ia3"
    target: Literal["auto"] | list[str] = "auto"
    """Names of the modules whose output is scaled; `auto`: the modules that peft lists for the architecture."""
    feedforward: list[str] = []
    """Modules of `target` whose input is scaled instead of their output."""


AdapterMethod = LoraMethod | QloraMethod | PromptTuningMethod | PrefixTuningMethod | Ia3Method


def _kind_alone(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


Method = Annotated[FullMethod | PartialMethod | AdapterMethod, Discriminator("kind"), BeforeValidator(_kind_alone)]
