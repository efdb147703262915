"""Memory and time of `packhorse evaluate` on the GPUs of one node: losses of two models, then their greedy answers.

A token of all answers that are generated at once reads every weight once, and with sharded weights gathers them once;
losses take the forward pass's FLOPs. Loading the weights is not counted, nor what a user's metric takes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil
from typing import Final

from packhorse.estimate.communication import LINK_SHARE, PCIE_SHARE
from packhorse.estimate.memory import CONTEXT_BYTES, CUBLAS_BYTES, FRAGMENTATION, NCCL_BYTES
from packhorse.estimate.plan_estimate import PlanEstimate
from packhorse.estimate.speed import BANDWIDTH_SHARE, HOOK_SECONDS, LAYER_SECONDS, SUSTAINED
from packhorse.estimate.weights import WIDTHS, WeightTensor
from packhorse.plan.evaluation import PRECISIONS, evaluation_engine, shards_weights

ROWS_AT_ONCE: Final = 64
"""Rows that a process answers at once (`evaluate/measure.py`)."""
TOKENS_AT_ONCE: Final = 16384
LOGITS_BYTES: Final = 3 * 2**29
"""Logits of a batch, their supervised rows, and these in fp32 (`evaluate/score.py`)."""
MODELS: Final = 2


@dataclass(frozen=True)
class EvaluationEstimate:
    """Memory and time of an evaluation.

    Attributes:
        engine: Engine that holds the weights; `ddp`: each process has a whole model.
        ranks: Number of GPUs, all on one node.
        required_bytes: Most memory of one GPU: each answer has a prompt as long as the longest document.
        fits: Whether a GPU holds that.
        tokens: Validation tokens; None before the data is prepared.
        answered_rows: Most rows that each model answers.
        seconds: Seconds without loading, where every answer takes all its tokens; None before the data is prepared.
    """

    engine: str
    ranks: int
    required_bytes: int
    fits: bool
    tokens: int | None
    answered_rows: int
    seconds: float | None


def estimate_evaluation(case: PlanEstimate) -> EvaluationEstimate:
    """Return the estimate for the rule of `plan.evaluation.evaluation_ranks`, on one node of the plan's GPUs."""
    plan, validation = case.plan, case.basis.validation
    ranks, settings = plan.topology.processes_per_node, plan.recipe.evaluation
    tokens = None
    if validation is not None and validation.num_packs is not None:
        tokens = round(validation.num_packs * validation.tokens_mean)
    answered = settings.max_answered_rows * (1 + bool(plan.recipe.data.retain))
    required = _required_bytes(case, ranks)
    return EvaluationEstimate(
        engine=evaluation_engine(plan.topology.engine),
        ranks=ranks,
        required_bytes=required,
        fits=required <= case.basis.gpu.memory_bytes,
        tokens=tokens,
        answered_rows=answered,
        seconds=None if tokens is None else MODELS * _model_seconds(case, ranks, tokens, answered),
    )


def _required_bytes(case: PlanEstimate, ranks: int) -> int:
    plan, shape = case.plan, case.basis.shape
    units: Counter[str] = Counter()
    for weight in case.weights or ():
        units[weight.unit] += _bytes(case, weight)
    whole, scales = sum(units.values()), sum(weight.constant_bytes for weight in case.weights or ())
    weights = whole
    if shards_weights(plan.topology.engine):
        gathered = 2 * max(units.values())  # the next unit arrives while one computes
        weights = gathered if _is_offloaded(case) else ceil(whole / ranks) + gathered
    rows = min(ROWS_AT_ONCE, ceil(plan.recipe.evaluation.max_answered_rows / ranks))
    packs = case.basis.validation or case.basis.packs
    length = packs.longest_document + plan.recipe.evaluation.max_new_tokens
    cached = rows * length * shape.layers * 2 * shape.key_value_heads * shape.head_width * _width(case)
    communication = NCCL_BYTES if ranks > 1 else 0
    allocated = weights + scales + cached + LOGITS_BYTES
    return ceil(allocated * (1 + FRAGMENTATION)) + CONTEXT_BYTES + CUBLAS_BYTES + communication


def _model_seconds(case: PlanEstimate, ranks: int, tokens: int, answered: int) -> float:
    """Return the seconds for the losses and the answers of one model."""
    plan, gpu, shape = case.plan, case.basis.gpu, case.basis.shape
    whole = sum(_bytes(case, weight) for weight in case.weights or ())
    gathering = 0.0
    if shards_weights(plan.topology.engine):
        gathering = whole * (ranks - 1) / ranks / (gpu.link_gb * 1e9 * LINK_SHARE[gpu.link])
        gathering += whole / ranks / (gpu.pcie_gb * 1e9 * PCIE_SHARE) if _is_offloaded(case) else 0.0
    rate = gpu.peak_flops(PRECISIONS[plan.chosen("model.dtype")], plan.recipe.tf32) * gpu.matmul_share * SUSTAINED
    used = sum(weight.size * _used_share(case, weight) for weight in case.weights or () if weight.unit != "embedding")
    losses = 2 * used * tokens / rate / ranks + ceil(tokens / TOKENS_AT_ONCE / ranks) * gathering
    launches = shape.layers * (LAYER_SECONDS + HOOK_SECONDS.get(plan.topology.engine, 0.0))
    token = max(whole / (gpu.bytes_per_second * BANDWIDTH_SHARE), launches) + gathering
    return losses + ceil(answered / (ROWS_AT_ONCE * ranks)) * plan.recipe.evaluation.max_new_tokens * token


def _width(case: PlanEstimate) -> int:
    """Return the bytes per weight of the base: the dtype in which it is loaded."""
    return WIDTHS[case.plan.chosen("model.dtype")]


def _bytes(case: PlanEstimate, weight: WeightTensor) -> int:
    if weight.storage != "plain":
        return weight.data_bytes
    return weight.size * (_width(case) if weight.kind == "base" else 4)


def _used_share(case: PlanEstimate, weight: WeightTensor) -> float:
    """Return the share of a weight that a token uses: of experts, those that the router chooses."""
    shape = case.basis.shape
    return shape.active_experts / shape.experts if len(weight.shape) == 3 and shape.experts else 1.0


def _is_offloaded(case: PlanEstimate) -> bool:
    return case.plan.topology.engine in ("zero3_offload", "zero3_nvme")
