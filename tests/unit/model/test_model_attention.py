"""The varlen kernel is called as torch's CUDA kernel accepts it, with the result of attention by document."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from packhorse.model import attention
from packhorse.model.attention import Documents, register_attention
from packhorse.plan.make_plan import make_plan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe
from tiny import TINY

LENGTHS = (5, 1, 7)


def flash(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *_: Any, scale: float, **__: Any) -> Tensor:
    """FlashAttention-2 by its definition, with the checks of mha_varlen_fwd in torch's flash_api.cpp."""
    width = query.shape[2]
    assert key.shape[2] == value.shape[2] == width
    assert width % 8 == 0
    assert width <= 256
    assert ends.dtype == torch.int32
    sizes = ends.diff().tolist()
    parts = zip(*(tensor.transpose(0, 1).split(sizes, 1) for tensor in (query, key, value)), strict=True)
    found = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True) for part in parts]
    return torch.cat(found, 1).transpose(0, 1)


@pytest.mark.parametrize(("query_width", "value_width"), [(16, 16), (24, 16), (12, 12)])
def test_heads_of_any_width_give_the_result_of_attention_by_document(
    query_width: int, value_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", flash)
    torch.manual_seed(0)
    tokens, found = sum(LENGTHS), []
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    shapes = ((4, query_width), (2, query_width), (2, value_width))
    given = [torch.randn(1, heads, tokens, width, dtype=torch.float64) for heads, width in shapes]
    for kernel in ("sdpa", "varlen"):
        inputs = [tensor.clone().requires_grad_() for tensor in given]
        attend: Any = AttentionInterface()[register_attention(kernel)]
        out, _ = attend(None, *inputs, None, documents=Documents(LENGTHS, ends, max(LENGTHS)))
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        found.append((out, *(tensor.grad for tensor in inputs)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("config", "kernel"),
    [
        ({"hidden_size": 4096, "num_attention_heads": 32}, "varlen"),
        ({"model_type": "gemma", "head_dim": 256, "hidden_size": 2048, "num_attention_heads": 8}, "varlen"),
        ({"head_dim": 512, "hidden_size": 2048, "num_attention_heads": 8}, "sdpa"),
        ({"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}, "varlen"),
        ({"qk_nope_head_dim": 256, "qk_rope_head_dim": 64, "v_head_dim": 256}, "sdpa"),
    ],
    ids=["llama", "gemma", "wide heads", "deepseek_v3", "wide latent attention"],
)
def test_the_kernel_is_one_that_takes_the_model_s_heads(config: dict[str, Any], kernel: str) -> None:
    model = {"config": {"model_type": "llama", **config}, "tokenizer": "builtin:tokenizer"}
    recipe = Recipe.model_validate(TINY | {"model": model, "precision": "bf16"})
    plan = make_plan(recipe, DeviceRequest(gpus=1), Hardware(num_cores=2, gpus=()), None)
    assert plan.chosen("model.attention") == kernel
