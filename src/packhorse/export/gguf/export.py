"""Export a model as GGUF files: proven before the first is written, each measured on held-out rows."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from packhorse.errors import UserError
from packhorse.evaluate.metrics.metric import LOSS
from packhorse.evaluate.results import MetricResult
from packhorse.evaluate.verdict import MetricValues, metric_result
from packhorse.export.gguf.convert import Source, write_gguf
from packhorse.export.gguf.families import family_of
from packhorse.export.gguf.file_types import Mix, check_file_types, num_bytes
from packhorse.export.gguf.measure import Quality, quality_of, reference_of
from packhorse.export.gguf.prove import Proof, choose_vocabulary, prove_numbers
from packhorse.export.gguf.vocabulary import Vocabulary, vocabularies_of
from packhorse.export.reference import HeldOutRow, layers_to_compare

PROOF_ROWS: Final = 4
PROOF_TOKENS: Final = 256
BESIDE: Final = ".writing"
"""Folder of files that are not proven yet, inside the result's folder."""


@dataclass(frozen=True)
class GgufRequest:
    """What to export.

    Attributes:
        model: Folder in Hugging Face form, with the tokenizer that was trained.
        tokenizer: That tokenizer.
        stops: Ids that end an answer; the first is the one that training taught.
        file_types: Names of types, e.g. `Q4_K_M`.
        out: Folder of the result.
        name: Name of the model, in file names.
        texts: Rendered rows of the run, whose ids are compared.
        rows: Held-out rows of the run, on which files are measured.
        smallest_effect: Difference of losses that matters, nats.
        facts: Further strings of a file's `general` section by name.
    """

    model: Path
    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[int]
    file_types: Sequence[str]
    out: Path
    name: str
    texts: Sequence[str]
    rows: Sequence[HeldOutRow]
    smallest_effect: float = 0.03
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GgufFile:
    """One file of the result.

    Attributes:
        file_type: Its type.
        path: Where it is.
        bytes: Its size.
        sha256: Its hash.
        quality: How it does on the held-out rows.
        loss: Its loss beside that of the model that it was made from.
        outcome: `kept` if the whole 95 % interval of the change is below the smallest effect, `lost` if it is above.
    """

    file_type: str
    path: Path
    bytes: int
    sha256: str
    quality: Quality
    loss: MetricResult
    outcome: Literal["kept", "lost", "cannot tell"]


@dataclass(frozen=True)
class GgufExport:
    """The result: the proof, and the files in the order of the request."""

    proof: Proof
    files: tuple[GgufFile, ...]


Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""


def export_gguf(request: GgufRequest, progress: Progress = lambda what, done, total: None) -> GgufExport:
    """Write one file per type; nothing is at its final name before it is proven.

    Raises:
        UserError: llama.cpp does not run such a model, reads other tokens or computes something else, or the disk
            is too small.
    """
    check_file_types(list(request.file_types))
    source = Source.open(request.model)
    candidates = vocabularies_of(request.tokenizer, source.config.vocab_size, list(request.stops))
    layers = layers_to_compare(source.config, source.fp32_bytes)
    _check_disk(request, source, layers)
    beside = request.out / BESIDE
    beside.mkdir(parents=True, exist_ok=True)
    try:
        vocabulary, proof = _prove(request, source, candidates, layers, beside, progress)
        reference = reference_of(source, request.rows)
        measure = partial(quality_of, reference=reference)
        files = [_file(request, source, vocabulary, name, beside, progress, measure) for name in request.file_types]
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return GgufExport(proof, tuple(files))


def _check_disk(request: GgufRequest, source: Source, layers: int) -> None:
    """Refuse a disk that cannot hold all files and the one of the proof."""
    tensors = source.tensors()
    has_output = any(tensor.name == "output.weight" for tensor in tensors)
    mixes = [Mix(name, source.config.num_hidden_layers, source.num_experts, has_output) for name in request.file_types]
    needed = sum(num_bytes(mix.kind(one.name, one.shape), one.shape) for mix in mixes for one in tensors)
    needed += sum(4 * int(np.prod(one.shape)) for one in source.tensors(layers))
    request.out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(request.out).free
    if needed > free:
        raise UserError(
            f"the files need {needed / 1e9:.1f} GB, and {request.out} has {free / 1e9:.1f} GB free.",
            "a disk that fills up would leave half a file.",
            "free some space, choose fewer types with --quantize, or another folder with --out.",
        )


def _prove(
    request: GgufRequest,
    source: Source,
    candidates: Sequence[Vocabulary],
    layers: int,
    beside: Path,
    progress: Progress,
) -> tuple[Vocabulary, Proof]:
    """Prove the tokenizer and the numbers on one f32 file, whole or of the first layers."""
    file = beside / "proof.gguf"

    def write(vocabulary: Vocabulary, file_type: str = "F32", num_layers: int = layers) -> Path:
        write_gguf(
            source,
            vocabulary,
            file_type,
            file,
            _facts(request),
            num_layers,
            lambda done, total: progress("proof", done, total),
        )
        return file

    def write_small(vocabulary: Vocabulary) -> Path:
        return write(vocabulary, "Q8_0", 1)

    vocabulary, normalised = choose_vocabulary(candidates, write_small, request.tokenizer, request.texts)
    write(vocabulary)
    rows = [row.ids[:PROOF_TOKENS] for row in request.rows[:PROOF_ROWS]]
    proof = prove_numbers(file, source, rows, layers, family_of(source.config).bound)
    return vocabulary, replace(proof, num_texts=len(request.texts), num_normalised=normalised)


def _file(
    request: GgufRequest,
    source: Source,
    vocabulary: Vocabulary,
    file_type: str,
    beside: Path,
    progress: Progress,
    quality: Callable[[Path], Quality],
) -> GgufFile:
    path = beside / f"{request.name}-{file_type}.gguf"
    write_gguf(
        source,
        vocabulary,
        file_type,
        path,
        _facts(request),
        progress=lambda done, total: progress(file_type, done, total),
    )
    measured = quality(path)
    loss = _loss(measured, request.smallest_effect)
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    final = path.replace(request.out / path.name)
    return GgufFile(
        file_type, final, final.stat().st_size, digest, measured, loss, _outcome(loss, request.smallest_effect)
    )


def _loss(measured: Quality, smallest_effect: float) -> MetricResult:
    """Return the paired comparison of losses; each row is one cluster."""
    rows = np.arange(len(measured.losses))
    weights = measured.num_tokens.astype(np.float64)
    values = MetricValues(LOSS, rows, measured.reference_losses, measured.losses, weights)
    return metric_result(values, values.tested(rows.tolist(), np.ones(len(rows), bool)), smallest_effect)


def _outcome(loss: MetricResult, smallest_effect: float) -> Literal["kept", "lost", "cannot tell"]:
    if loss.low is None or loss.high is None:
        return "cannot tell"
    return "kept" if loss.high < smallest_effect else "lost" if loss.low > smallest_effect else "cannot tell"


def _facts(request: GgufRequest) -> dict[str, str]:
    return {"name": request.name, **request.facts}
