"""Check the names in `method` against the modules of a model: before anything is loaded, and on the loaded model.

Both sides make a `ModelNames`: the plan from the model's shape, the worker from its modules.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from packhorse.errors import UserError
from packhorse.model_spec.measured_model import Names, Parameter
from packhorse.recipe.methods import Ia3Method, LoraMethod, Method, PartialMethod, QloraMethod

EXPERT_NAMES: Final = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass(frozen=True)
class ModelNames:
    """Modules and weights of a model by name.

    Attributes:
        family: `model_type` of the configuration.
        modules: All modules.
        linear: Linear modules, the output head among them.
        embedding: Module of the token embedding.
        head: Module of the output head.
        tied: Whether the output head is the embedding.
        weights: First name of each weight -> all its names; tied weights have several.
        quantized: Weights that a quantised method stores in few bits.
        experts: Weights of fused experts inside their layers, such as `experts.down_proj`.
        layers: Prefix of all names in decoder layers, in front of the layer's number.
        num_layers: Number of decoder layers.
    """

    family: str
    modules: tuple[str, ...]
    linear: tuple[str, ...]
    embedding: str
    head: str
    tied: bool
    weights: Mapping[str, tuple[str, ...]]
    quantized: tuple[str, ...]
    experts: tuple[str, ...]
    layers: str
    num_layers: int


def names_of_parameters(
    family: str, parameters: Iterable[Parameter], names: Names, tied: bool, num_layers: int
) -> ModelNames:
    """Return the names of a model that is known by its parameters; modules without parameters are not among them."""
    listed = list(parameters)
    embedding, head = (name.removesuffix(".weight") for name in (names.embedding, "lm_head" if tied else names.head))
    weights: dict[str, tuple[str, ...]] = {each.name: (each.name,) for each in listed}
    if tied:
        weights[names.embedding] = (names.embedding, f"{head}.weight")
    # Fused experts are parameters of the module around them.
    ends = [each.module if each.module != each.name else each.name.rpartition(".")[0] for each in listed]
    linear = [each.module for each in listed if each.linear and each.name.endswith(".weight")]
    paths = dict.fromkeys(part for end in (*ends, head) for part in _parents(end))
    return ModelNames(
        family=family,
        modules=tuple(paths),
        linear=tuple(dict.fromkeys((*linear, head))),
        embedding=embedding,
        head=head,
        tied=tied,
        weights=weights,
        quantized=tuple(f"{name}.weight" for name in linear if name != head),
        experts=tuple(
            sorted({".".join(each.name.split(".")[-2:]) for each in listed if is_expert(each.name, each.shape)})
        ),
        layers=names.layers,
        num_layers=num_layers,
    )


def is_expert(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a parameter holds all fused experts of a layer: [experts, out, in], not a linear module."""
    return len(shape) == 3 and ".experts." in name


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def check_method(method: Method, names: ModelNames) -> None:
    """Refuse names in a method that this model does not have, or that cannot be trained as the method says.

    Raises:
        UserError: See above; the fix names what the model has.
    """
    if isinstance(method, PartialMethod):
        chosen_weights(method, names)
    elif isinstance(method, Ia3Method):
        _check_ia3(method, names)
    elif isinstance(method, LoraMethod):
        _check_head(method, names)
        _check_whole(method, names)
        if method.experts and not names.experts:
            raise UserError(
                "method.experts is true, and this model has no fused expert weights.",
                "it puts adapters on these weights.",
                "remove method.experts: method.target reaches the linear layers of all other models.",
            )
        _check_targets(method, names)


# --- adapters -------------------------------------------------------------------------------------------------


def is_named(name: str, wanted: Iterable[str]) -> bool:
    """Return whether a name is one of the wanted ones, or ends in one of them."""
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def last_part(name: str) -> str:
    """Return the last part of a module's name, such as `q_proj`."""
    return name.rsplit(".", 1)[-1]


def closest(wanted: str, names: Iterable[str]) -> str:
    """Return up to five last parts of names, the most similar first."""
    ends = sorted({last_part(name) for name in names} - {""})
    near = difflib.get_close_matches(wanted, ends, n=5, cutoff=0.3)
    return ", ".join(near or [end for end in ends if not end.isdigit()][:5])


def linear_targets(method: LoraMethod, names: ModelNames) -> set[str]:
    """Return the last parts of the linear modules that `target` covers; the output head is not among them."""
    linear = {last_part(name) for name in names.linear if name != names.head}
    return linear if method.target == "all-linear" else set(method.target)


def _check_head(method: LoraMethod, names: ModelNames) -> None:
    head = last_part(names.head)
    if isinstance(method.target, list) and head in method.target:
        raise UserError(
            f"method.target names {head}, the output head.",
            "the head computes the loss itself, in chunks, and an adapter on it would be ignored.",
            f"set method.target to {_corrected(method.target, head, []) or 'all-linear'}; method.train_also: [{head}] "
            "trains it whole.",
        )


def _check_targets(method: LoraMethod, names: ModelNames) -> None:
    linear = [name for name in names.linear if name != names.head]
    if isinstance(method.target, list):
        adaptable = {*linear, names.embedding}
        for target in method.target:
            matches = [name for name in names.modules if is_named(name, [target])]
            if not matches or not set(matches) <= adaptable:
                raise no_adapter(target, method.target, linear)
    mistaken = sorted(linear_targets(method, names) & EXPERT_NAMES) if names.experts else []
    if mistaken:
        fitting = sorted({last_part(name) for name in linear} - EXPERT_NAMES)
        raise UserError(
            f"method.target covers {', '.join(mistaken)}, and this model is a mixture of experts.",
            "peft takes these names for the fused experts, and does not adapt linear modules with these names.",
            f"set method.target to [{', '.join(fitting)}]; method.experts: true adapts the experts.",
        )


def _corrected(entries: Iterable[str], wrong: str, instead: Iterable[str]) -> str:
    """Return the list with a wrong entry replaced, as it can be typed; empty if nothing is left."""
    kept = dict.fromkeys(name for entry in entries for name in (instead if entry == wrong else [entry]))
    return f"[{', '.join(kept)}]" if kept else ""


def no_adapter(target: str, targets: list[str], linear: Iterable[str]) -> UserError:
    """Return the error for an entry of `method.target` that gets no adapter."""
    ends = sorted({last_part(name) for name in linear})
    near = difflib.get_close_matches(target, ends, n=1)
    instead = _corrected(targets, target, near) or "all-linear"
    return UserError(
        f"method.target has {target}, which gets no adapter in this model.",
        "it would stay unchanged, although the recipe says that it is adapted.",
        f"set method.target to {instead}; the linear modules of this model are {', '.join(ends)}.",
    )


def _check_ia3(method: Ia3Method, names: ModelNames) -> None:
    if method.target == "auto":
        return
    for target in method.target:
        if not any(is_named(name, [target]) for name in names.linear):
            near = closest(target, names.linear)
            raise UserError(
                f"method.target has {target}, which is no linear module of this model.",
                "a factor without a module trains nothing.",
                f"set method.target to {_corrected(method.target, target, near.split(', ')[:1])}; the nearest names "
                f"are {near}.",
            )


def unknown_ia3(family: str, linear: Iterable[str]) -> UserError:
    """Return the error for IA³ with `target: auto` on an architecture that peft does not know."""
    return UserError(
        f"method.target is auto, and peft names no targets of IA³ for a {family} model.",
        "the factors belong on keys, values and the MLP's inner channels.",
        f"name them: method.target [k_proj, v_proj, down_proj] and method.feedforward [down_proj]; this model "
        f"has {closest('proj', linear)}.",
    )


def _check_whole(method: LoraMethod, names: ModelNames) -> None:
    """Refuse names in `train_also` that cannot be trained whole."""
    for wanted in method.train_also:
        matches = [name for name in names.modules if is_named(name, [wanted])]
        if not matches:
            near = closest(wanted, names.modules)
            raise UserError(
                f"method.train_also has {wanted}, which is no module of this model.",
                "peft would silently ignore it.",
                f"set method.train_also to {_corrected(method.train_also, wanted, near.split(', ')[:1])}; the nearest "
                f"names are {near}.",
            )
        inside = tuple(f"{name}." for name in matches)
        quantized = [name for name in names.quantized if name.startswith(inside)]
        if quantized and isinstance(method, QloraMethod):
            raise UserError(
                f"method.train_also has {wanted}, whose weights are quantised ({quantized[0]}).",
                "weights in few bits have no gradient.",
                f"set method.train_also to {_corrected(method.train_also, wanted, []) or '[]'}: method.target gives "
                f"{wanted} an adapter.",
            )
    ends = [names.embedding, names.head]
    named = [is_named(name, method.train_also) for name in ends]
    if names.tied and any(named) and not all(named):
        other = last_part(ends[named.index(False)])
        raise UserError(
            f"method.train_also names {ends[named.index(True)]}, which this model ties to {ends[named.index(False)]}.",
            "they are one tensor, so both train or neither does.",
            f"set method.train_also to [{', '.join([*method.train_also, other])}], or remove both.",
        )


def trains_tied(method: LoraMethod, names: ModelNames) -> bool:
    """Return whether `train_also` names an embedding and an output head that are one tensor."""
    return names.tied and all(is_named(name, method.train_also) for name in (names.embedding, names.head))


# --- partial ------------------------------------------------------------------------------------------------------


def chosen_weights(method: PartialMethod, names: ModelNames) -> set[str]:
    """Return the first names of the weights that the method trains.

    Raises:
        UserError: A pattern matches no weight, or one of two tied weights; or all weights would be trained, or none.
    """
    weights = names.weights
    for field, patterns in (("train", method.train), ("freeze", method.freeze)):
        for pattern in patterns:
            _check_pattern(weights, pattern, patterns, field)
        _check_tied(weights, patterns, field)
    chosen = {name for name, aliases in weights.items() if _fits(aliases, method.train)}
    if method.last_layers is not None:
        prefixes = _last_layers(names, method.last_layers)
        chosen |= {name for name in weights if name.startswith(prefixes)}
    elif not method.train:
        chosen = set(weights)
    chosen -= {name for name, aliases in weights.items() if _fits(aliases, method.freeze)}
    _refuse_all_or_none(chosen, weights)
    return chosen


def _fits(names: Iterable[str], patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_pattern(weights: Mapping[str, tuple[str, ...]], pattern: str, patterns: Iterable[str], field: str) -> None:
    every = [name for aliases in weights.values() for name in aliases]
    if not any(fnmatchcase(name, pattern) for name in every):
        near = difflib.get_close_matches(pattern, every, n=3, cutoff=0.3) or every[:3]
        raise UserError(
            f"method.{field} has {pattern}, which matches none of the model's {len(every)} weights.",
            "the weights that it was meant for would not change.",
            f"set method.{field} to {json.dumps([near[0] if each == pattern else each for each in patterns])}; the "
            f"nearest names are {', '.join(near)}; `*` stands for any letters, as in `*.mlp.*`.",
        )


def _check_tied(weights: Mapping[str, tuple[str, ...]], patterns: list[str], field: str) -> None:
    for aliases in weights.values():
        fitting = [name for name in aliases if _fits([name], patterns)]
        if fitting and len(fitting) < len(aliases):
            others = [name for name in aliases if name not in fitting]
            raise UserError(
                f"method.{field} matches {', '.join(fitting)}, which is tied to {', '.join(others)}: one tensor.",
                "they are one tensor, so all of them train or none does.",
                f"set method.{field} to {json.dumps([*patterns, *others])}, or remove all of them.",
            )


def _refuse_all_or_none(chosen: set[str], weights: Mapping[str, tuple[str, ...]]) -> None:
    if not chosen:
        raise UserError(
            f"method.train, last_layers and freeze leave 0 of {len(weights)} weights to train.",
            "the run would learn nothing.",
            "remove patterns from method.freeze, or add some to method.train.",
        )
    if len(chosen) == len(weights):
        raise UserError(
            f"method.train, last_layers and freeze leave all {len(weights)} weights to train.",
            "partial fine-tuning freezes some of them.",
            "set method: full, or name weights in method.freeze.",
        )


def _last_layers(names: ModelNames, count: int) -> tuple[str, ...]:
    """Return the name prefixes of the last layers."""
    total = names.num_layers
    if count > total:
        raise UserError(
            f"method.last_layers is {count}, and the model has {total} layers.",
            "there is no layer before the first.",
            f"set method.last_layers to {total} or less.",
        )
    return tuple(f"{names.layers}{index}." for index in range(total - count, total))
