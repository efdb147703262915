"""What `parallel.sequence` above 1 cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from packhorse.errors import UserError
from packhorse.recipe.findings import Finding
from packhorse.recipe.methods import PrefixTuningMethod, PromptTuningMethod
from packhorse.recipe.schema import Recipe


def sequence_rules(recipe: Recipe) -> Iterator[Finding]:
    """Methods that put tokens of their own before each row, which no process of a group would hold whole."""
    sequence, method = recipe.parallel.sequence, recipe.method
    if sequence > 1 and isinstance(method, PromptTuningMethod | PrefixTuningMethod):
        yield Finding(
            (("parallel", "sequence"), ("method", "kind")),
            f"parallel.sequence is {sequence}, and method.kind is {method.kind}.",
            "a prompt of trained vectors stands before each row, and the cut into equal parts does not know of it.",
            "set parallel.sequence to 1, or method.kind to lora",
        )


def unshared_heads(sequence: int, num_heads: int, world: int) -> UserError:
    """The refusal of groups of `sequence` out of `world` processes that cannot share a model's query heads equally."""
    fitting = [size for size in range(1, world + 1) if world % size == num_heads % size == 0]
    nearest = [*[size for size in fitting if size < sequence][-1:], *[size for size in fitting if size > sequence][:1]]
    return UserError(
        f"parallel.sequence is {sequence}, which does not divide the model's {num_heads} attention heads.",
        "inside attention each process of a group computes whole heads.",
        f"set parallel.sequence to {' or '.join(str(size) for size in nearest)}.",
    )
