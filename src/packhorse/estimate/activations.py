"""What the forward pass keeps for the backward pass on one rank, and the room that both work in.

Korthikanti et al. 2022 (arXiv 2205.05198, section 4) count 34 t H + 5 a t² bytes a layer for a GPT in 16 bit; here each
operation of the architecture is counted by itself, because norms, rotations, gated MLPs, adapters and autocast differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from packhorse.estimate.held import Held, base_width, casts_weights, compute_width
from packhorse.estimate.layers import COPIES, FP32, INDEX, Layer, Setting, keep_masks_and_scores
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.tape import Tape, Value
from packhorse.model_spec.anatomy import Anatomy, Formats
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.methods import LoraMethod, PrefixTuningMethod, PromptTuningMethod, QloraMethod

CHUNK_TOKENS: Final = 512
"""Rows of logits that exist at once; a test holds it to `train/objective.py`."""


@dataclass(frozen=True)
class LayerBytes:
    """One decoder layer.

    Attributes:
        kept: Bytes by part of the layer, where nothing is recomputed.
        input: Bytes of its input, all that is kept where it is recomputed.
        recomputed: Whether it is.
    """

    kept: dict[str, int]
    input: int
    recomputed: bool

    @property
    def whole(self) -> int:
        """All that its backward pass reads."""
        return sum(self.kept.values())


@dataclass(frozen=True)
class Activations:
    """Bytes of one forward pass of `batch.micro` packs.

    Attributes:
        layers: From first to last.
        inputs: Token ids, positions and labels, and the rotary angles.
        head: Last norm and output head.
        stashed: Gradients that the loss computes in its forward pass and holds until the backward pass.
        logits: Room of one chunk of the loss.
        layer_room: Gradients and copies that exist at once while a layer is gone back through.
        forward_room: Results that exist at once while a layer computes without a backward pass.
        tokens: Of the row on this rank.
        offloaded: Whether inputs of recomputed layers are kept on the host.
    """

    layers: tuple[LayerBytes, ...]
    inputs: int
    head: dict[str, int]
    stashed: int
    logits: int
    layer_room: int
    forward_room: int
    tokens: int
    offloaded: bool

    def kept_by_part(self, with_head: bool = True) -> dict[str, int]:
        """What is kept on the device between forward and backward pass, by part of the model.

        Args:
            with_head: Also for last norm and output head, which are gone back through first.
        """
        parts: dict[str, int] = {"inputs": self.inputs}
        for layer in self.layers:
            if layer.recomputed:
                held = 0 if self.offloaded else layer.input
                parts["layer inputs"] = parts.get("layer inputs", 0) + held
                continue
            for part, size in layer.kept.items():
                parts[part] = parts.get(part, 0) + size
        for part, size in self.head.items() if with_head else ():
            parts[part] = parts.get(part, 0) + size
        return parts

    @property
    def kept(self) -> int:
        """All that is kept on the device between forward and backward pass."""
        return sum(self.kept_by_part().values())

    @property
    def on_host(self) -> int:
        """Bytes of layer inputs in pinned host memory."""
        return sum(layer.input for layer in self.layers if layer.recomputed) if self.offloaded else 0

    @property
    def recomputed(self) -> int:
        """The largest layer that is recomputed, while it is gone back through."""
        return max((layer.whole for layer in self.layers if layer.recomputed), default=0)


def count_activations(plan: RunPlan, shape: Shape, held: tuple[Held, ...], packs: PackFigures) -> Activations:
    """Counts one forward pass of the fullest packs.

    Args:
        plan: Of the run.
        shape: Of its model.
        held: Its weights.
        packs: That it trains on.
    """
    tape = Tape()
    setting = _setting(plan, packs)
    labels = -(-plan.batch.micro_packs * packs.supervised_max // plan.topology.sequence)
    if shape.anatomy is None:
        layers, before, hidden = _walked(tape, setting, shape, held, plan)
    else:
        layers, before, hidden = _measured(tape, setting, shape, shape.anatomy, plan)
    stashed = _head(tape, setting, shape, held, hidden, labels)
    return Activations(
        layers=layers,
        inputs=2 * (setting.tokens + labels) * INDEX + before,
        head=tape.by_part(),
        stashed=stashed,
        logits=_logits(setting, shape, held, labels),
        layer_room=_layer_room(setting, shape, held),
        forward_room=_forward_room(setting, shape, hidden.width) + _unpacked(setting, held),
        tokens=setting.tokens,
        offloaded=plan.recipe.parallel.offload_activations,
    )


Body = tuple[tuple[LayerBytes, ...], int, Value]
"""Layers, bytes kept before them, and what the output head is given."""


def _walked(tape: Tape, setting: Setting, shape: Shape, held: tuple[Held, ...], plan: RunPlan) -> Body:
    """A family that is described in `parameters.py`, operation by operation."""
    by_unit: dict[str, list[Held]] = {}
    for weight in held:
        by_unit.setdefault(weight.unit, []).append(weight)
    hidden = _embedded(tape, setting, shape, by_unit["embedding"], plan)
    width, layers = hidden.width, []
    for index in range(shape.layers):
        own, before = Tape(), hidden
        hidden = Layer(own, setting, shape, by_unit[f"layer {index}"], index).forward(
            own.value(before.elements, before.width, before.has_grad), width
        )
        layers.append(LayerBytes(own.by_part(), before.bytes, _recomputes(plan, index)))
    angles = 0
    if any(layer.kept and not layer.recomputed for layer in layers):
        tables = 2 if len(set(shape.windows)) > 1 and shape.family == "gemma3_text" else 1
        angles = tables * 2 * setting.tokens * shape.head_width * width
    tail = Layer(tape, setting, shape, [weight for weight in held if weight.name == shape.names.norm], shape.layers)
    return tuple(layers), angles, tail.norm(hidden, shape.names.norm, "last norm")


def _measured(tape: Tape, setting: Setting, shape: Shape, anatomy: Anatomy, plan: RunPlan) -> Body:
    """A model whose own forward pass was looked at."""
    kept = anatomy.meter.kept(plan.recipe.method, _formats(setting, plan))
    layers = []
    for index, layer in enumerate(kept.layers):
        own = Tape()
        own.keep_new(layer.attention.at(setting.tokens) + round(layer.attention.fixed), 1, "attention")
        own.keep_new(layer.rest.at(setting.tokens), 1, "layer")
        # What does not grow with the tokens are weights in 16 bits.
        own.keep_new(round(layer.rest.fixed), 1, COPIES)
        if layer.attention.per_token:
            keep_masks_and_scores(own, setting, shape, index)
        parts = {part: size for part, size in own.by_part().items() if size}
        layers.append(LayerBytes(parts, layer.input.at(setting.tokens), _recomputes(plan, index)))
    tape.keep_new(kept.after.at(setting.tokens) + round(kept.after.fixed), 1, "last norm")
    before = kept.before.at(setting.tokens) + round(kept.before.fixed)
    if any(layer.kept and not layer.recomputed for layer in layers):
        before += kept.shared.at(setting.tokens)
    return tuple(layers), before, tape.value(setting.tokens * shape.hidden, kept.width, kept.has_grad)


def _formats(setting: Setting, plan: RunPlan) -> Formats:
    method = plan.recipe.method
    return Formats(
        compute=setting.compute,
        autocast=setting.autocast,
        base=setting.base,
        adapter=setting.adapter,
        quantized=isinstance(method, QloraMethod),
        on_cuda=setting.on_cuda,
        varlen=setting.varlen,
        keeps_inputs=setting.keeps_inputs,
        input_gradients=bool(plan.recipe.parallel.checkpointing),
        sequence=setting.sequence,
        documents=setting.documents if isinstance(method, (PromptTuningMethod, PrefixTuningMethod)) else 1,
    )


def _recomputes(plan: RunPlan, index: int) -> bool:
    every = int(plan.recipe.parallel.checkpointing)
    return every > 0 and index % every == 0


def _setting(plan: RunPlan, packs: PackFigures) -> Setting:
    method, sequence = plan.recipe.method, plan.topology.sequence
    row = plan.batch.micro_packs * packs.tokens_max
    squares = plan.batch.micro_packs * packs.squares_max
    # As many documents of one length as give these squares; the true number is at least this.
    documents = max(1, round(row * row / squares)) if squares else 1
    if isinstance(method, PromptTuningMethod):
        row += documents * method.virtual_tokens
    casts, compute = casts_weights(plan), compute_width(plan)
    base = base_width(plan)
    return Setting(
        tokens=-(-row // sequence),
        row_tokens=row,
        squares=squares,
        documents=documents,
        prefix=method.virtual_tokens if isinstance(method, PrefixTuningMethod) else 0,
        compute=compute,
        autocast=compute == 2 and not casts,
        base=compute if casts else base,
        adapter=compute if casts else FP32,
        dropout=isinstance(method, LoraMethod) and method.dropout > 0,
        on_cuda=plan.topology.device == "cuda",
        varlen=plan.chosen("model.attention") == "varlen",
        sequence=sequence,
        keeps_inputs=plan.topology.engine.startswith("zero3"),
    )


def _embedded(tape: Tape, setting: Setting, shape: Shape, weights: list[Held], plan: RunPlan) -> Value:
    embedding = [weight for weight in weights if weight.name == shape.names.embedding]
    rows = any(weight.name == "new tokens" for weight in weights)
    trained = any(weight.trained for weight in embedding) or rows
    beside = any(weight.kind == "adapter" for weight in embedding) or rows
    # Where layers are recomputed, transformers asks for the gradient of the first one's input, whatever is trained.
    recomputes = bool(plan.recipe.parallel.checkpointing)
    has_grad = trained or recomputes or isinstance(plan.recipe.method, PromptTuningMethod)
    width = setting.adapter if beside else setting.base
    return tape.value(setting.tokens * shape.hidden, width, has_grad)


def _head_weight(shape: Shape, held: tuple[Held, ...]) -> tuple[Held, bool]:
    """The output head as the loss meets it, and whether it is trained."""
    name = shape.names.embedding if shape.tied else shape.names.head
    found = [weight for weight in held if weight.name == name]
    return found[-1], any(weight.trained for weight in found)


def _head(tape: Tape, setting: Setting, shape: Shape, held: tuple[Held, ...], hidden: Value, labels: int) -> int:
    """Keeps what the loss needs; returns the bytes of gradients that it stashes."""
    weight, trained = _head_weight(shape, held)
    chosen = labels * shape.hidden
    if setting.compute == FP32:
        # One pass in float32 makes the gradients of hidden states and weight at once.
        return FP32 * ((chosen if hidden.has_grad else 0) + (weight.size if trained else 0))
    tape.keep_new(chosen, setting.compute, "loss")
    width = setting.adapter if weight.kind == "adapter" else setting.base
    if width != setting.compute:
        tape.keep_new(weight.size, setting.compute, COPIES)
    return 0


def _logits(setting: Setting, shape: Shape, held: tuple[Held, ...], labels: int) -> int:
    """One chunk of logits in float32, beside the gradients that torch's own loss makes in 16 bit."""
    weight, trained = _head_weight(shape, held)
    chunk = min(CHUNK_TOKENS, labels) * shape.vocabulary * FP32
    if setting.compute == FP32:
        return chunk
    made = (weight.size if trained else 0) + labels * shape.hidden
    # CUDA multiplies 16-bit numbers into float32; on the CPU the weight is copied, and its gradient added up beside.
    copies = 0 if setting.on_cuda else weight.size * FP32 * (2 if trained else 1)
    return chunk + made * setting.compute + copies


def _layer_room(setting: Setting, shape: Shape, held: tuple[Held, ...]) -> int:
    """The widest moment of a layer's backward pass: the gated product's gradients, and a weight's own gradient."""
    width, t = setting.compute, setting.tokens
    mlp = max(shape.mlp_width, shape.expert_width * shape.active_experts)
    hidden = t * shape.hidden * (FP32 if setting.autocast else width)
    trained = [weight for weight in held if weight.trained and weight.unit.startswith("layer")]
    own = max((weight.size for weight in trained), default=0) * (width if width != FP32 else 0)
    beside = any(weight.kind == "adapter" and "mlp." in weight.name for weight in trained)
    # An adapter's input is copied into the adapter's format, and so is its gradient.
    copies = 2 * t * mlp * setting.adapter if beside and setting.adapter > width else 0
    return 2 * hidden + 2 * t * mlp * width + own + copies + _unpacked(setting, held)


def _unpacked(setting: Setting, held: tuple[Held, ...]) -> int:
    """The largest packed weight as bitsandbytes unpacks it, one at a time, to compute with."""
    return max((weight.size for weight in held if weight.storage != "plain"), default=0) * setting.compute


def _forward_room(setting: Setting, shape: Shape, hidden_width: int) -> int:
    """The widest moment of a layer without a backward pass: hidden states beside gate, up and their product."""
    mlp = max(shape.mlp_width, shape.expert_width * shape.active_experts)
    return setting.tokens * (2 * shape.hidden * max(hidden_width, FP32) + 3 * mlp * setting.compute)
