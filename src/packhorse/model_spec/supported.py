"""Architectures that Packhorse cannot train correctly: refused by name before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from packhorse.errors import UserError
from packhorse.model_spec.configuration import Configuration, find_configuration
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
