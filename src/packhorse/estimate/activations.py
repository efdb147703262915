"""Memory that the forward pass keeps for the backward pass on one rank, and the workspace of both passes.

Korthikanti et al. 2022 (arXiv 2205.05198, section 4) count 34 t H + 5 a t² bytes per layer for a GPT in 16 bit. Here
each operation of the architecture is counted, because norms, rotations, gated MLPs, adapters and autocast differ.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from packhorse.estimate.packs import PackFigures
from packhorse.estimate.saved_tensors import (
    COPIES,
    FP32,
    INDEX,
    DecoderLayer,
    ForwardTensor,
    PassSettings,
    SavedTensors,
    save_masks_and_scores,
)
from packhorse.estimate.weights import WeightTensor, base_width, casts_adapter_inputs, casts_weights, compute_width
from packhorse.estimate.workspace import forward_workspace, layer_workspace
from packhorse.model_spec.measured_model import MeasuredModel, PassFormats
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.methods import LoraMethod, PrefixTuningMethod, PromptTuningMethod, QloraMethod
from packhorse.run_folder.checkpoints.pinned_slabs import pinned_bytes

CHUNK_TOKENS: Final = 512
TRAINED_CHUNK_TOKENS: Final = 2048
"""Rows of logits that exist at once: the second number where CUDA sums a trained head's gradient in 16 bits."""


@dataclass(frozen=True)
class LayerBytes:
    """Memory of one decoder layer.

    Attributes:
        kept: Bytes by part of the layer, where nothing is recomputed.
        input: Bytes of its input, which is kept where the layer is recomputed.
        attention: Bytes of attention's results, which selective checkpointing keeps too.
        recomputed: Whether the layer is recomputed.
    """

    kept: dict[str, int]
    input: int
    recomputed: bool
    attention: int = 0

    @property
    def total(self) -> int:
        """Bytes that its backward pass reads."""
        return sum(self.kept.values())


@dataclass(frozen=True)
class Activations:
    """Memory of one forward pass of `batch.micro` packs, in bytes.

    Attributes:
        layers: Decoder layers from first to last.
        inputs: Token ids, positions, labels and rotary angles, which a recomputed layer keeps with its input.
        head: Last norm and output head, by part.
        loss_gradients: Gradients that the loss computes in its forward pass and holds until the backward pass.
        logits: Workspace of one chunk of the loss.
        layer_workspace: Gradients and copies that exist at once in the backward pass of one layer.
        forward_workspace: Results that exist at once while a layer computes without a backward pass.
        tokens: Tokens of the row on this rank.
        offloaded: Whether inputs of recomputed layers are kept on the host.
    """

    layers: tuple[LayerBytes, ...]
    inputs: int
    head: dict[str, int]
    loss_gradients: int
    logits: int
    layer_workspace: int
    forward_workspace: int
    tokens: int
    offloaded: bool

    def kept_by_part(self, with_head: bool = True) -> dict[str, int]:
        """Return the bytes on the device between forward and backward pass, by part of the model.

        Args:
            with_head: Include last norm and output head, which the backward pass frees first.
        """
        # One offloaded input is on its way to the host, or back.
        moving = max((layer.input for layer in self.layers if layer.recomputed), default=0) if self.offloaded else 0
        parts = Counter({"inputs": self.inputs, "layer inputs": moving})
        for layer in self.layers:
            recomputed = {"layer inputs": 0 if self.offloaded else layer.input, "attention": layer.attention}
            parts.update(recomputed if layer.recomputed else layer.kept)
        if with_head:
            parts.update(self.head)
        return parts

    @property
    def kept(self) -> int:
        """Bytes on the device between forward and backward pass."""
        return sum(self.kept_by_part().values())

    @property
    def on_host(self) -> int:
        """Bytes of pinned host memory for layer inputs; torch rounds each allocation up to a power of two."""
        return sum(pinned_bytes(layer.input) for layer in self.layers if layer.recomputed) if self.offloaded else 0

    @property
    def recomputed(self) -> int:
        """Bytes of the largest recomputed layer during its backward pass."""
        return max((layer.total for layer in self.layers if layer.recomputed), default=0)


def count_activations(
    plan: RunPlan, shape: Shape, weights: tuple[WeightTensor, ...], packs: PackFigures
) -> Activations:
    """Count one forward pass of the packs that need most memory."""
    saved = SavedTensors()
    settings = _settings(plan, packs)
    labels = -(-plan.batch.micro_packs * packs.supervised_max // plan.topology.sequence)
    if shape.measured_model is None:
        layers, before, hidden = _described(saved, settings, shape, weights, plan)
    else:
        layers, before, hidden = _measured(saved, settings, shape, shape.measured_model, plan)
    loss_gradients = _head(saved, settings, shape, weights, hidden, labels)
    fullest = max(layers, key=lambda layer: layer.total)
    return Activations(
        layers=layers,
        inputs=2 * (settings.tokens + labels) * INDEX + before,
        head=saved.by_part(),
        loss_gradients=loss_gradients,
        logits=_logits(settings, shape, weights, labels),
        layer_workspace=layer_workspace(settings, shape, weights, fullest.kept),
        forward_workspace=forward_workspace(settings, shape, weights, hidden.width),
        tokens=settings.tokens,
        offloaded=plan.recipe.parallel.offload_activations,
    )


Body = tuple[tuple[LayerBytes, ...], int, ForwardTensor]
"""Layers, bytes kept in front of them, and the input of the output head."""


def _described(
    saved: SavedTensors, settings: PassSettings, shape: Shape, weights: tuple[WeightTensor, ...], plan: RunPlan
) -> Body:
    """Count a family whose operations `saved_tensors.py` lists."""
    by_unit: dict[str, list[WeightTensor]] = {}
    for weight in weights:
        by_unit.setdefault(weight.unit, []).append(weight)
    hidden = _embedded(saved, settings, shape, by_unit["embedding"], plan)
    width, layers = hidden.width, []
    for index in range(shape.layers):
        own, before = SavedTensors(), hidden
        layer = DecoderLayer(own, settings, shape, by_unit[f"layer {index}"], index)
        hidden = layer.forward(own.tensor(before.elements, before.width, before.has_grad))
        kept = _kept_attention(plan, settings, shape)
        layers.append(LayerBytes(own.by_part(), before.bytes, _recomputes(plan, index), kept))
    tables = 2 if len(set(shape.windows)) > 1 and shape.family == "gemma3_text" else 1
    angles = tables * 2 * settings.tokens * shape.head_width * width
    norm = [weight for weight in weights if weight.name == shape.names.norm]
    tail = DecoderLayer(saved, settings, shape, norm, shape.layers)
    return tuple(layers), angles, tail.norm(hidden, shape.names.norm, "last norm")


def _measured(
    saved: SavedTensors, settings: PassSettings, shape: Shape, measured: MeasuredModel, plan: RunPlan
) -> Body:
    """Count a model whose own forward pass was measured on fake tensors."""
    kept = measured.meter.kept(plan.recipe.method, _formats(settings, plan))
    layers = []
    for index, layer in enumerate(kept.layers):
        own = SavedTensors()
        own.save_new(layer.attention.at(settings.tokens) + round(layer.attention.fixed), 1, "attention")
        own.save_new(layer.rest.at(settings.tokens), 1, "layer")
        # What does not grow with the tokens are 16-bit copies of weights.
        own.save_new(round(layer.rest.fixed), 1, COPIES)
        if layer.attention.per_token:
            save_masks_and_scores(own, settings, shape, index)
        parts = {part: size for part, size in own.by_part().items() if size}
        attention = _kept_attention(plan, settings, shape) if layer.attention.per_token else 0
        layers.append(LayerBytes(parts, layer.input.at(settings.tokens), _recomputes(plan, index), attention))
    saved.save_new(kept.after.at(settings.tokens) + round(kept.after.fixed), 1, "last norm")
    before = kept.before.at(settings.tokens) + round(kept.before.fixed) + kept.shared.at(settings.tokens)
    return tuple(layers), before, saved.tensor(settings.tokens * shape.hidden, kept.width, kept.has_grad)


def _formats(settings: PassSettings, plan: RunPlan) -> PassFormats:
    method = plan.recipe.method
    return PassFormats(
        compute=settings.compute,
        autocast=settings.autocast,
        base=settings.base,
        adapter=settings.adapter,
        quantized=isinstance(method, QloraMethod),
        on_cuda=settings.on_cuda,
        varlen=settings.varlen,
        keeps_inputs=settings.keeps_inputs,
        input_gradients=bool(plan.recipe.parallel.checkpointing),
        sequence=settings.sequence,
        documents=settings.documents if isinstance(method, (PromptTuningMethod, PrefixTuningMethod)) else 1,
    )


def _recomputes(plan: RunPlan, index: int) -> bool:
    every = plan.recipe.parallel.recomputed_every
    return every > 0 and index % every == 0


def _kept_attention(plan: RunPlan, settings: PassSettings, shape: Shape) -> int:
    """Return the bytes of attention's output and of each softmax's sum, if selective checkpointing keeps them."""
    if plan.recipe.parallel.checkpointing != "selective":
        return 0
    rows = settings.row_tokens * -(-shape.heads // settings.sequence)
    return rows * (shape.head_width * settings.compute + FP32)


def _settings(plan: RunPlan, packs: PackFigures) -> PassSettings:
    method, sequence = plan.recipe.method, plan.topology.sequence
    row = plan.batch.micro_packs * packs.tokens_max
    squares = plan.batch.micro_packs * packs.squares_max
    # The number of documents of equal length that have this sum of squares; the true number is at least this.
    documents = max(1, round(row * row / squares)) if squares else 1
    if isinstance(method, PromptTuningMethod):
        row += documents * method.virtual_tokens
    casts, compute = casts_weights(plan), compute_width(plan)
    return PassSettings(
        tokens=-(-row // sequence),
        row_tokens=row,
        squares=squares,
        documents=documents,
        most_documents=plan.batch.micro_packs * packs.documents_max,
        prefix=method.virtual_tokens if isinstance(method, PrefixTuningMethod) else 0,
        compute=compute,
        autocast=compute == 2 and not casts,
        base=compute if casts else base_width(plan),
        adapter=compute if casts else FP32,
        casts_inputs=casts_adapter_inputs(plan),
        dropout=isinstance(method, LoraMethod) and method.dropout > 0,
        on_cuda=plan.topology.device == "cuda",
        varlen=plan.chosen("model.attention") == "varlen",
        sequence=sequence,
        keeps_inputs=plan.topology.engine.startswith("zero3"),
    )


def _embedded(
    saved: SavedTensors, settings: PassSettings, shape: Shape, weights: list[WeightTensor], plan: RunPlan
) -> ForwardTensor:
    embedding = [weight for weight in weights if weight.name == shape.names.embedding]
    rows = any(weight.name == "new tokens" for weight in weights)
    trained = any(weight.trained for weight in embedding) or rows
    adapted = any(weight.kind == "adapter" for weight in embedding) or rows
    # Where layers are recomputed, transformers requests the gradient of the first one's input, whatever is trained.
    recomputes = bool(plan.recipe.parallel.checkpointing)
    has_grad = trained or recomputes or isinstance(plan.recipe.method, PromptTuningMethod)
    width = settings.adapter if adapted else settings.base
    return saved.tensor(settings.tokens * shape.hidden, width, has_grad)


def _head_weight(shape: Shape, weights: tuple[WeightTensor, ...]) -> tuple[WeightTensor, bool]:
    """Return the output head's weight in the loss, and whether it is trained."""
    name = shape.names.embedding if shape.tied else shape.names.head
    named = [weight for weight in weights if weight.name == name]
    # Rows for new tokens are merged into the whole weight, which then has a gradient.
    rows = any(weight.name == "new tokens" and weight.unit == named[-1].unit for weight in weights)
    return named[-1], rows or any(weight.trained for weight in named)


def _head(
    saved: SavedTensors,
    settings: PassSettings,
    shape: Shape,
    weights: tuple[WeightTensor, ...],
    hidden: ForwardTensor,
    labels: int,
) -> int:
    """Save the loss's inputs; return the bytes of gradients that it computes in its forward pass."""
    weight, trained = _head_weight(shape, weights)
    chosen = labels * shape.hidden
    if settings.compute == FP32:
        # One pass in float32 computes the gradients of hidden states and weight at once.
        return FP32 * ((chosen if hidden.has_grad else 0) + (weight.size if trained else 0))
    saved.save_new(chosen, settings.compute, "loss")
    width = settings.adapter if weight.kind == "adapter" else settings.base
    if width != settings.compute:
        saved.save_new(weight.size, settings.compute, COPIES)
    return 0


def _logits(settings: PassSettings, shape: Shape, weights: tuple[WeightTensor, ...], labels: int) -> int:
    """Return the bytes of one chunk of float32 logits and, in 16 bits, of hidden states and the loss's gradients."""
    weight, trained = _head_weight(shape, weights)
    logits = min(chunk_tokens(settings.on_cuda, settings.compute, trained), labels) * shape.vocabulary
    if settings.compute == FP32:
        return logits * FP32
    gradients = (weight.size if trained else 0) + labels * shape.hidden
    # CUDA multiplies 16-bit numbers into float32; the CPU copies the weight and sums its gradient in float32.
    copies = weight.size * FP32 * (2 if trained else 1)
    # The model's output lives until the loss of its supervised rows is computed.
    gradients += settings.tokens * shape.hidden
    if settings.on_cuda:
        copies = logits * settings.compute  # of the logits' gradient, for the products
    return logits * FP32 + gradients * settings.compute + copies


def chunk_tokens(on_cuda: bool, compute: int, trained: bool) -> int:
    """Return the rows of logits that exist at once; a test compares it with the loss of `train/`."""
    return TRAINED_CHUNK_TOKENS if on_cuda and compute != FP32 and trained else CHUNK_TOKENS
