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
BASE = {"errors", "durable", "secrets", "version"}
MAY_IMPORT = {
    "errors": set(),
    "secrets": set(),
    "durable": {"errors"},
    "version": set(),
    "yaml_source": BASE,
    "recipe": BASE | {"yaml_source"},
    "model_spec": BASE | {"recipe", "yaml_source"},
    "quickstart": BASE,
    "plan": BASE | {"recipe", "model_spec"},
    "run_folder": BASE | {"recipe", "plan"},
    "data": BASE | {"recipe", "quickstart"},
    "model": BASE | {"recipe"},
    "track": BASE | {"recipe"},
    "train": BASE | {"recipe", "plan", "run_folder", "data", "model", "model_spec", "track"},
    "estimate": BASE | {"yaml_source", "recipe", "model_spec", "plan", "run_folder", "data", "model", "train"},
    "launching": BASE | {"yaml_source", "recipe", "plan", "run_folder", "estimate"},
    "evaluate": BASE | {"recipe", "plan", "run_folder", "data", "model", "track", "train"},
    "report": BASE | {"recipe", "data"},
    "doctor": BASE | {"recipe", "model_spec", "plan", "run_folder", "estimate", "data", "launching"},
    # workflows is below cli: it shows nothing
    "workflows": {path.name for path in SOURCE.iterdir() if path.is_dir()} - {"cli"} | BASE,
    "cli": {"*"},
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


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_each_module_imports_only_what_its_room_may(path: Path) -> None:
    name = module_name(path)
    if name == "packhorse":
        return
    allowed = MAY_IMPORT[room(name)]
    for target, _ in imports(parse(path)):
        if target.startswith("packhorse.") and room(target) != room(name) and "*" not in allowed:
            assert room(target) in allowed, f"{name} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_are_at_the_top_except_in_cli_and_workflows(path: Path) -> None:
    if room(module_name(path) + ".") in ("cli", "workflows"):
        return
    assert [target for target, inside in imports(parse(path)) if inside] == []


def test_there_is_no_import_cycle() -> None:
    graph = {module_name(path): {target for target, _ in imports(parse(path))} for path in FILES}
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


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_stay_short(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") <= LONGEST_FILE
    for node in ast.walk(parse(path)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0]
        documentation = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
        size = node.end_lineno - node.lineno + 1 - documentation
        limit = LONGEST_LOOP if (path.name, node.name) == ("loop.py", "train") else LONGEST_FUNCTION
        assert size <= limit, f"{path.name}:{node.name} has {size} lines"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_names_say_what_is_inside(path: Path) -> None:
    assert path.stem not in NAMES_THAT_SAY_NOTHING
    if path.name == "__init__.py" and path.parent != SOURCE:  # the public Python API is the one exception
        assert path.read_text(encoding="utf-8").strip() == ""


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_user_error_says_fact_why_and_fix(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("UserError", "Mistake"):
            given = len(node.args) + sum(keyword.arg in ("fact", "why", "fix") for keyword in node.keywords)
            starred = any(isinstance(argument, ast.Starred) for argument in node.args)
            assert starred or given >= 3, f"{path.name}:{node.lineno}"


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
        "import sys; from packhorse.cli.main import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'deepspeed', 'peft'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
