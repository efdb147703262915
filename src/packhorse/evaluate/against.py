"""What a tuned model is compared with in place of its base: another run's tuned model, or a folder with a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from packhorse.data.packs.store import PackStore
from packhorse.data.render.tokenizer import read_tokenizer
from packhorse.errors import UserError
from packhorse.evaluate.distributed.exchange import TokenRows
from packhorse.evaluate.held_out import HeldOut
from packhorse.evaluate.models import Subject
from packhorse.evaluate.sides import Side, same_tokens
from packhorse.train.setup import from_folder


def folder_side(folder: Path, tuned: Side) -> Side:
    """Return a folder with a model in Hugging Face form as the side that the tuned model is compared with.

    Args:
        folder: Folder with config.json, weights and tokenizer.
        tuned: Side of the tuned model, whose launcher and cache are used.

    Raises:
        UserError: The folder holds no model, or its tokenizer has no chat template for the prompts.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--against is {folder}, which " + ("holds no config.json." if folder.is_dir() else "does not exist."),
            "the tuned model is compared with its base, with another run, or with a model in Hugging Face form.",
            "give a run, a folder with config.json and weights, or `base`.",
        )
    tokenizer = _tokenizer(folder, tuned.tokenizer)
    own = folder if tokenizer is not tuned.tokenizer else None
    request = replace(from_folder(tuned.subject.base, folder), quantization=None)
    subject = Subject(request, folder, len(tokenizer))
    return replace(tuned, subject=subject, name=str(folder), tokenizer=tokenizer, endpoint=None, tokenizer_folder=own)


def _tokenizer(folder: Path, trained: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the folder's tokenizer; that of the run where the folder has none, or the same one without a template."""
    if not any(folder.glob("tokenizer*")):
        return trained
    tokenizer = read_tokenizer(folder)
    if tokenizer.chat_template is not None:
        return tokenizer
    if same_tokens(tokenizer, trained):
        return trained
    raise UserError(
        f"{folder} has {len(tokenizer):,} tokens and no chat template; the run has {len(trained):,} tokens.",
        "the prompts are chats, and the run's template writes them for other tokens.",
        f"put the model's template into {folder}/chat_template.jinja.",
    )


def shared_sets(sets: Sequence[HeldOut], others: Sequence[HeldOut]) -> list[HeldOut]:
    """Return the sets with only those rows that another run holds out too, in a set of the same name, by content.

    A row that the other run was trained on would show its memory and not its skill.

    Raises:
        UserError: No row is held out by both.
    """
    found = []
    for held_out in sets:
        theirs = {key for other in others if other.name == held_out.name for key in _keys(other)}
        kept = [document for document, key in enumerate(_keys(held_out)) if key in theirs]
        if kept:
            found.append(_only(held_out, kept))
    if not found:
        counts = [sum(each.documents.num_documents for each in side) for side in (sets, others)]
        raise UserError(
            f"the runs hold out {counts[0]:,} and {counts[1]:,} rows, and none of them is in both.",
            "models are compared on rows that neither was trained on.",
            "train both runs with the same data.validation, or the same data.sources and data.split.",
        )
    return found


def _keys(held_out: HeldOut) -> list[str]:
    """Return the content of each document as text."""
    assert isinstance(held_out.documents, PackStore)
    return [_key(row) for row in held_out.documents.rows()]


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps([row.get("messages"), row.get("tools"), row.get("text")], sort_keys=True)


def _only(held_out: HeldOut, kept: Sequence[int]) -> HeldOut:
    """Return a set with some of its documents."""
    place = {document: at for at, document in enumerate(kept)}
    ids, supervised = zip(*(held_out.documents.document(document) for document in kept))
    return HeldOut(
        name=held_out.name,
        documents=TokenRows(ids, supervised),
        rows=tuple(held_out.rows[document] for document in kept),
        groups=tuple(held_out.groups[document] for document in kept),
        clusters=tuple(held_out.clusters[document] for document in kept),
        questions=tuple(
            replace(question, row=place[question.row]) for question in held_out.questions if question.row in place
        ),
    )
