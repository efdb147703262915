"""The recipe's section on evaluation: rows, metrics and the gate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from packhorse.yaml_source.schema import PositiveFloat, Section


class GateCriterion(Section):
    """One condition of the gate, decided by the 95 % interval of the difference between tuned and base."""

    metric: str
    """Name of a metric of the evaluation, e.g. `loss` or `exact_match`."""
    set: Literal["validation", "retain", "test"] = "validation"
    """Held-out rows that are measured."""
    role: Literal["critical", "advisory"] = "critical"
    """Whether the verdict depends on it, or it is only reported."""
    min_gain: Annotated[float, Field(ge=0)] | None = None
    """The tuned model must be better by more than this; 0.02 is 2 points of a share, or 0.02 nats of a loss."""
    max_drop: PositiveFloat | None = None
    """The tuned model may be worse by less than this (non-inferiority)."""


class EarlyStoppingSection(Section):
    """End of training once the validation loss no longer improves."""

    patience: PositiveInt
    """Number of evaluations in a row without an improvement after which training ends."""
    min_delta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Only a validation loss that is lower by more than this, in nats per token, is an improvement."""


class EvaluationSection(Section):
    """Measurements on held-out rows."""

    every_steps: PositiveInt | None = None
    """Measure the validation loss every N steps; it is always measured before the first and after the last step."""
    early_stopping: EarlyStoppingSection | None = None
    """End training early, e.g. `{patience: 3}`; null: train all steps."""
    smallest_effect: Annotated[float, Field(gt=0, lt=1)] = 0.03
    """Smallest difference that matters: 0.03 is 3 points of a share, and 0.03 nats of a loss. As many rows are answered
    as show it with 80 % power, within `max_answered_rows`."""
    max_answered_rows: Annotated[int, Field(ge=0)] = 200
    """Most rows per set that base and tuned model answer greedily in `packhorse evaluate`; 0: none."""
    max_new_tokens: PositiveInt = 256
    """Largest number of tokens in an answer."""
    metrics: Literal["auto"] | list[str] = "auto"
    """Names of metrics, or `FILE.py:FUNCTION` for your own; `auto` chooses by the answers of the rows."""
    group_by: str | None = None
    """Row field whose values become the lines of the evaluation table, e.g. `family`."""
    cluster_by: str | None = None
    """Row field; rows with one value are not independent, e.g. questions on one document. Default: near copies."""
    gate: list[GateCriterion] = []
    """Conditions on the tuned model; `packhorse evaluate` ends with exit code 3 if a critical one is not met."""
