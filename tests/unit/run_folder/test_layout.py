"""Only run_folder/layout.py spells the name of a file or folder of a run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from packhorse.run_folder import layout

SOURCE = Path(__file__).resolve().parents[3] / "src" / "packhorse"
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "layout.py"]

NAMES = {value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
FOLDERS = {name for name in NAMES if re.fullmatch(r"[a-z]+", name)}
"""Plain words (`model`, `logs`): names of folders only as an operand of `/`."""
PARTS = re.compile(r"^/?(attempt|rank|heartbeat|stacks|collectives|optimizer)-$|^\.written-$|\.out$")
"""Pieces of f-strings that build such a name."""

# Files of the same name in other folders than that of a run, by package.
ALLOWED = {
    ("data", "data.json"),  # in the folder of prepared data
    ("data", "state.json"),  # in a folder of Hugging Face datasets
    ("estimate", "model"),  # in a temporary folder
    ("estimate", "runs"),
}


def names_in(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Strings in code that are names of a run's files; docstrings and sentences are not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in NAMES - FOLDERS:
            yield node.value, node.lineno
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
            if node.right.value in FOLDERS:
                yield node.right.value, node.lineno
        elif isinstance(node, ast.JoinedStr) and len(node.values) <= 5:
            for part in node.values:
                if isinstance(part, ast.Constant) and PARTS.search(part.value):
                    yield part.value, node.lineno


def test_names_of_a_runs_files_are_only_in_layout() -> None:
    offenders = []
    for path in FILES:
        package = path.relative_to(SOURCE).parts[0]
        spelled = [(name, line) for name, line in names_in(parse(path)) if (package, name) not in ALLOWED]
        offenders += [f"{path.relative_to(SOURCE)}:{line}: {name}" for name, line in spelled]
    assert offenders == [], "use the name of packhorse.run_folder.layout"


def test_every_exception_is_still_needed() -> None:
    assert {(path.relative_to(SOURCE).parts[0], name) for path in FILES for name, _ in names_in(parse(path))} >= ALLOWED


def test_the_search_finds_what_it_looks_for() -> None:
    code = 'run / "checkpoints"; run / "plan.json"; f"attempt-{3}"; f"{kind}-%j.out"; f"rank-{2}.json"; "STOP"'
    assert len(list(names_in(ast.parse(code)))) == 6
    assert list(names_in(ast.parse('"""See plan.json."""; f"rank {2} wrote it"; {"model": 1}'))) == []


def test_layout_imports_nothing_of_packhorse() -> None:
    text = (SOURCE / "run_folder" / "layout.py").read_text()
    assert "import packhorse" not in text
    assert "from packhorse" not in text


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
