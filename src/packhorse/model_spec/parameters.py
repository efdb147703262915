"""Every parameter of a model by name and shape, from its configuration alone: no torch, no weights.

The families below are described as transformers builds them; the tests compare each name and shape with the model that
transformers builds on the meta device. A model of another family is measured (`estimate/measure/fake_tensors.py`).

Letters: V vocabulary, H hidden width, I width of the MLP, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from packhorse.model_spec.configuration import Configuration
from packhorse.model_spec.measured_model import LLAMA, MeasuredModel, Names, Parameter


@dataclass(frozen=True)
class _Family:
    """How a family differs from Llama.

    Attributes:
        defaults: Values of the configuration's class for keys that config.json may omit.
        query_bias: Whether queries, keys and values have biases, whatever the configuration sets.
        head_norms: Whether each head's queries and keys have a norm.
        fused: Whether queries, keys and values are one layer, and gate and up another.
        norms: Names of the norms of width H in a layer.
    """

    defaults: Mapping[str, Any]
    query_bias: bool = False
    head_norms: bool = False
    fused: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")


_UNTIED: Final[Mapping[str, Any]] = {"tie_word_embeddings": False}
_TIED: Final[Mapping[str, Any]] = {"tie_word_embeddings": True}
FAMILIES: Final[Mapping[str, _Family]] = {
    "llama": _Family(_UNTIED),
    "mistral": _Family({**_UNTIED, "num_key_value_heads": 8}),
    "mixtral": _Family({**_UNTIED, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2": _Family({**_UNTIED, "num_key_value_heads": 32}, query_bias=True),
    "qwen3": _Family({**_UNTIED, "num_key_value_heads": 32, "head_dim": 128}, head_norms=True),
    "qwen3_moe": _Family(
        {
            **_UNTIED,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
        },
        head_norms=True,
    ),
    "gemma": _Family({**_TIED, "num_key_value_heads": 16, "head_dim": 256}),
    "gemma3_text": _Family(
        {**_TIED, "num_key_value_heads": 4, "head_dim": 256},
        head_norms=True,
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    ),
    "phi3": _Family(_UNTIED, fused=True),
}
_NEEDED: Final = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Shape:
    """The numbers of a configuration that determine the parameters.

    Attributes:
        family: `model_type` of the configuration.
        vocabulary: V.
        hidden: H.
        mlp_width: I.
        layers: Number of decoder layers.
        heads: Query heads.
        key_value_heads: Key/value heads.
        head_width: Width of one attention head.
        tied: Whether the output head is the embedding.
        attention_bias: Whether attention's linear layers have biases.
        mlp_bias: Whether the MLP's linear layers have biases.
        experts: E in a layer that has experts, otherwise 0.
        active_experts: Experts per token.
        expert_width: Width of one expert's MLP.
        sparse_layers: Indices of layers that have experts in place of an MLP.
        windows: For each layer, how many tokens attention looks back; None: to the document's start.
        names: Names of its parts.
        measured_model: Measured facts, for a family that is not described here.
    """

    family: str
    vocabulary: int
    hidden: int
    mlp_width: int
    layers: int
    heads: int
    key_value_heads: int
    head_width: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    experts: int
    active_experts: int
    expert_width: int
    sparse_layers: frozenset[int]
    windows: tuple[int | None, ...]
    names: Names = LLAMA
    measured_model: MeasuredModel | None = None


def read_shape(configuration: Configuration | None) -> Shape | None:
    """Return the shape; None for a family that is not described here, or where a number is missing."""
    if configuration is None or configuration.get("model_type") not in FAMILIES:
        return None
    name = str(configuration["model_type"])
    known = {key: value for key, value in configuration.items() if value is not None}
    fields = {**FAMILIES[name].defaults, **known}
    if any(not isinstance(fields.get(key), int) for key in _NEEDED):
        return None
    layers, heads = fields["num_hidden_layers"], fields["num_attention_heads"]
    experts = fields.get({"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}.get(name, ""), 0)
    if name == "qwen3_moe":
        # transformers 5 writes another name of the key.
        experts = known.get("num_experts", known.get("num_local_experts", experts))
    dense, every = fields.get("mlp_only_layers", ()), fields.get("decoder_sparse_step", 1)
    return Shape(
        family=name,
        vocabulary=fields["vocab_size"],
        hidden=fields["hidden_size"],
        mlp_width=fields["intermediate_size"],
        layers=layers,
        heads=heads,
        key_value_heads=fields.get("num_key_value_heads", heads),
        head_width=fields.get("head_dim", fields["hidden_size"] // heads),
        tied=fields["tie_word_embeddings"],
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False) and name == "llama",
        experts=experts,
        active_experts=fields["num_experts_per_tok"] if experts else 0,
        expert_width=fields["moe_intermediate_size"] if name == "qwen3_moe" else fields["intermediate_size"],
        sparse_layers=frozenset(at for at in range(layers) if experts and at not in dense and (at + 1) % every == 0),
        windows=_windows(name, configuration, layers),
    )


def _windows(family: str, configuration: Configuration, layers: int) -> tuple[int | None, ...]:
    """Return the windows as transformers' configuration classes complete what config.json omits."""
    # A Mistral with null has no window; one without the key has the class's default.
    window = configuration.get("sliding_window", {"mistral": 4096, "gemma3_text": 4096}.get(family))
    slides = family in ("mistral", "mixtral", "phi3", "gemma3_text") or configuration.get("use_sliding_window", False)
    if window is None or not slides:
        return (None,) * layers
    kinds = configuration.get("layer_types")
    if kinds is None and family == "gemma3_text":
        pattern = configuration.get("sliding_window_pattern", 6)
        kinds = ["full_attention" if (at + 1) % pattern == 0 else "sliding_attention" for at in range(layers)]
    elif kinds is None:
        first = configuration.get("max_window_layers", 28) if family in ("qwen2", "qwen3") else 0
        kinds = ["sliding_attention" if at >= first else "full_attention" for at in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def norm_widths(shape: Shape) -> int:
    """Return the elements per token that pass through the norms of one layer."""
    if shape.measured_model is not None:
        return shape.measured_model.norm_widths
    family = FAMILIES[shape.family]
    heads = (shape.heads + shape.key_value_heads) * shape.head_width if family.head_norms else 0
    return len(family.norms) * shape.hidden + heads


def list_parameters(shape: Shape) -> list[Parameter]:
    """List every parameter in the order of the transformers model's `named_parameters`, without a tied head."""
    if shape.measured_model is not None:
        return list(shape.measured_model.parameters)
    listed = [Parameter("model.embed_tokens.weight", (shape.vocabulary, shape.hidden))]
    # Layers with experts are alike, and so are those without.
    dense, sparse = list(_layer(shape, False)), list(_layer(shape, True)) if shape.sparse_layers else []
    for layer in range(shape.layers):
        parts = sparse if layer in shape.sparse_layers else dense
        listed += [Parameter(f"model.layers.{layer}.{part.name}", part.shape, part.linear) for part in parts]
    listed.append(Parameter("model.norm.weight", (shape.hidden,)))
    if not shape.tied:
        listed.append(Parameter("lm_head.weight", (shape.vocabulary, shape.hidden)))
    return listed


def _layer(shape: Shape, sparse: bool) -> Iterator[Parameter]:
    yield from _attention(shape)
    yield from _experts(shape) if sparse else _mlp(shape)
    for norm in FAMILIES[shape.family].norms:
        yield Parameter(f"{norm}.weight", (shape.hidden,))


def _attention(shape: Shape) -> Iterator[Parameter]:
    family = FAMILIES[shape.family]
    query, key_value = shape.heads * shape.head_width, shape.key_value_heads * shape.head_width
    if family.fused:
        yield from _linear("self_attn.o_proj", shape.hidden, query, bias=False)
        yield from _linear("self_attn.qkv_proj", query + 2 * key_value, shape.hidden, bias=False)
        return
    # Mistral's configuration classes ignore the key, and its layers have no biases.
    bias = shape.attention_bias and shape.family not in ("mistral", "mixtral", "qwen2")
    for name, outputs in (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)):
        yield from _linear(f"self_attn.{name}", outputs, shape.hidden, bias=bias or family.query_bias)
    yield from _linear("self_attn.o_proj", shape.hidden, query, bias=bias)
    if family.head_norms:
        yield Parameter("self_attn.q_norm.weight", (shape.head_width,))
        yield Parameter("self_attn.k_norm.weight", (shape.head_width,))


def _mlp(shape: Shape) -> Iterator[Parameter]:
    width, hidden = shape.mlp_width, shape.hidden
    if FAMILIES[shape.family].fused:
        yield from _linear("mlp.gate_up_proj", 2 * width, hidden, bias=False)
    else:
        yield from _linear("mlp.gate_proj", width, hidden, bias=shape.mlp_bias)
        yield from _linear("mlp.up_proj", width, hidden, bias=shape.mlp_bias)
    yield from _linear("mlp.down_proj", hidden, width, bias=shape.mlp_bias)


def _experts(shape: Shape) -> Iterator[Parameter]:
    # transformers stores all experts of a layer in two tensors; the router is a weight, not a linear layer.
    yield Parameter("mlp.experts.gate_up_proj", (shape.experts, 2 * shape.expert_width, shape.hidden))
    yield Parameter("mlp.experts.down_proj", (shape.experts, shape.hidden, shape.expert_width))
    yield Parameter("mlp.gate.weight", (shape.experts, shape.hidden))


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (outputs, inputs), linear=True)
    if bias:
        yield Parameter(f"{name}.bias", (outputs,))
