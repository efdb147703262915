"""Merge an adapter into its base, tensor by tensor, into a folder in Hugging Face form."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from packhorse.durable import disk_error
from packhorse.errors import UserError
from packhorse.export.merge.adapter import Change
from packhorse.export.merge.base import SeenBase
from packhorse.export.weight_files import ALONE, INDEX, Written, row_blocks, write_safetensors

EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
DONE_FILE: Final = "written.json"
"""Hashes of the whole files of an unfinished merge, and how far it moved their tensors."""


@dataclass(frozen=True)
class Merge:
    """What was written.

    Attributes:
        hashes: SHA-256 of each file of weights.
        moved: Norm of the change of each changed tensor over its norm before.
        untied: Whether the output head became a tensor beside the embedding, because training changed only one of them.
    """

    hashes: Mapping[str, str]
    moved: Mapping[str, float]
    untied: bool


def check_names(base: SeenBase, changes: Mapping[str, Change], tied: bool) -> None:
    """Refuse an adapter of another base.

    Raises:
        UserError: A change names a tensor that the base lacks.
    """
    known = {*base.names(), *([HEAD] if tied else [])}
    odd = sorted(changes.keys() - known)
    if odd:
        raise UserError(
            f"the adapter changes {odd[0]} (and {len(odd) - 1} more), which {base.files.folder} does not have.",
            "peft would only warn, and merge the rest: the model would be another one than was trained.",
            "name the base that the run was trained on, of the same revision.",
        )


def write_merged(
    base: SeenBase,
    changes: Mapping[str, Change],
    dtype: torch.dtype,
    folder: Path,
    progress: Callable[[int, int], None],
    request: str,
) -> Merge:
    """Write the weights and config.json of the merged model.

    Files that an earlier call of the same request has written whole are kept.

    Args:
        base: The base as training saw it.
        changes: Changes by the name of the tensor.
        dtype: Type of the result; computed in fp32 and rounded once.
        folder: Folder of the result, which exists.
        progress: Called with the bytes written so far and in all.
        request: What decides the result: files of another request are written again.

    Raises:
        UserError: A low-rank change of a tensor is zero, or the disk is full.
    """
    tied = bool(base.config.tie_word_embeddings)
    check_names(base, changes, tied)
    untied = tied and (HEAD in changes) and not _same_change(base, changes)
    plan = _plan(base, changes, dtype, untied)
    total = sum(tensor.bytes for tensors, _ in plan.values() for tensor in tensors)
    _check_disk(folder, total)
    finished = _finished(folder, request)
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    for file, (tensors, moved) in plan.items():
        if file in finished:
            count(sum(tensor.bytes for tensor in tensors))
            continue
        try:
            with one_thread():  # a block is too small for two, and the second core writes
                digest = write_safetensors(folder / file, tensors, count)
        except OSError as error:
            raise disk_error(folder / file, error) from error
        _refuse_still(moved, changes)
        finished[file] = {"sha256": digest, "moved": moved}
        (folder / DONE_FILE).write_text(json.dumps({"request": request, "files": finished}), encoding="utf-8")
    _write_index(plan, folder, total)
    _write_config(base, dtype, untied, folder)
    (folder / DONE_FILE).unlink(missing_ok=True)
    hashes = {file: noted["sha256"] for file, noted in finished.items()}
    return Merge(hashes, {name: far for noted in finished.values() for name, far in noted["moved"].items()}, untied)


Files = dict[str, tuple[list[Written], dict[str, float]]]


def _plan(base: SeenBase, changes: Mapping[str, Change], dtype: torch.dtype, untied: bool) -> Files:
    """Return the tensors of each file, and where each will note how far it moved."""
    plan: Files = {}
    for file, names in base.files.files.items():
        moved: dict[str, float] = {}
        kept = [name for name in names if not (base.config.tie_word_embeddings and name == HEAD)]
        plan[file] = ([_written(base, name, name, changes.get(name), dtype, moved) for name in kept], moved)
        if untied and EMBEDDING in names:
            plan[file][0].append(_written(base, EMBEDDING, HEAD, changes[HEAD], dtype, moved))
    if len(plan) == 1:
        return {ALONE: next(iter(plan.values()))}
    return plan


def _written(
    base: SeenBase, source: str, name: str, change: Change | None, dtype: torch.dtype, moved: dict[str, float]
) -> Written:
    def blocks() -> Iterator[Tensor]:
        if change is None:
            # Bytes that stay the same are read and written as they come from the file.
            yield base.files.read(source) if base.is_stored_as(source, dtype) else base.read(source)
            return
        apply, before = change.open(), base.read(source)
        length, distance = 0.0, 0.0
        for rows in row_blocks(before.shape):
            old = before[rows].float()
            new = apply(old, rows)
            length = math.hypot(length, float(torch.linalg.vector_norm(old)))
            distance = math.hypot(distance, float(torch.linalg.vector_norm(new - old)))
            yield new
        moved[name] = distance / max(length, 1e-30)

    stored = base.files.read(source).dtype
    # Counters and masks keep their type.
    return Written(name, dtype if stored.is_floating_point else stored, base.shape(source), blocks)


def _same_change(base: SeenBase, changes: Mapping[str, Change]) -> bool:
    """Return whether tied embedding and output head were changed alike, and stay tied."""
    if EMBEDDING not in changes:
        return False
    before = base.read(EMBEDDING).float()
    everything = slice(0, len(before))
    of_embedding, of_head = (changes[name].open()(before, everything) for name in (EMBEDDING, HEAD))
    return torch.equal(of_embedding, of_head)


def _refuse_still(moved: Mapping[str, float], changes: Mapping[str, Change]) -> None:
    still = [name for name, amount in moved.items() if amount == 0 and changes[name].is_low_rank]
    if still:
        raise UserError(
            f"the adapter changes {still[0]} by nothing ({len(still)} such tensors).",
            "its product of matrices is zero there: it was not trained, or saved before the first step.",
            "train the run to its end, or name fewer modules in method.target.",
        )


def _finished(folder: Path, request: str) -> dict[str, Any]:
    """Return what an interrupted call of the same request has noted of the files that it had written whole."""
    file = folder / DONE_FILE
    if not file.is_file():
        return {}
    noted: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: of_file
        for name, of_file in (noted["files"] if noted["request"] == request else {}).items()
        if (folder / name).is_file() and of_file["sha256"] == sha256(folder / name)
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sha256(file: Path) -> str:
    """Return the hash of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the merged model needs {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free.",
            "a disk that fills up would leave half a model.",
            "free some space, or name another folder with --out.",
        )


def _write_index(plan: Files, folder: Path, total: int) -> None:
    if len(plan) == 1:
        return
    names = {tensor.name: file for file, (tensors, _) in plan.items() for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_config(base: SeenBase, dtype: torch.dtype, untied: bool, folder: Path) -> None:
    config = base.config.__class__.from_dict(base.config.to_dict())
    config.vocab_size = base.shape(EMBEDDING)[0] if EMBEDDING in base.names() else config.vocab_size
    config.tie_word_embeddings = base.config.tie_word_embeddings and not untied
    config.dtype = dtype
    config.save_pretrained(folder)
