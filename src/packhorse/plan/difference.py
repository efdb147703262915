"""What differs between two plans, field by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from packhorse.plan.run_plan import RunPlan


@dataclass(frozen=True)
class Difference:
    """A field that is not the same.

    Attributes:
        field: Dotted; of the recipe without a prefix.
        before: Its value in the first plan; None where it has none.
        after: In the second.
    """

    field: str
    before: Any
    after: Any


def differences(before: RunPlan, after: RunPlan) -> list[Difference]:
    """Fields of recipe, topology, batch, data, engine configuration, environment and launch that are not the same.

    The reasons of decisions, and what is predicted, follow from these and are left out.
    """
    old, new = (dict(_fields(plan)) for plan in (before, after))
    names = dict.fromkeys((*old, *new))
    return [Difference(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value that is no mapping, with its dotted name."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _fields(plan: RunPlan) -> Iterator[tuple[str, Any]]:
    values = plan.model_dump(exclude={"decisions", "predicted", "version"})
    yield from leaves(values.pop("recipe"))
    yield from leaves(values)
