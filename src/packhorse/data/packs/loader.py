"""Packs to tensors: the micro-batches of one optimizer step for one rank, the next step made ready meanwhile.

Shapes: N tokens of a micro-batch, D its documents.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from packhorse.data.packs.batches import NULL_PACK, BatchPlan
from packhorse.data.packs.store import PackStore

IGNORED_LABEL: Final = -100
PAD_TOKEN: Final = 0
PAD_LENGTH: Final = 2


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Documents laid end to end; they never see each other.

    Attributes:
        input_ids: int64 [1, N].
        labels: int64 [1, N], already shifted: the label of a token is the next token of its document, or -100.
        position_ids: int64 [1, N], from 0 in each document.
        cu_seq_lens: int32 [D + 1], where documents start and end.
        max_length: Length of the longest document.
        document_lengths: D lengths on the host, so that attention on the CPU asks no tensor.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seq_lens: torch.Tensor
    max_length: int
    document_lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.input_ids.shape[1]


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One optimizer step for one rank.

    Attributes:
        micro_batches: As many as there are accumulation steps.
        num_supervised_tokens: Labels of the whole step that are not -100, over all ranks.
        num_tokens: Tokens of the whole step, over all ranks.
        num_slots: Tokens that the step's packs had room for: packs × T, null packs not counted.
    """

    micro_batches: list[MicroBatch]
    num_supervised_tokens: int
    num_tokens: int
    num_slots: int


class PackLoader:
    """Gives any step's batch; while it is used, a thread makes the next step's."""

    def __init__(
        self,
        store: PackStore,
        batch_plan: BatchPlan,
        rank: int,
        world_size: int,
        accumulation_steps: int,
        device_pin: bool,
    ) -> None:
        self._store = store
        self._batch_plan = batch_plan
        self._rank = rank
        self._world_size = world_size
        self._accumulation_steps = accumulation_steps
        self._device_pin = device_pin
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pack-loader")
        self._next: tuple[int, Future[StepBatch]] | None = None

    def step(self, k: int) -> StepBatch:
        """Return the batch of step k, counted from the start of training."""
        ready = self._next
        batch = ready[1].result() if ready is not None and ready[0] == k else self._load(k)
        self._next = (k + 1, self._thread.submit(self._load, k + 1))
        return batch

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _load(self, k: int) -> StepBatch:
        shares = self._batch_plan.share(k, self._world_size, self._accumulation_steps)
        packs = shares[shares != NULL_PACK]
        return StepBatch(
            micro_batches=[self._micro_batch(packs_of) for packs_of in shares[self._rank]],
            num_supervised_tokens=int(self._store.pack_labels[packs].sum()),
            num_tokens=int(self._store.pack_tokens[packs].sum()),
            num_slots=len(packs) * self._store.length_tokens,
        )

    def _micro_batch(self, packs: NDArray[np.int64]) -> MicroBatch:
        micro_batch = make_micro_batch(self._store, packs[packs != NULL_PACK])
        return _pinned(micro_batch) if self._device_pin else micro_batch


def make_micro_batch(store: PackStore, packs: NDArray[np.int64]) -> MicroBatch:
    """Lay the documents of these packs end to end; without packs, two tokens that train nothing."""
    documents = [store.document(index) for pack in packs.tolist() for index in store.documents_of(pack).tolist()]
    if not documents:
        documents = [(np.full(PAD_LENGTH, PAD_TOKEN, np.uint16), np.zeros(PAD_LENGTH, np.uint8))]
    lengths = np.array([len(ids) for ids, _ in documents])
    ends = np.cumsum(lengths)
    ids = np.concatenate([ids for ids, _ in documents]).astype(np.int64)
    supervised = np.concatenate([mask for _, mask in documents])
    labels = np.full(len(ids), IGNORED_LABEL, np.int64)
    labels[:-1] = np.where(supervised[1:], ids[1:], IGNORED_LABEL)
    # The last token of one document must not predict the first of the next.
    labels[ends - 1] = IGNORED_LABEL
    positions = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    return MicroBatch(
        input_ids=torch.from_numpy(ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seq_lens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_length=int(lengths.max()),
        document_lengths=tuple(lengths.tolist()),
    )


def _pinned(micro_batch: MicroBatch) -> MicroBatch:
    return MicroBatch(
        input_ids=micro_batch.input_ids.pin_memory(),
        labels=micro_batch.labels.pin_memory(),
        position_ids=micro_batch.position_ids.pin_memory(),
        cu_seq_lens=micro_batch.cu_seq_lens.pin_memory(),
        max_length=micro_batch.max_length,
        document_lengths=micro_batch.document_lengths,
    )
