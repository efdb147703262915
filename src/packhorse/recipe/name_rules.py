"""Rules on names and paths: what stands in them reaches a folder, a hub or a command line as it is, or is refused."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from packhorse.recipe.findings import Finding, dotted
from packhorse.recipe.schema import Recipe, Source
from packhorse.recipe.schema_view import KeyPath

# As huggingface_hub's `validate_repo_id` has it; it would read anything else as a path, or end in a traceback.
HUB_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
# Part of a path in the hub's cache.
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,254}")
LONGEST_PATH_BYTES = 1023
"""What every system takes: PATH_MAX of macOS without its last byte."""


def name_rules(recipe: Recipe) -> Iterator[Finding]:
    """Names on the hub that are none, and text that no path can hold."""
    for path, text in _hub_names(recipe):
        if HUB_NAME.fullmatch(text) is None or ".." in text or "--" in text:
            yield _refused(
                path, text, "is no name on the hub", "it is looked up there, and never read as a path", "owner/name"
            )
    for path, text in _revisions(recipe):
        if REVISION.fullmatch(text) is None or ".." in text:
            yield _refused(
                path, text, "is no commit, tag or branch", "it names a folder in the hub's cache", "40 hex digits"
            )
    for path, text in _other_names(recipe):
        if (character := next((each for each in text if not _may_stand_in_a_path(each)), None)) is not None:
            yield _refused(
                path,
                text,
                f"holds the character U+{ord(character):04X}",
                "it ends a path, or breaks a line of a job script or a message",
                "text without line breaks and control characters",
            )
        elif len(text.encode()) > LONGEST_PATH_BYTES:
            fact = f"has {len(text.encode()):,} bytes"
            yield _refused(
                path, text, fact, f"not every system takes a path of more than {LONGEST_PATH_BYTES:,}", "a shorter path"
            )


def _refused(path: KeyPath, text: str, fact: str, why: str, example: str) -> Finding:
    shown = f"{text[:57]}..." if len(text) > 60 else text
    return Finding((path,), f"{dotted(path)} is {shown!a}: it {fact}.", f"{why}.", f"write {dotted(path)} as {example}")


def _may_stand_in_a_path(character: str) -> bool:
    # Half a surrogate pair (Cs) is a byte of the command line that is no UTF-8.
    return unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")


def _hub_names(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    yield from _given(("model", "id"), recipe.model.id)
    for path, source in _sources(recipe):
        yield from _given((*path, "id"), source.id)


def _revisions(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    yield from _given(("model", "revision"), recipe.model.revision)
    for path, source in _sources(recipe):
        yield from _given((*path, "revision"), source.revision)


def _other_names(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    yield from _given(("runs_folder",), recipe.runs_folder)
    yield from _given(("model", "path"), recipe.model.path)
    yield from _given(("model", "tokenizer"), recipe.model.tokenizer)
    yield from _given(("data", "template"), recipe.data.template)
    yield from _given(("parallel", "nvme"), recipe.parallel.nvme)
    yield from _given(("track", "wandb_project"), recipe.track.wandb_project)
    for path, source in _sources(recipe):
        yield from _given((*path, "path"), source.path)
        yield from _given((*path, "subset"), source.subset)
        yield from _given((*path, "split"), source.split)


def _given(path: KeyPath, text: str | None) -> Iterator[tuple[KeyPath, str]]:
    if text is not None:
        yield path, text


def _sources(recipe: Recipe) -> Iterator[tuple[KeyPath, Source]]:
    data = recipe.data
    lists: list[tuple[KeyPath, Sequence[Source]]] = [
        (("data", "sources"), data.sources),
        (("data", "validation"), data.validation),
        (("data", "retain"), data.retain),
        (("data", "decontaminate", "against"), data.decontaminate.against if data.decontaminate else ()),
    ]
    for place, sources in lists:
        for number, source in enumerate(sources):
            yield (*place, number), source
