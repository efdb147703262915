"""In which order the weights of a decoder layer are met: what runs backward, and what runs again, hangs on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from packhorse.model_spec.anatomy import Parameter
from packhorse.model_spec.parameters import FAMILIES, Shape

_QUERIES: Final = 1


@dataclass(frozen=True)
class Order:
    """In which order the weights of a layer are met.

    Attributes:
        stage: Of a name below the layer.
        count: How many stages there are.
        queries: After which of them attention runs.
        last: Names of linear layers that nothing in their layer follows.
    """

    stage: Callable[[str], int]
    count: int
    queries: int
    last: frozenset[str]


def order_of(shape: Shape) -> Order:
    """The order in a model's layers."""
    anatomy = shape.anatomy
    if anatomy is None:
        # A norm behind the last layer asks for what that computes.
        followed = len(FAMILIES[shape.family].norms) == 4
        return Order(_stage, 6, _QUERIES, frozenset() if followed else frozenset({"mlp.down_proj"}))
    stages = anatomy.stages
    inside: dict[int, list[tuple[int, Parameter]]] = {}
    for each in anatomy.parameters:
        at, name = shape.names.split(each.name)
        if at is not None:
            inside.setdefault(at, []).append((stages.get(name, 0), each))
    last = set()
    for met in inside.values():
        end = max(stage for stage, _ in met)
        last |= {shape.names.in_layer(each.module) for stage, each in met if stage == end and each.linear}
    return Order(lambda name: stages.get(name, 0), max(stages.values()) + 1, anatomy.queries_stage, frozenset(last))


def _stage(name: str) -> int:
    """Of the families that are described: norm, queries, output, norm, MLP up, MLP down."""
    if name.startswith("self_attn."):
        return 2 if ".o_proj" in name else _QUERIES
    if name.startswith("mlp."):
        return 5 if "down_proj" in name else 4
    return 0 if "input_layernorm" in name else 3
