"""Number of parameters of a recipe's model, and how many of them are trained."""

from __future__ import annotations

from rich.console import Console

from packhorse.cli.show.text import plain_table
from packhorse.errors import UserError
from packhorse.model_spec.trainable import ParameterCounts, count_shape
from packhorse.recipe.schema import Recipe
from packhorse.workflows.model_shape import Unknown, known_shape


def show_parameters(console: Console, recipe: Recipe, vocab_size: int | None) -> None:
    """Print one row per kind of module; nothing if the parameters cannot be counted yet."""
    counts = _counts(recipe, vocab_size)
    if isinstance(counts, Unknown):
        return
    figures = ("count", "shape", "parameters", "trainable")
    table = plain_table("module", *figures, right=figures)
    for module in counts.modules:
        shape = " × ".join(f"{side:,}" for side in module.shape)
        trainable = f"{module.trainable:,}" if module.trainable else "-"
        table.add_row(module.name, f"{module.count:,}", shape, f"{module.total:,}", trainable)
    console.print()
    console.print(table)


def parameter_lines(recipe: Recipe, vocab_size: int | None) -> list[tuple[str, str]]:
    """Return the counts as label and text, or why they are not known yet.

    Args:
        recipe: Recipe with a model and a method.
        vocab_size: Size of the tokenizer, if known; a fresh model takes it.
    """
    counts = _counts(recipe, vocab_size)
    if isinstance(counts, Unknown):
        return [("parameters", f"counted when the model is loaded: {counts.reason}")]
    share = counts.trainable / counts.total
    of = f"{share:.2%}" if counts.total == counts.base else f"{share:.2%} of {counts.total:,} with the adapter"
    return [("parameters", f"{counts.base:,}"), ("trainable", f"{counts.trainable:,} ({of})")]


def _counts(recipe: Recipe, vocab_size: int | None) -> ParameterCounts | Unknown:
    if recipe.model.new_tokens:
        return Unknown("only the loaded model shows whether its embedding has free rows for model.new_tokens")
    try:
        shape = known_shape(recipe, vocab_size)
    except UserError as error:
        return Unknown(error.mistakes[0].fact)
    if isinstance(shape, Unknown):
        return shape
    counts = count_shape(shape, recipe.method)
    assert counts is not None, "known_shape checks it"
    return counts
