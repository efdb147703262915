"""Private names of other libraries: all are in the table, all exist, and a missing one is a clear error."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest

from packhorse.errors import UserError
from packhorse.library_hooks import LibraryHook, check_library_hooks, library_hooks, missing_names, supported_versions

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "packhorse"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes", "fire")
# Of Python itself, or of a library whose absence is allowed for by the code.
ALLOWED = {"_exit", "_grouped_mm", "_cdata", "_C", "_distributed_c10d"}


def private_names(tree: ast.AST) -> set[str]:
    """Names with an underscore that are read from another object or imported from a library."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found |= set() if mine else {node.attr}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            private_module = any(part.startswith("_") for part in node.module.split("."))
            found |= {alias.name for alias in node.names if private_module or alias.name.startswith("_")}
    return found - own


def test_every_private_name_is_in_the_table() -> None:
    listed = {name for hook in library_hooks() for name in hook.names}
    offenders = {}
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        stored = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        missing = private_names(tree) - listed - ALLOWED - stored
        if missing:
            offenders[str(path.relative_to(SOURCE))] = sorted(missing)
    assert offenders == {}


def test_every_entry_is_used_where_it_says_and_guarded_by_a_test() -> None:
    offenders = []
    for hook in library_hooks():
        place = SOURCE / hook.used_by.replace(".", "/")
        files = place.rglob("*.py") if place.is_dir() else [place.with_name(f"{place.name}.py")]
        text = "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
        unused = [name for name in hook.names if not re.search(rf"\b{name}\b", text)]
        offenders += [f"{hook.used_by} does not use {name} of {hook.library}" for name in unused]
        if not (ROOT / "tests" / hook.guard).is_file():
            offenders.append(f"{hook.guard} is no test")
    assert not offenders, "\n".join(offenders)


def test_the_installed_libraries_have_every_name() -> None:
    assert missing_names(library_hooks()) == []


def test_a_missing_name_is_an_error_that_names_the_supported_versions(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "there.py").write_text("def present(): ...\n")
    hook = LibraryHook("torch", "there.py", "model.load", "unit/test_library_hooks.py", ("present", "absent", "pres"))
    assert missing_names([hook], tmp_path) == [("torch", "there.py: absent"), ("torch", "there.py: pres")]
    with pytest.raises(UserError, match=r"torch/there.py: present") as raised:
        check_library_hooks([hook])
    assert f"torch {importlib.metadata.version('torch')}" in str(raised.value)
    assert f"pip install '{supported_versions('torch')}'" in str(raised.value)


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_hooked_library_has_a_floor_and_a_cap(library: str) -> None:
    requirement = supported_versions(library)
    assert ">=" in requirement
    assert "<" in requirement
