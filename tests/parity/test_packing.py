"""Packed equals alone, token by token, for the kinds of attention that models have."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from packhorse.data.packs.loader import MicroBatch
from packhorse.errors import UserError
from packhorse.model.attention import register_attention
from packhorse.train.objectives.forward import micro_batch_loss, model_inputs
from packhorse.train.objectives.token_loss import install_loss_head

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama, grouped queries": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2, biases": Qwen2Config(**SIZES),
    "qwen3, head norms": Qwen3Config(**SIZES, head_dim=8),
    "mistral, sliding window": MistralConfig(**SIZES, sliding_window=7),
}
LENGTHS = (5, 23, 1, 14)


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 97, (length,), generator=generator) for length in LENGTHS]


def packed() -> MicroBatch:
    ids = torch.cat(documents())
    labels = torch.cat([torch.cat([document[1:], torch.tensor([-100])]) for document in documents()])
    ends = np.cumsum(LENGTHS)
    predicting = (labels != -100).nonzero().squeeze(1)
    return MicroBatch(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        predicting=predicting,
        targets=labels[predicting],
        cu_seq_lens=torch.tensor([0, *ends], dtype=torch.int32),
        max_length=max(LENGTHS),
        document_lengths=LENGTHS,
        document_of=torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[predicting],
        documents=torch.arange(len(LENGTHS)),
    )


def model_pair(config: PretrainedConfig) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights with our packed attention and with transformers' eager attention."""
    torch.manual_seed(0)
    # A copy each: from_config writes the attention into the configuration that it is given.
    ours = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=register_attention("sdpa"))
    # Fresh weights hardly look at other tokens; larger ones make a leak visible.
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    theirs = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager")
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("name", CONFIGS, ids=str)
def test_each_token_has_the_loss_that_it_has_alone(name: str) -> None:
    ours, theirs = model_pair(CONFIGS[name])
    batch = packed()
    with torch.no_grad():
        logits = ours(**model_inputs(batch, torch.device("cpu")), use_cache=False).logits[0]
        alone = [theirs(document[None], use_cache=False).logits[0] for document in documents()]
    token_losses = F.cross_entropy(logits, batch.labels[0], ignore_index=-100, reduction="none")
    expected = F.cross_entropy(torch.cat(alone), batch.labels[0], ignore_index=-100, reduction="none")
    assert expected.max() > 1
    torch.testing.assert_close(token_losses, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS, ids=str)
def test_loss_and_gradient_are_the_plain_models(name: str) -> None:
    ours, theirs = model_pair(CONFIGS[name])
    install_loss_head(ours)
    loss = micro_batch_loss(ours, packed(), torch.device("cpu"))
    loss.backward()
    expected = torch.zeros(())
    for document in documents():
        if len(document) > 1:
            logits = theirs(document[None], use_cache=False).logits[0, :-1]
            expected = expected + F.cross_entropy(logits, document[1:], reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    for (key, mine), plain in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, plain.grad, atol=1e-4, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_a_null_pack_gives_zero_loss_and_zero_gradient_to_every_parameter() -> None:
    ours, _ = model_pair(CONFIGS["llama, tied"])
    install_loss_head(ours)
    batch = packed()
    nothing = MicroBatch(**{**batch.__dict__, "predicting": batch.predicting[:0], "targets": batch.targets[:0]})
    loss = micro_batch_loss(ours, nothing, torch.device("cpu"))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def test_attention_that_is_not_told_where_documents_end_is_refused() -> None:
    ours, _ = model_pair(CONFIGS["llama, tied"])
    inputs = model_inputs(packed(), torch.device("cpu"))
    inputs.pop("documents")
    with pytest.raises(UserError, match="hand keywords down"):
        ours(**inputs, use_cache=False)
