"""Architectures that Packhorse cannot train correctly: refused by name before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Final

from packhorse.errors import UserError
from packhorse.model_spec.configuration import Configuration, find_configuration
from packhorse.recipe.config_class import causal_types
from packhorse.recipe.schema import Recipe

# model_type -> what its layers do that packed attention or the chunked loss does not, and a model to use instead.
_REFUSED: Final[Mapping[str, tuple[str, str]]] = {
    "gemma2": (
        "caps the scores of its attention, which packed attention does not compute",
        "model.id google/gemma-3-1b-it or google/gemma-7b-it",
    ),
    "gpt_oss": (
        "has attention sinks, which packed attention does not compute",
        "model.id Qwen/Qwen3-30B-A3B-Instruct-2507",
    ),
    "falcon": (
        "does not run through transformers' attention interface, so packed documents would see each other",
        "model.id Qwen/Qwen3-8B",
    ),
    "cohere": (
        "scales its logits, which the chunked loss does not compute",
        "model.id Qwen/Qwen3-8B",
    ),
}


def check_model(recipe: Recipe) -> None:
    """Refuse a model that would be trained incorrectly, as far as its configuration is on this machine.

    The parity probe before the first step finds what only the loaded model shows.

    Raises:
        UserError: The architecture is not supported, reads more than text, or balances its experts by a loss.
    """
    configuration = find_configuration(recipe)
    if configuration is None:
        return
    kind = str(configuration.get("model_type"))
    if kind in _REFUSED:
        why, instead = _REFUSED[kind]
        raise UserError(f"the model is a {kind}.", f"it {why}.", f"set {instead}.")
    _refuse_other_inputs(kind, configuration)
    text = text_part(configuration)
    if text.get("attn_logit_softcapping"):
        raise uncomputed("softcap")
    if kind not in causal_types() and not recipe.model.trust_remote_code:
        if "auto_map" in configuration:
            raise untrusted_code(str(recipe.model.path or recipe.model.id))
        raise UserError(
            f"the model's config.json has model_type {kind}, and transformers {version('transformers')} has no causal "
            "language model of this type.",
            "there is no code that could run it.",
            "set model.id or model.path to a model of another type, or install a newer Packhorse.",
        )
    if configuration.get("output_router_logits"):
        raise UserError(
            "the model's configuration sets output_router_logits, which adds a loss that balances its experts.",
            "Packhorse trains on the loss of the tokens alone and would ignore it.",
            "set output_router_logits to false in config.json or model.config.",
        )


def _refuse_other_inputs(kind: str, configuration: Configuration) -> None:
    parts = [name for name in ("vision_config", "audio_config") if configuration.get(name)]
    if parts:
        raise UserError(
            f"the model is a {kind} with {' and '.join(parts)}: it reads more than text.",
            "rows are text, so those weights would never have a gradient, and distributed engines wait for one.",
            "set model.id to a text model, such as google/gemma-3-1b-it or Qwen/Qwen3-8B.",
        )


def text_part(configuration: Configuration) -> Configuration:
    """Return the configuration of the language model, which multimodal models keep in `text_config`."""
    return configuration.get("text_config") or configuration


def uncomputed(name: str) -> UserError:
    """Return the error for a part of attention that packed attention does not compute."""
    return UserError(
        f"this architecture's attention uses {name}, which Packhorse's packed attention does not compute.",
        "without it, another model would silently be trained.",
        "choose a model without it (Llama, Qwen, Mistral, Phi and most others).",
    )


def own_attention(kind: str) -> UserError:
    """Return the error for a model none of whose layers runs its attention through transformers' interface."""
    return UserError(
        f"no layer of a {kind} model runs its attention through transformers' interface.",
        "attention then cannot know where packed documents end, and would silently mix them.",
        "set model.id to a model of another type, such as Qwen/Qwen3-8B.",
    )


def untrusted_code(source: str) -> UserError:
    """Return the error for a model with its own code that the recipe does not trust."""
    return UserError(
        f"the model {source} needs its own Python code, and model.trust_remote_code is false.",
        "that code could do anything that you may do on this machine.",
        "read it, then set model.trust_remote_code: true; or choose a model type that transformers has.",
    )


def require_embeddings(rows: int, vocab_size: int, is_fresh: bool) -> None:
    """Refuse a model with fewer embeddings than its tokenizer has tokens; more do no harm.

    Raises:
        UserError: A token would have no embedding.
    """
    if rows >= vocab_size:
        return
    fix = (
        f"set model.config.vocab_size to {vocab_size}, or remove it: it then is the tokenizer's size."
        if is_fresh
        else "remove model.tokenizer, so that the model's own tokenizer is used."
    )
    raise UserError(
        f"the model has {rows} embeddings and the tokenizer {vocab_size} tokens.",
        "a token without an embedding ends the run with an index error, or trains on another token.",
        fix,
    )


def refuse_dropout(dropout: float) -> None:
    """Refuse dropout, which the varlen kernel does not have.

    Raises:
        UserError: The model's attention has dropout.
    """
    if dropout:
        raise UserError(
            f"the model's attention_dropout is {dropout}, which the varlen kernel does not have.",
            "without it, another model would silently be trained.",
            "set model.attention to sdpa, or attention_dropout to 0 in the model's config.json.",
        )
