"""How many parameters a recipe's model has and how many of them are trained: told before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from packhorse.errors import UserError
from packhorse.model_spec.configuration import CONFIG_FILE, Configuration, find_configuration
from packhorse.model_spec.measured_model import CPU_FLOAT32, NotMeasuredError
from packhorse.model_spec.parameters import Shape, read_shape
from packhorse.model_spec.supported import check_model
from packhorse.model_spec.trainable import ParameterCounts, count_shape
from packhorse.recipe.schema import Recipe

LATER = "counted when the model is loaded"


@dataclass(frozen=True)
class Unknown:
    """Why memory and time cannot be said."""

    reason: str


def show_parameters(console: Console, recipe: Recipe, vocab_size: int | None) -> None:
    """Prints a row for each kind of module; nothing where they cannot be counted ahead."""
    counts = _counts(recipe, vocab_size)
    if not isinstance(counts, Unknown):
        console.print()
        console.print(_table(counts))


def parameter_lines(recipe: Recipe, vocab_size: int | None) -> list[tuple[str, str]]:
    """The counts as label and text, or why they are not known yet.

    Args:
        recipe: Its model and method.
        vocab_size: Size of the tokenizer, where it is known: that of a fresh model.
    """
    counts = _counts(recipe, vocab_size)
    if isinstance(counts, Unknown):
        return [("parameters", f"{LATER}: {counts.reason}")]
    share = counts.trainable / counts.total
    of = f"{share:.2%}" if counts.total == counts.base else f"{share:.2%} of {counts.total:,} with the adapter"
    return [("parameters", f"{counts.base:,}"), ("trainable", f"{counts.trainable:,} ({of})")]


def _counts(recipe: Recipe, vocab_size: int | None) -> ParameterCounts | Unknown:
    if recipe.model.new_tokens:
        return Unknown("whether its embedding has rows to spare for model.new_tokens is seen then")
    try:
        shape = known_shape(recipe, vocab_size)
    except UserError as error:
        return Unknown(error.mistakes[0].fact)
    if isinstance(shape, Unknown):
        return shape
    counts = count_shape(shape, recipe.method)
    assert counts is not None, "known_shape asks for it"
    return counts


def known_shape(recipe: Recipe, vocab_size: int | None) -> Shape | Unknown:
    """Shape of the recipe's model, on which all of its method can be counted; or why it is not known.

    Args:
        recipe: Its model and method.
        vocab_size: Of the prepared data's tokenizer; None looks for the tokenizer where a fresh model takes its size.

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
                f"a fresh model's vocabulary is its tokenizer's, and {recipe.model.tokenizer} has no tokenizer.json on "
                "this machine: `packhorse prepare` fetches it, or model.config.vocab_size says it"
            )
        configuration = {**configuration, "vocab_size": size}
    shape = read_shape(configuration)
    if shape is None:
        return _built(recipe, configuration)
    if count_shape(shape, recipe.method) is None:
        return Unknown(f"what {recipe.method.kind} trains of a {shape.family} is peft's choice; method.target says it")
    return shape


def _built(recipe: Recipe, configuration: Configuration) -> Shape | Unknown:
    """Of a model that no description covers: made without memory, and looked at."""
    check_model(recipe)
    # Only here: families that are described need no torch.
    from packhorse.estimate.measure.fake_tensors import measure_shape

    try:
        shape = measure_shape(json.dumps(configuration, sort_keys=True))
        if count_shape(shape, recipe.method) is None:
            return Unknown(f"what {recipe.method.kind} trains of a {shape.family} is peft's choice")
        assert shape.measured_model is not None
        shape.measured_model.meter.kept(recipe.method, CPU_FLOAT32)
    except NotMeasuredError as error:
        return Unknown(error.reason)
    return shape


def _where_configuration_is(recipe: Recipe) -> str:
    model = recipe.model
    if model.path is not None:
        return f"{model.path} has no {CONFIG_FILE} that can be read: copy the model's own into that folder"
    return f"{model.id} has no {CONFIG_FILE} on this machine: `hf download {model.id} {CONFIG_FILE}` fetches it"


def _table(counts: ParameterCounts) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("module")
    for heading in ("count", "shape", "parameters", "trainable"):
        table.add_column(heading, justify="right")
    for module in counts.modules:
        table.add_row(
            module.name,
            f"{module.count:,}",
            " × ".join(f"{side:,}" for side in module.shape),
            f"{module.total:,}",
            f"{module.trainable:,}" if module.trainable else "-",
        )
    return table
