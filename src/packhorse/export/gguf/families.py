"""Model families that llama.cpp runs: their parameters in a GGUF file, and what is done to their weights.

Source: llama.cpp's converter (MIT, github.com/ggml-org/llama.cpp, `conversion/`), as far as weights and keys go.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from numpy.typing import NDArray
from transformers import PretrainedConfig

from packhorse.errors import UserError

Weights = NDArray[np.float32]
ROPE_FACTORS: Final = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """How a family is written.

    Attributes:
        architecture: llama.cpp's architecture.
        write: Write the family's own parameters.
        change: Change the weights of a tensor (name in Hugging Face form, weights, configuration).
        bound: Largest difference of log-probabilities of the f32 file to transformers, nats (docs/export.md).
    """

    architecture: MODEL_ARCH
    write: Callable[[GGUFWriter, PretrainedConfig], None]
    change: Callable[[str, Weights, PretrainedConfig], Weights]
    bound: float = 5e-4


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a configuration.

    Raises:
        UserError: llama.cpp does not run the architecture, or computes a feature of this model differently.
    """
    name = (config.architectures or [type(config).__name__])[0]
    if name not in FAMILIES:
        raise UserError(
            f"a model of the architecture {name} cannot be written as GGUF.",
            f"the converter knows {', '.join(sorted(FAMILIES))}.",
            "export it as a Hugging Face folder: packhorse export RUN.",
        )
    family = FAMILIES[name]
    reason = _difference(config)
    if reason:
        raise UserError(
            f"this {name} cannot be written as GGUF: {reason}.",
            "llama.cpp would compute something else than was trained, without a message.",
            "export it as a Hugging Face folder: packhorse export RUN.",
        )
    return family


def write_parameters(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """Write the sizes, the rotary embedding and what is the family's own."""
    window = _window(config) if config.architectures[0] in CUT_AT_WINDOW else None
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_width(config))
    writer.add_value_length(head_width(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = rope_of(config)
    writer.add_rope_dimension_count(int(head_width(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    family_of(config).write(writer, config)


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """Return the parameters of the rotary embedding, for Gemma 3 those of its full attention."""
    rope: dict[str, Any] = config.rope_parameters
    whole: dict[str, Any] = rope.get("full_attention", rope)
    return whole


def head_width(config: PretrainedConfig) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


def rope_factors(config: PretrainedConfig) -> dict[str, Weights]:
    """Return tensors of factors that divide the rotary frequencies, by name; float32 [head width / 2] each."""
    rope = rope_of(config)
    if rope["rope_type"] == "llama3":
        return {ROPE_FACTORS: _llama3_factors(rope, head_width(config))}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32) for name in ("long", "short")
        }
    return {}


def _llama3_factors(rope: dict[str, Any], width: int) -> Weights:
    """Return the factors of Llama 3.1's scaling (transformers' `_compute_llama3_parameters`)."""
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float64) / width)
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    share = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - share) / rope["factor"] + share), np.float32)


def _difference(config: PretrainedConfig) -> str:
    """Return what llama.cpp would compute differently; empty if nothing is known."""
    rope = rope_of(config)
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    checks = {
        f"its rotary embedding is scaled by {rope['rope_type']}": rope["rope_type"]
        not in ("default", "linear", "llama3", "yarn", "longrope"),
        f"its activation is {activation}": activation not in ("silu", "gelu_pytorch_tanh"),
        "its experts are not normalised (norm_topk_prob)": getattr(config, "norm_topk_prob", True) is False,
        "some of its layers have no experts": bool(getattr(config, "mlp_only_layers", None))
        or getattr(config, "decoder_sparse_step", 1) != 1,
        "its attention scale is not that of the head width": getattr(config, "query_pre_attn_scalar", None)
        not in (None, head_width(config)),
        "its layers with a sliding window are not five of six": getattr(config, "model_type", "") == "gemma3_text"
        and [kind == "sliding_attention" for kind in config.layer_types]
        != [bool((layer + 1) % 6) for layer in range(config.num_hidden_layers)],
    }
    return "; ".join(reason for reason, differs in checks.items() if differs)


def _window(config: PretrainedConfig) -> int | None:
    """Return the tokens that attention sees, where not all of them."""
    window: int | None = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None


def _nothing(_: GGUFWriter, __: PretrainedConfig) -> None:
    """Write nothing more."""


def _unchanged(_: str, weights: Weights, __: PretrainedConfig) -> Weights:
    return weights


def _interleaved(name: str, weights: Weights, config: PretrainedConfig) -> Weights:
    """Interleave the two halves of each head in q and k: llama.cpp rotates neighbours for this architecture."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in heads if f".{part}." in name), None)
    if count is None:
        return weights
    halves = weights.reshape(count, 2, -1, *weights.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weights.shape)


def _write_mixtral(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)


def _write_qwen3_moe(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _write_gemma3(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _plus_one(name: str, weights: Weights, _: PretrainedConfig) -> Weights:
    """Gemma's norms multiply by 1 + weight."""
    return weights + 1 if name.endswith("norm.weight") else weights


def _write_phi3(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_sliding_window(_window(config) or 0)
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    if rope_of(config)["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)


LLAMA: Final = Family(MODEL_ARCH.LLAMA, _nothing, _interleaved)
FAMILIES: Final = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "MixtralForCausalLM": Family(MODEL_ARCH.LLAMA, _write_mixtral, _interleaved),
    "Qwen2ForCausalLM": Family(MODEL_ARCH.QWEN2, _nothing, _unchanged),
    "Qwen3ForCausalLM": Family(MODEL_ARCH.QWEN3, _nothing, _unchanged),
    "Qwen3MoeForCausalLM": Family(MODEL_ARCH.QWEN3MOE, _write_qwen3_moe, _unchanged),
    "Gemma3ForCausalLM": Family(MODEL_ARCH.GEMMA3, _write_gemma3, _plus_one, bound=5e-3),
    "Phi3ForCausalLM": Family(MODEL_ARCH.PHI3, _write_phi3, _unchanged),
}
# llama.cpp has no sliding window for these; within the window both compute the same.
CUT_AT_WINDOW: Final = ("MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
