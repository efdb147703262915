"""Checkpointing and offload change what is kept for the backward pass, and no number."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from packhorse.model.attention import Documents, register_attention
from packhorse.model.methods.attach import Start, attach
from packhorse.recipe.methods import LoraMethod
from packhorse.recipe.schema import ParallelSection
from packhorse.train.activation_offload import LayerInputOffload
from packhorse.train.setup import apply_checkpointing

NUM_LAYERS, TOKENS, WIDTH = 6, 96, 32


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).train()


def step(model: nn.Module) -> tuple[float, list[Tensor], int]:
    """Loss, gradients, and bytes of activations that are kept for the backward pass."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(TOKENS).remainder(64)[None]
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()], sum(kept.values())


@pytest.mark.parametrize("checkpointing", [True, 1, 2, 3], ids=str)
def test_recomputed_layers_give_the_same_gradients_and_keep_less(checkpointing: Any) -> None:
    plain = tiny_llama()
    model = copy.deepcopy(plain)
    apply_checkpointing(model, ParallelSection(checkpointing=checkpointing))
    loss, gradients, whole = step(plain)
    again, recomputed, kept = step(model)
    assert again == pytest.approx(loss, rel=1e-6)
    for one, other in zip(gradients, recomputed, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)
    # What the layers keep is nearly all; a recomputed one keeps its input.
    share = len(range(0, NUM_LAYERS, checkpointing)) / NUM_LAYERS
    assert whole * (1 - share) < kept < whole * (1 - 0.85 * share)


class CountedCalls(TorchDispatchMode):
    """Names of the operators that run, below autograd and below selective checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def tensors_of_python() -> list[Tensor]:
    return [each for each in gc.get_objects() if type(each) is Tensor]


def packed_step(model: nn.Module, dtype: torch.dtype) -> tuple[list[Tensor], int, int]:
    """Gradients, calls of attention's forward kernel, and bytes of new tensors between forward and backward pass."""
    lengths = (40, 30, 26)
    documents = Documents(lengths, torch.tensor([0, 40, 70, 96], dtype=torch.int32), 40)
    ids, positions = (torch.arange(TOKENS) % 64)[None], torch.cat([torch.arange(n) for n in lengths])[None]
    for parameter in model.parameters():
        parameter.grad = None
    before = {
        each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), *tensors_of_python())
    }
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    torch.manual_seed(1)  # of dropout
    calls = CountedCalls()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), calls:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, position_ids=positions, documents=documents, use_cache=False).logits.float().sum()
        # What selective checkpointing keeps is in its own store, which Python's collector sees.
        held |= {each.untyped_storage().data_ptr(): each for each in tensors_of_python()}
        kept = sum(each.untyped_storage().nbytes() for address, each in held.items() if address not in before)
        held.clear()
        loss.backward()
    attended = sum("flash_attention_for_cpu" in name and "backward" not in name for name in calls.names)
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], attended, kept


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_selective_checkpointing_keeps_attention_and_recomputes_the_rest(method: str, dtype: torch.dtype) -> None:
    plain: Any = tiny_llama()
    plain.set_attn_implementation(register_attention("sdpa"))
    if method == "lora":
        plain = attach(plain, LoraMethod(), Start(seed=1), autocast=dtype != torch.float32)
    whole, selective = copy.deepcopy(plain), copy.deepcopy(plain)
    apply_checkpointing(whole, ParallelSection(checkpointing=True))
    apply_checkpointing(selective, ParallelSection(checkpointing="selective"))
    gradients, once, _ = packed_step(plain, dtype)
    recomputed, twice, least = packed_step(whole, dtype)
    chosen, again, kept = packed_step(selective, dtype)
    for one, two, three in zip(gradients, recomputed, chosen, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert (once, twice, again) == (3 * NUM_LAYERS, 6 * NUM_LAYERS, 3 * NUM_LAYERS)
    # Output and log-sum-exp of each head (Dao 2023, arXiv 2307.08691, section 3.1): 4 heads of width 8.
    added = NUM_LAYERS * TOKENS * (4 * 8 * dtype.itemsize + 4 * 4)
    assert kept - least == pytest.approx(added, rel=0.05)


def test_without_checkpointing_nothing_is_recomputed() -> None:
    plain = tiny_llama()
    model = copy.deepcopy(plain)
    apply_checkpointing(model, ParallelSection())
    assert step(model)[2] == step(plain)[2]


class LateStream:
    """A stream whose copies are made when something waits for them, and not before.

    Buffers begin with NaN, so that whatever is read before its copy shows in the gradients. A copy whose source or
    target was released before is an error: on a GPU another tensor could be there by then.
    """

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self._copies: list[Callable[[], None]] = []
        self._num_done = 0

    def empty_on_host(self, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, math.nan)

    empty_on_device = empty_on_host

    def copy(self, target: Tensor, source: Tensor) -> int:
        number, ends = len(self._copies), (ref(target), ref(source))

        def late() -> None:
            to, origin = (end() for end in ends)
            assert to is not None, f"copy {number} writes to released memory"
            assert origin is not None, f"copy {number} reads released memory"
            to.copy_(origin)

        assert tuple(source.shape) == (1, TOKENS, WIDTH)
        self._copies.append(late)
        self.log.append(f"copy {number}")
        return number

    def wait(self, copied: int) -> None:
        self.log.append(f"wait {copied}")
        for late in self._copies[self._num_done : copied + 1]:
            late()
        self._num_done = max(self._num_done, copied + 1)


def offloaded(plain: nn.Module, monkeypatch: pytest.MonkeyPatch, **parallel: Any) -> tuple[nn.Module, list[str]]:
    """A copy of a model that offloads on a late stream, and what it does, in order."""
    log: list[str] = []
    stream = LateStream(log)
    monkeypatch.setattr(LayerInputOffload.__init__, "__defaults__", (lambda _: stream,))
    model: Any = copy.deepcopy(plain)
    apply_checkpointing(model, ParallelSection(offload_activations=True, **parallel))
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: log.append(f"layer {index}"))
    return model, log


def checkpointed(plain: nn.Module, **parallel: Any) -> nn.Module:
    model = copy.deepcopy(plain)
    apply_checkpointing(model, ParallelSection(**parallel))
    return model


def assert_same(model: nn.Module, reference: nn.Module) -> None:
    (loss, gradients, _), (expected, wanted, _) = step(model), step(reference)
    assert loss == expected
    assert all(map(torch.equal, gradients, wanted))


@pytest.mark.parametrize("every", [True, 2, 3], ids=str)
def test_offloaded_inputs_give_the_same_bits(every: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_llama()
    model, log = offloaded(plain, monkeypatch, checkpointing=every)
    reference = checkpointed(plain, checkpointing=every)
    for _ in range(3):
        assert_same(model, reference)
    # Each input leaves, and each but the last returns; the last layer's is still there when the backward pass begins.
    num_layers = len(range(0, NUM_LAYERS, every))
    assert sum(line.startswith("copy") for line in log) == 3 * (2 * num_layers - 1)


def test_copies_run_beside_one_layer_and_return_one_layer_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    model, log = offloaded(tiny_llama(), monkeypatch, checkpointing=2)
    step(model)
    assert log == [
        *("copy 0", "layer 0", "layer 1", "wait 0"),
        *("copy 1", "layer 2", "layer 3", "wait 1"),
        *("copy 2", "layer 4", "layer 5"),
        *("wait 2", "copy 3", "layer 4"),
        *("wait 3", "copy 4", "layer 2"),
        *("wait 4", "layer 0"),
    ]


def test_a_forward_pass_that_is_given_up_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_llama()
    model, _ = offloaded(plain, monkeypatch, checkpointing=True)
    model(torch.arange(TOKENS).remainder(64)[None].flip(1), use_cache=False)
    assert_same(model, checkpointed(plain, checkpointing=True))


def test_a_second_backward_pass_reads_the_inputs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_llama()
    model, _ = offloaded(plain, monkeypatch, checkpointing=True)
    ids = torch.arange(TOKENS).remainder(64)[None]
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    for parameter, grad in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad)


def test_on_a_cpu_nothing_is_copied() -> None:
    plain = tiny_llama()
    model = checkpointed(plain, checkpointing=True, offload_activations=True)
    reference = checkpointed(plain, checkpointing=True)
    assert_same(model, reference)
    tensor = torch.ones(1)
    assert LayerInputOffload().pack_hook(tensor) is tensor
