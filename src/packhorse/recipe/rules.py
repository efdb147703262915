"""Rules between fields: each refuses a recipe that would stop late, or train something else than was meant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from packhorse.recipe.findings import Finding
from packhorse.recipe.method_rules import method_rules
from packhorse.recipe.name_rules import name_rules
from packhorse.recipe.parallel_rules import parallel_rules
from packhorse.recipe.recovery_rules import recovery_rules
from packhorse.recipe.schema import BatchSection, ModelSection, Recipe, Source
from packhorse.recipe.schema_view import KeyPath, join_words
from packhorse.recipe.sequence_rules import sequence_rules
from packhorse.recipe.sweep_rules import sweep_rules
from packhorse.recipe.training_rules import training_rules

SHARES_TOLERANCE = 1e-6
ROLES = ("system", "user", "assistant", "tool")
SIDES = ("train", "validation", "test")


def rule_findings(recipe: Recipe) -> list[Finding]:
    """Every rule that the recipe breaks."""
    return [
        *name_rules(recipe),
        *_model_rules(recipe.model),
        *_fresh_model_rules(recipe),
        *method_rules(recipe),
        *_dtype_rules(recipe),
        *_source_rules(recipe),
        *_source_mix_rules(recipe),
        *_split_rules(recipe),
        *_batch_rules(recipe.batch),
        *parallel_rules(recipe.parallel),
        *sequence_rules(recipe),
        *training_rules(recipe),
        *recovery_rules(recipe),
        *sweep_rules(recipe),
    ]


def _model_rules(model: ModelSection) -> Iterator[Finding]:
    given = [name for name in ("id", "path", "config") if getattr(model, name) is not None]
    paths: tuple[KeyPath, ...] = tuple(("model", name) for name in given)
    if not given:
        yield Finding(
            (("model", "id"), ("model", "path"), ("model", "config")),
            "model gives none of id, path and config.",
            "training starts from some model.",
            "add model.id (hub), model.path (local folder) or model.config (a fresh model)",
        )
    elif len(given) > 1:
        unset = join_words([f"model.{name}=null" for name in given])
        yield Finding(
            paths,
            f"model gives {' and '.join(given)} at once.",
            "only one model can be started from.",
            f"keep one; on the command line, unset what is not wanted: {unset}",
        )
    if model.revision is not None and model.id is None:
        yield Finding(
            (("model", "revision"),),
            f"model.revision is {model.revision}, but there is no model.id.",
            "a revision is a commit of a model on the hub.",
            "remove model.revision, or give model.id",
        )


def _fresh_model_rules(recipe: Recipe) -> Iterator[Finding]:
    config = recipe.model.config
    if config is None:
        return
    if not isinstance(config.get("model_type"), str):
        yield Finding(
            (("model", "config"),),
            "model.config has no model_type.",
            "the type says which architecture the other fields belong to.",
            "add model_type to model.config, e.g. model_type: llama",
        )
    if recipe.model.tokenizer is None:
        yield Finding(
            (("model", "tokenizer"),),
            "model.config is given without model.tokenizer.",
            "a fresh model has no tokenizer of its own.",
            "add model.tokenizer: a folder, a hub name, or builtin:tokenizer",
        )
    if not recipe.method.trains_base:
        yield Finding(
            (("method",), ("model", "config")),
            f"method is {recipe.method.kind}, but model.config starts from random weights.",
            "adapters adjust what a model knows; random weights that stay frozen know nothing.",
            "set method: full, or give model.id or model.path",
        )


def _dtype_rules(recipe: Recipe) -> Iterator[Finding]:
    if recipe.precision == "fp32" and recipe.model.dtype == "bfloat16":
        yield Finding(
            (("precision",), ("model", "dtype")),
            "precision is fp32, but model.dtype is bfloat16.",
            "weights stored in bfloat16 have lost what fp32 arithmetic would keep.",
            "set model.dtype: auto, or precision: bf16",
        )


def _source_rules(recipe: Recipe) -> Iterator[Finding]:
    places: list[tuple[KeyPath, Sequence[Source]]] = [
        (("data", "sources"), recipe.data.sources),
        (("data", "validation"), recipe.data.validation),
        (("data", "retain"), recipe.data.retain),
    ]
    if recipe.data.decontaminate is not None:
        places.append((("data", "decontaminate", "against"), recipe.data.decontaminate.against))
    for path, sources in places:
        for index, source in enumerate(sources):
            yield from _one_source_rules(source, (*path, index))


def _one_source_rules(source: Source, path: KeyPath) -> Iterator[Finding]:
    name = ".".join(map(str, path))
    for theirs, ours in source.roles.items():
        if ours not in ROLES:
            yield Finding(
                ((*path, "roles", theirs),),
                f"{name}.roles.{theirs} is {ours}.",
                f"the roles are {join_words(list(ROLES))}.",
                f"set {name}.roles.{theirs} to one of them",
            )
    if source.rows is not None and source.weight is not None:
        yield Finding(
            ((*path, "rows"), (*path, "weight")),
            f"{name} gives rows ({source.rows}) and weight ({source.weight:g}) at once.",
            "both say how many of its rows are used.",
            "keep one of them",
        )
    both: tuple[KeyPath, ...] = ((*path, "path"), (*path, "id"))
    if (source.path is None) == (source.id is None):
        fact = "gives neither path nor id." if source.path is None else "gives path and id at once."
        yield Finding(
            both,
            f"{name} {fact}",
            "rows come from one place.",
            f"give {name}.path (a file) or {name}.id (a hub data set)",
        )
    elif source.path is not None:
        given = {"revision": source.revision, "subset": source.subset}
        for key in [key for key, value in given.items() if value is not None]:
            yield Finding(
                ((*path, key),),
                f"{name}.{key} is {given[key]}, but {name} is a file.",
                f"{key} belongs to a hub data set.",
                f"remove {name}.{key}, or give {name}.id",
            )


def _source_mix_rules(recipe: Recipe) -> Iterator[Finding]:
    weighted = [source.weight is not None for source in recipe.data.sources]
    if any(weighted) and not all(weighted):
        missing = join_words([f"data.sources.{at}" for at, given in enumerate(weighted) if not given])
        yield Finding(
            (("data", "sources", weighted.index(False)),),
            f"{sum(weighted)} of {len(weighted)} sources have a weight; {missing} has none.",
            "weights are relative to each other: a source without one has no share.",
            f"give {missing} a weight too, or none to any",
        )
    elsewhere: list[tuple[str, Sequence[Source]]] = [
        ("validation", recipe.data.validation),
        ("retain", recipe.data.retain),
    ]
    for name, sources in elsewhere:
        for index, source in enumerate(sources):
            if source.weight is not None:
                yield Finding(
                    (("data", name, index, "weight"),),
                    f"data.{name}.{index}.weight is {source.weight:g}.",
                    "weights mix the rows that are trained on.",
                    f"remove data.{name}.{index}.weight; rows limits how many are used",
                )


def _split_rules(recipe: Recipe) -> Iterator[Finding]:
    split = recipe.data.split
    given = {name: share for name in SIDES if (share := getattr(split, name)) is not None}
    if recipe.data.validation or not given:
        return
    total = sum(given.values())
    absent = [name for name in SIDES if name not in given]
    # One share that is absent is the rest.
    if total > 1 + SHARES_TOLERANCE or (total < 1 - SHARES_TOLERANCE and len(absent) != 1):
        shares = " + ".join(f"{share:g}" for share in given.values())
        mended = absent[0] if len(absent) == 1 else "train"
        others = sum(share for name, share in given.items() if name != mended)
        fix = f"set data.split.{mended} to {round(1 - others, 6):g}, or mend the others" if others <= 1 else "mend them"
        yield Finding(
            tuple(("data", "split", name) for name in given),
            f"the shares of data.split are {shares} = {round(total, 6):g}.",
            "they share out all rows: their sum is 1.",
            fix,
        )
    elif given.get("train", 1 - total) <= SHARES_TOLERANCE:
        yield Finding(
            (("data", "split", "train"),),
            "data.split.train is 0.",
            "no row would be trained on.",
            "set data.split.train above 0",
        )


def _batch_rules(batch: BatchSection) -> Iterator[Finding]:
    if isinstance(batch.micro, int) and batch.packs % batch.micro:
        divisors = [number for number in range(1, batch.packs + 1) if batch.packs % number == 0]
        below = max(number for number in divisors if number <= batch.micro or number == 1)
        above = min((number for number in divisors if number > batch.micro), default=batch.packs)
        yield Finding(
            (("batch", "micro"), ("batch", "packs")),
            f"batch.micro is {batch.micro}, which does not divide batch.packs {batch.packs}.",
            "a step is made of whole forward passes of equal size.",
            f"set batch.micro to {join_words([str(n) for n in sorted({below, above})])}",
        )
