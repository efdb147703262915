"""Rules between the fields of a method: what peft or bitsandbytes cannot do together, or would do as something else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from packhorse.recipe.findings import Finding
from packhorse.recipe.methods import Ia3Method, LoraMethod, PartialMethod, PromptTuningMethod, QloraMethod
from packhorse.recipe.schema import Recipe
from packhorse.recipe.schema_view import KeyPath, join_words

CHANGES_BASE = ("pissa", "olora")


def method_rules(recipe: Recipe) -> Iterator[Finding]:
    """Every rule that the method breaks, alone or with new tokens."""
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
                "LoftQ mends what quantisation to 4 bits takes away, and nothing is quantised.",
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
    yield from _new_token_rules(recipe)


def _finding(names: tuple[str, ...], fact: str, why: str, fix: str) -> Finding:
    return Finding(tuple(("method", name) for name in names), fact, why, fix)


def _partial_rules(method: PartialMethod) -> Iterator[Finding]:
    if method.last_layers is None and not method.train and not method.freeze:
        yield Finding(
            (("method",),),
            "method is partial, and gives none of last_layers, train and freeze.",
            "they say which weights are trained.",
            "add method.last_layers: 2, or patterns such as method.train: ['lm_head.*']; method: full trains them all",
        )


def _lora_rules(method: LoraMethod) -> Iterator[Finding]:
    if method.target == []:
        yield _finding(
            ("target",),
            "method.target is an empty list.",
            "without adapted modules there is nothing to train.",
            "remove method.target: it is all-linear then",
        )
    both = sorted(set(method.target) & set(method.train_also)) if isinstance(method.target, list) else []
    if both:
        yield _finding(
            ("target", "train_also"),
            f"method.target and method.train_also both name {join_words(both)}.",
            "a module is trained whole or beside an adapter.",
            "take it out of one of them",
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
            "LoftQ replaces adapters whose magnitudes DoRA has measured already.",
            "set method.initialization: default, or method.dora: false",
        )


def _expert_rules(method: LoraMethod) -> Iterator[Finding]:
    if not method.experts:
        return
    reasons = {
        "dropout": (method.dropout > 0, f"{method.dropout:g}", "0", "experts' inputs are not at hand to drop"),
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
            "it takes the adapter's start out of the weights, which would be quantised anew: the saved adapter would "
            "not fit the base.",
            "set method: lora, or method.initialization: loftq (nf4, fp4) or default",
        )
    if bits8 and method.initialization in ("loftq", "orthogonal"):
        why = {
            "loftq": "peft computes LoftQ for 4-bit weights only.",
            "orthogonal": "peft makes such adapters in the type of the base's weights, and int8 has no gradient.",
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
            "without scaled modules there is nothing to train.",
            "remove method.target: it is auto then",
        )
    elif method.target == "auto" and method.feedforward:
        yield _finding(
            ("target", "feedforward"),
            f"method.feedforward names {join_words(method.feedforward)}, and method.target is auto.",
            "auto chooses both.",
            "name the modules in method.target too, or remove method.feedforward",
        )
    else:
        odd = [name for name in method.feedforward if name not in method.target]
        if odd and method.target != "auto":
            yield _finding(
                ("target", "feedforward"),
                f"method.feedforward has {join_words(odd)}, which method.target lacks.",
                "it says of which targets the input is scaled in place of the output.",
                f"add {join_words(odd)} to method.target",
            )


def _new_token_rules(recipe: Recipe) -> Iterator[Finding]:
    tokens, method = recipe.model.new_tokens, recipe.method
    path: tuple[KeyPath, ...] = (("model", "new_tokens"),)
    if any(not token.strip() for token in tokens):
        yield Finding(path, "model.new_tokens has an empty token.", "a token stands for text.", "remove it")
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        yield Finding(
            path, f"model.new_tokens has {join_words(twice)} twice.", "a token has one row.", "keep one of each"
        )
    if tokens and not (method.trains_base or isinstance(method, LoraMethod)):
        yield Finding(
            (*path, ("method",)),
            f"model.new_tokens adds {len(tokens)} tokens, and method is {method.kind}.",
            "the rows of the embedding stay frozen there, so that a new token would mean what its pieces mean on "
            "average for ever.",
            "set method: lora, which trains the new rows, or remove model.new_tokens",
        )
