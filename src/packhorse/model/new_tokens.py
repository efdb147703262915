"""Rows for tokens that the model has not seen: as many as the tokenizer needs, each from what its text was before.

Shapes: V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

Pieces = Mapping[int, tuple[int, ...]]
"""New token id -> the ids that the tokenizer cut its text into before it was a token."""


def add_rows(model: PreTrainedModel, pieces: Pieces, num_tokens: int) -> None:
    """Starts each new token from the mean of its pieces' rows, in the embedding and in an untied output head.

    Nothing is drawn at random, so every rank and every engine starts from the same rows. Models often have spare
    rows, which nobody has trained; the embedding only grows where it has too few.

    Args:
        model: Whole or under ZeRO-3's `zero.Init`; rows are [V, H].
        pieces: Of every new token.
        num_tokens: Tokens of the tokenizer, the new ones included.
    """
    embedding: Any = model.get_input_embeddings()
    if getattr(embedding.weight, "ds_shape", embedding.weight.shape)[0] < num_tokens:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
        embedding = model.get_input_embeddings()
    weights = [embedding.weight]
    head: Any = model.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        weights.append(head.weight)
    for weight in weights:
        with _whole(weight), torch.no_grad():
            for token, parts in pieces.items():
                weight[token] = weight[list(parts)].float().mean(0).to(weight.dtype)


@contextmanager
def _whole(weight: Any) -> Iterator[None]:  # noqa: ANN401
    """Gathers a ZeRO-3 weight on every rank, and shares it out again as changed."""
    if not hasattr(weight, "ds_id"):
        yield
        return
    weight.all_gather()
    try:
        yield
    finally:
        weight.partition(has_been_updated=True)
