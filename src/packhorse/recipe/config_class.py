"""Fields of transformers' configuration classes, read from their source text: importing transformers imports torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

AUTO: Final = "models/auto"
BASE_FILES: Final = (
    "configuration_utils.py",
    "modeling_rope_utils.py",
    "integrations/heterogeneity/configuration_utils.py",
)
SIMPLE: Final[Mapping[str, tuple[type, ...]]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
    "list": (list,),
    "dict": (dict,),
}
Fields = Mapping[str, tuple[type, ...] | None]
"""Field of a configuration class -> types of its values; None for a type of another form."""


def causal_types() -> Mapping[str, str]:
    """Return each `model_type` of which transformers has a causal language model -> the model's class."""
    return _table(f"{AUTO}/modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


def model_types() -> Mapping[str, str]:
    """Return each `model_type` that can be a fresh model -> its configuration class."""
    classes = _table(f"{AUTO}/auto_mappings.py", "CONFIG_MAPPING_NAMES")
    return {kind: name for kind, name in classes.items() if kind in causal_types()}


@cache
def config_fields(model_type: str) -> Fields | None:
    """Return the fields of a configuration class with the types of their values.

    Args:
        model_type: One of `model_types`.

    Returns:
        None if the class is not written as expected: then only the class itself knows its fields.
    """
    name = model_types()[model_type]
    folder = _table(f"{AUTO}/auto_mappings.py", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME").get(model_type, model_type)
    folder = folder.replace("-", "_")
    file = f"models/{folder}/configuration_{folder}.py"
    known = {**{found.name: found for base in BASE_FILES for found in _classes(base)}}
    known |= {found.name: found for found in _classes(file)}
    fields: dict[str, tuple[type, ...] | None] = {}
    todo = [name]
    while todo:
        found = known.get(todo.pop())
        if found is None:
            continue
        todo += [base.id for base in found.bases if isinstance(base, ast.Name)]
        for field, types in _fields_of(found):
            fields.setdefault(field, types)
    if "rope_parameters" in fields:
        # An older name that transformers moves into rope_parameters.
        fields["rope_theta"] = SIMPLE["float"]
    return fields if name in known and "PreTrainedConfig" in known else None


def _fields_of(found: ast.ClassDef) -> Iterator[tuple[str, tuple[type, ...] | None]]:
    """Yield what an instance has: annotated and other names of the class, properties, and what methods set."""
    for line in found.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id, _types(line.annotation)
        elif isinstance(line, ast.Assign):
            yield from ((target.id, None) for target in line.targets if isinstance(target, ast.Name))
        elif isinstance(line, ast.FunctionDef):
            yield line.name, None
        if isinstance(line, (ast.Assign, ast.AnnAssign)) and isinstance(line.value, ast.Dict):
            target = line.targets[0] if isinstance(line, ast.Assign) else line.target
            if isinstance(target, ast.Name) and target.id == "attribute_map":
                names = (*line.value.keys, *line.value.values)
                yield from ((str(name.value), None) for name in names if isinstance(name, ast.Constant))
    for node in ast.walk(found):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr, None


def _types(annotation: ast.expr) -> tuple[type, ...] | None:
    names = [part.strip() for part in ast.unparse(annotation).split("|")]
    return tuple(kind for name in names for kind in SIMPLE[name]) if all(name in SIMPLE for name in names) else None


@cache
def _classes(file: str) -> tuple[ast.ClassDef, ...]:
    try:
        text = (_folder() / file).read_text(encoding="utf-8")
    except OSError:
        return ()
    return tuple(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))


@cache
def _table(file: str, name: str) -> Mapping[str, Any]:
    """Return an `OrderedDict` of a source file."""
    text = (_folder() / file).read_text(encoding="utf-8")
    found = re.search(rf"^{name} = OrderedDict\((.*?)^\)", text, re.DOTALL | re.MULTILINE)
    return dict(ast.literal_eval(found[1].strip())) if found else {}


@cache
def _folder() -> Path:
    found = find_spec("transformers")
    assert found is not None, "a dependency of Packhorse"
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0])
