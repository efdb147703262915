from pathlib import Path

import pytest

from packhorse.errors import Mistake, UserError
from packhorse.recipe.load import load_recipe

GOOD = """\
name: good
model:
  id: org/model
data:
  sources:
    - path: rows.jsonl
optimizer:
  learning_rate: 1e-4
epochs: 1
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file in the current folder, which is an empty one."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "my.yaml") -> str:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write_file


@pytest.fixture
def good(write):
    return write(GOOD)


@pytest.fixture
def mistakes_of():
    """Loads and returns the mistakes; each must say fact, why and fix."""

    def load(name: str, *overrides: str) -> tuple[Mistake, ...]:
        with pytest.raises(UserError) as caught:
            load_recipe(name, overrides)
        for mistake in caught.value.mistakes:
            for part in (mistake.fact, mistake.why, mistake.fix):
                assert part.endswith("."), mistake
                assert "Input should" not in part
            assert mistake.where
        return caught.value.mistakes

    return load
