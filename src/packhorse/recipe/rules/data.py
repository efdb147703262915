"""Rules on rows: names of data sets and files, sources and their mix, and shares of the split."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import date

from packhorse.recipe.schema import Recipe, Source
from packhorse.yaml_source.findings import Finding
from packhorse.yaml_source.nodes import KeyPath, dotted
from packhorse.yaml_source.schema import join_words

# The pattern of huggingface_hub's `validate_repo_id`, which takes other text for a path, or raises.
HUB_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
# A revision becomes part of a path in the hub's cache.
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,254}")
LONGEST_PATH_BYTES = 1023
"""Longest path that every system accepts: PATH_MAX of macOS without the final zero byte."""
SHARES_TOLERANCE = 1e-6
ROLES = ("system", "user", "assistant", "tool")
SIDES = ("train", "validation", "test")


def data_rules(recipe: Recipe) -> Iterator[Finding]:
    """Yield the rules on `data` that the recipe breaks."""
    for path, source in _sources(recipe):
        yield from _source_rules(source, path)
    yield from _date_rules(recipe)
    yield from _weight_rules(recipe)
    yield from _split_rules(recipe)


def name_rules(recipe: Recipe) -> Iterator[Finding]:
    """Yield names that the hub does not accept, and text that no path can contain."""
    for path, text in _hub_names(recipe):
        if HUB_NAME.fullmatch(text) is None or ".." in text or "--" in text:
            yield _refused(
                path,
                text,
                "is not a valid name on the hub",
                "it is looked up on the hub and never read as a path",
                "owner/name",
            )
    for path, text in _revisions(recipe):
        if REVISION.fullmatch(text) is None or ".." in text:
            yield _refused(
                path,
                text,
                "is not a commit, tag or branch",
                "it becomes a folder name in the hub's cache",
                "40 hex digits",
            )
    for path, text in _other_names(recipe):
        if (character := next((c for c in text if not _allowed_in_path(c)), None)) is not None:
            yield _refused(
                path,
                text,
                f"contains the character U+{ord(character):04X}",
                "it would end a path, or break a line of a job script or a message",
                "text without line breaks and control characters",
            )
        elif len(text.encode()) > LONGEST_PATH_BYTES:
            why = f"some systems refuse paths of more than {LONGEST_PATH_BYTES:,} bytes"
            yield _refused(path, text, f"has {len(text.encode()):,} bytes", why, "a shorter path")


def _refused(path: KeyPath, text: str, fact: str, why: str, example: str) -> Finding:
    shown = f"{text[:57]}..." if len(text) > 60 else text
    return Finding((path,), f"{dotted(path)} is {shown!a}: it {fact}.", f"{why}.", f"write {dotted(path)} as {example}")


def _allowed_in_path(character: str) -> bool:
    # Half a surrogate pair (Cs) is a byte of the command line that is not UTF-8.
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
        (("data", "test"), data.test),
        (("data", "retain"), data.retain),
        (("data", "decontaminate", "against"), data.decontaminate.against if data.decontaminate else ()),
    ]
    for path, sources in lists:
        for index, source in enumerate(sources):
            yield (*path, index), source


def _source_rules(source: Source, path: KeyPath) -> Iterator[Finding]:
    name = dotted(path)
    for theirs, role in source.roles.items():
        if role not in ROLES:
            yield Finding(
                ((*path, "roles", theirs),),
                f"{name}.roles.{theirs} is {role}.",
                f"the roles are {join_words(list(ROLES))}.",
                f"set {name}.roles.{theirs} to one of them",
            )
    if source.rows is not None and source.weight is not None:
        yield Finding(
            ((*path, "rows"), (*path, "weight")),
            f"{name} gives rows ({source.rows}) and weight ({source.weight:g}) at once.",
            "each of the two sets how many of its rows are used.",
            "keep one of them",
        )
    if source.delimiter is not None and (len(source.delimiter) != 1 or source.delimiter in '"\r\n'):
        yield Finding(
            ((*path, "delimiter"),),
            f"{name}.delimiter is {source.delimiter!a}.",
            "one character separates the cells of a table, and quotes and line breaks have another meaning.",
            f'set {name}.delimiter to ";", or remove it: it is then found from the first rows',
        )
    both: tuple[KeyPath, ...] = ((*path, "path"), (*path, "id"))
    if (source.path is None) == (source.id is None):
        fact = "gives neither path nor id." if source.path is None else "gives path and id at once."
        yield Finding(
            both,
            f"{name} {fact}",
            "each source reads rows from one location.",
            f"give {name}.path (a file) or {name}.id (a hub data set)",
        )
    elif source.path is None:
        if source.key is not None:
            yield Finding(
                ((*path, "key"),),
                f"{name}.key is {source.key}, but {name} is a data set on the hub.",
                "key names a list in a local .json file.",
                f"remove {name}.key; {name}.split selects a split of a data set on the hub",
            )
    else:
        if source.split != "train":
            yield Finding(
                ((*path, "split"),),
                f"{name}.split is {source.split}, but {name} is a local file.",
                "split selects part of a data set on the hub.",
                f"remove {name}.split; for a .json file with several lists, write {name}.key: {source.split}",
            )
        given = {"revision": source.revision, "subset": source.subset}
        for key in [key for key, value in given.items() if value is not None]:
            yield Finding(
                ((*path, key),),
                f"{name}.{key} is {given[key]}, but {name} is a local file.",
                f"{key} selects part of a data set on the hub.",
                f"remove {name}.{key}, or give {name}.id",
            )


def _date_rules(recipe: Recipe) -> Iterator[Finding]:
    day = recipe.data.template_date
    try:
        date.fromisoformat(day or "2026-01-31")
    except ValueError as error:
        yield Finding(
            (("data", "template_date"),),
            f"data.template_date is {day}: {error}.",
            "the template writes it as a date.",
            "write a date that exists, such as 2026-01-31",
        )


def _weight_rules(recipe: Recipe) -> Iterator[Finding]:
    weighted = [source.weight is not None for source in recipe.data.sources]
    if any(weighted) and not all(weighted):
        missing = join_words([f"data.sources.{at}" for at, given in enumerate(weighted) if not given])
        yield Finding(
            (("data", "sources", weighted.index(False)),),
            f"{sum(weighted)} of {len(weighted)} sources have a weight; {missing} has none.",
            "weights are relative to each other, so a source without one has no share.",
            f"give {missing} a weight too, or remove all weights",
        )
    unmixed: list[tuple[str, Sequence[Source]]] = [
        ("validation", recipe.data.validation),
        ("test", recipe.data.test),
        ("retain", recipe.data.retain),
    ]
    for name, sources in unmixed:
        for index, source in enumerate(sources):
            if source.weight is not None:
                yield Finding(
                    (("data", name, index, "weight"),),
                    f"data.{name}.{index}.weight is {source.weight:g}.",
                    "weights set the mix of the rows that are trained on.",
                    f"remove data.{name}.{index}.weight; rows limits how many are used",
                )


def _split_rules(recipe: Recipe) -> Iterator[Finding]:
    split = recipe.data.split
    given = {name: share for name in SIDES if (share := getattr(split, name)) is not None}
    if recipe.data.validation:
        # Train is the rest of the test share; other shares are used for data.retain alone.
        given = {"validation": 0.0, "test": split.test} if split.test and not recipe.data.test else {}
    elif recipe.data.test and given:
        given.setdefault("test", 0.0)
    if not given:
        return
    total = sum(given.values())
    absent = [name for name in SIDES if name not in given]
    # One missing share is the remainder.
    if total > 1 + SHARES_TOLERANCE or (total < 1 - SHARES_TOLERANCE and len(absent) != 1):
        shares = " + ".join(f"{share:g}" for share in given.values())
        changed = absent[0] if len(absent) == 1 else "train"
        others = sum(share for name, share in given.items() if name != changed)
        fix = "change the shares"
        if others <= 1:
            fix = f"set data.split.{changed} to {round(1 - others, 6):g}, or change the others"
        yield Finding(
            tuple(("data", "split", name) for name in given),
            f"the shares of data.split are {shares} = {round(total, 6):g}.",
            "the shares divide all rows, so their sum is 1.",
            fix,
        )
    elif given.get("train", 1 - total) <= SHARES_TOLERANCE:
        yield Finding(
            (("data", "split", "train"),),
            "data.split.train is 0.",
            "no row would be trained on.",
            "set data.split.train above 0",
        )
