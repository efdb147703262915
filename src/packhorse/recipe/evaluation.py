"""The recipe's section on evaluation: rows, metrics and the gate."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from packhorse.yaml_source.schema import PositiveFloat, Section

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


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


class JudgeSection(Section):
    """A language model that judges answers in `packhorse evaluate RUN --judge`."""

    url: Annotated[
        str, Field(pattern=r"^https?://\S+$", json_schema_extra={"takes": "an address, such as https://…/v1"})
    ]
    """OpenAI-compatible endpoint up to the version, e.g. `https://api.openai.com/v1` or `http://localhost:8000/v1`."""
    model: str
    """Name of the judge at the endpoint."""
    api_key_env: str | None = None
    """Environment variable with the API key, e.g. `OPENAI_API_KEY`; the key is never written."""
    mode: Literal["pairwise", "rubric"] = "pairwise"
    """`pairwise`: the better of both answers, in both orders; `rubric`: each answer alone, 1 to 5."""
    criteria: str = "correct, complete, and clear"
    """What makes an answer good, in the words of the prompt."""
    template: str | None = None
    """File with your own prompt (Jinja). Names: `conversation`, `expected`, `criteria`, `answer_a`, `answer_b`, under
    rubric `answer`. The form of the verdict is added at its end."""
    max_rows: PositiveInt | None = None
    """Most rows per set that are judged; a hash of the row decides which. Default: all answered rows."""
    max_requests: PositiveInt = 1000
    """Most requests for one evaluation; above it none is sent."""
    max_cost: PositiveFloat | None = None
    """Most that the verdicts of one evaluation may cost, in the currency of the prices; needs both prices."""
    input_price: Price | None = None
    """Price of a million tokens of requests."""
    output_price: Price | None = None
    """Price of a million tokens of replies."""
    max_reply_tokens: PositiveInt = 512
    """Largest number of tokens in a reply of the judge."""
    request: dict[str, Any] = {}
    """Further fields of the request; null removes one, e.g. `{temperature: null, max_tokens: null,
    max_completion_tokens: 2000}` for a model that thinks."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests at the same time."""
    timeout_seconds: PositiveFloat = 120.0
    """Longest wait for one reply, before the request is repeated."""


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
    judge: JudgeSection | None = None
    """Language model that judges the answers in `packhorse evaluate RUN --judge`."""
