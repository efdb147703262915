"""Part `numerics`: attention over documents and the chunked loss, beside exact references; the same bits twice, or not.

Shapes: T tokens of a pack, D documents, H query heads, K key and value heads, E head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

from packhorse.model.attention import _KERNELS, Documents
from packhorse.train.objectives.token_loss import CHUNK_TOKENS, token_loss_sum
from setting import Case, Figures, Setting

TOKENS, HEADS = 4096, 8
WIDTHS = (64, 80, 96, 128, 192, 256)
DOCUMENTS = (1, 8, 400)
HIDDEN, VOCABULARY = 2048, 128_256
CHUNKS = (512, 1024, 2048, 4096)


def cases(setting: Setting) -> Iterator[Case]:
    """Yield attention by width, grouping, window and documents, then the loss by chunk."""
    width = 128
    shapes = [(width, HEADS // 4, None, count) for count in DOCUMENTS]
    shapes += [(other, HEADS, None, 8) for other in WIDTHS]
    shapes += [(width, HEADS // 4, 300, count) for count in DOCUMENTS[:2]]
    if setting.smoke:
        shapes = [(16, 2, None, 3), (16, 2, 10, 1)]
    for width, heads, window, count in shapes:
        grouped = f", {HEADS // heads} queries a key" if heads < HEADS else ""
        name = f"attention E {width}, {count} documents{grouped}{f', window {window}' if window else ''}"
        yield name, partial(_attention, setting, width, heads, window, count)
    yield "attention, the same bits twice", lambda: _repeated(setting)
    for chunk in (*CHUNKS[: 1 if setting.smoke else None], None):
        yield (
            f"loss, {f'chunks of {chunk:,}' if chunk else f'as trained (chunks of {CHUNK_TOKENS})'}",
            partial(_loss, setting, chunk),
        )
    for allowed in (True, False):
        yield (
            f"products of 16 bits, sums in 16 bits {'allowed' if allowed else 'off'}",
            partial(_sums, setting, allowed),
        )


# --- attention ------------------------------------------------------------------------------------


def _attention(setting: Setting, width: int, heads: int, window: int | None, count: int) -> Figures:
    """Return the largest error of output and gradients over the largest value; SDPA's beside it."""
    tensors = _tensors(setting, width, heads)
    documents = _documents(setting, tensors[0].shape[2], count)
    exact = _exact(tensors, documents, window)
    figures: Figures = {}
    for name in ("varlen", "sdpa") if setting.is_cuda else ("sdpa",):
        peak = _peak_of(setting, partial(_run, name, tensors, documents, window))
        found = _run(name, tensors, documents, window)
        errors = [_error(one, other) for one, other in zip(found, exact, strict=True)]
        figures |= {f"{name} {part}": error for part, error in zip(("output", "dq", "dk", "dv"), errors, strict=True)}
        figures[f"{name} ms"] = setting.seconds(partial(_run, name, tensors, documents, window), 5, 1) * 1e3
        figures[f"{name} GiB"] = peak
    return figures


def _repeated(setting: Setting) -> Figures:
    """Return whether two runs give the same bits, by default and where torch is told to be deterministic."""
    name = "varlen" if setting.is_cuda else "sdpa"
    tensors = _tensors(setting, 128, HEADS // 4)
    documents = _documents(setting, tensors[0].shape[2], 8)
    figures: Figures = {}
    for words, deterministic in (("", False), (", deterministic", True)):
        with _deterministic(deterministic):
            one, other = (_run(name, tensors, documents, None) for _ in range(2))
            same = [torch.equal(a, b) for a, b in zip(one, other, strict=True)]
            figures |= {
                f"{part}{words}": is_same for part, is_same in zip(("output", "dq", "dk", "dv"), same, strict=True)
            }
            figures[f"ms{words}"] = setting.seconds(partial(_run, name, tensors, documents, None), 5, 1) * 1e3
    return figures


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _tensors(setting: Setting, width: int, heads: int) -> list[Tensor]:
    """Return query [1, H, T, E], key and value [1, K, T, E] and the output's gradient [1, T, H, E]."""
    torch.manual_seed(0)
    tokens = 64 if setting.smoke else TOKENS
    shapes = [(1, HEADS, tokens, width), *[(1, heads, tokens, width)] * 2, (1, tokens, HEADS, width)]
    return [torch.randn(shape, device=setting.device).bfloat16() for shape in shapes]


def _documents(setting: Setting, tokens: int, count: int) -> Documents:
    """Return documents of growing length that fill the pack."""
    ends = [round(tokens * ((at + 1) / count) ** 1.5) for at in range(count)]
    ends = sorted({max(end, at + 1) for at, end in enumerate(ends)})
    lengths = tuple(end - begin for begin, end in zip((0, *ends[:-1]), ends, strict=True))
    cumulative = torch.tensor([0, *ends], dtype=torch.int32, device=setting.device)
    return Documents(lengths, cumulative, max(lengths))


def _run(name: str, tensors: Sequence[Tensor], documents: Documents, window: int | None) -> list[Tensor]:
    """Return output and gradients of a kernel of ours."""
    inputs = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    output = _KERNELS[name](*inputs, documents, 0.0, None, window)  # type: ignore[index, call-arg]
    return [output.detach(), *torch.autograd.grad(output, inputs, tensors[3])]


def _exact(tensors: Sequence[Tensor], documents: Documents, window: int | None) -> list[Tensor]:
    """Return output and gradients in float64, one document after another, written out from the formula."""
    inputs = [tensor.double().requires_grad_() for tensor in tensors[:3]]
    query, key, value = inputs
    group = query.shape[1] // key.shape[1]
    parts, begin = [], 0
    for length in documents.lengths:
        rows = slice(begin, begin + length)
        q, k, v = query[0, :, rows], *(t[0, :, rows].repeat_interleave(group, 0) for t in (key, value))
        at = torch.arange(length, device=q.device)
        distance = at[:, None] - at[None, :]
        seen = (distance >= 0) & (distance < (window or length))
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
        begin += length
    output = torch.cat(parts)[None]
    return [output.detach(), *torch.autograd.grad(output, inputs, tensors[3].double())]


def _peak_of(setting: Setting, work: Callable[[], object]) -> float | None:
    """Return the GiB that `work` adds at its peak."""
    if not setting.is_cuda:
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


# --- loss -----------------------------------------------------------------------------------------


def _loss(setting: Setting, chunk: int | None) -> Figures:
    """Return time, peak, and the error of loss and gradients beside plain cross-entropy in fp32."""
    hidden, weight, labels = _head(setting)
    options = LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def ours() -> Tensor:
        if chunk is None:
            return token_loss_sum(hidden, weight, None, labels)
        return F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options).float().sum()

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ours(), (hidden, weight))

    milliseconds = setting.seconds(gradients, 3, 1) * 1e3
    peak = _peak_of(setting, gradients)
    loss, found = float(ours().detach()), gradients()
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    exact = F.cross_entropy(wide[0] @ wide[1].T, labels, reduction="sum")
    expected = torch.autograd.grad(exact, wide)
    errors = [float((one.float() - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)]
    return {
        "ms": milliseconds,
        "GiB": peak,
        "loss ÷ exact - 1": loss / float(exact.detach()) - 1,
        "error of the hidden states' gradient": errors[0],
        "error of the head's gradient": errors[1],
    }


def _head(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states [T, H], the head [V, H] and labels [T], whose frequencies fall as those of words."""
    torch.manual_seed(0)
    tokens, hidden, vocabulary = (64, 32, 500) if setting.smoke else (TOKENS, HIDDEN, VOCABULARY)
    states = torch.randn(tokens, hidden, device=setting.device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, hidden, device=setting.device) * 0.02).bfloat16().requires_grad_()
    frequencies = 1 / torch.arange(1, vocabulary + 1, device=setting.device)
    return states, weight, torch.multinomial(frequencies, tokens, replacement=True)


def _sums(setting: Setting, allowed: bool) -> Figures:
    """Return the error of a LoRA product (long rows, few columns), whose sums cuBLAS may split."""
    torch.manual_seed(0)
    tokens, hidden = (64, 256) if setting.smoke else (TOKENS, 14_336)
    left, right = (torch.randn(shape, device=setting.device).bfloat16() for shape in ((tokens, hidden), (hidden, 32)))
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed
    try:
        product = left @ right
        milliseconds = setting.seconds(lambda: left @ right) * 1e3
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before
    return {"largest error": _error(product, left.double() @ right.double()), "ms": milliseconds}
