"""Rules on the model, the method that trains it, and how devices share the work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from packhorse.errors import UserError
from packhorse.recipe.methods import (
    Ia3Method,
    LoraMethod,
    PartialMethod,
    PrefixTuningMethod,
    PromptTuningMethod,
    QloraMethod,
)
from packhorse.recipe.rules.fresh_model import fresh_model_rules
from packhorse.recipe.schema import ModelSection, ParallelSection, Recipe
from packhorse.yaml_source.findings import Finding
from packhorse.yaml_source.nodes import KeyPath
from packhorse.yaml_source.schema import join_words

CHANGES_BASE = ("pissa", "olora")


def model_rules(recipe: Recipe) -> Iterator[Finding]:
    """Yield the rules on `model`, `method` and `parallel.sequence` that the recipe breaks."""
    yield from _start_rules(recipe.model)
    yield from fresh_model_rules(recipe)
    yield from _method_rules(recipe)
    yield from _new_token_rules(recipe)
    yield from _dtype_rules(recipe)
    yield from _sequence_rules(recipe)


def _start_rules(model: ModelSection) -> Iterator[Finding]:
    given = [name for name in ("id", "path", "config") if getattr(model, name) is not None]
    paths: tuple[KeyPath, ...] = tuple(("model", name) for name in given)
    if not given:
        yield Finding(
            (("model", "id"), ("model", "path"), ("model", "config")),
            "model gives none of id, path and config.",
            "training starts from a model.",
            "add model.id (hub), model.path (local folder) or model.config (a fresh model)",
        )
    elif len(given) > 1:
        unset = join_words([f"model.{name}=null" for name in given])
        yield Finding(
            paths,
            f"model gives {' and '.join(given)} at once.",
            "training starts from one model.",
            f"keep one; on the command line, unset the others: {unset}",
        )
    if model.revision is not None and model.id is None:
        yield Finding(
            (("model", "revision"),),
            f"model.revision is {model.revision}, but there is no model.id.",
            "a revision is a commit of a model on the hub.",
            "remove model.revision, or give model.id",
        )


def _dtype_rules(recipe: Recipe) -> Iterator[Finding]:
    if recipe.precision == "fp32" and recipe.model.dtype == "bfloat16":
        yield Finding(
            (("precision",), ("model", "dtype")),
            "precision is fp32, but model.dtype is bfloat16.",
            "weights stored in bfloat16 have lost what fp32 arithmetic would keep.",
            "set model.dtype: auto, or precision: bf16",
        )


def _method_rules(recipe: Recipe) -> Iterator[Finding]:
    method = recipe.method
    if isinstance(method, PartialMethod):
        yield from _partial_rules(method)
    elif isinstance(method, LoraMethod):
        yield from _lora_rules(method)
        yield from _expert_rules(method)
        if isinstance(method, QloraMethod):
            yield from _qlora_rules(method)
        elif method.initialization == "loftq":
            yield _finding(
                ("initialization",),
                "method.initialization is loftq, and method is lora.",
                "LoftQ compensates the error of 4-bit quantisation, and lora quantises nothing.",
                "set method: qlora, or method.initialization: default",
            )
    elif isinstance(method, Ia3Method):
        yield from _ia3_rules(method)
    elif isinstance(method, PromptTuningMethod) and method.text is not None and not method.text.strip():
        yield _finding(
            ("text",),
            "method.text is empty.",
            "the prompt starts from the embeddings of its tokens.",
            "write a text, such as the task in a sentence, or remove method.text",
        )


def _finding(names: tuple[str, ...], fact: str, why: str, fix: str) -> Finding:
    return Finding(tuple(("method", name) for name in names), fact, why, fix)


def _partial_rules(method: PartialMethod) -> Iterator[Finding]:
    if method.last_layers is None and not method.train and not method.freeze:
        yield Finding(
            (("method",),),
            "method is partial, and none of last_layers, train and freeze is given.",
            "these fields select the weights to train.",
            "add method.last_layers: 2, or patterns such as method.train: ['lm_head.*']; method: full trains them all",
        )


def _lora_rules(method: LoraMethod) -> Iterator[Finding]:
    if method.target == []:
        yield _finding(
            ("target",),
            "method.target is an empty list.",
            "without adapted modules nothing is trained.",
            "remove method.target; the default is all-linear",
        )
    twice = sorted(set(method.target) & set(method.train_also)) if isinstance(method.target, list) else []
    if twice:
        yield _finding(
            ("target", "train_also"),
            f"method.target and method.train_also both name {join_words(twice)}.",
            "a module is either trained whole or frozen with an adapter.",
            "remove it from one of the two lists",
        )
    if method.initialization == "orthogonal" and method.rank % 2:
        yield _finding(
            ("rank", "initialization"),
            f"method.initialization is orthogonal, and method.rank is {method.rank}.",
            "A and B take the odd and the even rows of one orthogonal matrix.",
            f"set method.rank to {method.rank + 1}",
        )
    if method.dora and method.initialization == "loftq":
        yield _finding(
            ("dora", "initialization"),
            "method.dora is true, and method.initialization is loftq.",
            "LoftQ replaces adapters after DoRA has measured their magnitudes.",
            "set method.initialization: default, or method.dora: false",
        )


def _expert_rules(method: LoraMethod) -> Iterator[Finding]:
    if not method.experts:
        return
    reasons = {
        "dropout": (method.dropout > 0, f"{method.dropout:g}", "0", "it cannot apply dropout to the experts' inputs"),
        "dora": (method.dora, "true", "false", "DoRA needs the norm of each row of one matrix"),
        "initialization": (
            method.initialization not in ("default", "gaussian"),
            method.initialization,
            "default",
            "it starts from the weight of one linear layer",
        ),
    }
    for name, (breaks, value, instead, why) in reasons.items():
        if breaks:
            yield _finding(
                ("experts", name),
                f"method.experts is true, and method.{name} is {value}.",
                f"peft adds the adapter to the experts' fused weights, and {why}.",
                f"set method.{name}: {instead}, or method.experts: false",
            )


def _qlora_rules(method: QloraMethod) -> Iterator[Finding]:
    bits8 = method.quantization == "int8"
    if method.initialization in CHANGES_BASE:
        yield _finding(
            ("initialization",),
            f"method.initialization is {method.initialization}, and method is qlora.",
            "it subtracts the adapter's start from the weights, which are then quantised again: the saved adapter "
            "would not fit the base.",
            "set method: lora, or method.initialization: loftq (nf4, fp4) or default",
        )
    if bits8 and method.initialization in ("loftq", "orthogonal"):
        why = {
            "loftq": "peft computes LoftQ for 4-bit weights only.",
            "orthogonal": "peft creates such adapters in the type of the base weights, and int8 has no gradient.",
        }[method.initialization]
        yield _finding(
            ("initialization", "quantization"),
            f"method.initialization is {method.initialization}, and method.quantization is int8.",
            why,
            "set method.quantization: nf4, or method.initialization: default",
        )
    if bits8 and method.dora:
        yield _finding(
            ("dora", "quantization"),
            "method.dora is true, and method.quantization is int8.",
            "peft cannot read the norms of int8 weights once the model has been evaluated.",
            "set method.quantization: nf4, or method.dora: false",
        )


def _ia3_rules(method: Ia3Method) -> Iterator[Finding]:
    if method.target == []:
        yield _finding(
            ("target",),
            "method.target is an empty list.",
            "without scaled modules nothing is trained.",
            "remove method.target; the default is auto",
        )
    elif method.target == "auto" and method.feedforward:
        yield _finding(
            ("target", "feedforward"),
            f"method.feedforward names {join_words(method.feedforward)}, and method.target is auto.",
            "auto chooses both lists.",
            "name the modules in method.target too, or remove method.feedforward",
        )
    else:
        unknown = [name for name in method.feedforward if name not in method.target]
        if unknown and method.target != "auto":
            yield _finding(
                ("target", "feedforward"),
                f"method.feedforward has {join_words(unknown)}, which method.target lacks.",
                "feedforward selects the targets whose input is scaled instead of the output.",
                f"add {join_words(unknown)} to method.target",
            )


def _new_token_rules(recipe: Recipe) -> Iterator[Finding]:
    tokens, method = recipe.model.new_tokens, recipe.method
    path: tuple[KeyPath, ...] = (("model", "new_tokens"),)
    if any(not token.strip() for token in tokens):
        yield Finding(path, "model.new_tokens has an empty token.", "each token represents text.", "remove it")
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        yield Finding(
            path, f"model.new_tokens has {join_words(twice)} twice.", "each token has one row.", "keep one of each"
        )
    if tokens and not (method.trains_base or isinstance(method, LoraMethod)):
        yield Finding(
            (*path, ("method",)),
            f"model.new_tokens adds {len(tokens)} tokens, and method is {method.kind}.",
            "this method keeps the embedding frozen, so a new token would keep the average of its pieces as its row.",
            "set method: lora, which trains the new rows, or remove model.new_tokens",
        )


def _sequence_rules(recipe: Recipe) -> Iterator[Finding]:
    sequence, method = recipe.parallel.sequence, recipe.method
    if sequence > 1 and isinstance(method, PromptTuningMethod | PrefixTuningMethod):
        yield Finding(
            (("parallel", "sequence"), ("method", "kind")),
            f"parallel.sequence is {sequence}, and method.kind is {method.kind}.",
            "this method puts trained vectors before each row, and the split of a pack into equal parts ignores them.",
            "set parallel.sequence to 1, or method.kind to lora",
        )


def unshared_heads(sequence: int, num_heads: int, world: int) -> UserError:
    """Return the error for groups of `sequence` out of `world` processes that cannot share the query heads equally."""
    fitting = [size for size in range(1, world + 1) if world % size == num_heads % size == 0]
    nearest = [*[size for size in fitting if size < sequence][-1:], *[size for size in fitting if size > sequence][:1]]
    return UserError(
        f"parallel.sequence is {sequence}, which does not divide the model's {num_heads} attention heads.",
        "in attention, each process of a group computes whole heads.",
        f"set parallel.sequence to {' or '.join(str(size) for size in nearest)}.",
    )


def parallel_rules(parallel: ParallelSection) -> Iterator[Finding]:
    """Yield fields of `parallel` that the engine ignores or lacks."""
    if parallel.engine != "hsdp" and parallel.shard_group is not None:
        yield Finding(
            (("parallel", "shard_group"), ("parallel", "engine")),
            f"parallel.shard_group is {parallel.shard_group}, and parallel.engine is {parallel.engine}.",
            "only hsdp keeps several copies of the weights, one per group of processes.",
            "remove parallel.shard_group, or set parallel.engine to hsdp",
        )
    if parallel.engine == "zero3_nvme" and parallel.nvme is None:
        yield Finding(
            (("parallel", "engine"), ("parallel", "nvme")),
            "parallel.engine is zero3_nvme, and parallel.nvme is not given.",
            "this engine keeps weights and optimizer states in a folder on a disk of each node.",
            "set parallel.nvme to a folder on a fast local disk, e.g. /local/scratch, or use zero3_offload",
        )
    if parallel.engine != "zero3_nvme" and parallel.nvme is not None:
        yield Finding(
            (("parallel", "nvme"), ("parallel", "engine")),
            f"parallel.nvme is {parallel.nvme}, and parallel.engine is {parallel.engine}.",
            "only zero3_nvme uses that folder.",
            "remove parallel.nvme, or set parallel.engine to zero3_nvme",
        )
