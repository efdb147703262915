"""Proof that student and teacher mean the same token by each id."""

from __future__ import annotations

from tokenizers import Tokenizer

from packhorse.data.resolve import TOKENIZER_FILE, fast_tokenizer, resolve_tokenizer
from packhorse.errors import UserError
from packhorse.recipe.objectives import DistilObjective
from packhorse.recipe.schema import Recipe
from packhorse.recipe.teacher import teacher_recipe


def check_teacher_tokenizer(recipe: Recipe, downloads: bool) -> None:
    """Refuse a teacher whose tokenizer gives an id to another token than the student's; other objectives have none.

    Args:
        recipe: Recipe of one run.
        downloads: Whether to download a tokenizer that is not on this machine; otherwise nothing is checked then.

    Raises:
        UserError: The tokenizers differ, or the teacher has none.
    """
    if not isinstance(recipe.objective, DistilObjective):
        return
    ours, theirs = (_vocabulary(each, downloads) for each in (recipe, teacher_recipe(recipe)))
    if ours is None or theirs is None:
        return
    ours |= {token: -1 for token in recipe.model.new_tokens if token not in theirs}
    odd = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if odd:
        raise UserError(
            f"the tokenizers of student and teacher differ in {len(odd):,} tokens, such as {odd[0]!r}: "
            f"{_id(ours, odd[0])} in the student's, {_id(theirs, odd[0])} in the teacher's.",
            "the divergence compares the probabilities of equal ids.",
            "choose a teacher of the same family as the student, such as Qwen/Qwen3-8B for Qwen/Qwen3-0.6B.",
        )


def _vocabulary(recipe: Recipe, downloads: bool) -> dict[str, int] | None:
    """Return the id of each token; None where the tokenizer has no fast form here."""
    if not downloads:
        tokenizer = fast_tokenizer(recipe)
        return None if tokenizer is None else dict(tokenizer.get_vocab())
    file = resolve_tokenizer(recipe) / TOKENIZER_FILE
    return dict(Tokenizer.from_file(str(file)).get_vocab()) if file.is_file() else None


def _id(vocabulary: dict[str, int], token: str) -> str:
    number = vocabulary.get(token)
    return "absent" if number is None else "a new token" if number < 0 else f"id {number}"
