"""One decoder layer's forward pass on a tape: the operations of transformers' own layers, in their order.

Shapes: t tokens of the row on this rank, T of the whole row (t but under sequence parallelism), H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from packhorse.estimate.held import Held
from packhorse.estimate.tape import Tape, Value
from packhorse.model_spec.parameters import FAMILIES, Shape

FP32: Final = 4
INDEX: Final = 8
GEMMA: Final = ("gemma", "gemma3_text")
COPIES: Final = "weight copies"


@dataclass(frozen=True)
class Setting:
    """How the layers are run.

    Attributes:
        tokens: t.
        row_tokens: T.
        squares: Sum of the squared lengths of the row's documents.
        documents: How many there are.
        prefix: Keys and values before each document.
        compute: Bytes of a number in matrix products.
        autocast: Whether these are made by autocast, from float32 where weights or hidden states are that.
        base: Bytes of a base weight as the forward pass meets it.
        adapter: Bytes of an adapter's weight as the forward pass meets it.
        dropout: Whether low-rank adapters drop a part of their input.
        on_cuda: Whether CUDA's kernels run: a dropout mask then takes a byte an element.
        varlen: Whether attention is torch's varlen kernel; else SDPA, document by document.
        sequence: Ranks that share the row.
        keeps_inputs: Whether linear layers keep their input even where the weight is frozen, as ZeRO-3's own do.
    """

    tokens: int
    row_tokens: int
    squares: int
    documents: int
    prefix: int
    compute: int
    autocast: bool
    base: int
    adapter: int
    dropout: bool
    on_cuda: bool
    varlen: bool
    sequence: int
    keeps_inputs: bool


class Layer:
    """Walks one layer."""

    def __init__(self, tape: Tape, setting: Setting, shape: Shape, weights: Sequence[Held], index: int) -> None:
        self._tape = tape
        self._set = setting
        self._shape = shape
        self._index = index
        self._base: dict[str, Held] = {}
        self._beside: dict[str, list[Held]] = {}
        for held in weights:
            if held.kind == "base":
                self._base[held.name] = held
            else:
                self._beside.setdefault(held.name, []).append(held)

    def forward(self, hidden: Value, rope_width: int) -> Value:
        """hidden [t, H] -> [t, H]."""
        norms = FAMILIES[self._shape.family].norms
        mixed = self._attention(self.norm(hidden, self._name(f"{norms[0]}.weight"), "norms"), rope_width)
        if len(norms) == 4:
            mixed = self.norm(mixed, self._name(f"{norms[1]}.weight"), "norms")
        hidden = self._add(hidden, mixed)
        normed = self.norm(hidden, self._name(f"{norms[2 if len(norms) == 4 else 1]}.weight"), "norms")
        changed = self._experts(normed) if self._index in self._shape.sparse_layers else self._mlp(normed)
        if len(norms) == 4:
            changed = self.norm(changed, self._name(f"{norms[3]}.weight"), "norms")
        return self._add(hidden, changed)

    def norm(self, x: Value, name: str, part: str) -> Value:
        """Root mean square norm over the last dimension of `x`, computed in float32."""
        tape, weight = self._tape, self._base[name]
        wide = tape.cast(x, FP32)
        rows = x.elements // weight.shape[-1]
        if x.has_grad:
            tape.keep(wide, part)
            tape.keep_new(rows, FP32, part)
        is_gemma = self._shape.family in GEMMA
        normed = tape.value(x.elements, FP32 if is_gemma else x.width, x.has_grad)
        if weight.trained:
            tape.keep(normed, part)
        if is_gemma and x.has_grad:
            tape.keep_new(weight.size, FP32, part)
        width = x.width if is_gemma else max(x.width, self._set.base)
        return tape.value(x.elements, width, x.has_grad or weight.trained)

    def _name(self, part: str) -> str:
        return f"model.layers.{self._index}.{part}"

    def _add(self, one: Value, other: Value) -> Value:
        return self._tape.value(one.elements, max(one.width, other.width), one.has_grad or other.has_grad)

    def linear(self, x: Value, name: str, part: str) -> Value:
        """A linear layer of the base with what stands beside it."""
        name = self._name(f"{name}.weight")
        weight = self._base[name]
        beside = self._beside.get(name, [])
        scale = next((held for held in beside if len(held.shape) == 1 and len(beside) == 1), None)
        if scale is not None and scale.size == weight.shape[1] != weight.shape[0]:
            # IA3 before the layer: the factor's gradient reads what is scaled, in the factor's format.
            self._tape.keep(self._tape.cast(x, self._set.adapter), part)
            return self._product(self._tape.value(x.elements, x.width, True), weight, part)
        out = self._product(x, weight, part)
        if scale is not None:
            self._tape.keep(out, part)
            return self._tape.value(out.elements, out.width, True)
        return self._low_rank(x, out, beside, part) if beside else out

    def _product(self, x: Value, weight: Held, part: str) -> Value:
        tape = self._tape
        width = self._set.adapter if weight.kind == "adapter" else self._set.base
        given = tape.cast(x, self._set.compute)
        if weight.trained or (self._set.keeps_inputs and x.has_grad and weight.storage == "plain"):
            tape.keep(given, part)
        if x.has_grad and self._set.autocast and width != self._set.compute and weight.storage == "plain":
            tape.keep_new(weight.size, self._set.compute, COPIES)
        rows = x.elements // weight.shape[1]
        return tape.value(rows * weight.shape[0], self._set.compute, x.has_grad or weight.trained)

    def _low_rank(self, x: Value, out: Value, beside: Sequence[Held], part: str) -> Value:
        """peft's LoRA layer: the input in the adapter's format, dropout, A, B, and the sum."""
        tape, (down, up, *magnitude) = self._tape, beside
        given = tape.cast(x, self._set.adapter)
        if self._set.dropout:
            if given.has_grad:
                tape.keep_new(given.elements, 1 if self._set.on_cuda else given.width, "dropout masks")
            given = tape.value(given.elements, given.width, given.has_grad)
        inner = self._product(given, down, "adapter")
        added = self._product(inner, up, "adapter")
        if magnitude:
            inputs, rank, outputs = down.shape[1], down.shape[0], up.shape[0]
            tape.keep(out, "adapter")
            tape.keep(added, "adapter")
            # peft finds the norm of the whole weight by sending a unit matrix through the adapter.
            tape.keep_new(inputs * inputs + inputs * rank, self._set.compute, "adapter")
            tape.keep_new(3 * outputs, FP32, "adapter")
        return tape.value(out.elements, out.width, True)

    def _attention(self, x: Value, rope_width: int) -> Value:
        shape, tape, part = self._shape, self._tape, "attention"
        t, width = self._set.tokens, shape.head_width
        query, key = shape.heads * width, shape.key_value_heads * width
        if FAMILIES[shape.family].fused:
            fused = self.linear(x, "self_attn.qkv_proj", part)
            q = tape.value(t * query, fused.width, fused.has_grad)
            k, v = tape.value(t * key, fused.width, fused.has_grad), fused
        else:
            q, k, v = (self.linear(x, f"self_attn.{name}_proj", part) for name in "qkv")
        if FAMILIES[shape.family].head_norms:
            q, k = (
                self.norm(each, self._name(f"self_attn.{name}_norm.weight"), part)
                for each, name in ((q, "q"), (k, "k"))
            )
        # Rotation makes new tensors, in float32 where the angles are; attention itself takes the values' format.
        q, k = (tape.value(each.elements, v.width, each.has_grad) for each in (q, k))
        return self.linear(self._attend(q, k, v), "self_attn.o_proj", part)

    def _attend(self, q: Value, k: Value, v: Value) -> Value:
        tape, setting, shape, part = self._tape, self._set, self._shape, "attention"
        width = setting.compute
        if setting.sequence > 1:
            # All tokens of a part of the heads; key/value heads that the ranks do not divide are repeated.
            heads = -(-max(shape.key_value_heads, setting.sequence) // setting.sequence)
            q = tape.value(setting.row_tokens * shape.heads // setting.sequence * shape.head_width, width, q.has_grad)
            k, v = (tape.value(setting.row_tokens * heads * shape.head_width, width, k.has_grad) for _ in range(2))
        if setting.prefix:
            more = setting.documents * setting.prefix * k.elements // setting.row_tokens
            k, v = (tape.value(k.elements + more, width, True) for _ in range(2))
        has_grad = q.has_grad or k.has_grad or v.has_grad
        out = tape.value(q.elements, width, has_grad)
        if has_grad:
            for value in (q, k, v, out):
                tape.keep(value, part)
            tape.keep_new(q.elements // shape.head_width, FP32, part)
            keep_masks_and_scores(tape, setting, shape, self._index)
        if setting.sequence > 1:
            return tape.value(setting.tokens * shape.heads * shape.head_width, width, has_grad)
        # Parts by document are put together in a new tensor.
        return out if setting.varlen else tape.value(q.elements, width, has_grad)

    def _mlp(self, x: Value) -> Value:
        tape, part, t = self._tape, "mlp", self._set.tokens
        if FAMILIES[self._shape.family].fused:
            gate = up = self.linear(x, "mlp.gate_up_proj", part)
        else:
            gate, up = self.linear(x, "mlp.gate_proj", part), self.linear(x, "mlp.up_proj", part)
        active = tape.value(t * self._shape.mlp_width, gate.width, gate.has_grad)
        if gate.has_grad or up.has_grad:
            for value in (gate, active, up):
                tape.keep(value, part)
        product = tape.value(active.elements, gate.width, gate.has_grad or up.has_grad)
        return self.linear(product, "mlp.down_proj", part)

    def _experts(self, x: Value) -> Value:
        """Fused experts through torch's grouped product: each token as often as it has experts."""
        tape, shape, setting, part = self._tape, self._shape, self._set, "mlp"
        t, top = setting.tokens, shape.active_experts
        rows = t * top
        router = self._product(x, self._base[self._name("mlp.gate.weight")], part)
        if router.has_grad:
            tape.keep_new(t * shape.experts, FP32, part)
            tape.keep_new(rows, INDEX, part)
            if shape.family == "mixtral":
                tape.keep_new(t + rows, FP32, part)
        up, down = (self._base[self._name(f"mlp.experts.{name}_proj")] for name in ("gate_up", "down"))
        for indices in (x.has_grad, router.has_grad, x.has_grad):
            if indices:
                tape.keep_new(rows, INDEX, part)
        # Autocast does not know the grouped product: transformers gives it the weights' own format.
        width = setting.base
        chosen = tape.value(rows * shape.hidden, width, x.has_grad)
        gate_up = self._grouped(chosen, up, rows * 2 * shape.expert_width)
        active = tape.value(rows * shape.expert_width, width, gate_up.has_grad)
        if gate_up.has_grad:
            tape.keep(gate_up, part)
            tape.keep(active, part)
        product = tape.value(active.elements, width, gate_up.has_grad)
        out = self._grouped(product, down, rows * shape.hidden)
        if router.has_grad:
            tape.keep(out, part)
        if out.has_grad:
            tape.keep_new(rows, setting.compute if shape.family == "qwen3_moe" else FP32, part)
        return tape.value(t * shape.hidden, x.width, out.has_grad or router.has_grad)

    def _grouped(self, x: Value, weight: Held, elements: int) -> Value:
        adapters: Mapping[str, list[Held]] = self._beside
        adapted = weight.name in adapters
        if weight.trained or adapted:
            self._tape.keep(x, "mlp")
        if adapted:
            # peft adds the adapter to the experts' weights, all of them, before they are used.
            self._tape.keep_new(weight.size, x.width, COPIES)
            if self._set.autocast and self._set.adapter != self._set.compute:
                size = sum(held.size for held in adapters[weight.name])
                self._tape.keep_new(size, self._set.compute, COPIES)
        return self._tape.value(elements, x.width, x.has_grad or weight.trained or adapted)


def keep_masks_and_scores(tape: Tape, setting: Setting, shape: Shape, index: int) -> None:
    """What SDPA keeps beside its inputs, of each document; torch's varlen kernel keeps nothing more.

    Args:
        tape: Of the layer.
        setting: How it is run.
        shape: Of the model.
        index: Of the layer.
    """
    if setting.varlen:
        return
    window = shape.windows[index]
    longest = setting.squares // max(1, setting.documents)
    masked = setting.prefix > 0 or (window is not None and longest > window * window)
    if masked:
        tape.keep_new(setting.squares + setting.prefix * setting.row_tokens, setting.compute, "attention")
    grouped = shape.heads != shape.key_value_heads
    if setting.on_cuda and grouped and (setting.compute == FP32 or masked):
        # Of torch's kernels only the plain one takes grouped heads in float32 or with a mask.
        tape.keep_new(shape.heads // setting.sequence * setting.squares, setting.compute, "attention")
    if shape.anatomy is not None and not setting.on_cuda:
        scores = shape.anatomy.scores_kept * shape.heads // setting.sequence
        tape.keep_new(scores * setting.squares, FP32, "attention")
