"""Arithmetic of one pass of one rank, from the architecture: which products run forward, backward and once more.

Letters: t tokens that a rank works on in a pass, S supervised ones, H hidden width, V vocabulary, r rank of LoRA.

A product of a weight [outputs, inputs] with t tokens takes 2 t x inputs x outputs operations forward, as many for the
gradient of its input and as many for that of the weight (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
What is trained decides which of these run: a frozen weight has no gradient, and below the lowest trained weight nothing
runs backward. Attention takes 4 x pairs x heads x head width forward; pairs are those of a query and a key that it may
see: half the square of each document's length (causal), or less under a sliding window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from packhorse.estimate.order import order_of
from packhorse.estimate.packs import PackFigures
from packhorse.model_spec.anatomy import Parameter
from packhorse.model_spec.parameters import Shape, list_parameters
from packhorse.model_spec.trainable import trained_by_name
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.methods import LoraMethod, Method, PrefixTuningMethod, PromptTuningMethod

# FlashAttention computes the scores anew in its backward pass: five products of the forward pass's two
# (Dao 2023, arXiv 2307.08691, section 4.1).
FLASH_BACKWARD = 2.5

Part = Literal["linear", "experts", "adapter", "head"]


@dataclass(frozen=True)
class Products:
    """Matrix products of one kind in a pass: `rows` tokens with each of some weights of one shape.

    Attributes:
        part: What the weight is.
        rows: Tokens that meet one weight.
        outputs: Of the weight.
        inputs: Of the weight.
        forward: Weights that run forward.
        recomputed: Those of them that run again because of checkpointing.
        input_gradients: Those whose input's gradient is computed.
        weight_gradients: Those whose own gradient is.
        joined: Weights that one launch multiplies, such as the experts of a layer.
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
    joined: int = 1

    @property
    def one(self) -> float:
        """Operations of one product."""
        return 2.0 * self.rows * self.outputs * self.inputs

    @property
    def model_flops(self) -> float:
        """What the mathematics asks for: forward and backward, nothing twice."""
        return self.one * (self.forward + self.input_gradients + self.weight_gradients)


@dataclass(frozen=True)
class Attention:
    """Attention of a pass over all layers.

    Attributes:
        forward_flops: Of the forward pass.
        backward_flops: Of the backward pass as the mathematics asks for it: twice the forward's.
        recomputed_flops: Of layers that run forward again because of checkpointing.
    """

    forward_flops: float
    backward_flops: float
    recomputed_flops: float

    @property
    def kernel_backward_flops(self) -> float:
        """Of the backward pass as the kernel runs it."""
        return self.backward_flops / 2.0 * FLASH_BACKWARD


@dataclass(frozen=True)
class PassWork:
    """All arithmetic of one pass of one rank.

    Attributes:
        tokens: t, of this rank; under `parallel.sequence` its part of the packs.
        supervised: S, of this rank.
        products: Every matrix product.
        attention: The rest.
        layers_backward: Layers through which a gradient flows.
        layers_recomputed: Those of them that run forward again.
    """

    tokens: float
    supervised: float
    products: tuple[Products, ...]
    attention: Attention
    layers_backward: int
    layers_recomputed: int

    @property
    def model_flops(self) -> float:
        """What MFU counts: neither recomputation nor what a kernel does twice."""
        attention = self.attention.forward_flops + self.attention.backward_flops
        return sum(products.model_flops for products in self.products) + attention

    @property
    def hardware_flops(self) -> float:
        """What HFU counts: all that runs."""
        again = sum(products.one * products.recomputed for products in self.products)
        attention = self.attention.recomputed_flops + self.attention.kernel_backward_flops
        return (
            sum(products.model_flops for products in self.products) + again + attention + self.attention.forward_flops
        )


def pass_work(plan: RunPlan, shape: Shape, packs: PackFigures) -> PassWork | None:
    """The arithmetic of a mean pass; None where what the method trains is the library's choice.

    Args:
        plan: Method, batch split, topology and checkpointing.
        shape: Of the model.
        packs: What a pack holds.
    """
    method = plan.recipe.method
    trained = trained_by_name(list_parameters(shape), method, shape)
    if isinstance(method, (PromptTuningMethod, PrefixTuningMethod)):
        trained = {}
    elif trained is None:
        return None
    share = plan.batch.micro_packs / plan.topology.sequence
    tokens, supervised = packs.tokens_mean * share, packs.supervised_mean * share
    if isinstance(method, PromptTuningMethod):
        tokens += _documents(packs) * method.virtual_tokens * share
    layers = _Layers(plan, shape, trained, tokens).walk()
    return PassWork(
        tokens=tokens,
        supervised=supervised,
        products=(*_joined(layers), _head(plan, shape, trained, supervised)),
        attention=_attention(shape, plan, packs, layers),
        layers_backward=sum(layer.backward for layer in layers),
        layers_recomputed=sum(layer.recomputed for layer in layers),
    )


@dataclass(frozen=True)
class _Layer:
    """One decoder layer: its products, and whether gradients reach its attention and its input's side."""

    window: int | None
    products: tuple[Products, ...]
    backward: bool
    attention_backward: bool
    recomputed: bool


class _Layers:
    """Walks the layers in the order of the forward pass and notes from where on a gradient is needed."""

    def __init__(self, plan: RunPlan, shape: Shape, trained: Mapping[str, int], tokens: float) -> None:
        self._shape = shape
        self._method = plan.recipe.method
        self._trained = trained
        self._tokens = tokens
        self._order = order_of(shape)
        last = tuple(
            f".{name}{end}" for name in (*self._order.last, "mlp.experts.down_proj") for end in ("", ".weight")
        )
        self._adapted_last = isinstance(self._method, LoraMethod) and any(name.endswith(last) for name in trained)
        self._every = int(plan.recipe.parallel.checkpointing)
        # Virtual tokens are trained and stand before the first layer. Where layers are recomputed, transformers asks
        # for the gradient of the first one's input, whatever is trained: the backward pass runs down to it.
        trained_before = shape.names.embedding in trained or isinstance(self._method, PromptTuningMethod)
        self._reached = trained_before or self._every > 0

    def walk(self) -> list[_Layer]:
        """Every layer, from the first."""
        names, found, known = self._shape.names, [], {}
        listed = ((names.layer_of(each.name), each) for each in list_parameters(self._shape))
        inside = [(at, each) for at, each in listed if at is not None]
        for at, pairs in groupby(inside, key=lambda pair: pair[0]):
            group = [each for _, each in pairs]
            chosen = tuple(each.name in self._trained for each in group)
            # Most layers are alike.
            like = (
                self._reached,
                self._shape.windows[at],
                at in self._shape.sparse_layers,
                self._may_recompute(at),
                chosen,
            )
            if like not in known:
                known[like] = self._layer(at, group)
            found.append(known[like])
            self._reached = found[-1].backward
        return found

    def _may_recompute(self, at: int) -> bool:
        return self._every > 0 and at % self._every == 0

    def _layer(self, at: int, parameters: Sequence[Parameter]) -> _Layer:
        order = self._order
        stages = [order.stage(self._shape.names.in_layer(each.name)) for each in parameters]
        by_stage = [
            [each for each, own in zip(parameters, stages, strict=True) if own == stage] for stage in range(order.count)
        ]
        products: list[Products] = []
        attention_backward = False
        for stage, group in enumerate(by_stage):
            needed = self._reached
            for parameter in group:
                products += self._products(parameter, needed)
                self._reached = self._reached or parameter.name in self._trained
            if stage == order.queries:
                self._reached = self._reached or isinstance(self._method, PrefixTuningMethod)
                attention_backward = self._reached
        again = self._reached and self._may_recompute(at)
        return _Layer(
            window=self._shape.windows[at],
            products=tuple(replace(each, recomputed=self._again(each) * again) for each in products),
            backward=self._reached,
            attention_backward=attention_backward,
            recomputed=again,
        )

    def _again(self, products: Products) -> int:
        """How many of a recomputed layer's products run again."""
        # torch stops when all that the backward pass asks for is there. The layer's last product is asked for by none,
        # but an adapter beside it is computed later and has its input kept.
        if products.name.removesuffix(".adapter_b") in self._order.last and products.part == "adapter":
            return 0
        return 0 if products.name in self._order.last and not self._adapted_last else products.forward

    def _products(self, parameter: Parameter, needed: bool) -> Iterator[Products]:
        if len(parameter.shape) < 2:
            return
        experts = parameter.shape[0] if len(parameter.shape) == 3 else 1
        outputs, inputs = parameter.shape[-2:]
        rows = self._tokens * self._shape.active_experts / experts if experts > 1 else self._tokens
        name = self._shape.names.in_layer(parameter.name).removesuffix(".weight")
        trained, method = parameter.name in self._trained, self._method
        beside = whole = False
        if trained and isinstance(method, LoraMethod):
            whole = parameter.module.endswith(tuple(method.train_also))
            beside = not whole
        base = Products(
            name=name,
            part="experts" if experts > 1 else "linear",
            rows=rows,
            outputs=outputs,
            inputs=inputs,
            forward=experts,
            input_gradients=experts * needed,
            weight_gradients=experts * (whole or (trained and method.trains_base)),
            joined=experts,
        )
        yield base
        if beside:
            assert isinstance(method, LoraMethod)
            half = replace(base, part="adapter", weight_gradients=experts)
            yield replace(half, name=f"{name}.adapter_a", outputs=method.rank)
            yield replace(half, name=f"{name}.adapter_b", inputs=method.rank, input_gradients=experts)


def _joined(layers: Sequence[_Layer]) -> Iterator[Products]:
    """The products of all layers, those of one kind added up."""
    found: dict[tuple[str, Part], Products] = {}
    # Layers that are alike are one object.
    counts, once = Counter(map(id, layers)), {id(layer): layer for layer in layers}
    for layer in once.values():
        for each in layer.products:
            times, so_far = counts[id(layer)], found.get((each.name, each.part))
            if so_far is None:
                so_far = replace(each, forward=0, recomputed=0, input_gradients=0, weight_gradients=0)
            found[each.name, each.part] = replace(
                so_far,
                forward=so_far.forward + times * each.forward,
                recomputed=so_far.recomputed + times * each.recomputed,
                input_gradients=so_far.input_gradients + times * each.input_gradients,
                weight_gradients=so_far.weight_gradients + times * each.weight_gradients,
            )
    yield from found.values()


def _head(plan: RunPlan, shape: Shape, trained: Mapping[str, int], supervised: float) -> Products:
    """The output head, which runs where the next token is supervised and nowhere else."""
    weight = shape.names.embedding if shape.tied else shape.names.head
    # In 16 bits the chunked loss computes its logits once more for the backward pass; in fp32 it never lets them go.
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


def _attention(shape: Shape, plan: RunPlan, packs: PackFigures, layers: Sequence[_Layer]) -> Attention:
    width = shape.heads * shape.head_width
    # Ranks that share a pack hold whole documents for a part of the heads.
    share = plan.batch.micro_packs / plan.topology.sequence
    virtual = _virtual_pairs(plan.recipe.method, packs)
    per_window = {layer.window: pairs_of_pack(packs, layer.window) + virtual for layer in layers}

    def flops(chosen: Sequence[_Layer]) -> float:
        return 4.0 * width * share * sum(per_window[layer.window] for layer in chosen)

    return Attention(
        forward_flops=flops(layers),
        backward_flops=2.0 * flops([layer for layer in layers if layer.attention_backward]),
        recomputed_flops=flops([layer for layer in layers if layer.recomputed]),
    )


def _virtual_pairs(method: Method, packs: PackFigures) -> float:
    """Pairs of a pack that virtual tokens add: keys before each document, and under prompt tuning queries too."""
    if isinstance(method, PrefixTuningMethod):
        return packs.tokens_mean * method.virtual_tokens
    if isinstance(method, PromptTuningMethod):
        return packs.tokens_mean * method.virtual_tokens + _documents(packs) * method.virtual_tokens**2 / 2.0
    return 0.0


def _documents(packs: PackFigures) -> float:
    """Documents of a mean pack, were they of one length; of unequal ones there are more."""
    return packs.tokens_mean**2 / max(packs.squares_mean, 1.0)


def pairs_of_pack(packs: PackFigures, window: int | None) -> float:
    """Pairs of a query and a key that it sees in a mean pack.

    Without a window half the sum of squared lengths. A document of l > w tokens under a window w has l w - w²/2; of
    unequal documents the length that a mean token's has is taken, which gives a little too many.
    """
    length = packs.squares_mean / max(packs.tokens_mean, 1.0)
    if window is None or length <= window:
        return packs.squares_mean / 2.0
    return packs.tokens_mean * (window - window**2 / (2.0 * length))
