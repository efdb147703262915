"""The public Python API: what `import packhorse` costs and offers, and the example of its page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching.launching_cases import planned

import packhorse
from packhorse.errors import EXIT_STOPPED
from packhorse.workflows import api
from packhorse.workflows.new_run import RunEnd
from tiny import write_tiny

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python-api.md"
LOOK = """
import sys, packhorse
heavy = {"torch", "transformers", "datasets", "pydantic", "numpy", "yaml", "rich", "fire"} & set(sys.modules)
assert not heavy, heavy
packhorse.load_recipe("quickstart/full")
result = packhorse.plan("llama3.1-8b/lora", gpus="8xH100-80GB")
assert result.case is not None and result.case.fits
assert packhorse.plan("quickstart/full").plan.num_steps == 1250, "a package does not replace the function of its name"
assert "torch" not in sys.modules
"""


def test_importing_and_planning_import_no_torch(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


TORCH = """
import sys
from packhorse.data.render import tokenizer
assert "torch" not in sys.modules, "tokenizers need no torch"
import torch.nn.functional
from transformers import modeling_rope_utils
assert torch.nn.functional.relu(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
assert modeling_rope_utils.torch.Tensor is torch.Tensor, "what was imported before torch uses the same torch"
"""


def test_torch_can_be_used_after_tokenizers_were_read_without_it() -> None:
    done = subprocess.run([sys.executable, "-c", TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_name_is_there_and_documented() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in packhorse.__all__:
        assert callable(getattr(packhorse, name))
        assert name in page
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        packhorse.trian  # noqa: B018


def test_overrides_are_values_of_the_recipe(tmp_path: Path) -> None:
    recipe = write_tiny(tmp_path)
    loaded = packhorse.load_recipe(
        recipe, name="12", steps=3, **{"optimizer.learning_rate": 1e-5, "optimizer.betas": [0.8, 0.9]}
    )
    assert (loaded.name, loaded.steps, loaded.optimizer.learning_rate) == ("12", 3, 1e-5)
    assert list(loaded.optimizer.betas) == [0.8, 0.9]
    with pytest.raises(packhorse.UserError, match="lerning_rate"):
        packhorse.load_recipe(recipe, **{"optimizer.lerning_rate": 1})


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    folder = Path(planned(tmp_path).run_folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "evaluation/loss": 3.0}\n')
    run = packhorse.open_run(folder)
    assert run.path == folder
    assert run.status is not None
    assert run.metrics.to_pylist() == [
        {"step": 1, "train/loss": 2.5, "evaluation/loss": None},
        {"step": 2, "train/loss": None, "evaluation/loss": 3.0},
    ]
    assert run.evaluation is None
    assert run.weights is None
    (folder / "model").mkdir()
    assert run.weights == folder / "model"


def test_a_stopped_run_is_raised_and_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path)
    monkeypatch.setattr(api.resume_run, "resume_here", lambda *_: RunEnd(plan, EXIT_STOPPED, "stopped at step 3"))
    with pytest.raises(packhorse.RunFailedError, match="stopped at step 3") as caught:
        packhorse.resume(plan.run_folder)
    assert caught.value.exit_code == EXIT_STOPPED
    assert caught.value.run is not None
    assert caught.value.run.path == Path(plan.run_folder)


def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "\nfinished [" in done.stdout
    assert (tmp_path / "runs" / "first" / "evaluation.json").is_file()
