"""The language of the project: plain standard English in code, messages, docs and recipes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "packhorse").rglob("*.py"))
TEXTS = [
    *SOURCES,
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.*")),
    *sorted((ROOT / "slurm").rglob("*.*")),
    *sorted((ROOT / "accelerate_configs").glob("*")),
    *sorted((ROOT / "launch").glob("*.py")),
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
]
# Phrase (a pattern) -> what to write instead.
BANNED = {
    r"stands? (in|at|on|there|here|below|beside|above|between|alone|with|twice|where)": "is in, is at",
    r"(where|as) (it|they) stands?": "location",
    r"go(es|ing)? on": "resume, continue",
    r"(is|are|was|were|be|been) (told|said)": "is reported, is printed, is logged",
    r"(?<!cannot )tells?(?!\(\))|told": "report, print, show, say",
    r"no number|numbers? that (is|are) none|is none of": "NaN or Inf, not finite",
    r"le(ft|ave|aves|aving) out": "skipped, omitted",
    r"mend(s|ed|ing)?": "fix",
    r"so many": "N",
    r"by (itself|themselves)": "automatically, alone",
    r"(cannot|can|to) be had": "is not available, cannot be downloaded",
    r"(is|are|was|were) asked of|what (is|was) asked": "requested",
    r"anew": "again",
    r"(also|are|is) packed,? (or not)|packed files?": "compressed",
    r"(every|another|each|which|all) ways?": "candidate, configuration",
    r"a (line|process|run|pass|file|row|job|node) an? (run|GPU|node|rank|process|step|row|attempt)": "one … per …",
    r"for good": "permanently",
    r"as (it|they) (is|are)": "unchanged",
    r"of (its|their|our|his) own": "separate, its own + noun",
    r"whoever|thither|thereby|whence": "plain words",
}
PATTERN = re.compile(
    "|".join(rf"(?P<b{number}>(?<![\w-]){phrase}(?![\w-]))" for number, phrase in enumerate(BANNED)), re.IGNORECASE
)
BAD_OPENINGS = ("The same", "Of the", "Both", "It ", "As ")


def test_no_text_uses_a_banned_phrase() -> None:
    offenders = []
    for path in TEXTS:
        if path.suffix not in {".py", ".md", ".yaml", ".yml", ".sbatch", ".sh", ".json"}:
            continue
        # Where a phrase is broken over two lines, the second may begin with a comment sign.
        text = re.sub(r"\s*\n[ \t]*(# ?)?", " ", path.read_text(encoding="utf-8"))
        for hit in PATTERN.finditer(text):
            offenders.append(f"{path.relative_to(ROOT)}: {hit[0]!r}")
    assert not offenders, f"{len(offenders)} phrases:\n" + "\n".join(offenders)


def test_docstrings_stand_alone() -> None:
    offenders = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                text = ast.get_docstring(node) or ""
                if text.startswith(BAD_OPENINGS):
                    offenders.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert not offenders, "\n".join(offenders)
