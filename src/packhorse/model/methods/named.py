"""Names of a model's modules, and the nearest ones to a name that is none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn


def module_names(model: nn.Module, kind: type[nn.Module] = nn.Module) -> list[str]:
    """Names of all modules of a kind."""
    return [name for name, part in model.named_modules() if name and isinstance(part, kind)]


def closest(wanted: str, names: Iterable[str]) -> str:
    """Up to five last parts of names, the nearest first."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in names} - {""})
    near = difflib.get_close_matches(wanted, ends, n=5, cutoff=0.3)
    return ", ".join(near or [end for end in ends if not end.isdigit()][:5])
