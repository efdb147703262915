"""How many parameters a recipe's model has and how many of them are trained: told before anything is loaded."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from packhorse.plan.architectures import find_configuration
from packhorse.plan.parameters import read_shape
from packhorse.plan.trainable import ParameterCounts, count_parameters
from packhorse.recipe.schema import Recipe

LATER = "counted when the model is loaded"


def show_parameters(console: Console, recipe: Recipe, vocab_size: int | None) -> None:
    """Prints a row for each kind of module; nothing where they cannot be counted ahead."""
    counts = _counts(recipe, vocab_size)
    if counts is not None:
        console.print()
        console.print(_table(counts))


def parameter_lines(recipe: Recipe, vocab_size: int | None) -> list[tuple[str, str]]:
    """The counts as label and text, or why they are not known yet.

    Args:
        recipe: Its model and method.
        vocab_size: Size of the tokenizer, where it is known: that of a fresh model.
    """
    counts = _counts(recipe, vocab_size)
    if counts is None:
        return [("parameters", f"{LATER}: {why_not_counted(recipe, vocab_size)}")]
    share = counts.trainable / counts.total
    of = f"{share:.2%}" if counts.total == counts.base else f"{share:.2%} of {counts.total:,} with the adapter"
    return [("parameters", f"{counts.base:,}"), ("trainable", f"{counts.trainable:,} ({of})")]


def _counts(recipe: Recipe, vocab_size: int | None) -> ParameterCounts | None:
    if recipe.model.new_tokens:
        return None
    return count_parameters(find_configuration(recipe, vocab_size), recipe.method)


def why_not_counted(recipe: Recipe, vocab_size: int | None) -> str:
    """Why the model's parameters are not known before it is loaded."""
    if recipe.model.new_tokens:
        return "whether its embedding has rows to spare for model.new_tokens is seen then"
    configuration = find_configuration(recipe, vocab_size)
    if configuration is None:
        return f"{recipe.model.id or recipe.model.path} has no config.json on this machine"
    if read_shape(configuration) is not None:
        return f"what {recipe.method.kind} trains of a {configuration['model_type']} is peft's choice"
    if recipe.model.config is not None and "vocab_size" not in configuration:
        return "a fresh model's vocabulary is its tokenizer's; `packhorse prepare` reads it"
    return f"model_type {configuration.get('model_type')} is not one that is counted ahead"


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
