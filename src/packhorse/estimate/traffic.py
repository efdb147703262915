"""Bytes through a GPU's own memory in addition to the matrix products: what bandwidth limits, not arithmetic.

Counted kernel by kernel as eager torch runs transformers' layers: each kernel reads its inputs and writes its output.
The tests compare the sums with the bytes of every kernel that torch runs for the real model. Compiled layers are
counted as if everything between two products, or a product and attention, were one kernel: not measured yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from packhorse.estimate.communication import shard_group
from packhorse.estimate.flops import PassWork, Products
from packhorse.estimate.weights import WeightTensor, casts_adapter_inputs, casts_weights, compute_width
from packhorse.model_spec.parameters import Shape, norm_widths
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.methods import Ia3Method, LoraMethod, QloraMethod

# Bytes per trained weight and step: gradient read twice and scaled (norm, clipping), the weight and its states read and
# written. States as in docs/optimizers.md.
CLIPPING: Final = 12
STEP: Final = {
    "adamw": 28,
    "adamw_8bit": 16,
    "paged_adamw": 28,
    "paged_adamw_8bit": 16,
    "lion": 20,
    "lion_8bit": 14,
    "adafactor": 24,
    "muon": 44,
}
# The backward pass of norms, rotary embedding, activation and residual sums moves this many times the bytes of the
# forward pass; more where the norms' own gradients are summed (measured).
BACKWARD: Final = 2.0
BACKWARD_TRAINED: Final = 2.35

Uses = Literal["forward", "recomputed", "input_gradients", "weight_gradients"]


@dataclass(frozen=True)
class Traffic:
    """Bytes through memory for one purpose.

    Attributes:
        name: Name of the purpose.
        forward: Bytes in the forward pass.
        backward: Bytes in the backward pass, including recomputation.
        reason: Where they come from, in one line.
    """

    name: str
    forward: float
    backward: float
    reason: str


def pass_traffic(plan: RunPlan, shape: Shape, work: PassWork) -> tuple[Traffic, ...]:
    """List what one pass of one rank moves in addition to its products."""
    elementwise = _fused_elementwise if plan.compiles_layers else _elementwise
    found = [
        elementwise(plan, shape, work),
        *_adapters(plan, work),
        _logits(plan, shape, work),
        *_dequantisation(plan, work),
        _casts(plan, work),
    ]
    return tuple(each for each in found if each.forward or each.backward)


def step_bytes(plan: RunPlan, weights: Sequence[WeightTensor]) -> float:
    """Return the bytes that the optimizer's update moves on one GPU."""
    engine = plan.topology.engine
    if engine in ("zero3_offload", "zero3_nvme"):
        return 0.0
    trained = float(sum(weight.size for weight in weights if weight.trained))
    if engine not in ("single", "ddp"):
        trained /= shard_group(plan.topology).size
    clipping = 0 if plan.recipe.optimizer.in_backward else CLIPPING
    # DeepSpeed writes the 16-bit weights again from its float32 master weights.
    copies = 6 if engine.startswith("zero") and plan.recipe.precision != "fp32" else 0
    return trained * (STEP[plan.recipe.optimizer.name] + clipping + copies)


def _elementwise(plan: RunPlan, shape: Shape, work: PassWork) -> Traffic:
    """Count norms, rotary embeddings, activation and residual sums."""
    b = compute_width(plan)
    # Autocast leaves the hidden states between layers in the format of trained weights.
    r = 4 if not casts_weights(plan) and plan.chosen("model.dtype") == "float32" else b
    # RMSNorm: to float32, square, mean, scale, back, times the weight.
    norm = (r + 4 if r != 4 else 0) + 8 + 4 + 8 + (4 + r if r != 4 else 0) + 2 * r
    queries, keys = shape.heads * shape.head_width, shape.key_value_heads * shape.head_width
    # x cos + rotate(x) sin: five kernels. Then what attention reads and writes.
    rotary = 10 * max(b, r) * (queries + keys) + 2 * b * (2 * queries + 2 * keys)
    residual = 2 * 3 * r * shape.hidden
    # Autocast rounds the input of each product.
    rounding = (4 + 2) * 5 * shape.hidden if r != b else 0
    dense = 5 * b * shape.mlp_width
    sparse = shape.active_experts * (5 * b * shape.expert_width + 7 * b * shape.hidden) + 4 * 4 * shape.experts
    share = len(shape.sparse_layers) / shape.layers
    mlp = dense * (1 - share) + sparse * share
    layer = work.tokens * (norm * norm_widths(shape) + rotary + residual + rounding + mlp)
    last_norm = work.tokens * norm * shape.hidden
    times = BACKWARD_TRAINED if plan.recipe.method.trains_base else BACKWARD
    backward = layer * (times * work.layers_backward + work.layers_recomputed) + times * last_norm
    reason = f"norms, rotary embedding, activation and residuals in eager torch, {b} and {r} bytes per element"
    return Traffic("elementwise", layer * shape.layers + last_norm, backward, reason)


def _fused_elementwise(plan: RunPlan, shape: Shape, work: PassWork) -> Traffic:
    """Count what `_elementwise` counts, in compiled layers; the router and the sums of experts stay eager."""
    b = compute_width(plan)
    r = 4 if not casts_weights(plan) and plan.chosen("model.dtype") == "float32" else b
    queries, keys = shape.heads * shape.head_width, shape.key_value_heads * shape.head_width
    # A norm reads the hidden states and what the layer adds to them, and writes their sum and its own output.
    norm = (2 * r + 2 * b) * norm_widths(shape)
    rotary, attention = 2 * b * (queries + keys), 2 * b * (2 * queries + 2 * keys)
    share = len(shape.sparse_layers) / shape.layers
    sparse = shape.active_experts * (5 * b * shape.expert_width + 7 * b * shape.hidden) + 4 * 4 * shape.experts
    # Activation and product: two inputs and one output forward; three inputs and two outputs backward.
    forward = norm + rotary + attention + 3 * b * shape.mlp_width * (1 - share) + sparse * share
    back = norm + rotary + 2 * attention + 5 * b * shape.mlp_width * (1 - share) + BACKWARD * sparse * share
    last_norm = (8 + 4 + 8 + 4 * r) * shape.hidden  # not in a decoder layer, so not compiled
    backward = back * work.layers_backward + forward * work.layers_recomputed + BACKWARD * last_norm
    reason = f"norms, rotary embedding, activation and residuals in compiled layers (predicted), {b} bytes per element"
    return Traffic("elementwise", work.tokens * (forward * shape.layers + last_norm), work.tokens * backward, reason)


def _adapters(plan: RunPlan, work: PassWork) -> list[Traffic]:
    """Count what adapters do in addition to their products: casts, dropout, scale, sum."""
    method, b = plan.recipe.method, compute_width(plan)
    if isinstance(method, Ia3Method):
        scaled = 3 * b * sum(each.rows * each.outputs * each.forward for each in _linear(work)) / 3
        return [Traffic("adapters", scaled, scaled * BACKWARD, "factors of IA³, on a third of the layers")]
    if not isinstance(method, LoraMethod):
        return []
    given = 4 if casts_adapter_inputs(plan) else b
    before = (2 * given + 1 if method.dropout else 0) + (2 * (b + given) if given != b else 0)
    # Scale and sum forward; backward the gradient is scaled, and that of the input added to the others'.
    after, sum_of_gradients, scaled_gradient = 5 * b, 3 * b, 2 * b
    undone = before  # dropout in the backward pass
    if plan.compiles_layers:
        # The mask is drawn again, not stored; scale and sum are one kernel, as are dropout and the sum of gradients.
        before, after, sum_of_gradients, undone = 2 * b if method.dropout else 0, 3 * b, 2 * b, 0

    def moved(uses: Uses, inside: int, outside: int) -> float:
        downs = (each.rows * each.inputs * _count(each, uses) for each in work.products if _is(each, "adapter_a"))
        ups = (each.rows * each.outputs * _count(each, uses) for each in work.products if _is(each, "adapter_b"))
        return inside * sum(downs) + outside * sum(ups)

    # DoRA takes the norm of W + BA along each row, for which it computes that matrix.
    norms = 14.0 * _weights(_linear(work), "forward") if method.dora else 0.0
    backward = moved("forward", undone + sum_of_gradients, scaled_gradient) + moved("recomputed", before, after)
    backward += norms if work.layers_recomputed else 0.0
    reason = f"casts to {given} bytes, dropout {method.dropout:g}, scale and sum" + (", norms of DoRA" * method.dora)
    return [Traffic("adapters", moved("forward", before, after) + norms, backward, reason)]


def _logits(plan: RunPlan, shape: Shape, work: PassWork) -> Traffic:
    """Count the softmax over the vocabulary, forward and for its gradient, one chunk at a time."""
    size = work.supervised * shape.vocabulary * compute_width(plan)
    return Traffic("logits", 3.0 * size, 4.0 * size, f"softmax over {shape.vocabulary:,} tokens, in chunks")


def _dequantisation(plan: RunPlan, work: PassWork) -> list[Traffic]:
    """Count the conversions of a quantised weight for each of its products."""
    method, b, linear = plan.recipe.method, compute_width(plan), _linear(work)
    if not isinstance(method, QloraMethod):
        return []
    stored = 0.5 + (1 / 64 if method.double_quantization else 1 / 16)
    if method.quantization == "int8":
        # Written as 16-bit numbers, and once more when they are scaled.
        stored = 1.0 + 2 * b
    forward = _weights(linear, "forward") * (stored + b)
    backward = (_weights(linear, "input_gradients") + _weights(linear, "recomputed")) * (stored + b)
    return [
        Traffic("dequantisation", forward, backward, f"{method.quantization} weights to {b} bytes for each product")
    ]


def _casts(plan: RunPlan, work: PassWork) -> Traffic:
    """Count the casts of float32 weights that autocast makes at each use, and the sums of their gradients."""
    trained = [each for each in work.products if each.weight_gradients]
    adding = 12.0 if plan.batch.accumulation_steps > 1 else 0.0
    if casts_weights(plan) or plan.recipe.precision == "fp32":
        return Traffic("gradient sums", 0.0, adding * _weights(trained, "weight_gradients"), "sums over the passes")
    backward = 6.0 * _weights(trained, "recomputed") + (6.0 + adding) * _weights(trained, "weight_gradients")
    return Traffic(
        "casts", 6.0 * _weights(trained, "forward"), backward, "autocast rounds trained weights in each pass"
    )


def _linear(work: PassWork) -> list[Products]:
    return [each for each in work.products if each.part == "linear"]


def _is(products: Products, adapter: str) -> bool:
    return products.part == "adapter" and products.name.endswith(adapter)


def _count(products: Products, uses: Uses) -> int:
    return int(getattr(products, uses))


def _weights(products: Iterable[Products], uses: Uses) -> float:
    """Return the elements of all weights, each once per use."""
    return float(sum(each.outputs * each.inputs * _count(each, uses) for each in products))
