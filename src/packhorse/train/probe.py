"""The parity probe: proves before the first step, on the model, kernel and engine that train, that packing is exact.

isolation   losses of documents 2 and 3 do not change when document 1 does
packing     three documents in one pack have the same losses as each alone
head        the chunked loss equals cross-entropy over the model's own logits
units       two rows of a preference objective in one pack have the same losses as each alone
compiled    compiled layers give the same loss as eager ones
sequence    a row shared by several ranks has the same loss as on one rank

Where a reward model trains, the sum of the documents' scores takes the place of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packhorse.data.packs.loader import IGNORED_LABEL, MicroBatch, lay_out, lay_out_documents
from packhorse.data.packs.store import Ids, PackStore
from packhorse.errors import UserError
from packhorse.model.sequence import SequenceGroup
from packhorse.train.engine.engine import Engine
from packhorse.train.objectives.documents import document_scores
from packhorse.train.objectives.forward import micro_batch_loss, model_inputs
from packhorse.train.objectives.objective import Objective
from packhorse.train.objectives.preference import ScoreObjective

Total = Callable[[nn.Module, MicroBatch, torch.device, SequenceGroup | None], Tensor]

PROBE_TOKENS = 48
NUM_DOCUMENTS = 3

# Equal shapes and numbers give equal bits; only the reduction order inside a kernel may differ.
ISOLATION_TOLERANCE = 1e-6
# Other shapes are summed in another order: seen 1e-7 to 1e-6 in fp32, 1e-3 to 1e-2 in bf16; fp16 has 3 bits more.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}


@dataclass(frozen=True)
class ProbeReport:
    """Largest relative differences; None where there is nothing to compare."""

    isolation: float
    packing: float
    head: float
    sequence: float | None
    compiled: float | None = None
    units: float | None = None

    def figures(self) -> dict[str, float]:
        """Return the differences as metrics."""
        return {f"proof/{name}_difference": value for name, value in asdict(self).items() if value is not None}


def probe(
    engine: Engine,
    store: PackStore,
    objective: Objective,
    precision: str,
    sequence: SequenceGroup | None,
    is_compiled: bool = False,
) -> ProbeReport:
    """Run the probe, on every rank alike.

    Raises:
        UserError: Documents see each other, or packing, sharing a row or the chunked loss changes a loss.
    """
    model = engine.model
    documents = _documents(store)
    model.eval()
    with torch.no_grad():
        total = _scores if isinstance(objective, ScoreObjective) else micro_batch_loss
        report = _measure(model, engine.device, total, documents, sequence, is_compiled)
        if store.documents_per_row > 1:
            report = replace(report, units=_unit_difference(engine, store, objective, sequence))
    model.train()
    _refuse_differences(report, precision)
    return report


def probe_teacher(model: nn.Module, device: torch.device, store: PackStore, precision: str) -> None:
    """Run the probe on a model in evaluation mode that does not train, with its loss head installed.

    Raises:
        UserError: See `probe`.
    """
    with torch.no_grad():
        _refuse_differences(_measure(model, device, micro_batch_loss, _documents(store), None, False), precision)


def _documents(store: PackStore) -> list[Ids]:
    return [store.document(index)[0][:PROBE_TOKENS] for index in range(min(NUM_DOCUMENTS, store.num_documents))]


def _measure(
    model: nn.Module,
    device: torch.device,
    total: Total,
    documents: list[Ids],
    sequence: SequenceGroup | None,
    is_compiled: bool,
) -> ProbeReport:
    def whole_loss(pack: list[Ids]) -> float:
        return float(total(model, _pack(pack, 0), device, None))

    def loss(pack: list[Ids], first_counted: int = 0) -> float:
        part = total(model, _pack(pack, first_counted), device, sequence)
        return sequence.sum(part) if sequence else float(part)

    together, eager = loss(documents), None
    if is_compiled:
        with torch.compiler.set_stance("force_eager"):
            eager = loss(documents)
    alone = sum(loss([document]) for document in documents)
    changed = [np.roll(documents[0], 1)[::-1].copy(), *documents[1:]]
    rest, rest_changed = (loss(pack, 1) for pack in (documents, changed))
    plain_total = _plain_scores if total is _scores else _plain_loss
    plain = float(plain_total(model, _pack(documents[:1], 0), device))
    return ProbeReport(
        isolation=_relative(rest, rest_changed),
        packing=_relative(together, alone),
        head=_relative(whole_loss(documents[:1]), plain),
        sequence=_relative(together, whole_loss(documents)) if sequence else None,
        compiled=_relative(together, eager) if eager is not None else None,
    )


def _plain_loss(model: nn.Module, micro_batch: MicroBatch, device: torch.device) -> Tensor:
    """Return the loss from the model's own logits, one document."""
    logits = model(**model_inputs(micro_batch, device), use_cache=False).logits
    labels = micro_batch.labels[0].to(device)
    return F.cross_entropy(logits[0].float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")


def _scores(
    model: nn.Module, micro_batch: MicroBatch, device: torch.device, sequence: SequenceGroup | None = None
) -> Tensor:
    """Return the sum of the magnitudes of the scores of documents with supervised tokens."""
    counted = torch.isin(torch.arange(len(micro_batch.documents)), micro_batch.document_of).to(device)
    return (document_scores(model, micro_batch, device, sequence).own * counted).abs().sum()


def _plain_scores(model: nn.Module, micro_batch: MicroBatch, device: torch.device) -> Tensor:
    """Return the magnitude of the model's own score of one document."""
    score: Tensor = model(**model_inputs(micro_batch, device), use_cache=False).logits
    return score.float().abs().sum()


def _unit_difference(
    engine: Engine, store: PackStore, objective: Objective, sequence: SequenceGroup | None
) -> float | None:
    """Compare two rows of a pack, together and alone; None where no pack has two."""
    size = store.documents_per_row
    sizes = np.diff(store.pack_offsets)
    if not len(sizes) or sizes.max() < 2 * size:
        return None
    documents = store.documents_of(int(np.argmax(sizes >= 2 * size)))

    def loss(first: int, end: int) -> float:
        rows = lay_out_documents(store, documents[first * size : end * size])
        part = objective(engine.model, rows, engine.device, sequence).total
        return sequence.sum(part) if sequence else float(part)

    return _relative(loss(0, 2), loss(0, 1) + loss(1, 2))


def _pack(documents: list[Ids], first_counted: int) -> MicroBatch:
    """Lay out documents as in training; every token of the documents from `first_counted` on is supervised."""
    masks = [np.full(len(ids), number >= first_counted, np.uint8) for number, ids in enumerate(documents)]
    return lay_out(documents, masks)


def _relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other), 1e-12)


def _refuse_differences(report: ProbeReport, precision: str) -> None:
    tolerance = TOLERANCE[precision]
    # First, because all other figures are measured on shared rows too.
    if report.sequence is not None and not report.sequence <= tolerance:
        raise UserError(
            f"rows shared by several processes have a different loss than whole rows: {report.sequence:.1e} apart,"
            f" {tolerance:.0e} is allowed.",
            "a layer of this architecture mixes tokens outside attention.",
            "set parallel.sequence to 1, or choose a model whose layers mix tokens in attention only.",
        )
    if not report.isolation <= ISOLATION_TOLERANCE:
        raise UserError(
            f"documents in a pack see each other: changing one changed the loss of the others by"
            f" {report.isolation:.1e}, {ISOLATION_TOLERANCE:.0e} is allowed.",
            "the model would learn from rows that have nothing to do with each other.",
            "choose another model.attention, or an architecture whose layers mix tokens in attention only.",
        )
    packing = max(report.packing, report.units or 0.0)
    if not packing <= tolerance:
        raise UserError(
            f"packed documents have another loss than alone: {packing:.1e} apart, {tolerance:.0e} is allowed.",
            "positions or attention of this architecture do not restart with each document.",
            "choose another model.attention, or another model.",
        )
    if report.compiled is not None and not report.compiled <= tolerance:
        raise UserError(
            f"compiled layers have another loss than eager ones: {report.compiled:.1e} apart, {tolerance:.0e} is"
            " allowed.",
            "the compiler makes wrong code for this architecture or this GPU.",
            "set parallel.compile to false.",
        )
    if not report.head <= tolerance:
        raise UserError(
            f"the chunked loss differs from the model's own loss: {report.head:.1e} apart, {tolerance:.0e} is allowed.",
            "this architecture changes its logits after the linear head (a soft cap or a scale).",
            "choose a model with a plain linear head (Llama, Qwen, Mistral, Phi).",
        )
