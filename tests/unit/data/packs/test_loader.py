from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_cases import Document, write_store
from test_store import DOCUMENTS

from packhorse.data.packs.batches import BatchPlan
from packhorse.data.packs.loader import MicroBatch, PackLoader, make_micro_batch
from packhorse.data.packs.store import PackStore


def test_micro_batch_by_hand(tmp_path: Path) -> None:
    store = write_store(tmp_path, DOCUMENTS, packing="best_fit")
    assert [store.documents_of(pack).tolist() for pack in (0, 1)] == [[1, 2], [0, 3]]
    micro_batch = make_micro_batch(store, np.array([0, 1]))
    assert micro_batch.input_ids.tolist() == [[8, 9, 10, 11, 12, 13, 5, 6, 7, 14, 15]]
    assert micro_batch.labels.tolist() == [[-100, -100, -100, 12, 13, -100, 6, 7, -100, 15, -100]]
    assert micro_batch.predicting.tolist() == [3, 4, 6, 7, 9]
    assert micro_batch.targets.tolist() == [12, 13, 6, 7, 15]
    assert micro_batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert micro_batch.cu_seq_lens.tolist() == [0, 2, 6, 9, 11]
    assert str(micro_batch.cu_seq_lens.dtype) == "torch.int32"
    wide = (micro_batch.input_ids, micro_batch.labels, micro_batch.position_ids, micro_batch.predicting)
    assert {str(each.dtype) for each in (*wide, micro_batch.targets)} == {"torch.int64"}
    assert (micro_batch.max_length, micro_batch.document_lengths, micro_batch.num_tokens) == (4, (2, 4, 3, 2), 11)


def test_no_pack_is_two_tokens_that_train_nothing(tmp_path: Path) -> None:
    micro_batch = make_micro_batch(write_store(tmp_path, DOCUMENTS), np.array([], np.int64))
    assert micro_batch.input_ids.tolist() == [[0, 0]]
    assert micro_batch.labels.tolist() == [[-100, -100]]
    assert micro_batch.targets.tolist() == []
    assert micro_batch.cu_seq_lens.tolist() == [0, 2]


def loaders(store: PackStore, world: int, accumulation: int, packs_per_step: int = 4) -> list[PackLoader]:
    plan = BatchPlan(store.pack_costs, packs_per_step, 0, store.in_order)
    return [PackLoader(store, plan, rank, world, accumulation, False) for rank in range(world)]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_totals_of_the_step_are_those_of_all_ranks(tmp_path: Path, world: int, accumulation: int) -> None:
    ranks = loaders(write_store(tmp_path, DOCUMENTS), world, accumulation)
    batches = [rank.step(3) for rank in ranks]
    assert {(batch.num_supervised_tokens, batch.num_tokens, batch.num_slots) for batch in batches} == {(5, 11, 12)}
    micro_batches = [micro_batch for batch in batches for micro_batch in batch.micro_batches]
    assert len(micro_batches) == world * accumulation
    assert sum(len(micro_batch.targets) for micro_batch in micro_batches) == 5
    real = [micro_batch for micro_batch in micro_batches if micro_batch.input_ids.any()]
    assert sum(micro_batch.num_tokens for micro_batch in real) == 11
    for rank in ranks:
        rank.close()


def test_any_step_in_any_order_gives_the_same(tmp_path: Path) -> None:
    (loader,) = loaders(write_store(tmp_path, DOCUMENTS), 1, 1, packs_per_step=1)
    in_order = [loader.step(k).micro_batches[0].input_ids.tolist() for k in range(6)]
    out_of_order = {k: loader.step(k).micro_batches[0].input_ids.tolist() for k in (5, 0, 3, 4, 2, 1, 1)}
    assert in_order == [out_of_order[k] for k in range(6)]
    loader.close()


def test_what_goes_wrong_in_the_thread_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (loader,) = loaders(write_store(tmp_path, DOCUMENTS), 1, 1, packs_per_step=1)

    def break_from_step_1(plan: BatchPlan, step: int, world: int, accumulation: int) -> np.ndarray:
        if step > 0:
            raise OSError("the disk is gone")
        return np.zeros((1, 1, 1), np.int64)

    monkeypatch.setattr(BatchPlan, "share", break_from_step_1)
    loader.step(0)
    with pytest.raises(OSError, match="the disk is gone"):
        loader.step(1)
    loader.close()


@st.composite
def stores(draw: st.DrawFn) -> list[Document]:
    """Documents whose ids are all different, so that a token is known by its id."""
    masks = draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=30))
    ends = np.cumsum([len(mask) for mask in masks]).tolist()
    return [(list(range(end - len(mask) + 1, end + 1)), mask) for end, mask in zip(ends, masks)]


def trained_pairs(micro_batch: MicroBatch) -> list[tuple[int, int]]:
    """Token and next token, where that is trained on."""
    ids, labels = micro_batch.input_ids[0].tolist(), micro_batch.labels[0].tolist()
    return [(token, label) for token, label in zip(ids, labels) if label != -100]


@settings(deadline=None, max_examples=50)
@given(
    stores(),
    st.sampled_from(["mixed", "best_fit", "in_order", "none"]),
    st.integers(1, 5),
    st.sampled_from([(1, 1), (2, 1), (3, 2)]),
    st.integers(0, 2),
)
def test_every_token_once_an_epoch_and_no_label_of_another_document(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[Document],
    how: str,
    packs_per_step: int,
    shape: tuple[int, int],
    epoch: int,
) -> None:
    store = write_store(tmp_path_factory.mktemp("data"), documents, vocab_size=1000, length=12, packing=how)
    ranks = loaders(store, *shape, packs_per_step)
    num_steps = -(-store.num_packs // packs_per_step)
    batches = [rank.step(k) for k in range(epoch * num_steps, (epoch + 1) * num_steps) for rank in ranks]
    seen = [micro_batch for batch in batches for micro_batch in batch.micro_batches]
    tokens = Counter(token for micro_batch in seen for token in micro_batch.input_ids[0].tolist() if token != 0)
    assert tokens == Counter(token for ids, _ in documents for token in ids)
    expected = [(a, b) for ids, mask in documents for a, b, on in zip(ids, ids[1:], mask[1:]) if on]
    assert sorted(pair for micro_batch in seen for pair in trained_pairs(micro_batch)) == sorted(expected)
    # Ids rise by one within a document, so a position tells where each token's document began.
    begin = {ids[0] for ids, _ in documents}
    for micro_batch in seen:
        starts = (micro_batch.input_ids[0] - micro_batch.position_ids[0]).tolist()
        assert set(starts) <= begin or not micro_batch.input_ids.any()
    for rank in ranks:
        rank.close()


def test_packs_in_order_give_the_rows_as_they_came(tmp_path: Path) -> None:
    documents = [([number] * 3, [1] * 3) for number in range(1, 21)]
    (loader,) = loaders(write_store(tmp_path, documents, packing="in_order"), 1, 1, packs_per_step=1)
    for epoch in (0, 1):
        steps = [loader.step(k).micro_batches[0].input_ids[0].tolist() for k in range(epoch * 10, epoch * 10 + 10)]
        assert [token for step in steps for token in step] == [number for number in range(1, 21) for _ in range(3)]
    loader.close()


TENSORS = ("input_ids", "position_ids", "predicting", "targets", "cu_seq_lens")


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_copy_that_is_done_late_still_finds_its_step(tmp_path: Path, num_parts: int) -> None:
    """A GPU copies asynchronously: buffers of a step must not be written again while later steps are loaded."""
    store = write_store(tmp_path, DOCUMENTS)
    plan = BatchPlan(store.pack_costs, 2, 0)
    loader = PackLoader(store, plan, 0, 1, 2, device_pin=False, part=num_parts - 1, num_parts=num_parts)
    queued = [
        (getattr(micro_batch, name), getattr(micro_batch, name).clone())
        for step in range(6)
        for micro_batch in loader.step(step).micro_batches
        for name in TENSORS
    ]
    loader.close()
    assert all(torch.equal(source, at_once) for source, at_once in queued)
    # One step may have the packs of another, so equal values would not show a buffer that two steps share.
    storages = {(source.untyped_storage().data_ptr(), source.data_ptr()) for source, _ in queued if source.numel()}
    assert len(storages) == sum(source.numel() > 0 for source, _ in queued)


def test_the_loader_cuts_rows_for_the_ranks_that_share_them(tmp_path: Path) -> None:
    store = write_store(tmp_path, DOCUMENTS)
    plan = BatchPlan(store.pack_costs, 4, 0)
    whole, *parts = (
        PackLoader(store, plan, 0, 1, 1, False, part=part, num_parts=num_parts)
        for part, num_parts in ((0, 1), (0, 2), (1, 2))
    )
    (row,), *cut = (loader.step(0).micro_batches for loader in (whole, *parts))
    joined = torch.cat([part.input_ids for (part,) in cut], 1)
    assert joined[0, : row.num_tokens].tolist() == row.input_ids[0].tolist()
    assert joined.shape[1] == row.num_tokens + row.num_tokens % 2
    for loader in (whole, *parts):
        loader.close()
