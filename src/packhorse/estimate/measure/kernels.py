"""What fake tensors on the CPU do not show of a pass: packed attention, and what CUDA, DeepSpeed or bitsandbytes do.

Each stands here by what it keeps for the backward pass:

    attention      queries, keys, values, output, and the logarithm of each softmax's sum
    dropout        its mask: a byte an element on CUDA, the element's own width on the CPU
    quantised      nothing: the weight is unpacked again (bitsandbytes)
    ZeRO-3         a linear layer keeps its input even where the weight is frozen (DeepSpeed's own function)
    grouped        experts' products keep their input where the weight is trained
    norms          CUDA's autocast computes layer norm and softmax in float32 (torch's notes on autocast)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from packhorse.model.attention import Documents, refuse_dropout
from packhorse.model_spec.anatomy import Formats

_recorder: ContextVar[Recorder] = ContextVar("recorder")
COMPUTE: Final = {4: torch.float32, 2: torch.bfloat16}
IN_FLOAT32: Final = (F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, F.softplus, torch.rsqrt)


@dataclass(frozen=True)
class Attended:
    """One call of attention.

    Attributes:
        heads: Of queries.
        key_value_heads: Of keys and values.
        width: Of a head, mean of keys' and values'.
        window: How many tokens back it looks; None: to the document's start.
        scores_kept: How often SDPA on the CPU keeps a number for each query and key.
    """

    heads: int
    key_value_heads: int
    width: int
    window: int | None
    scores_kept: int


@dataclass(frozen=True)
class Met:
    """A weight as the pass comes to it, or attention.

    Attributes:
        layer: In which.
        name: Of the parameter; None for attention.
        input: Which tensor it is given.
    """

    layer: int
    name: str | None
    input: int


class Recorder:
    """Notes what a pass keeps and meets, by layer: 0 to N - 1, None before them, N after."""

    def __init__(self, model: nn.Module, head: nn.Module, formats: Formats) -> None:
        self.formats = formats
        self.inputs: list[Tensor] = []
        self.head_input: Tensor | None = None
        self.attended: dict[int, Attended] = {}
        self.met: list[Met] = []
        self.active_experts = 0
        self.in_attention = False
        self._unit: int | None = None
        self._kept: dict[int, tuple[int | None, str, Tensor]] = {}
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
        """Of the row."""
        return int(self.inputs[0].shape[-2])

    def begin(self, layer: int, hidden: Tensor, others: object) -> None:
        """A layer's forward pass begins; `others` is what it is given beside its input."""
        self._unit = layer
        self.inputs.append(hidden)
        self._shared |= {storage_of(each) for each in tree_leaves(others) if isinstance(each, Tensor)}

    def end(self, layer: int, out: Any) -> None:  # noqa: ANN401
        """A layer's forward pass is over; what follows the last is behind the layers."""
        self._results[layer] = out
        self._unit = len(self.inputs)

    def repeat(self, layer: int, like: int) -> Any:  # noqa: ANN401
        """A layer is like one that was run, whose result is returned."""
        self._like[layer] = like
        self.attended |= {layer: self.attended[like]} if like in self.attended else {}
        self._unit = len(self.inputs)
        return self._results[like]

    def ignore(self, tensor: Tensor) -> None:
        """A tensor that is counted elsewhere: the row's token ids and positions."""
        self._fixed.add(storage_of(tensor))

    def keep(self, tensor: Tensor) -> Tensor:
        """Of autograd: a tensor is kept; each storage counts once, weights do not."""
        key = storage_of(tensor)
        if key not in self._fixed and key not in self._kept:
            # Held, so that no other storage gets its place.
            part = "attention" if self.in_attention else "rest"
            self._kept[key] = (None, "shared", tensor) if key in self._shared else (self._unit, part, tensor)
        return tensor

    def meet(self, weight: Tensor, given: Tensor) -> None:
        """A weight is multiplied with `given`."""
        name = self._weights.get(storage_of(weight))
        if name is not None and self._unit is not None:
            self.met.append(Met(self._unit, name, storage_of(given)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scores_kept: int) -> None:
        """Attention is called; query [1, H, T, E], key and value [1, K, T, E]."""
        if self._unit is None:
            return
        width = (key.shape[-1] + value.shape[-1]) // 2
        self.attended.setdefault(self._unit, Attended(query.shape[1], key.shape[1], width, window, scores_kept))
        self.met.append(Met(self._unit, None, storage_of(query)))

    def bytes_of(self, unit: int | None, part: str) -> int:
        """Kept in a layer, by attention or by the rest; by all layers as `shared`."""
        wanted = self._like.get(unit, unit) if unit is not None else None
        kept = (tensor for at, what, tensor in self._kept.values() if at == wanted and what == part)
        return sum(each.untyped_storage().nbytes() for each in kept)


def storage_of(tensor: Tensor) -> int:
    """Which storage a tensor is a view of; fake ones have no address."""
    return int(tensor.untyped_storage()._cdata)


class Passing(TorchFunctionMode):
    """Runs torch's functions as the run's own device and engine would keep things, and tells the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._token: Token[Recorder] | None = None

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
        """One call."""
        kwargs, recorder = kwargs or {}, self._recorder
        formats = recorder.formats
        if func is F.linear:
            recorder.meet(args[1], args[0])
            if id(args[1]) in recorder.quantized:
                return _Product.apply(args[0], args[1].shape[0], False)  # type: ignore[no-untyped-call]
            if formats.keeps_inputs and not args[1].requires_grad and args[0].requires_grad:
                return _Product.apply(args[0], args[1].shape[0], True)  # type: ignore[no-untyped-call]
        elif func is torch.addmm:
            recorder.meet(args[2], args[1])
            if id(args[2]) in recorder.quantized:
                return _Product.apply(args[1], args[2].shape[1], False)  # type: ignore[no-untyped-call]
        elif func in (F.grouped_mm, torch._grouped_mm):
            recorder.meet(args[1], args[0])
            recorder.active_experts = args[0].shape[0] // recorder.tokens
            return _Grouped.apply(args[0], args[1])  # type: ignore[no-untyped-call]
        elif func is F.dropout:
            return _dropped(formats.on_cuda, *args, **kwargs)
        elif getattr(func, "__name__", "") != "__get__":
            for weight in args:
                if isinstance(weight, nn.Parameter) and weight.dim() == 1:
                    recorder.meet(weight, weight)
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
    # Of SDPA's kernels on the CPU only the plain one has dropout, and heads of two widths.
    scores = 3 if dropout else int(key.shape[-1] != value.shape[-1])
    recorder.attend(query, key, value, window, scores)
    if scores and not formats.on_cuda:
        return _plainly(recorder, query, key, value)
    heads = key.shape[1]
    # Ranks that share a row have whole key/value heads: where these are fewer, they are repeated.
    repeated = -(-max(heads, formats.sequence) // formats.sequence) * formats.sequence // heads
    if repeated > 1:
        key, value = (each.repeat(1, repeated, 1, 1) for each in (key, value))
    recorder.in_attention = True
    out: Tensor = _Attention.apply(query, key, value, True)  # type: ignore[no-untyped-call]
    recorder.in_attention = False
    # Parts by document are put together in a new tensor.
    return out if formats.varlen else out.clone()


def _plainly(recorder: Recorder, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by plain products, in float32, with scaled queries and keys; scores are counted by the plan."""
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
        """given [S, inputs], weight [E, inputs, outputs] -> [S, outputs]."""
        ctx.save_for_backward(*((given,) if weight.requires_grad else ()), weight)
        return given.new_empty(given.shape[0], weight.shape[2])


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, mask: Tensor) -> Tensor:  # noqa: ANN401
        """The mask is kept."""
        ctx.save_for_backward(mask)
        return torch.empty_like(given)


def _dropped(on_cuda: bool, given: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0:
        return given
    out: Tensor = _Dropout.apply(given, torch.empty_like(given, dtype=torch.bool if on_cuda else given.dtype))  # type: ignore[no-untyped-call]
    return out
