"""Partial fine-tuning: trains the weights that are selected by name, and freezes the others."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from packhorse.errors import UserError
from packhorse.recipe.methods import PartialMethod

Names = Mapping[str, tuple[str, ...]]
"""Each weight's first name -> all its names; tied weights have several."""


def freeze_others(model: nn.Module, method: PartialMethod) -> None:
    """Require gradients only for the weights that the method trains.

    Args:
        model: A transformers model.
        method: Weights in the last layers or matching `train` are trained, except those matching `freeze`; with
            `freeze` alone all others are trained.

    Raises:
        UserError: A pattern matches no weight, or one of two tied weights; or all weights would be trained, or none.
    """
    names = _all_names(model)
    for field, patterns in (("train", method.train), ("freeze", method.freeze)):
        for pattern in patterns:
            _check_pattern(names, pattern, field)
        _check_tied(names, patterns, field)
    chosen = {name for name, aliases in names.items() if _fits(aliases, method.train)}
    if method.last_layers is not None:
        prefixes = _last_layers(model, method.last_layers)
        chosen |= {name for name in names if name.startswith(prefixes)}
    elif not method.train:
        chosen = set(names)
    chosen -= {name for name, aliases in names.items() if _fits(aliases, method.freeze)}
    _refuse_all_or_none(chosen, names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def _all_names(model: nn.Module) -> Names:
    by_weight: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_weight[id(parameter)].append(name)
    return {names[0]: tuple(names) for names in by_weight.values()}


def _fits(names: Iterable[str], patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_pattern(names: Names, pattern: str, field: str) -> None:
    every = [name for aliases in names.values() for name in aliases]
    if not any(fnmatchcase(name, pattern) for name in every):
        near = difflib.get_close_matches(pattern, every, n=3, cutoff=0.3) or every[:3]
        raise UserError(
            f"method.{field} has {pattern}, which matches none of the model's {len(every)} weights.",
            "the weights that it was meant for would not change.",
            f"the nearest names are {', '.join(near)}; `*` stands for any letters, as in `*.mlp.*`.",
        )


def _check_tied(names: Names, patterns: list[str], field: str) -> None:
    for aliases in names.values():
        fitting = [name for name in aliases if _fits([name], patterns)]
        if fitting and len(fitting) < len(aliases):
            others = [name for name in aliases if name not in fitting]
            raise UserError(
                f"method.{field} matches {', '.join(fitting)}, which is tied to {', '.join(others)}: one tensor.",
                "they are one tensor, so all of them train or none does.",
                f"add {', '.join(others)} to method.{field}, or remove all of them.",
            )


def _refuse_all_or_none(chosen: set[str], names: Names) -> None:
    if not chosen:
        raise UserError(
            f"method.train, last_layers and freeze leave 0 of {len(names)} weights to train.",
            "the run would learn nothing.",
            "remove patterns from method.freeze, or add some to method.train.",
        )
    if len(chosen) == len(names):
        raise UserError(
            f"method.train, last_layers and freeze leave all {len(names)} weights to train.",
            "partial fine-tuning freezes some of them.",
            "set method: full, or name weights in method.freeze.",
        )


def _last_layers(model: nn.Module, count: int) -> tuple[str, ...]:
    """Return the name prefixes of the last layers."""
    config: Any = model.config
    total = int(config.get_text_config().num_hidden_layers)
    if count > total:
        raise UserError(
            f"method.last_layers is {count}, and the model has {total} layers.",
            "there is no layer before the first.",
            f"set it to {total} or less.",
        )
    stack = next(name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == total)
    return tuple(f"{stack}.{index}." for index in range(total - count, total))
