"""A row cut for the ranks of a group: nothing is lost, nothing comes twice, and the parts are equally long."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packhorse.data.packs.loader import MicroBatch, lay_out, part_of_row


def row(lengths: list[int]) -> MicroBatch:
    generator = np.random.default_rng(0)
    ids = [generator.integers(1, 500, length) for length in lengths]
    return lay_out(ids, [generator.integers(0, 2, length).astype(np.uint8) for length in lengths])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5))
def test_parts_make_up_the_row(lengths: list[int], size: int) -> None:
    whole = row(lengths)
    parts = [part_of_row(whole, rank, size) for rank in range(size)]
    assert len({part.num_tokens for part in parts}) == 1
    assert 0 <= parts[0].num_tokens * size - whole.num_tokens < size
    for name in ("input_ids", "position_ids", "labels"):
        joined = torch.cat([getattr(part, name) for part in parts], 1)
        assert joined[0, : whole.num_tokens].tolist() == getattr(whole, name)[0].tolist()
    # What was added is a document of its own that trains nothing.
    assert sum(len(part.targets) for part in parts) == len(whole.targets)
    for part in parts:
        assert part.document_lengths[: len(lengths)] == tuple(lengths)
        assert sum(part.document_lengths) == parts[0].num_tokens * size == int(part.cu_seq_lens[-1])
        assert part.cu_seq_lens.diff().tolist() == list(part.document_lengths)
        assert part.max_length == max(part.document_lengths)


@pytest.mark.parametrize(
    ("rank", "ids", "predicting", "targets"),
    [(0, [7, 8, 9], [0, 1], [8, 9]), (1, [4, 5, 0], [0], [5])],
    ids=["first part", "second part"],
)
def test_parts_of_two_documents(rank: int, ids: list[int], predicting: list[int], targets: list[int]) -> None:
    """7 8 9 | 4 5 -> 7 8 9 and 4 5 0, where 0 is a document of its own."""
    whole = lay_out([np.array([7, 8, 9]), np.array([4, 5])], [np.ones(3, np.uint8), np.ones(2, np.uint8)])
    part = part_of_row(whole, rank, 2)
    assert part.input_ids[0].tolist() == ids
    assert part.predicting.tolist() == predicting
    assert part.targets.tolist() == targets
    assert part.document_lengths == (3, 2, 1)


def test_the_last_token_of_a_part_predicts_the_first_of_the_next() -> None:
    whole = lay_out([np.array([7, 8, 9, 4])], [np.ones(4, np.uint8)])
    assert part_of_row(whole, 0, 2).targets.tolist() == [8, 9]
    assert part_of_row(whole, 1, 2).targets.tolist() == [4]
