"""Import the file of another trainer: find out whose it is, translate it, check the recipe, write it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from packhorse.durable import replace_file
from packhorse.errors import UserError
from packhorse.recipe.aliases import counterpart
from packhorse.recipe.importers.draft import Draft, field_of, trainers
from packhorse.recipe.importers.model import translate_model
from packhorse.recipe.importers.sources import translate_data
from packhorse.recipe.importers.training import translate_training
from packhorse.recipe.load import parse_recipe, refused_values
from packhorse.recipe.schema import recipe_view
from packhorse.yaml_source.nodes import FileKind, Node, dotted, parse_yaml, read_yaml, shown_path

TRAINERS = ("axolotl", "llamafactory", "trl", "torchtune")
FLATTENED = ("model", "tokenizer", "optimizer", "lr_scheduler", "checkpointer", "metric_logger")
"""Sections of torchtune whose keys are read one by one."""
REQUIRED = {"name", "optimizer.learning_rate", "data.sources", "epochs"}
REFERENCE = re.compile(r"\$\{(\w+)\}")
FILE_KIND = FileKind(
    "a file of another trainer", "base_model: org/name", "give a file of axolotl, LLaMA-Factory, TRL or torchtune"
)


@dataclass(frozen=True)
class Imported:
    """A recipe that was made from the file of another trainer.

    Attributes:
        text: The recipe as YAML, with comments.
        trainer: The other trainer, as it writes its name.
        num_unmatched: Number of keys without a counterpart.
    """

    text: str
    trainer: str
    num_unmatched: int


def import_recipe(path: Path, trainer: str = "", num_gpus: int = 1) -> Imported:
    """Translate the file of another trainer to a recipe that loads.

    Args:
        path: YAML or JSON file.
        trainer: One of `TRAINERS`; empty: detected from the keys.
        num_gpus: Number of GPUs that the file was meant for.

    Raises:
        UserError: The file is of no known trainer, names no model or no rows, or a value in it is refused.
    """
    shown = shown_path(path)
    root, mistakes = read_yaml(path, shown, FILE_KIND)
    if mistakes:
        raise UserError.of(mistakes)
    trainer = trainer or _detect(root, shown)
    draft = Draft(shown, trainer, num_gpus, _keys(root, trainer))
    translate_data(draft)
    translate_model(draft)
    translate_training(draft)
    _translate_rest(draft)
    _remove_refused_values(draft)
    parse_recipe(draft.root())
    text = draft.text(
        [
            f"Imported from {shown}, a file of {draft.title}, by `packhorse recipes import`.",
            "A comment says where a value has another meaning than there; keys without a counterpart are at the end.",
        ]
    )
    parse_recipe(*parse_yaml(text, shown))
    return Imported(text, draft.title, len(draft.unmatched))


def write_import(imported: Imported, target: Path) -> None:
    """Write an imported recipe to a new file.

    Raises:
        UserError: The file exists or cannot be written.
    """
    if target.exists() or target.is_symlink():
        raise UserError(
            f"{target} already exists.", "the import would overwrite it.", f"write --out new-{target.name}."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, imported.text)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror}.",
            "the imported recipe is written to this file.",
            "give --out a file in a folder that you may write to.",
        ) from None


def _detect(root: Node, shown: str) -> str:
    names = {key.lower() for key in root.value}
    components = sum(isinstance(node.value, dict) and "_component_" in node.value for node in root.value.values())
    scores = {trainer: len(names & set(trainers()[trainer]["keys"])) for trainer in TRAINERS}
    scores["torchtune"] += components
    best = max(scores, key=lambda trainer: scores[trainer])
    if {"name", "model", "data"} <= names and not components:
        raise UserError(
            f"{shown} has the sections of a recipe.",
            "a recipe is not imported.",
            f"run `packhorse check {shown}`.",
            f"{shown}:1",
        )
    if scores[best] == 0 or list(scores.values()).count(scores[best]) > 1:
        near = [trainers()[trainer]["title"] for trainer in TRAINERS if scores[trainer] == scores[best] > 0]
        raise UserError(
            f"{shown} has the keys of {' and of '.join(near) or 'no trainer that Packhorse knows'}.",
            "axolotl, LLaMA-Factory, TRL and torchtune are known, each by keys that only it has.",
            f"name the trainer: --trainer {' or --trainer '.join(TRAINERS)}.",
            f"{shown}:1",
        )
    return best


def _keys(root: Node, trainer: str) -> dict[str, tuple[str, Node]]:
    """Return the keys that are set, by the name that the alias table has for them: name in the file, and value."""
    listed: list[tuple[str, Node]] = []
    for key, node in root.value.items():
        if trainer == "torchtune" and key in FLATTENED and isinstance(node.value, dict):
            listed += [(f"{key}.{name}", child) for name, child in node.value.items()]
        else:
            listed.append((key, node))
    table = trainers()[trainer]
    keys: dict[str, tuple[str, Node]] = {}
    for key, node in listed:
        if node.value is None or node.value in ("", [], {}):
            continue
        section, _, last = key.lower().replace("-", "_").rpartition(".")
        # A name in these parts has its own meaning, as `checkpointer.output_dir` is no folder of runs.
        name = f"{section}.{last}" if section in table.get("parts", {}) else last
        name = table["names"].get(f"{section}.{last}" if section else last, name)
        keys[key if name in keys else name] = key, _without_references(node, root)
    return keys


def _without_references(node: Node, root: Node) -> Node:
    """Replace `${key}` by the value of that key, as torchtune does."""
    if not isinstance(node.value, str):
        return node

    def value(found: re.Match[str]) -> str:
        other = root.value.get(found[1])
        return str(other.value) if other is not None and isinstance(other.value, str | int | float) else found[0]

    text = REFERENCE.sub(value, node.value)
    return Node(text, node.file, node.line, text) if text != node.value else node


def _translate_rest(draft: Draft) -> None:
    """Translate the keys that only have another name; the others are those without a counterpart."""
    for name, (typed, node) in draft.keys.items():
        field, line = field_of(name), counterpart("lines", name)
        if line is not None and isinstance(node.value, bool) and not name.startswith(("eval", "save", "logging")):
            target, _, value = line.partition(": ")
            if node.value and value != "auto" and target not in draft.values:
                draft.set(target, parse_yaml(value, draft.file)[0], node, f"from `{typed}: true`")
        elif field is None or "[" in field or counterpart("sentences", name):
            draft.omit(typed, node, f"the closest is `{line}`" if line else "")
        elif field in draft.values:
            draft.omit(typed, node, f"another key sets {field}")
        else:
            draft.typed[field] = typed
            draft.set_from(field, node, typed)


def _remove_refused_values(draft: Draft) -> None:
    """Move values that another trainer takes, but a recipe does not, to the keys without a counterpart."""
    root = draft.root()
    for path in refused_values(root):
        name = dotted(path)
        if name in draft.values and name not in REQUIRED:
            takes = recipe_view().words_for(recipe_view().at(path, root) or {})
            draft.omit(draft.typed.get(name, name), draft.values.pop(name), f"{name} takes {takes}")
