"""Bytes that go through a GPU's own memory beside the matrix products: what is bound by bandwidth, not by arithmetic.

Counted kernel by kernel as eager torch runs transformers' layers: each kernel reads its inputs and writes its output.
The tests compare it with the bytes of every kernel that torch runs for the real model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from packhorse.estimate.communication import shard_group
from packhorse.estimate.flops import PassWork, Products
from packhorse.estimate.held import Held, casts_weights, compute_width
from packhorse.model_spec.parameters import Shape, norm_widths
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.methods import Ia3Method, LoraMethod, QloraMethod

# Bytes that a step moves for each trained weight: gradient read twice and scaled (norm, clipping), the weight and its
# states read and written. States as in docs/optimizers.md.
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
# The backward pass of norms, rotary embedding, activation and residual sums moves so many times as much as the forward
# pass; more where the norms' own gradients are summed up (measured).
BACKWARD: Final = 2.0
BACKWARD_TRAINED: Final = 2.35

Times = Literal["forward", "recomputed", "input_gradients", "weight_gradients"]


@dataclass(frozen=True)
class Traffic:
    """Bytes through memory for one purpose.

    Attributes:
        forward: Of the forward pass of one pass.
        backward: Of its backward pass, with what is recomputed.
        reason: Where it comes from, in a line.
    """

    name: str
    forward: float
    backward: float
    reason: str


def pass_traffic(plan: RunPlan, shape: Shape, held: tuple[Held, ...], work: PassWork) -> tuple[Traffic, ...]:
    """What one pass of one rank moves beside its products."""
    found = [
        _elementwise(plan, shape, work),
        _adapters(plan, work),
        _logits(plan, shape, work),
        _quantised(plan, work),
        _casts(plan, work),
        _gathered(plan, held, work, shape),
    ]
    return tuple(each for each in found if each.forward or each.backward)


def step_bytes(plan: RunPlan, held: Sequence[Held]) -> float:
    """What the optimizer's step moves on one GPU."""
    engine = plan.topology.engine
    if engine in ("zero3_offload", "zero3_nvme"):
        return 0.0
    trained = float(sum(each.size for each in held if each.trained))
    if engine not in ("single", "ddp"):
        trained /= shard_group(plan.topology).size
    clipping = 0 if plan.recipe.optimizer.in_backward else CLIPPING
    # DeepSpeed writes the 16-bit weights anew from its float32 masters.
    copies = 6 if engine.startswith("zero") and plan.recipe.precision != "fp32" else 0
    return trained * (STEP[plan.recipe.optimizer.name] + clipping + copies)


def _residual_width(plan: RunPlan) -> int:
    """Bytes of a number between layers: autocast leaves them in the type of the weights that are trained."""
    whole = not casts_weights(plan) and plan.chosen("model.dtype") == "float32"
    return 4 if whole else compute_width(plan)


def _elementwise(plan: RunPlan, shape: Shape, work: PassWork) -> Traffic:
    """Norms, rotary embeddings, activation and residual sums."""
    b, r = compute_width(plan), _residual_width(plan)
    # RMSNorm: to float32, square, mean, scale, back, times the weight.
    norm = (r + 4 if r != 4 else 0) + 8 + 4 + 8 + (4 + r if r != 4 else 0) + 2 * r
    queries, keys = shape.heads * shape.head_width, shape.key_value_heads * shape.head_width
    norms = norm * norm_widths(shape)
    # x cos + rotate(x) sin: five kernels. Then what attention reads and writes beside its arithmetic.
    rotary = 10 * max(b, r) * (queries + keys) + 2 * b * (2 * queries + 2 * keys)
    residual = 2 * 3 * r * shape.hidden
    # Autocast rounds the input of each product anew.
    rounding = (4 + 2) * 5 * shape.hidden if r != b else 0
    dense = 5 * b * shape.mlp_width
    sparse = shape.active_experts * (5 * b * shape.expert_width + 7 * b * shape.hidden) + 4 * 4 * shape.experts
    share = len(shape.sparse_layers) / shape.layers
    layer = work.tokens * (norms + rotary + residual + rounding + dense * (1 - share) + sparse * share)
    last_norm = work.tokens * norm * shape.hidden
    times = BACKWARD_TRAINED if plan.recipe.method.trains_base else BACKWARD
    backward = layer * (times * work.layers_backward + work.layers_recomputed) + times * last_norm
    reason = f"norms, rotary embedding, activation and residuals, {b} and {r} bytes a number, kernel by kernel"
    return Traffic("elementwise", layer * shape.layers + last_norm, backward, reason)


def _adapters(plan: RunPlan, work: PassWork) -> Traffic:
    """What stands beside the adapters' products: casts, dropout, scale, sum."""
    method, b = plan.recipe.method, compute_width(plan)
    if isinstance(method, Ia3Method):
        scaled = sum(each.rows * each.outputs * each.forward for each in work.products if each.part == "linear") / 3
        return Traffic(
            "adapters", 3 * b * scaled, 3 * b * scaled * BACKWARD, "factors of IA³, of a third of the layers"
        )
    if not isinstance(method, LoraMethod):
        return Traffic("adapters", 0.0, 0.0, "")
    # peft lifts the input to the adapters' float32 where the engine does not hold them in 16 bits; autocast rounds it.
    lifted = 4 if not casts_weights(plan) and b == 2 else b
    before = (2 * lifted + 1 if method.dropout else 0) + (2 * (b + lifted) if lifted != b else 0)
    # Scale and sum forward; backward the gradient is scaled, and that of the input added to the others'.
    after, sum_of_gradients, scaled_gradient = 5 * b, 3 * b, 2 * b
    downs = [each for each in work.products if each.name.endswith("adapter_a")]
    ups = [each for each in work.products if each.name.endswith("adapter_b")]

    def moved(times: Times, inside: int, outside: int) -> float:
        into = sum(each.rows * each.inputs * _times(each, times) * inside for each in downs)
        return into + sum(each.rows * each.outputs * _times(each, times) * outside for each in ups)

    # DoRA takes the norm of W + BA along each row, for which it makes that matrix.
    whole = sum(each.outputs * each.inputs * each.forward for each in work.products if each.part == "linear")
    norms = 14.0 * whole if method.dora else 0.0
    forward = moved("forward", before, after)
    backward = moved("forward", before + sum_of_gradients, scaled_gradient) + moved("recomputed", before, after)
    backward += norms if work.layers_recomputed else 0.0
    reason = f"casts to {lifted} bytes, dropout {method.dropout:g}, scale and sum" + (", norms of DoRA" * method.dora)
    return Traffic("adapters", forward + norms, backward, reason)


def _logits(plan: RunPlan, shape: Shape, work: PassWork) -> Traffic:
    """Softmax over the vocabulary, forward and for its gradient, a chunk at a time."""
    one = work.supervised * shape.vocabulary * compute_width(plan)
    return Traffic("logits", 3.0 * one, 4.0 * one, f"softmax over {shape.vocabulary:,} tokens, in chunks")


def _quantised(plan: RunPlan, work: PassWork) -> Traffic:
    """bitsandbytes writes a layer's weights in 16 bits each time that it multiplies with them."""
    method = plan.recipe.method
    if not isinstance(method, QloraMethod):
        return Traffic("dequantisation", 0.0, 0.0, "")
    b = compute_width(plan)
    linear = [each for each in work.products if each.part == "linear"]
    if method.quantization == "int8":
        # Forward the inputs are quantised instead, and the product's 32-bit sums scaled back.
        forward = sum(each.rows * (3 * each.inputs + 6 * each.outputs) * each.forward for each in linear)
        again = sum(each.rows * (3 * each.inputs + 6 * each.outputs) * each.recomputed for each in linear)
        back = sum(each.outputs * each.inputs * each.input_gradients * (1 + b) for each in linear)
        return Traffic("dequantisation", forward, again + back, "LLM.int8() scales inputs and outputs of each product")
    stored = 0.5 + (1 / 64 if method.double_quantization else 1 / 16)
    forward = _weights(linear, "forward") * (stored + b)
    backward = (_weights(linear, "input_gradients") + _weights(linear, "recomputed")) * (stored + b)
    return Traffic(
        "dequantisation", forward, backward, f"{method.quantization} weights made {b} bytes for each product"
    )


def _casts(plan: RunPlan, work: PassWork) -> Traffic:
    """Weights in float32 that autocast rounds for each use, and their gradients that it lifts and adds up."""
    if casts_weights(plan) or plan.recipe.precision == "fp32":
        adding = 12.0 if plan.batch.accumulation_steps > 1 else 0.0
        return Traffic("gradient sums", 0.0, adding * _weights(work.products, "weight_gradients"), "sums of the passes")
    trained = [each for each in work.products if each.weight_gradients]
    adding = 12.0 if plan.batch.accumulation_steps > 1 else 0.0
    backward = 6.0 * _weights(trained, "recomputed") + (6.0 + adding) * _weights(trained, "weight_gradients")
    return Traffic(
        "casts", 6.0 * _weights(trained, "forward"), backward, "autocast rounds trained weights in each pass"
    )


def _gathered(plan: RunPlan, held: tuple[Held, ...], work: PassWork, shape: Shape) -> Traffic:
    """Sharded weights are copied into and out of the buffer that they are gathered in."""
    engine = plan.topology.engine
    if not (engine in ("fsdp2", "hsdp") or engine.startswith("zero3")):
        return Traffic("copies", 0.0, 0.0, "")
    width = compute_width(plan)
    whole = float(sum(each.size * width if each.storage == "plain" else each.data_bytes for each in held))
    share = work.layers_backward / shape.layers
    return Traffic("copies", 2.0 * whole, 2.0 * whole * share, "gathered weights are copied out of one buffer")


def _weights(products: Iterable[Products], times: Times) -> float:
    """Numbers of all weights, each as often as it is used."""
    return float(sum(each.outputs * each.inputs * _times(each, times) for each in products))


def _times(products: Products, times: Times) -> int:
    return int(getattr(products, times))
