"""The loss of odd micro-batches, and where there is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from packhorse.errors import UserError
from packhorse.model.methods.attach import Start, attach
from packhorse.recipe.methods import LoraMethod
from packhorse.train.objectives.token_loss import token_loss_sum


@pytest.mark.parametrize("num_labels", [0, 700])
def test_the_loss_is_cross_entropys_and_reaches_hidden_weight_and_bias(num_labels: int) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(num_labels, 8), torch.randn(40, 8), torch.randn(40)]
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    theirs = [tensor.clone().requires_grad_() for tensor in tensors]
    labels = torch.randint(0, 40, (num_labels,))
    loss = token_loss_sum(*ours, labels)
    expected = F.cross_entropy(F.linear(*theirs), labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, plain.grad)


def test_an_adapter_on_the_output_head_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="method.target names lm_head"):
        attach(model, LoraMethod(target=["q_proj", "lm_head"]), Start())
