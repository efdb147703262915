"""Prove a merged model: it computes what base and adapter compute, and rounding has not swallowed the update.

Shapes: P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from packhorse.errors import UserError
from packhorse.export.reference import log_probabilities

LARGEST_DIFFERENCE: Final = 1e-4
"""Nats, for a merge in fp32."""
ROUNDING_FACTOR: Final = 2.0
"""A merge in 16 bits may cost this much more than computing in 16 bits does."""
SHARE_OF_UPDATE: Final = 0.25


@dataclass(frozen=True)
class MergeProof:
    """What a merge was held against, on held-out rows.

    Attributes:
        num_positions: Positions that were compared.
        base_to_adapter: KL(base, base + adapter), nats: how far training moved the model.
        adapter_to_merged: KL(base + adapter, merged), in fp32 from the stored weights.
        rounding_floor: KL(base + adapter in fp32, the same computed in the type of the result).
        largest_difference: Largest difference of a log-probability of base + adapter and merged, nats.
        trained_to_merged: KL(base in few bits + adapter, merged), nats, for a merge into the unrounded base.
    """

    num_positions: int
    base_to_adapter: float
    adapter_to_merged: float
    rounding_floor: float
    largest_difference: float
    trained_to_merged: float | None = None


def prove_merge(adapted: Any, merged: Any, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> MergeProof:  # noqa: ANN401
    """Compare a merged model with its base and adapter.

    Args:
        adapted: peft's model in fp32, on the base that training saw.
        merged: Merged model, read from its files, in fp32.
        rows: Ids of held-out rows.
        dtype: Type of the result.

    Raises:
        UserError: The merged model is its base, computes something else, or rounding has swallowed the update.
    """
    of_adapter, of_merged = _of_rows(adapted, rows), _of_rows(merged, rows)
    with adapted.disable_adapter():
        of_base = _of_rows(adapted, rows)
    floor = 0.0
    if dtype != torch.float32:
        floor = _divergence(of_adapter, _of_rows(adapted.to(dtype), rows))
    proof = MergeProof(
        num_positions=len(of_adapter),
        base_to_adapter=_divergence(of_base, of_adapter),
        adapter_to_merged=_divergence(of_adapter, of_merged),
        rounding_floor=floor,
        largest_difference=float((of_adapter - of_merged).abs().max()),
    )
    _refuse(proof, _divergence(of_base, of_merged), dtype)
    return proof


def _refuse(proof: MergeProof, base_to_merged: float, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        if not proof.largest_difference <= LARGEST_DIFFERENCE:
            raise UserError(
                f"the merged model's log-probabilities are {proof.largest_difference:.2g} nats from base + adapter.",
                f"a merge in fp32 is exact to {LARGEST_DIFFERENCE:g}: some weight was merged wrongly.",
                "use RUN/adapter with its base. Please report the recipe's method.",
            )
        return
    most = max(ROUNDING_FACTOR * proof.rounding_floor, 1e-7)
    swallowed = proof.adapter_to_merged > SHARE_OF_UPDATE * proof.base_to_adapter
    if swallowed or not base_to_merged > 0:
        raise UserError(
            f"rounding to {_name(dtype)} swallows the update: base to adapter {proof.base_to_adapter:.2g} nats, "
            f"adapter to merged {proof.adapter_to_merged:.2g}.",
            "the steps of 16-bit weights are larger than what training changed, so the model would answer as its base.",
            "write --dtype float32, or use RUN/adapter with its base.",
        )
    if proof.adapter_to_merged > most:
        raise UserError(
            f"the merged model is {proof.adapter_to_merged:.2g} nats from base + adapter, of which rounding explains "
            f"{most:.2g}.",
            "some weight was merged wrongly.",
            "use RUN/adapter with its base. Please report the recipe's method.",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _of_rows(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:  # noqa: ANN401
    """Return fp32 [P, V] after each token of each row."""
    return torch.cat([log_probabilities(model, ids) for ids in rows])


def divergence_on(one: Any, other: Any, rows: Sequence[Sequence[int]]) -> float:  # noqa: ANN401
    """Return the mean KL(one, other) of two models on rows, nats."""
    return _divergence(_of_rows(one, rows), _of_rows(other, rows))


def _divergence(one: Tensor, other: Tensor) -> float:
    """Return the mean KL(one, other) over positions, nats."""
    return float((one.exp().double() * (one.double() - other.double())).sum(-1).mean())
