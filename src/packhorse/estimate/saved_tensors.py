"""Tensors that autograd saves in a decoder layer, counted without running it.

torch saves a tensor once, however many operations need it, and only what the backward pass will read:

    linear       its input where the weight is trained, its weight where the input has a gradient
    product      each factor that the other factor's gradient needs
    norm         the input in float32 and its inverse root mean square; the normed input where the weight is trained
    silu, gelu   their input
    attention    queries, keys, values, output, and the logarithm of each softmax's sum

Weights are not counted; copies of them that autocast makes are. `DecoderLayer` lists the operations of transformers'
own layers in their order.

Shapes: t tokens of the row on this rank, T of the whole row (t except under sequence parallelism), H hidden width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from packhorse.estimate.weights import WeightTensor
from packhorse.model_spec.parameters import FAMILIES, Shape

FP32: Final = 4
INDEX: Final = 8
GEMMA: Final = ("gemma", "gemma3_text")
COPIES: Final = "weight copies"


@dataclass(frozen=True)
class ForwardTensor:
    """A tensor of the forward pass.

    Attributes:
        key: Identity of its storage; views of one storage share it.
        elements: Elements of the storage.
        width: Bytes per element.
        has_grad: Whether the backward pass reaches it.
    """

    key: int
    elements: int
    width: int
    has_grad: bool

    @property
    def bytes(self) -> int:
        """Bytes of the storage."""
        return self.elements * self.width


@dataclass
class SavedTensors:
    """Sums the bytes of saved storages, by part of the model."""

    saved: dict[int, tuple[str, int]] = field(default_factory=dict)
    _next: int = 0

    def tensor(self, elements: int, width: int, has_grad: bool) -> ForwardTensor:
        """Return a tensor with a new storage."""
        self._next += 1
        return ForwardTensor(self._next, elements, width, has_grad)

    def cast(self, tensor: ForwardTensor, width: int) -> ForwardTensor:
        """Return the tensor in another width: itself where it has that width already."""
        return tensor if tensor.width == width else self.tensor(tensor.elements, width, tensor.has_grad)

    def save(self, tensor: ForwardTensor, part: str) -> None:
        """Save a tensor for the backward pass."""
        self.saved.setdefault(tensor.key, (part, tensor.bytes))

    def save_new(self, elements: int, width: int, part: str) -> None:
        """Save a tensor that no other operation reads."""
        self.save(self.tensor(elements, width, True), part)

    def by_part(self) -> dict[str, int]:
        """Return the saved bytes of each part."""
        parts: Counter[str] = Counter()
        for part, size in self.saved.values():
            parts[part] += size
        return parts


@dataclass(frozen=True)
class PassSettings:
    """How a forward pass runs.

    Attributes:
        tokens: t.
        row_tokens: T.
        squares: Sum of the squared lengths of the row's documents.
        documents: Number of documents in the row, were they of equal length.
        most_documents: Number of documents in the row that has most.
        prefix: Keys and values in front of each document.
        compute: Bytes per element in matrix products.
        autocast: Whether autocast casts the inputs of products, where weights or hidden states are float32.
        base: Bytes of a base weight in the forward pass.
        adapter: Bytes of an adapter's weight in the forward pass.
        casts_inputs: Whether a low-rank adapter casts its input to the adapter's format.
        dropout: Whether low-rank adapters use dropout.
        on_cuda: Whether CUDA's kernels run, whose dropout masks take one byte per element.
        varlen: Whether attention is torch's varlen kernel; otherwise SDPA, one document at a time.
        sequence: Ranks that share the row.
        keeps_inputs: Whether linear layers save their input even where the weight is frozen, as under ZeRO-3.
    """

    tokens: int
    row_tokens: int
    squares: int
    documents: int
    most_documents: int
    prefix: int
    compute: int
    autocast: bool
    base: int
    adapter: int
    casts_inputs: bool
    dropout: bool
    on_cuda: bool
    varlen: bool
    sequence: int
    keeps_inputs: bool


class DecoderLayer:
    """Counts the saved tensors of one decoder layer."""

    def __init__(
        self, saved: SavedTensors, settings: PassSettings, shape: Shape, weights: Sequence[WeightTensor], index: int
    ) -> None:
        self._saved = saved
        self._set = settings
        self._shape = shape
        self._index = index
        self._base: dict[str, WeightTensor] = {}
        self._adapters: dict[str, list[WeightTensor]] = {}
        for weight in weights:
            if weight.kind == "base":
                self._base[weight.name] = weight
            else:
                self._adapters.setdefault(weight.name, []).append(weight)

    def forward(self, hidden: ForwardTensor) -> ForwardTensor:
        """hidden [t, H] -> [t, H]."""
        norms = FAMILIES[self._shape.family].norms
        mixed = self._attention(self.norm(hidden, self._name(f"{norms[0]}.weight"), "norms"))
        if len(norms) == 4:
            mixed = self.norm(mixed, self._name(f"{norms[1]}.weight"), "norms")
        hidden = self._add(hidden, mixed)
        normed = self.norm(hidden, self._name(f"{norms[2 if len(norms) == 4 else 1]}.weight"), "norms")
        changed = self._experts(normed) if self._index in self._shape.sparse_layers else self._mlp(normed)
        if len(norms) == 4:
            changed = self.norm(changed, self._name(f"{norms[3]}.weight"), "norms")
        return self._add(hidden, changed)

    def norm(self, x: ForwardTensor, name: str, part: str) -> ForwardTensor:
        """Root mean square norm over the last dimension of `x`, computed in float32."""
        saved, weight = self._saved, self._base[name]
        wide = saved.cast(x, FP32)
        if x.has_grad:
            saved.save(wide, part)
            saved.save_new(x.elements // weight.shape[-1], FP32, part)
        is_gemma = self._shape.family in GEMMA
        normed = saved.tensor(x.elements, FP32 if is_gemma else x.width, x.has_grad)
        if weight.trained:
            saved.save(normed, part)
        if is_gemma and x.has_grad:
            saved.save_new(weight.size, FP32, part)
        width = x.width if is_gemma else max(x.width, self._set.base)
        return saved.tensor(x.elements, width, x.has_grad or weight.trained)

    def _name(self, part: str) -> str:
        return f"model.layers.{self._index}.{part}"

    def _add(self, left: ForwardTensor, right: ForwardTensor) -> ForwardTensor:
        return self._saved.tensor(left.elements, max(left.width, right.width), left.has_grad or right.has_grad)

    def _linear(self, x: ForwardTensor, name: str, part: str) -> ForwardTensor:
        """Apply a linear layer of the base model with its adapters."""
        name = self._name(f"{name}.weight")
        weight = self._base[name]
        adapters = self._adapters.get(name, [])
        scale = adapters[0] if len(adapters) == 1 and len(adapters[0].shape) == 1 else None
        if scale is not None and scale.size == weight.shape[1] != weight.shape[0]:
            # IA3 in front of the layer: the factor's gradient reads the scaled tensor, in the factor's format.
            self._saved.save(self._saved.cast(x, self._set.adapter), part)
            return self._product(self._saved.tensor(x.elements, x.width, True), weight, part)
        out = self._product(x, weight, part)
        if scale is not None:
            self._saved.save(out, part)
            return self._saved.tensor(out.elements, out.width, True)
        return self._low_rank(x, out, adapters, weight) if adapters else out

    def _product(self, x: ForwardTensor, weight: WeightTensor, part: str) -> ForwardTensor:
        saved = self._saved
        width = self._set.adapter if weight.kind == "adapter" else self._set.base
        given = saved.cast(x, self._set.compute)
        if weight.trained or (self._set.keeps_inputs and x.has_grad and weight.storage == "plain"):
            saved.save(given, part)
        if x.has_grad and self._set.autocast and width != self._set.compute and weight.storage == "plain":
            self._copy(weight)
        rows = x.elements // weight.shape[1]
        return saved.tensor(rows * weight.shape[0], self._set.compute, x.has_grad or weight.trained)

    def _copy(self, weight: WeightTensor) -> None:
        self._saved.save_new(weight.size, self._set.compute, COPIES)

    def _low_rank(
        self, x: ForwardTensor, out: ForwardTensor, adapters: Sequence[WeightTensor], weight: WeightTensor
    ) -> ForwardTensor:
        """Apply peft's LoRA layer: the input in the adapter's format, dropout, A, B, and the sum."""
        saved, (down, up, *magnitude) = self._saved, adapters
        given = saved.cast(x, self._set.adapter) if self._set.casts_inputs else x
        if self._set.dropout:
            if given.has_grad:
                saved.save_new(given.elements, 1 if self._set.on_cuda else given.width, "dropout masks")
            given = saved.tensor(given.elements, given.width, given.has_grad)
        added = self._product(self._product(given, down, "adapter"), up, "adapter")
        if magnitude:
            saved.save(out, "adapter")
            saved.save(added, "adapter")
            saved.save_new(3 * up.shape[0], FP32, "adapter")
            if self._set.dropout and x.has_grad and (self._set.autocast or weight.storage != "plain"):
                # What dropout leaves is multiplied by the weight once more, by a copy in the compute format.
                self._copy(weight)
        return saved.tensor(out.elements, out.width, True)

    def _attention(self, x: ForwardTensor) -> ForwardTensor:
        shape, saved, part = self._shape, self._saved, "attention"
        t, width = self._set.tokens, shape.head_width
        if FAMILIES[shape.family].fused:
            v = self._linear(x, "self_attn.qkv_proj", part)
            q = saved.tensor(t * shape.heads * width, v.width, v.has_grad)
            k = saved.tensor(t * shape.key_value_heads * width, v.width, v.has_grad)
        else:
            q, k, v = (self._linear(x, f"self_attn.{name}_proj", part) for name in "qkv")
        if FAMILIES[shape.family].head_norms:
            q = self.norm(q, self._name("self_attn.q_norm.weight"), part)
            k = self.norm(k, self._name("self_attn.k_norm.weight"), part)
        # Rotation makes new tensors, in float32 where the angles are; attention itself uses the values' format.
        q, k = (saved.tensor(each.elements, v.width, each.has_grad) for each in (q, k))
        return self._linear(self._attend(q, k, v), "self_attn.o_proj", part)

    def _attend(self, q: ForwardTensor, k: ForwardTensor, v: ForwardTensor) -> ForwardTensor:
        saved, settings, shape, part = self._saved, self._set, self._shape, "attention"
        width = settings.compute
        if settings.sequence > 1:
            # All tokens for some of the heads; key/value heads that the ranks do not divide are repeated.
            heads = -(-max(shape.key_value_heads, settings.sequence) // settings.sequence)
            queries = settings.row_tokens * shape.heads // settings.sequence * shape.head_width
            q = saved.tensor(queries, width, q.has_grad)
            k, v = (saved.tensor(settings.row_tokens * heads * shape.head_width, width, k.has_grad) for _ in range(2))
        if settings.prefix:
            more = settings.documents * settings.prefix * k.elements // settings.row_tokens
            k, v = (saved.tensor(k.elements + more, width, True) for _ in range(2))
        has_grad = q.has_grad or k.has_grad or v.has_grad
        out = saved.tensor(q.elements, width, has_grad)
        if has_grad:
            for tensor in (q, k, v, out):
                saved.save(tensor, part)
            saved.save_new(q.elements // shape.head_width, FP32, part)
            save_masks_and_scores(saved, settings, shape, self._index)
        if settings.sequence > 1:
            return saved.tensor(settings.tokens * shape.heads * shape.head_width, width, has_grad)
        # Outputs by document are concatenated into a new tensor.
        return out if settings.varlen else saved.tensor(q.elements, width, has_grad)

    def _mlp(self, x: ForwardTensor) -> ForwardTensor:
        saved, part, t = self._saved, "mlp", self._set.tokens
        if FAMILIES[self._shape.family].fused:
            gate = up = self._linear(x, "mlp.gate_up_proj", part)
        else:
            gate, up = self._linear(x, "mlp.gate_proj", part), self._linear(x, "mlp.up_proj", part)
        active = saved.tensor(t * self._shape.mlp_width, gate.width, gate.has_grad)
        if gate.has_grad or up.has_grad:
            for tensor in (gate, active, up):
                saved.save(tensor, part)
        product = saved.tensor(active.elements, gate.width, gate.has_grad or up.has_grad)
        return self._linear(product, "mlp.down_proj", part)

    def _experts(self, x: ForwardTensor) -> ForwardTensor:
        """Apply fused experts through torch's grouped product: each token once per active expert."""
        saved, shape, settings, part = self._saved, self._shape, self._set, "mlp"
        t = settings.tokens
        rows = t * shape.active_experts
        router = self._product(x, self._base[self._name("mlp.gate.weight")], part)
        if router.has_grad:
            saved.save_new(t * shape.experts, FP32, part)
            saved.save_new(rows, INDEX, part)
            if shape.family == "mixtral":
                saved.save_new(t + rows, FP32, part)
        for needs_index in (x.has_grad, router.has_grad, x.has_grad):
            if needs_index:
                saved.save_new(rows, INDEX, part)
        # Autocast does not cast for the grouped product: transformers uses the weights' own format.
        width = settings.base
        chosen = saved.tensor(rows * shape.hidden, width, x.has_grad)
        gate_up = self._grouped(chosen, "mlp.experts.gate_up_proj", rows * 2 * shape.expert_width)
        active = saved.tensor(rows * shape.expert_width, width, gate_up.has_grad)
        if gate_up.has_grad:
            saved.save(gate_up, part)
            saved.save(active, part)
        product = saved.tensor(active.elements, width, gate_up.has_grad)
        out = self._grouped(product, "mlp.experts.down_proj", rows * shape.hidden)
        if router.has_grad:
            saved.save(out, part)
        if out.has_grad:
            saved.save_new(rows, settings.compute if shape.family == "qwen3_moe" else FP32, part)
        return saved.tensor(t * shape.hidden, x.width, out.has_grad or router.has_grad)

    def _grouped(self, x: ForwardTensor, name: str, elements: int) -> ForwardTensor:
        weight = self._base[self._name(name)]
        adapters = self._adapters.get(weight.name, [])
        if weight.trained or adapters:
            self._saved.save(x, "mlp")
        if adapters:
            # peft adds the adapter to the weights of all experts before they are used.
            self._saved.save_new(weight.size, x.width, COPIES)
            if self._set.autocast and self._set.adapter != self._set.compute:
                self._saved.save_new(sum(adapter.size for adapter in adapters), self._set.compute, COPIES)
        return self._saved.tensor(elements, x.width, x.has_grad or weight.trained or bool(adapters))


def save_masks_and_scores(saved: SavedTensors, settings: PassSettings, shape: Shape, index: int) -> None:
    """Save masks and scores of SDPA for each document; torch's varlen kernel saves neither."""
    if settings.varlen:
        return
    window = shape.windows[index]
    mean_square = settings.squares // max(1, settings.documents)
    masked = settings.prefix > 0 or (window is not None and mean_square > window * window)
    if masked:
        saved.save_new(settings.squares + settings.prefix * settings.row_tokens, settings.compute, "attention")
    grouped = shape.heads != shape.key_value_heads
    if settings.on_cuda and grouped and (settings.compute == FP32 or masked):
        # Of torch's kernels only the plain one supports grouped heads in float32 or with a mask.
        saved.save_new(shape.heads // settings.sequence * settings.squares, settings.compute, "attention")
    if shape.measured_model is not None and not settings.on_cuda:
        scores = shape.measured_model.scores_kept * shape.heads // settings.sequence
        saved.save_new(scores * settings.squares, FP32, "attention")
