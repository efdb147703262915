"""Keep the inputs of recomputed layers in pinned host memory, copied on a side stream while the GPU computes.

transformers' own `offload=True` copies on the compute stream, which therefore waits for each copy. Here a layer's input
leaves the GPU while that layer computes, as in torchtune's `OffloadActivations`, and returns one layer ahead in the
backward pass. The GPU holds at most one input beside the one in use.

No buffer is used again before its copy is done: when layer k + 1 begins, the compute stream waits for the copy of layer
k's input and then releases its memory; torch's allocator of pinned memory reuses a block after its copies are done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class CopyStream:
    """A stream of a GPU on which tensors are copied while the compute stream works."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def empty_on_host(self, tensor: Tensor) -> Tensor:
        """Return pinned host memory for a copy of a tensor."""
        return torch.empty_like(tensor, device="cpu", pin_memory=True)

    def empty_on_device(self, tensor: Tensor) -> Tensor:
        """Return memory of the compute stream for a copy of a tensor."""
        return torch.empty_like(tensor, device=self._device, pin_memory=False)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """Copy after the work that the compute stream has so far; return the event of the copy's end."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        copied: torch.cuda.Event = self._stream.record_event()
        return copied

    def wait(self, copied: torch.cuda.Event) -> None:
        """Let the compute stream, not the host, wait for a copy."""
        torch.cuda.current_stream(self._device).wait_event(copied)


@dataclass(eq=False)
class _Input:
    """Input of one layer.

    Attributes:
        host: Its copy in host memory.
        device: The tensor on the GPU while it leaves or returns, else None.
        copied: End of the copy that is under way or was the last.
        previous: Input of the layer before, None where that is no longer needed.
    """

    host: Tensor
    device: Tensor | None
    copied: Any
    previous: Callable[[], _Input | None]


def copy_stream(device: torch.device) -> CopyStream | None:
    """Return a side stream of a GPU; None on a CPU, where the tensors are in host memory already."""
    return CopyStream(device) if device.type == "cuda" else None


class LayerInputOffload(saved_tensors_hooks):
    """Hooks for what autograd saves: the inputs of recomputed layers, first to last, and read last to first."""

    def __init__(self, stream_of: Callable[[torch.device], CopyStream | None] = copy_stream) -> None:
        super().__init__(self._save, self._restore)
        self._stream_of = stream_of
        self._stream: CopyStream | None = None
        self._under_way: _Input | None = None
        self._newest: Callable[[], _Input | None] = lambda: None

    def _save(self, tensor: Tensor) -> Tensor | _Input:
        if self._stream is None:
            self._stream = self._stream_of(tensor.device)
        if self._stream is None:
            return tensor
        self._finish_copy(self._stream)
        host = self._stream.empty_on_host(tensor)
        # An input does not change later: checkpointing without offload computes from it again, too.
        device = tensor.detach()
        saved = _Input(host, device, self._stream.copy(host, device), self._newest)
        self._under_way, self._newest = saved, ref(saved)
        return saved

    def _restore(self, saved: Tensor | _Input) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        stream = self._stream
        assert stream is not None
        if saved is not self._under_way:
            self._fetch(stream, saved)
        stream.wait(saved.copied)
        tensor, saved.device, self._under_way = saved.device, None, None
        assert tensor is not None
        before = saved.previous()
        if before is not None:
            self._fetch(stream, before)
        return tensor

    def _fetch(self, stream: CopyStream, saved: _Input) -> None:
        """Begin to copy an input to the GPU."""
        self._finish_copy(stream)
        saved.device = stream.empty_on_device(saved.host)
        saved.copied = stream.copy(saved.device, saved.host)
        self._under_way = saved

    def _finish_copy(self, stream: CopyStream) -> None:
        """Let the compute stream wait for the copy under way, then release its memory on the GPU."""
        if self._under_way is not None:
            stream.wait(self._under_way.copied)
            self._under_way.device = None
            self._under_way = None


def offload_layer_inputs(model: nn.Module) -> None:
    """Let the layers that are recomputed save their inputs in host memory; call it once checkpointing is enabled."""
    hooks = LayerInputOffload()
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None:
            setattr(module, "_gradient_checkpointing_func", partial(_checkpoint_with, hooks, checkpoint))  # noqa: B010


def _checkpoint_with(hooks: LayerInputOffload, checkpoint: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    with hooks:
        return checkpoint(*args, **kwargs)
