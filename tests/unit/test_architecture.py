"""The plan of the house, walked over the source: imports, cycles, sizes, names, messages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "packhorse"
FILES = sorted(SOURCE.rglob("*.py"))

# Package or top-level module -> what it may import besides itself; `*` stands for everything.
MAY_IMPORT = {
    "errors": set(),
    "masking": set(),
    "durable": {"errors"},
    "version": set(),
    "checkpoints": {"errors", "durable"},
    "recipe": {"errors", "masking", "durable"},
    "quickstart": {"errors"},
    "plan": {"errors", "durable", "version", "recipe"},
    "record": {"errors", "masking", "durable", "plan"},
    "launching": {"errors", "masking", "durable", "checkpoints", "recipe", "plan", "record"},
    "data": {"errors", "durable", "version", "recipe", "quickstart"},
    "model": {"errors", "durable", "recipe"},
    "track": {"errors", "durable", "recipe"},
    "train": {"errors", "masking", "durable", "checkpoints", "recipe", "plan", "record", "data", "model", "track"},
    "evaluate": {"errors", "durable", "recipe", "plan", "record", "data", "model", "track", "train"},
    "report": {"errors", "durable", "recipe", "data"},
    "doctor": {"errors", "durable", "version", "recipe", "plan", "record", "data", "launching"},
    "commands": {"*"},
    "verbs": {"errors"},
    "cli": {"errors", "masking", "verbs"},
}
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "helpers", "helper", "misc", "core"}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_LOOP = 400, 60, 90


def module_name(path: Path) -> str:
    return ".".join(("packhorse", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def room(name: str) -> str:
    return name.split(".")[1]


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Each module of ours that is imported, and whether inside a function."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in inside
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def test_each_module_imports_only_what_its_room_may() -> None:
    forbidden = []
    for name, tree in TREES.items():
        if name == "packhorse" or "*" in MAY_IMPORT[room(name)]:
            continue
        targets = {target for target, _ in imports(tree) if target.startswith("packhorse.")}
        allowed = MAY_IMPORT[room(name)] | {room(name)}
        forbidden += [f"{name} imports {target}" for target in sorted(targets) if room(target) not in allowed]
    assert forbidden == []


def test_imports_stand_at_the_top_but_in_commands() -> None:
    assert [
        f"{name} imports {target} inside a function"
        for name, tree in TREES.items()
        if room(name + ".") != "commands"
        for target, inside in imports(tree)
        if inside
    ] == []


def test_there_is_no_import_cycle() -> None:
    graph = {name: {target for target, _ in imports(tree)} for name, tree in TREES.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name in done:
            return
        for target in graph.get(name, ()):
            if target in graph:
                visit(target, (*above, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in FILES:
        lines = path.read_text(encoding="utf-8").count("\n")
        long += [f"{module_name(path)} has {lines} lines"] * (lines > LONGEST_FILE)
        for node in ast.walk(TREES[module_name(path)]):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            first = node.body[0]
            documentation = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
            size = node.end_lineno - node.lineno + 1 - documentation
            limit = LONGEST_LOOP if (path.name, node.name) == ("loop.py", "train") else LONGEST_FUNCTION
            long += [f"{module_name(path)}:{node.name} has {size} lines"] * (size > limit)
    assert long == []


def test_names_say_what_is_inside() -> None:
    assert [module_name(path) for path in FILES if path.stem in NAMES_THAT_SAY_NOTHING] == []
    packages = [path for path in FILES if path.name == "__init__.py"]
    assert [module_name(path) for path in packages if path.read_text(encoding="utf-8").strip()] == []


def test_every_user_error_says_fact_why_and_fix() -> None:
    incomplete = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("UserError", "Mistake"):
                given = len(node.args) + sum(keyword.arg in ("fact", "why", "fix") for keyword in node.keywords)
                starred = any(isinstance(argument, ast.Starred) for argument in node.args)
                incomplete += [f"{name}:{node.lineno}"] * (not starred and given < 3)
    assert incomplete == []


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["recipes"],
        ["plan", "llama3.3-70b/qlora", "--gpus", "8"],
        ["submit", "quickstart/full", "--site", "site.yaml", "--dry-run"],
        ["status", "nothing"],
        ["doctor", "--fast"],
    ],
    ids=lambda words: words[0],
)
def test_looking_imports_no_torch(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("name: here\ngpus_per_node: 1\n")
    code = (
        "import sys; from packhorse.cli import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'deepspeed', 'peft'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
