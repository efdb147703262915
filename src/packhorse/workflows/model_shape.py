"""Shape of a recipe's model from its config, before any weight is loaded, or the reason why it is not known."""

from __future__ import annotations

import json
from dataclasses import dataclass

from packhorse.model_spec.configuration import CONFIG_FILE, Configuration, find_configuration
from packhorse.model_spec.measured_model import CPU_FLOAT32, NotMeasuredError
from packhorse.model_spec.parameters import Shape, read_shape
from packhorse.model_spec.supported import check_model
from packhorse.model_spec.trainable import count_shape
from packhorse.recipe.schema import Recipe


@dataclass(frozen=True)
class Unknown:
    """Reason why a model, its memory or its time is not known."""

    reason: str


def known_shape(recipe: Recipe, vocab_size: int | None) -> Shape | Unknown:
    """Return the shape of the recipe's model, if all that its method trains can be counted on it.

    Args:
        recipe: Recipe with a model and a method.
        vocab_size: Vocabulary of the prepared data's tokenizer; None looks for the tokenizer if the model is fresh.

    Raises:
        UserError: Training refuses the model, or the method on it.
    """
    configuration = find_configuration(recipe, vocab_size)
    if configuration is None:
        return Unknown(_where_configuration_is(recipe))
    if recipe.model.config is not None and "vocab_size" not in configuration:
        # Only here: no other plan reads a tokenizer for its model.
        from packhorse.data.resolve import vocabulary_size

        size = vocabulary_size(recipe)
        if size is None:
            return Unknown(
                f"a fresh model takes the vocabulary of its tokenizer, and {recipe.model.tokenizer} has no "
                "tokenizer.json on this machine: run `packhorse prepare` or set model.config.vocab_size"
            )
        configuration = {**configuration, "vocab_size": size}
    shape = read_shape(configuration)
    if shape is None:
        return _measured_shape(recipe, configuration)
    if count_shape(shape, recipe.method) is None:
        return Unknown(
            f"peft chooses what {recipe.method.kind} trains of a {shape.family}; set method.target to choose it"
        )
    return shape


def _measured_shape(recipe: Recipe, configuration: Configuration) -> Shape | Unknown:
    """Return the shape of a model without a description: build it without memory, and count."""
    check_model(recipe)
    # Only here: described families need no torch.
    from packhorse.estimate.measure.fake_tensors import measure_shape

    try:
        shape = measure_shape(json.dumps(configuration, sort_keys=True))
        assert shape.measured_model is not None
        shape.measured_model.meter.kept(recipe.method, CPU_FLOAT32)
        if count_shape(shape, recipe.method) is None:
            return Unknown(f"peft chooses what {recipe.method.kind} trains of a {shape.family}")
    except NotMeasuredError as error:
        return Unknown(error.reason)
    return shape


def _where_configuration_is(recipe: Recipe) -> str:
    model = recipe.model
    if model.path is not None:
        return f"{model.path} has no readable {CONFIG_FILE}: copy the {CONFIG_FILE} of the model into that folder"
    return f"{model.id} has no {CONFIG_FILE} on this machine: run `hf download {model.id} {CONFIG_FILE}`"
