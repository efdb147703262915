"""Checkpointing and offload change what is kept for the backward pass, and no number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from packhorse.recipe.schema import ParallelSection
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


def test_without_checkpointing_nothing_is_recomputed() -> None:
    plain = tiny_llama()
    model = copy.deepcopy(plain)
    apply_checkpointing(model, ParallelSection())
    assert step(model)[2] == step(plain)[2]


def test_offload_sends_the_input_of_each_layer_to_the_host_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no accelerator: the hooks of torch's own `save_on_cpu` are replaced by ones that count."""
    moved: list[tuple[int, ...]] = []

    class Counting(saved_tensors_hooks):
        def __init__(self, pin_memory: bool, device_type: str) -> None:
            assert pin_memory
            super().__init__(self._count, lambda tensor: tensor)

        def _count(self, tensor: Tensor) -> Tensor:
            moved.append(tuple(tensor.shape))
            return tensor

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", Counting)
    plain = tiny_llama()
    model = copy.deepcopy(plain)
    apply_checkpointing(model, ParallelSection(checkpointing=True, offload_activations=True))
    loss, gradients, _ = step(plain)
    again, offloaded, _ = step(model)
    assert moved == [(1, TOKENS, WIDTH)] * NUM_LAYERS
    assert again == pytest.approx(loss, rel=1e-6)
    for one, other in zip(gradients, offloaded, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)
