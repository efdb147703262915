from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_cases import MakeRecipe, save_tiny_tokenizer

from packhorse.recipe.schema import Recipe


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny_tokenizer(tmp_path / "tiny")


@pytest.fixture
def make_recipe(tmp_path: Path, tiny: Path) -> MakeRecipe:
    """A recipe over files; `batch`, `data`, `model`, `evaluation` take further keys."""

    def make(*paths: Path | str, **sections: dict[str, Any]) -> Recipe:
        return Recipe.model_validate(
            {
                "name": "test",
                "runs_folder": str(tmp_path / "runs"),
                "model": {"config": {"model_type": "llama"}, "tokenizer": str(tiny), **sections.get("model", {})},
                "data": {
                    "sources": [path if isinstance(path, dict) else {"path": str(path)} for path in paths],
                    "split": {"train": 0.7, "validation": 0.15, "test": 0.15},
                    **sections.get("data", {}),
                },
                "batch": {"length": 64, "packs": 2, **sections.get("batch", {})},
                "optimizer": {"learning_rate": 1e-4},
                "evaluation": sections.get("evaluation", {}),
                "steps": 1,
            }
        )

    return make
