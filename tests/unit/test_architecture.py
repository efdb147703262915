"""The architecture, checked on the source: imports, cycles, sizes, names, messages."""

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
BASE = {"errors", "durable", "secrets", "version", "torch_on_demand"}
MAY_IMPORT = {
    "errors": set(),
    "secrets": set(),
    "torch_on_demand": set(),
    "durable": {"errors"},
    "version": set(),
    "yaml_source": BASE,
    "recipe": BASE | {"yaml_source"},
    "model_spec": BASE | {"recipe", "yaml_source"},
    "quickstart": BASE,
    "library_hooks": {"errors"},
    "plan": BASE | {"recipe", "model_spec"},
    "run_folder": BASE | {"recipe", "plan"},
    "data": BASE | {"recipe", "quickstart"},
    "model": BASE | {"recipe", "model_spec"},
    "track": BASE | {"recipe"},
    "train": BASE | {"recipe", "plan", "run_folder", "data", "model", "model_spec", "track"},
    "estimate": BASE | {"yaml_source", "recipe", "model_spec", "plan", "run_folder", "data", "model", "train"},
    "launching": BASE | {"yaml_source", "recipe", "plan", "run_folder", "estimate"},
    "evaluate": BASE | {"recipe", "plan", "run_folder", "data", "model", "track", "train"},
    "export": BASE | {"recipe", "plan", "run_folder", "data", "model", "train", "evaluate"},
    "report": BASE | {"recipe", "plan", "run_folder", "data", "track", "evaluate"},
    "doctor": BASE | {"recipe", "model_spec", "plan", "run_folder", "estimate", "data", "launching"},
    # workflows is below cli: it shows nothing
    "workflows": {path.name for path in SOURCE.iterdir() if path.is_dir()} - {"cli"} | BASE | {"library_hooks"},
    "cli": {"*"},
}
LAYOUT = "packhorse.run_folder.layout"
"""Names of a run's files: imports nothing of ours, so every package may import it."""
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "helpers", "helper", "misc", "core"}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_LOOP = 400, 60, 90
SMALL_FILE, MOST_SMALL_FILES, LARGEST_SHARE_OF_IMPORTS = 50, 25, 0.11
WITH_TORCH = (
    "model.",
    "train.",
    "evaluate.",
    "export.",
    "estimate.measure.",
    "doctor.bandwidth",
    "track.trackers",
    "data.packs.loader",
)


def module_name(path: Path) -> str:
    return ".".join(("packhorse", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def package_of(name: str) -> str:
    """`packhorse.data.read.row` -> `data`."""
    return name.split(".")[1]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


TREES = {module_name(path): parse(path) for path in FILES}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Each module that is imported, and whether inside a function."""
    inside = {id(node) for function in functions(tree) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in inside
            # `from package import module`
            yield from ((f"{node.module}.{name.name}", id(node) in inside) for name in node.names)
        elif isinstance(node, ast.Import):
            yield from ((name.name, id(node) in inside) for name in node.names)


GRAPH = {name: {target for target, _ in imports(tree) if target in TREES} for name, tree in TREES.items()}


def cycle(graph: dict[str, set[str]]) -> str:
    """Return one cycle of a graph as `a -> b -> a`; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> str:
        if name in above:
            return " -> ".join((*above[above.index(name) :], name))
        if name in done:
            return ""
        for target in sorted(graph.get(name, ())):
            if found := visit(target, (*above, name)):
                return found
        done.add(name)
        return ""

    return next((found for name in sorted(graph) if (found := visit(name, ()))), "")


def test_each_package_imports_only_what_it_may() -> None:
    offenders = []
    for name, targets in GRAPH.items():
        if name == "packhorse":
            continue
        allowed = MAY_IMPORT[package_of(name)] | {package_of(name)}
        offenders += [
            f"{name} imports {target}"
            for target in targets
            if "*" not in allowed and target not in ("packhorse", LAYOUT) and package_of(target) not in allowed
        ]
    assert offenders == []


def test_only_the_packages_that_compute_import_torch() -> None:
    heavy = {"torch", "accelerate", "deepspeed", "peft", "bitsandbytes"}
    offenders = [
        name
        for name, tree in TREES.items()
        if not name.startswith(tuple(f"packhorse.{package}" for package in WITH_TORCH))
        and {target.split(".")[0] for target, _ in imports(tree)} & heavy
    ]
    assert offenders == []


def test_there_is_no_import_cycle_between_modules() -> None:
    assert cycle(GRAPH) == ""


def test_there_is_no_import_cycle_between_the_packages_inside_a_package() -> None:
    packages = {name for name in TREES if any(other.startswith(f"{name}.") for other in TREES)}
    graph = {name: targets - {LAYOUT} for name, targets in GRAPH.items()}
    cycles = {}
    for package in packages:
        children: dict[str, set[str]] = {}
        for name, targets in graph.items():
            if name.startswith(f"{package}."):
                child = name[len(package) + 1 :].split(".")[0]
                others = {t[len(package) + 1 :].split(".")[0] for t in targets if t.startswith(f"{package}.")}
                children.setdefault(child, set()).update(others - {child})
        if found := cycle(children):
            cycles[package] = found
    assert cycles == {}


def test_imports_are_at_the_top_except_in_commands_workflows_and_the_public_api() -> None:
    offenders = [
        f"{name} imports {target}"
        for name, tree in TREES.items()
        if name != "packhorse" and not name.startswith(("packhorse.cli.", "packhorse.workflows."))
        for target, inside in imports(tree)
        if inside
    ]
    assert offenders == []


def test_files_and_functions_are_short() -> None:
    offenders = []
    for path in FILES:
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > LONGEST_FILE:
            offenders.append(f"{module_name(path)} has {lines} lines")
        for node in functions(TREES[module_name(path)]):
            first = node.body[0]
            documentation = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
            size = node.end_lineno - node.lineno + 1 - documentation
            limit = LONGEST_LOOP if (path.name, node.name) == ("loop.py", "train") else LONGEST_FUNCTION
            if size > limit:
                offenders.append(f"{module_name(path)}.{node.name} has {size} lines")
    assert offenders == []


def test_the_code_is_not_scattered_over_small_files() -> None:
    texts = [path.read_text(encoding="utf-8") for path in FILES if path.name != "__init__.py"]
    small = [text for text in texts if text.count("\n") <= SMALL_FILE]
    num_imports = sum(
        node.end_lineno - node.lineno + 1
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    )
    assert len(small) <= MOST_SMALL_FILES
    assert num_imports / sum(text.count("\n") for text in texts) <= LARGEST_SHARE_OF_IMPORTS


def test_names_say_what_is_inside() -> None:
    assert [name for name in TREES if name.split(".")[-1] in NAMES_THAT_SAY_NOTHING] == []
    texts = {module_name(path): path.read_text(encoding="utf-8") for path in FILES if path.name == "__init__.py"}
    assert [name for name, text in texts.items() if text.strip() and name != "packhorse"] == []


def test_every_user_error_has_fact_why_and_fix() -> None:
    offenders = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("UserError", "Mistake")
            ):
                given = len(node.args) + sum(keyword.arg in ("fact", "why", "fix") for keyword in node.keywords)
                starred = any(isinstance(argument, ast.Starred) for argument in node.args)
                if not starred and given < 3:
                    offenders.append(f"{name}:{node.lineno}")
    assert offenders == []


def test_a_mistake_of_the_recipe_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: r\nbatch: {lenght: 8}\n")
    (tmp_path / "site.yaml").write_text("name: here\ngpus_per_node: 1\n")
    code = (
        "import sys; from packhorse.cli.main import main\n"
        "for words in ['check'], ['prepare'], ['plan'], ['train'], ['submit', '--site', 'site.yaml']:\n"
        "    assert main([words[0], 'recipe.yaml', *words[1:]]) == 2, words\n"
        "    heavy = {'torch', 'transformers', 'pyarrow', 'datasets', 'accelerate', 'peft'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("batch.lenght") == 5


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
