"""Load packs as tensors: the micro-batches of one optimizer step for one rank; a thread prepares the next steps.

Shapes: N tokens of a micro-batch, D its documents, S its supervised tokens, k tokens that are kept of a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from packhorse.data.packs.batches import NULL_PACK, BatchPlan
from packhorse.data.packs.store import Ids, Int64, Mask, PackStore

IGNORED_LABEL: Final = -100
PAD_TOKEN: Final = 0
PAD_LENGTH: Final = 2
# Two steps, so that a slow disk read for one step is hidden while the previous step trains.
STEPS_AHEAD: Final = 2


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Documents laid end to end; attention never crosses from one to another.

    Attributes:
        input_ids: int64 [1, N].
        position_ids: int64 [1, N], from 0 in each document.
        predicting: int64 [S], rising: tokens whose next token, in the same document, is trained on.
        targets: int64 [S], the next token of each.
        cu_seq_lens: int32 [D + 1], start of each document and end of the last.
        max_length: Length of the longest document.
        document_lengths: D lengths on the host, so that attention on the CPU reads no tensor.
        document_of: int64 [S], which of the documents each target belongs to.
        documents: int64 [D], indices in the store; without documents that only fill a row.
        values: float64 [D, m], numbers of each document, in columns with the names of `value_names`; None without such.
        num_parts: Number of ranks that share the documents; each holds an equal part of the tokens.
        teacher_ids: int64 [S, k], the teacher's most probable next tokens; None without a stored teacher.
        teacher_logps: fp16 [S, k], their log-probabilities.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predicting: torch.Tensor
    targets: torch.Tensor
    cu_seq_lens: torch.Tensor
    max_length: int
    document_lengths: tuple[int, ...]
    document_of: torch.Tensor
    documents: torch.Tensor
    values: torch.Tensor | None = None
    value_names: tuple[str, ...] = ()
    num_parts: int = 1
    teacher_ids: torch.Tensor | None = None
    teacher_logps: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens (N)."""
        return self.input_ids.shape[1]

    @property
    def labels(self) -> torch.Tensor:
        """int64 [1, N], already shifted: the next token where it is trained on, else -100; computed on each call."""
        labels = torch.full_like(self.input_ids, IGNORED_LABEL)
        labels[0, self.predicting] = self.targets
        return labels

    def pinned(self) -> MicroBatch:
        """Return the micro-batch in pinned memory, from which a GPU copies without waiting."""
        names = ["input_ids", "position_ids", "predicting", "targets", "cu_seq_lens", "document_of"]
        if self.teacher_ids is not None:
            names += ["teacher_ids", "teacher_logps"]
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One optimizer step for one rank.

    Attributes:
        micro_batches: One per gradient accumulation step.
        num_supervised_tokens: Labels of the whole step that are not -100, over all ranks.
        num_tokens: Tokens of the whole step, over all ranks.
        num_slots: Capacity of the step's packs in tokens: packs × T, without null packs.
        num_units: Units of the whole step: supervised tokens, or rows where they have two documents.
        divisor: Divisor of the sum of unit losses: supervised tokens of the step, or the epoch's mean rows per step, so
            that each pair weighs the same.
    """

    micro_batches: list[MicroBatch]
    num_supervised_tokens: int
    num_tokens: int
    num_slots: int
    num_units: int
    divisor: float


class PackLoader:
    """Returns the batch of any step; a thread prepares the next two steps meanwhile.

    One thread is enough: it lays out tens of millions of tokens per second (`benchmarks/loader.py`), and a GPU trains
    on about ten thousand. Worker processes would have to copy what a thread hands over without a copy.
    """

    def __init__(
        self,
        store: PackStore,
        batch_plan: BatchPlan,
        rank: int,
        world_size: int,
        accumulation_steps: int,
        device_pin: bool,
        part: int = 0,
        num_parts: int = 1,
    ) -> None:
        self._store = store
        self._batch_plan = batch_plan
        self._rank = rank
        self._world_size = world_size
        self._accumulation_steps = accumulation_steps
        self._device_pin = device_pin
        self._part, self._num_parts = part, num_parts
        self._mean_units = store.num_units / batch_plan.num_steps_per_epoch
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pack-loader")
        self._ahead: dict[int, Future[StepBatch]] = {}

    def step(self, k: int) -> StepBatch:
        """Return the batch of step k, counted from the start of training."""
        ready = self._ahead.get(k)
        batch = self._load(k) if ready is None else ready.result()
        ahead = range(k + 1, k + 1 + STEPS_AHEAD)
        for stale in self._ahead.keys() - set(ahead):
            self._ahead.pop(stale).cancel()
        for step in ahead:
            if step not in self._ahead:
                self._ahead[step] = self._thread.submit(self._load, step)
        return batch

    def rows(self, k: int) -> list[dict[int, list[int]]]:
        """Return the packs of each of this rank's micro-batches in step k, each with the indices of its rows."""
        mine = self._batch_plan.share(k, self._world_size, self._accumulation_steps)[self._rank]
        return [
            {pack: self._store.documents_of(pack).tolist() for pack in packs.tolist() if pack != NULL_PACK}
            for packs in mine
        ]

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _load(self, k: int) -> StepBatch:
        shares = self._batch_plan.share(k, self._world_size, self._accumulation_steps)
        packs = shares[shares != NULL_PACK]
        mine = shares[self._rank]
        num_units = int(self._store.pack_units[packs].sum())
        self._store.fetch(mine[mine != NULL_PACK])
        return StepBatch(
            micro_batches=[self._micro_batch(packs_of) for packs_of in mine],
            num_supervised_tokens=int(self._store.pack_labels[packs].sum()),
            num_tokens=int(self._store.pack_tokens[packs].sum()),
            num_slots=len(packs) * self._store.length_tokens,
            num_units=num_units,
            divisor=num_units if self._store.documents_per_row == 1 else self._mean_units,
        )

    def _micro_batch(self, packs: NDArray[np.int64]) -> MicroBatch:
        whole = make_micro_batch(self._store, packs[packs != NULL_PACK], self._device_pin)
        if self._num_parts == 1:
            return whole
        part = part_of_row(whole, self._part, self._num_parts)
        return part.pinned() if self._device_pin else part


def make_micro_batch(store: PackStore, packs: NDArray[np.int64], pinned: bool = False) -> MicroBatch:
    """Lay the documents of these packs end to end; without packs, two tokens that train nothing."""
    indices = np.concatenate([store.packs[:0], *(store.documents_of(pack) for pack in packs.tolist())])
    batch = lay_out_documents(store, indices, pinned)
    if store.teacher is None:
        return batch
    tokens = [torch.from_numpy(values) for values in store.teacher.read(packs)]
    ids, log_probabilities = (values.pin_memory() if pinned else values for values in tokens)
    return replace(batch, teacher_ids=ids, teacher_logps=log_probabilities)


def lay_out_documents(store: PackStore, indices: Int64, pinned: bool = False) -> MicroBatch:
    """Lay documents of a store end to end, with their values; without documents, two tokens that train nothing."""
    documents = [store.document(index) for index in indices.tolist()]
    if not documents:
        documents = [(np.full(PAD_LENGTH, PAD_TOKEN, np.uint16), np.zeros(PAD_LENGTH, np.uint8))]
    batch = lay_out([ids for ids, _ in documents], [mask for _, mask in documents], pinned)
    values = np.stack([values[indices] for values in store.values.values()], axis=1) if store.values else None
    return replace(
        batch,
        documents=torch.from_numpy(indices.copy()),
        values=torch.from_numpy(values) if values is not None else None,
        value_names=tuple(store.values),
    )


def lay_out(ids: Sequence[Ids], supervised: Sequence[Mask], pinned: bool = False) -> MicroBatch:
    """Lay documents end to end.

    Args:
        ids: D documents, each [length].
        supervised: D masks, each [length], 1 where the token is trained on.
        pinned: Whether to use pinned memory, from which the GPU copies asynchronously.
    """
    lengths = np.array([len(document) for document in ids])
    cu_seq_lens = torch.zeros(len(ids) + 1, dtype=torch.int32, pin_memory=pinned)
    np.cumsum(lengths, out=cu_seq_lens.numpy()[1:])
    starts = cu_seq_lens.numpy()[:-1]
    trained = np.concatenate(supervised)
    # No token may predict the first token of a document, least of all the last token of the document before.
    trained[starts] = 0
    chosen = np.flatnonzero(trained)
    # One buffer for everything that goes to the device, filled in place: the only copy between file and device.
    buffer = torch.empty(2 * len(trained) + 3 * len(chosen), dtype=torch.int64, pin_memory=pinned)
    parts = torch.split(buffer, [len(trained), len(trained), len(chosen), len(chosen), len(chosen)])
    input_ids, position_ids, predicting, targets, document_of = (part.numpy() for part in parts)
    np.concatenate(ids, out=input_ids)
    np.subtract(np.arange(len(trained)), np.repeat(starts, lengths), out=position_ids)
    np.subtract(chosen, 1, out=predicting)
    np.take(input_ids, chosen, out=targets, mode="clip")
    np.subtract(np.searchsorted(cu_seq_lens.numpy(), chosen, "right"), 1, out=document_of)
    return MicroBatch(
        input_ids=parts[0][None],
        position_ids=parts[1][None],
        predicting=parts[2],
        targets=parts[3],
        cu_seq_lens=cu_seq_lens,
        max_length=int(lengths.max()),
        document_lengths=tuple(lengths.tolist()),
        document_of=parts[4],
        documents=torch.arange(len(ids)),
    )


def part_of_row(micro_batch: MicroBatch, rank: int, size: int) -> MicroBatch:
    """Return the tokens of one of `size` ranks, which hold equal parts; documents stay those of the whole row.

    A row that cannot be cut into equal parts gets one more document, without supervised tokens.
    """
    missing = -micro_batch.num_tokens % size
    row = _with_null_document(micro_batch, missing) if missing else micro_batch
    length = row.num_tokens // size
    first, end = rank * length, (rank + 1) * length
    low, high = np.searchsorted(row.predicting.numpy(), (first, end)).tolist()
    return replace(
        row,
        input_ids=row.input_ids[:, first:end],
        position_ids=row.position_ids[:, first:end],
        predicting=row.predicting[low:high] - first,
        targets=row.targets[low:high],
        document_of=row.document_of[low:high],
        teacher_ids=None if row.teacher_ids is None else row.teacher_ids[low:high],
        teacher_logps=None if row.teacher_logps is None else row.teacher_logps[low:high],
        num_parts=size,
    )


def _with_null_document(micro_batch: MicroBatch, length: int) -> MicroBatch:
    ids = torch.full((1, length), PAD_TOKEN)
    positions = torch.arange(length)[None]
    return replace(
        micro_batch,
        input_ids=torch.cat([micro_batch.input_ids, ids], 1),
        position_ids=torch.cat([micro_batch.position_ids, positions], 1),
        cu_seq_lens=torch.cat([micro_batch.cu_seq_lens, micro_batch.cu_seq_lens[-1:] + length]),
        max_length=max(micro_batch.max_length, length),
        document_lengths=(*micro_batch.document_lengths, length),
    )
