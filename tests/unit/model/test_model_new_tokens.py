"""Rows for new tokens: the mean of their pieces, in embedding and untied head, and no other row touched."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from packhorse.model.load import add_rows


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("num_tokens", "rows"), [(14, 16), (18, 18)], ids=["spare-rows", "too-few-rows"])
def test_a_new_row_is_the_mean_of_its_pieces_on_every_rank(tied: bool, num_tokens: int, rows: int) -> None:
    found = []
    for seed in (1, 2):  # what a rank has drawn before is of no account
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                tie_word_embeddings=tied,
            )
        )  # fmt: skip
        torch.manual_seed(seed)
        before = [
            w.detach().clone() for w in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        ]
        first = num_tokens - 2
        add_rows(model, {first: (3, 5, 7), first + 1: (4,)}, num_tokens)
        after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        assert (after[0] is after[1]) == tied
        assert model.config.vocab_size == rows
        for old, new in zip(before, after, strict=True):
            assert new.shape == (rows, 8)
            torch.testing.assert_close(new[first], old[[3, 5, 7]].mean(0))
            assert torch.equal(new[first + 1], old[4])
            assert torch.equal(new[:first], old[:first])
        found.append(after[0].detach())
    assert torch.equal(*found)
