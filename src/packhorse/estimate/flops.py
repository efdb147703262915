"""FLOPs of one pass of one rank, from the architecture: which products run forward, backward and once more.

Letters: t tokens of a rank in one pass, S supervised tokens, H hidden width, V vocabulary, r rank of LoRA.

A product of a weight [outputs, inputs] with t tokens takes 2 t x inputs x outputs FLOPs forward, as many for the
gradient of its input and as many for the gradient of the weight (PaLM, Chowdhery et al. 2022, arXiv 2204.02311,
appendix B). What is trained decides which of these run: a frozen weight has no gradient, and below the lowest trained
weight nothing runs backward. Attention takes 4 x pairs x heads x head width forward. Pairs are those of a query and a
key that it attends to: half the square of each document's length (causal), or fewer with a sliding window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from packhorse.estimate.packs import PackFigures
from packhorse.model_spec.measured_model import Parameter
from packhorse.model_spec.parameters import FAMILIES, Shape, list_parameters
from packhorse.model_spec.trainable import trained_by_name
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.methods import LoraMethod, Method, PrefixTuningMethod, PromptTuningMethod

# FlashAttention computes the scores again in its backward pass: five products for the forward pass's two
# (Dao 2023, arXiv 2307.08691, section 4.1).
FLASH_BACKWARD = 2.5

Part = Literal["linear", "experts", "adapter", "head"]


@dataclass(frozen=True)
class Products:
    """Matrix products in one pass: `rows` tokens times each of several weights of one shape.

    Attributes:
        name: Name of the weight inside its layer.
        part: Kind of weight.
        rows: Tokens that one weight is multiplied with.
        outputs: Output width of the weight.
        inputs: Input width of the weight.
        forward: Number of weights that run forward.
        recomputed: Number of those that run again because of checkpointing.
        input_gradients: Number of weights whose input's gradient is computed.
        weight_gradients: Number of weights whose own gradient is computed.
    """

    name: str
    part: Part
    rows: float
    outputs: int
    inputs: int
    forward: int = 0
    recomputed: int = 0
    input_gradients: int = 0
    weight_gradients: int = 0

    @property
    def one(self) -> float:
        """FLOPs of one product."""
        return 2.0 * self.rows * self.outputs * self.inputs

    @property
    def model_flops(self) -> float:
        """FLOPs that the mathematics needs: forward and backward, nothing twice."""
        return self.one * (self.forward + self.input_gradients + self.weight_gradients)

    def times(self, count: int, more: Products | None) -> Products:
        """Return `count` times these products, added to `more`."""
        more = more or replace(self, forward=0, recomputed=0, input_gradients=0, weight_gradients=0)
        return replace(
            more,
            forward=more.forward + count * self.forward,
            recomputed=more.recomputed + count * self.recomputed,
            input_gradients=more.input_gradients + count * self.input_gradients,
            weight_gradients=more.weight_gradients + count * self.weight_gradients,
        )


@dataclass(frozen=True)
class Attention:
    """FLOPs of attention in one pass over all layers.

    Attributes:
        forward_flops: FLOPs of the forward pass.
        backward_flops: FLOPs that the mathematics of the backward pass needs: twice the forward pass's.
        recomputed_flops: FLOPs of layers that run forward again because of checkpointing.
    """

    forward_flops: float
    backward_flops: float
    recomputed_flops: float

    @property
    def kernel_backward_flops(self) -> float:
        """FLOPs that the kernel runs in the backward pass."""
        return self.backward_flops / 2.0 * FLASH_BACKWARD


@dataclass(frozen=True)
class PassWork:
    """FLOPs of one pass of one rank.

    Attributes:
        tokens: t; under `parallel.sequence` the rank's part of the packs.
        supervised: S of this rank.
        products: Every matrix product.
        attention: Attention.
        layers_backward: Number of layers that a gradient passes through.
        layers_recomputed: Number of those that run forward again.
    """

    tokens: float
    supervised: float
    products: tuple[Products, ...]
    attention: Attention
    layers_backward: int
    layers_recomputed: int

    @property
    def model_flops(self) -> float:
        """FLOPs that MFU counts: neither recomputation nor what a kernel does twice."""
        attention = self.attention.forward_flops + self.attention.backward_flops
        return sum(products.model_flops for products in self.products) + attention

    @property
    def hardware_flops(self) -> float:
        """FLOPs that HFU counts: everything that runs."""
        products = sum(each.model_flops + each.one * each.recomputed for each in self.products)
        attention = self.attention.recomputed_flops + self.attention.kernel_backward_flops
        return products + attention + self.attention.forward_flops


def pass_work(plan: RunPlan, shape: Shape, packs: PackFigures) -> PassWork:
    """Count the FLOPs of a mean pass of a method whose trained weights are known."""
    method = plan.recipe.method
    trained = trained_by_name(list_parameters(shape), method, shape)
    assert trained is not None, "list_weights knows them"
    share = plan.batch.micro_packs / plan.topology.sequence
    tokens, supervised = packs.tokens_mean * share, packs.supervised_mean * share
    if isinstance(method, PromptTuningMethod):
        tokens += _documents(packs) * method.virtual_tokens * share
    layers = _LayerWalk(plan, shape, trained, tokens).layers()
    return PassWork(
        tokens=tokens,
        supervised=supervised,
        products=(*_summed(layers), _head(plan, shape, trained, supervised)),
        attention=_attention(shape, plan, packs, layers),
        layers_backward=sum(layer.backward for layer in layers),
        layers_recomputed=sum(layer.recomputed for layer in layers),
    )


# --- in which order a layer uses its weights ----------------------------------------------------------


@dataclass(frozen=True)
class LayerOrder:
    """Order in which a layer uses its weights, which decides what runs backward and what runs again.

    Attributes:
        stage: Stage of a name inside the layer.
        count: Number of stages.
        queries: Stage after which attention runs.
        last: Names of linear layers that nothing in their layer follows.
    """

    stage: Callable[[str], int]
    count: int
    queries: int
    last: frozenset[str]


def _order_of(shape: Shape) -> LayerOrder:
    measured = shape.measured_model
    if measured is None:
        # A norm behind the last linear layer needs its result.
        followed = len(FAMILIES[shape.family].norms) == 4
        return LayerOrder(_described_stage, 6, 1, frozenset() if followed else frozenset({"mlp.down_proj"}))
    stages = measured.stages
    inside: dict[int, list[tuple[int, Parameter]]] = {}
    for parameter in measured.parameters:
        layer, name = shape.names.split(parameter.name)
        if layer is not None:
            inside.setdefault(layer, []).append((stages.get(name, 0), parameter))
    last = set()
    for parameters in inside.values():
        end = max(stage for stage, _ in parameters)
        last |= {shape.names.in_layer(each.module) for stage, each in parameters if stage == end and each.linear}
    return LayerOrder(
        lambda name: stages.get(name, 0), max(stages.values()) + 1, measured.queries_stage, frozenset(last)
    )


def _described_stage(name: str) -> int:
    """Return the stage in a described family: norm, queries, output, norm, MLP up, MLP down."""
    if name.startswith("self_attn."):
        return 2 if ".o_proj" in name else 1
    if name.startswith("mlp."):
        return 5 if "down_proj" in name else 4
    return 0 if "input_layernorm" in name else 3


# --- the walk over the layers -------------------------------------------------------------------------


@dataclass(frozen=True)
class _LayerWork:
    """One decoder layer: its products, and whether gradients reach its attention and its input."""

    window: int | None
    products: tuple[Products, ...]
    backward: bool
    attention_backward: bool
    recomputed: bool


class _LayerWalk:
    """Visits the layers in the order of the forward pass and tracks from where on a gradient is needed."""

    def __init__(self, plan: RunPlan, shape: Shape, trained: Mapping[str, int], tokens: float) -> None:
        self._shape = shape
        self._method = plan.recipe.method
        self._trained = trained
        self._tokens = tokens
        self._order = _order_of(shape)
        last = tuple(
            f".{name}{end}" for name in (*self._order.last, "mlp.experts.down_proj") for end in ("", ".weight")
        )
        self._adapted_last = isinstance(self._method, LoraMethod) and any(name.endswith(last) for name in trained)
        self._every = plan.recipe.parallel.recomputed_every
        # Virtual tokens are trained and precede the first layer. Where layers are recomputed, transformers requests the
        # gradient of the first one's input, whatever is trained: the backward pass runs down to it.
        trained_before = shape.names.embedding in trained or isinstance(self._method, PromptTuningMethod)
        self._needs_grad = trained_before or self._every > 0

    def layers(self) -> list[_LayerWork]:
        """Return the work of every layer, from the first; equal layers are one object."""
        names, found, known = self._shape.names, [], {}
        listed = ((names.layer_of(each.name), each) for each in list_parameters(self._shape))
        inside = [(index, each) for index, each in listed if index is not None]
        for index, pairs in groupby(inside, key=lambda pair: pair[0]):
            group = [each for _, each in pairs]
            key = (
                self._needs_grad,
                self._shape.windows[index],
                index in self._shape.sparse_layers,
                self._may_recompute(index),
                tuple(each.name in self._trained for each in group),
            )
            if key not in known:
                known[key] = self._layer(index, group)
            found.append(known[key])
            self._needs_grad = found[-1].backward
        return found

    def _may_recompute(self, index: int) -> bool:
        return self._every > 0 and index % self._every == 0

    def _layer(self, index: int, parameters: Sequence[Parameter]) -> _LayerWork:
        order = self._order
        stages = [order.stage(self._shape.names.in_layer(each.name)) for each in parameters]
        products: list[Products] = []
        attention_backward = False
        for stage in range(order.count):
            input_has_grad = self._needs_grad
            for parameter, own in zip(parameters, stages, strict=True):
                if own == stage:
                    products += self._products(parameter, input_has_grad)
                    self._needs_grad = self._needs_grad or parameter.name in self._trained
            if stage == order.queries:
                self._needs_grad = self._needs_grad or isinstance(self._method, PrefixTuningMethod)
                attention_backward = self._needs_grad
        again = self._needs_grad and self._may_recompute(index)
        return _LayerWork(
            window=self._shape.windows[index],
            products=tuple(replace(each, recomputed=self._again(each) * again) for each in products),
            backward=self._needs_grad,
            attention_backward=attention_backward,
            recomputed=again,
        )

    def _again(self, products: Products) -> int:
        """Return how many of a recomputed layer's products run again."""
        # torch stops when the backward pass has all that it needs. Nothing needs the result of a layer's last product,
        # but an adapter on it is computed later and has its input saved.
        if products.name.removesuffix(".adapter_b") in self._order.last and products.part == "adapter":
            return 0
        return 0 if products.name in self._order.last and not self._adapted_last else products.forward

    def _products(self, parameter: Parameter, input_has_grad: bool) -> Iterator[Products]:
        if len(parameter.shape) < 2:
            return
        experts = parameter.shape[0] if len(parameter.shape) == 3 else 1
        outputs, inputs = parameter.shape[-2:]
        name = self._shape.names.in_layer(parameter.name).removesuffix(".weight")
        trained, method = parameter.name in self._trained, self._method
        lora = method if trained and isinstance(method, LoraMethod) else None
        whole = lora is not None and parameter.module.endswith(tuple(lora.train_also))
        base = Products(
            name=name,
            part="experts" if experts > 1 else "linear",
            rows=self._tokens * self._shape.active_experts / experts if experts > 1 else self._tokens,
            outputs=outputs,
            inputs=inputs,
            forward=experts,
            input_gradients=experts * input_has_grad,
            weight_gradients=experts * (whole or (trained and method.trains_base)),
        )
        yield base
        if lora is not None and not whole:
            half = replace(base, part="adapter", weight_gradients=experts)
            yield replace(half, name=f"{name}.adapter_a", outputs=lora.rank)
            yield replace(half, name=f"{name}.adapter_b", inputs=lora.rank, input_gradients=experts)


def _summed(layers: Sequence[_LayerWork]) -> Iterator[Products]:
    """Yield the products of all layers, with those of one name summed."""
    found: dict[tuple[str, Part], Products] = {}
    counts, once = Counter(map(id, layers)), {id(layer): layer for layer in layers}
    for layer in once.values():
        for each in layer.products:
            key = (each.name, each.part)
            found[key] = each.times(counts[id(layer)], found.get(key))
    yield from found.values()


def _head(plan: RunPlan, shape: Shape, trained: Mapping[str, int], supervised: float) -> Products:
    """Return the output head, which runs only where the next token is supervised."""
    weight = shape.names.embedding if shape.tied else shape.names.head
    # In 16 bits the chunked loss computes its logits again for the backward pass; in fp32 it keeps them.
    again = plan.recipe.precision != "fp32"
    return Products(
        name="lm_head",
        part="head",
        rows=supervised,
        outputs=shape.vocabulary,
        inputs=shape.hidden,
        forward=1,
        recomputed=int(again),
        input_gradients=1,
        weight_gradients=int(weight in trained),
    )


def _attention(shape: Shape, plan: RunPlan, packs: PackFigures, layers: Sequence[_LayerWork]) -> Attention:
    width = shape.heads * shape.head_width
    # Ranks that share a pack hold whole documents for a part of the heads.
    share = plan.batch.micro_packs / plan.topology.sequence
    virtual = _virtual_pairs(plan.recipe.method, packs)
    per_window = {layer.window: pairs_of_pack(packs, layer.window) + virtual for layer in layers}

    def flops(chosen: Sequence[_LayerWork]) -> float:
        return 4.0 * width * share * sum(per_window[layer.window] for layer in chosen)

    selective = plan.recipe.parallel.checkpointing == "selective"
    return Attention(
        forward_flops=flops(layers),
        backward_flops=2.0 * flops([layer for layer in layers if layer.attention_backward]),
        recomputed_flops=0.0 if selective else flops([layer for layer in layers if layer.recomputed]),
    )


def _virtual_pairs(method: Method, packs: PackFigures) -> float:
    """Return the pairs per pack from virtual tokens: keys for each document, under prompt tuning queries too."""
    if isinstance(method, PrefixTuningMethod):
        return packs.tokens_mean * method.virtual_tokens
    if isinstance(method, PromptTuningMethod):
        return packs.tokens_mean * method.virtual_tokens + _documents(packs) * method.virtual_tokens**2 / 2.0
    return 0.0


def _documents(packs: PackFigures) -> float:
    """Return the documents of a mean pack if all had one length; of unequal ones there are more."""
    return packs.tokens_mean**2 / max(packs.squares_mean, 1.0)


def pairs_of_pack(packs: PackFigures, window: int | None) -> float:
    """Return the pairs of a query and a key that it attends to, in a mean pack.

    Without a window this is half the sum of squared lengths. A document of l > w tokens with a window w has
    l w - w²/2 pairs; for unequal documents the length around a mean token is used, which is slightly too many.
    """
    length = packs.squares_mean / max(packs.tokens_mean, 1.0)
    if window is None or length <= window:
        return packs.squares_mean / 2.0
    return packs.tokens_mean * (window - window**2 / (2.0 * length))
