"""Records what a forward pass on fake tensors saves for the backward pass, as CUDA and the run's engine would.

Fake tensors on the CPU do not show what these save; it is substituted here:

    attention      queries, keys, values, output, and the logarithm of each softmax's sum
    dropout        its mask: one byte per element on CUDA, the element's own width on the CPU
    quantised      nothing: the weight is dequantised again (bitsandbytes)
    ZeRO-3         a linear layer saves its input even where the weight is frozen (DeepSpeed's own function)
    grouped        experts' products save their input where the weight is trained
    norms          CUDA's autocast computes layer norm and softmax in float32 (torch's notes on autocast)

Shapes: T tokens, H query heads, K key/value heads, E head width, D documents, P virtual tokens, S rows of all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Final
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from packhorse.model.attention import Documents
from packhorse.model_spec.measured_model import PassFormats
from packhorse.model_spec.supported import refuse_dropout

_recorder: ContextVar[PassRecorder] = ContextVar("recorder")
COMPUTE: Final = {4: torch.float32, 2: torch.bfloat16}
IN_FLOAT32: Final = (F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, F.softplus, torch.rsqrt)


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention.

    Attributes:
        heads: Query heads.
        key_value_heads: Key/value heads.
        width: Head width, mean of keys' and values'.
        window: Tokens that attention looks back; None: to the document's start.
        scores_kept: Times that SDPA on the CPU saves an element for each query and key.
    """

    heads: int
    key_value_heads: int
    width: int
    window: int | None
    scores_kept: int


@dataclass(frozen=True)
class WeightUse:
    """Use of a weight, or of attention, in a pass.

    Attributes:
        layer: Index of the layer.
        name: Name of the parameter; None for attention.
        input: Storage of the tensor that it is applied to.
    """

    layer: int
    name: str | None
    input: int


class PassRecorder:
    """Records saved tensors and used weights by layer: 0 to N - 1, None in front of them, N behind."""

    def __init__(self, model: nn.Module, head: nn.Module, formats: PassFormats) -> None:
        self.formats = formats
        self.inputs: list[Tensor] = []
        self.head_input: Tensor | None = None
        self.attended: dict[int, AttentionCall] = {}
        self.uses: list[WeightUse] = []
        self.active_experts = 0
        self.in_attention = False
        self._unit: int | None = None
        self._kept: dict[int, tuple[int | None, str, ref[UntypedStorage]]] = {}
        self._like: dict[int, int] = {}
        self._results: dict[int, Any] = {}
        self._shared: set[int] = set()
        self._fixed = {storage_of(each) for each in (*model.parameters(), *model.buffers())}
        self._weights = {storage_of(each): name for name, each in model.named_parameters()}
        linear = (part for part in model.modules() if isinstance(part, (nn.Linear, Conv1D)) and part is not head)
        frozen = {id(part.weight) for part in linear if not part.weight.requires_grad}
        self.quantized = frozen if formats.quantized else set()

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return int(self.inputs[0].shape[-2])

    def begin(self, layer: int, hidden: Tensor, others: object) -> None:
        """Record the start of a layer's forward pass; `others` are its arguments other than the hidden states."""
        self._unit = layer
        self.inputs.append(hidden)
        self._shared |= {storage_of(each) for each in tree_leaves(others) if isinstance(each, Tensor)}

    def end(self, layer: int, out: Any) -> None:  # noqa: ANN401
        """Record the end of a layer's forward pass; what follows the last layer is behind the layers."""
        self._results[layer] = out
        self._unit = len(self.inputs)

    def repeat(self, layer: int, like: int) -> Any:  # noqa: ANN401
        """Record that a layer equals one that has run, and return that one's result."""
        self._like[layer] = like
        self.attended |= {layer: self.attended[like]} if like in self.attended else {}
        self._unit = len(self.inputs)
        return self._results[like]

    def ignore(self, tensor: Tensor) -> None:
        """Do not count a tensor that the plan counts elsewhere: the row's token ids and positions."""
        self._fixed.add(storage_of(tensor))

    def keep(self, tensor: Tensor) -> Tensor:
        """Record a tensor that autograd saves; each storage counts once, weights do not."""
        key = storage_of(tensor)
        if key not in self._fixed and key not in self._kept:
            part = "attention" if self.in_attention else "rest"
            # Forgotten with its storage: what autograd saved for a result that was dropped is not kept.
            storage = ref(tensor.untyped_storage(), lambda _: self._kept.pop(key))
            self._kept[key] = (None, "shared", storage) if key in self._shared else (self._unit, part, storage)
        return tensor

    def use(self, weight: Tensor, given: Tensor) -> None:
        """Record that a weight is applied to `given`."""
        name = self._weights.get(storage_of(weight))
        if name is not None and self._unit is not None:
            self.uses.append(WeightUse(self._unit, name, storage_of(given)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scores_kept: int) -> None:
        """Record a call of attention; query [1, H, T, E], key and value [1, K, T, E]."""
        if self._unit is None:
            return
        width = (key.shape[-1] + value.shape[-1]) // 2
        self.attended.setdefault(self._unit, AttentionCall(query.shape[1], key.shape[1], width, window, scores_kept))
        self.uses.append(WeightUse(self._unit, None, storage_of(query)))

    def bytes_of(self, unit: int | None, part: str) -> int:
        """Return the bytes saved in a layer, by `attention` or by the `rest`; by all layers as `shared`."""
        unit = self._like.get(unit, unit) if unit is not None else None
        kept = (storage() for own, own_part, storage in self._kept.values() if own == unit and own_part == part)
        return sum(storage.nbytes() for storage in kept if storage is not None)


def storage_of(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage; fake tensors have no address."""
    return int(tensor.untyped_storage()._cdata)


class RunAsPlanned(TorchFunctionMode):
    """Runs torch's functions so that they save what the run's own device and engine would save."""

    def __init__(self, recorder: PassRecorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._token: Token[PassRecorder] | None = None

    def __enter__(self) -> Any:  # noqa: ANN401
        self._token = _recorder.set(self._recorder)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:  # noqa: ANN401
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        assert self._token is not None
        _recorder.reset(self._token)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401
        """Run one call."""
        kwargs, recorder = kwargs or {}, self._recorder
        formats = recorder.formats
        if func is F.linear:
            recorder.use(args[1], args[0])
            if id(args[1]) in recorder.quantized:
                return _Product.apply(args[0], args[1].shape[0], False)  # type: ignore[no-untyped-call]
            if formats.keeps_inputs and not args[1].requires_grad and args[0].requires_grad:
                return _Product.apply(args[0], args[1].shape[0], True)  # type: ignore[no-untyped-call]
        elif func is torch.addmm:
            recorder.use(args[2], args[1])
            if id(args[2]) in recorder.quantized:
                return _Product.apply(args[1], args[2].shape[1], False)  # type: ignore[no-untyped-call]
        elif func in (F.grouped_mm, torch._grouped_mm):
            recorder.use(args[1], args[0])
            recorder.active_experts = args[0].shape[0] // recorder.tokens
            return _Grouped.apply(args[0], args[1])  # type: ignore[no-untyped-call]
        elif func is F.dropout:
            return _dropped(formats.on_cuda, *args, **kwargs)
        elif getattr(func, "__name__", "") != "__get__":
            for weight in args:
                if isinstance(weight, nn.Parameter) and weight.dim() == 1:
                    recorder.use(weight, weight)
        if func in IN_FLOAT32 and formats.on_cuda and formats.autocast:
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Packed attention by its shapes: query [1, H, T, E], key and value [1, K, T + D P, E] -> [1, T, H, E]."""
    recorder = _recorder.get()
    formats = recorder.formats
    if formats.varlen:
        refuse_dropout(dropout)
        query, key = query.to(value.dtype), key.to(value.dtype)
    elif formats.autocast:
        query, key, value = (each.to(COMPUTE[formats.compute]) for each in (query, key, value))
    # Of SDPA's kernels on the CPU only the plain one supports dropout, and keys and values of different widths.
    scores = 3 if dropout else int(key.shape[-1] != value.shape[-1])
    recorder.attend(query, key, value, window, scores)
    if scores and not formats.on_cuda:
        return _attend_plain(recorder, query, key, value)
    heads = key.shape[1]
    # Ranks that share a row have whole key/value heads, which are repeated where there are fewer than ranks.
    repeated = -(-max(heads, formats.sequence) // formats.sequence) * formats.sequence // heads
    if repeated > 1:
        key, value = (each.repeat(1, repeated, 1, 1) for each in (key, value))
    recorder.in_attention = True
    out: Tensor = _Attention.apply(query, key, value, True)  # type: ignore[no-untyped-call]
    recorder.in_attention = False
    # Outputs by document are concatenated into a new tensor.
    return out if formats.varlen else out.clone()


def _attend_plain(recorder: PassRecorder, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SDPA's plain kernel: float32 products of scaled queries and keys; the plan counts the scores."""
    key, value = (
        each.repeat_interleave(query.shape[1] // each.shape[1], 1) if each.shape[1] != query.shape[1] else each
        for each in (key, value)
    )
    recorder.in_attention = True
    out: Tensor = _Attention.apply(query.float() * 1.0, key.float() * 1.0, value.float(), False)  # type: ignore[no-untyped-call]
    recorder.in_attention = False
    return out.to(query.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, fused: bool) -> Tensor:  # noqa: ANN401
        """-> [1, T, H, E]."""
        out = value.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        sums = torch.empty(query.shape[1], query.shape[2])
        ctx.save_for_backward(query, key, value, *((out, sums) if fused else ()))
        return out


class _Product(torch.autograd.Function):
    """A linear layer whose weight has no gradient."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, outputs: int, keeps: bool) -> Tensor:  # noqa: ANN401
        """given [..., inputs] -> [..., outputs]."""
        if keeps:
            ctx.save_for_backward(given)
        return given.new_empty(*given.shape[:-1], outputs)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN401
        """given [S, inputs], weight [experts, inputs, outputs] -> [S, outputs]."""
        ctx.save_for_backward(*((given,) if weight.requires_grad else ()), weight)
        return given.new_empty(given.shape[0], weight.shape[2])


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, mask: Tensor) -> Tensor:  # noqa: ANN401
        """Save the mask."""
        ctx.save_for_backward(mask)
        return torch.empty_like(given)


def _dropped(on_cuda: bool, given: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0:
        return given
    mask = torch.empty_like(given, dtype=torch.bool if on_cuda else given.dtype)
    out: Tensor = _Dropout.apply(given, mask)  # type: ignore[no-untyped-call]
    return out
