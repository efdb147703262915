"""An evaluation by two launched ranks that hold parts of the weights: losses and answers are those of one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pyarrow import parquet
from transformers import LlamaConfig, LlamaForCausalLM

from packhorse.evaluate.evaluate_run import subject_of
from packhorse.evaluate.held_out import read_sets, trained_form
from packhorse.evaluate.measure import Measured, measure, work_on
from packhorse.evaluate.models import TUNED, load_tuned
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.folder import open_run
from packhorse.workflows.evaluate import EvaluationRequest, evaluate_run, launcher_of
from ranks import planned
from tiny import TINY, write_tiny

ROWS = {"sources": [{"path": "builtin:core.messages.jsonl", "rows": 200}]}
ANSWERED = {"max_answered_rows": 5, "max_new_tokens": 12}


def write_base(folder: Path) -> dict[str, Any]:
    """A random model whose answers vary, as the recipe's `model`."""
    shape = {key: value for key, value in TINY["model"]["config"].items() if key != "model_type"}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=2048, initializer_range=0.3))
    model.save_pretrained(folder / "base")
    return {"path": str(folder / "base"), "tokenizer": "builtin:tokenizer"}


def planned_run(folder: Path, engine: str, method: dict[str, Any] | str) -> RunPlan:
    recipe = write_tiny(folder, model=write_base(folder), method=method, data=ROWS, evaluation=ANSWERED)
    return open_run(str(planned(recipe, "run", f"parallel.engine={engine}", "parallel.processes=2")))


def rows_of(plan: RunPlan, ranks: int) -> list[dict[str, Any]]:
    evaluate_run(plan, EvaluationRequest(ranks=ranks))
    folder = Path(plan.run_folder) / "evaluation"
    (folder / "answers.jsonl").rename(folder / f"answers-{ranks}.jsonl")
    assert not (folder / "ranks").exists()
    return parquet.read_table(folder / "rows.parquet").to_pylist()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads a name that transformers renames
def test_an_adapter_and_its_base_under_zero3(tmp_path: Path) -> None:
    plan = planned_run(tmp_path, "zero3", {"kind": "lora", "rank": 4, "alpha": 16})
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False),
    )
    adapted.save_pretrained(Path(plan.run_folder) / "adapter")
    alone, shared = rows_of(plan, 1), rows_of(plan, 2)
    for name in ("base", "tuned"):
        assert [row[f"{name}/loss"] for row in shared] == pytest.approx(
            [row[f"{name}/loss"] for row in alone], rel=1e-6
        )
        answers = [row[f"{name}/answer"] for row in alone]
        assert [row[f"{name}/answer"] for row in shared] == answers
        assert len({answer for answer in answers if answer is not None}) == 5, "equal answers would show nothing"
    assert [row["base/loss"] for row in alone] != pytest.approx([row["tuned/loss"] for row in alone], abs=1e-2)


def test_a_whole_model_under_fsdp2(tmp_path: Path) -> None:
    plan = planned_run(tmp_path, "fsdp2", "full")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.model.layers[0].mlp.up_proj.weight.data.neg_()
    model.save_pretrained(Path(plan.run_folder) / "model")
    subject, tokenizer = subject_of(plan)
    settings = plan.recipe.evaluation
    assert plan.data is not None
    sets = read_sets(Path(plan.data.folder), settings, trained_form(tokenizer, plan.recipe.data))
    work = [work_on(held_out, tokenizer, settings) for held_out in sets]
    launcher = launcher_of(plan, EvaluationRequest(ranks=2), lambda _: None)
    assert launcher is not None
    (shared,) = launcher.measure({TUNED: "tuned"}, work)
    alone = measure(load_tuned(subject), tokenizer, work)
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-6)
    assert [each.answers for each in shared] == [each.answers for each in alone]


def losses(measured: Sequence[Measured]) -> list[float]:
    return [loss.sum_nats for each in measured for loss in each.losses]
