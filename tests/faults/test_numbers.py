"""Numbers that are none never reach a weight, on any engine: the run stops before the step, or leaves it out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli import curve, metrics, packhorse
from packhorse.errors import EXIT_MEMORY, EXIT_NOT_FINITE, EXIT_OK
from packhorse.plan.replan import replace_plan, with_smaller_micro
from packhorse.plan.run_plan import read_plan
from packhorse.run_folder.skipped_steps import read_skipped_steps, write_skipped_steps
from ranks import planned, run_ranks
from tiny import write_tiny

STEPS, BAD_STEP = 6, 4
FAULT_AT = BAD_STEP - 1  # steps done


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, two passes a step, a checkpoint each step."""
    return write_tiny(
        tmp_path_factory.mktemp("numbers"),
        steps=STEPS,
        batch={"length": 256, "packs": 8, "micro": 2},
        parallel={"processes": 2},
        checkpoint={"every_steps": 1, "keep_last": 9},
        evaluation={"max_answered_rows": 0},
    )


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer states of a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    parts = [load_file(path) for path in sorted(folder.rglob("*.safetensors"))]
    return {name: tensor for part in parts for name, tensor in part.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("engine", "fault", "found"),
    [
        ("ddp", "nan_loss", "rank 1: the loss of micro-batch 1 of 2 (pack "),
        ("ddp", "nan_gradient", "and so are the gradients of each, computed once more"),
        ("ddp", "nan_weight", "rank 1: the weight model.embed_tokens.weight holds NaN or Inf"),
        ("zero3", "nan_weight", "rank 1: the weight model.embed_tokens.weight holds NaN or Inf"),
        ("fsdp2", "nan_loss", "rank 1: the loss of micro-batch 1 of 2 (pack "),
        ("ddp", "nan_layer", "rank 1: the gradient of micro-batch 1 of 2 (pack "),
        ("zero2", "nan_gradient", "ZeRO does not show which rank's gradient is not"),
    ],
)
def test_all_ranks_stop_before_the_step_and_say_where_it_came_from(
    recipe: Path, engine: str, fault: str, found: str
) -> None:
    run = planned(recipe, f"stop-{engine}-{fault}", f"parallel.engine={engine}")
    records = run_ranks(run, f"{fault}@{FAULT_AT}:1")
    assert [record["exit_code"] for record in records] == [EXIT_NOT_FINITE] * 2
    assert records[0]["message"] == records[1]["message"]
    assert f"at step {BAD_STEP} the loss is" in records[0]["message"]
    assert found in records[0]["message"]
    if fault == "nan_layer":
        assert "is not finite, starting at model.layers.0.post_attention_layernorm.weight" in records[0]["message"]
    if "pack" in found:
        assert " with rows " in records[0]["message"]
    assert f"the newest checkpoint is of step {FAULT_AT}" in records[0]["message"]
    assert checkpoints(run) == list(range(1, BAD_STEP))

    last = metrics(run)[-1]
    assert last["step"] == BAD_STEP
    assert (last["train/loss"] == "nan") == (fault in ("nan_loss", "nan_weight"))
    assert not math.isfinite(float(last["train/grad_norm"]))
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


@pytest.mark.matrix
def test_beside_an_adapter_on_sharded_weights_the_gradient_is_seen_between_the_layers(recipe: Path) -> None:
    base = planned(recipe, "base", "steps=1", "parallel.processes=1")
    assert [record["exit_code"] for record in run_ranks(base)] == [EXIT_OK]
    words = ("method=lora", "model.config=null", f"model.path={base}", "parallel.engine=fsdp2")
    run = planned(recipe, "adapter", *words)
    records = run_ranks(run, f"nan_layer@{FAULT_AT}:1")
    assert [record["exit_code"] for record in records] == [EXIT_NOT_FINITE] * 2
    assert "rank 1: the gradient of micro-batch 1 of 2 (pack " in records[0]["message"]
    assert "model.embed_tokens." in records[0]["message"]


@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        ("ddp", "nan_gradient"),
        ("zero1", "nan_loss"),
        ("zero2", "nan_gradient"),
        ("zero3", "nan_loss"),
        ("fsdp2", "nan_gradient"),
    ],
)
def test_a_step_that_is_left_out_changes_nothing_and_is_left_out_again(recipe: Path, engine: str, fault: str) -> None:
    words = (f"parallel.engine={engine}", "recovery.on_nonfinite=skip")
    run = planned(recipe, f"skip-{engine}", *words)
    assert [record["exit_code"] for record in run_ranks(run, f"{fault}@{FAULT_AT}:1")] == [EXIT_OK] * 2
    assert list(read_skipped_steps(run)) == [BAD_STEP]
    assert same(tensors(run, BAD_STEP), tensors(run, BAD_STEP - 1))
    assert not same(tensors(run, BAD_STEP + 1), tensors(run, BAD_STEP))
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert not math.isfinite(float(lines[BAD_STEP]["train/grad_norm"]))
    assert [line.get("recovery/skipped") for line in lines] == [None] * BAD_STEP + [1] + [None] * (STEPS - BAD_STEP)

    # Whoever goes on from before that step, without the fault, comes to the same end.
    for step in range(BAD_STEP - 1, STEPS + 1):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    weights = "model/model.safetensors"
    first_end, first_curve = (run / weights).read_bytes(), curve(run)[BAD_STEP:]
    assert [record["exit_code"] for record in run_ranks(run, attempt=2)] == [EXIT_OK] * 2
    assert curve(run)[BAD_STEP - 1 :] == first_curve
    assert (run / weights).read_bytes() == first_end
    assert metrics(run)[BAD_STEP] == {"step": BAD_STEP, "recovery/skipped": 1}


def test_one_more_than_may_be_left_out_ends_the_run(recipe: Path) -> None:
    words = ("recovery.on_nonfinite=skip", "recovery.most_skipped=2")
    run = planned(recipe, "too-many", *words)
    write_skipped_steps(run, {1: "by hand", 2: "by hand"})
    records = run_ranks(run, f"nan_loss@{FAULT_AT}:0")
    assert [record["exit_code"] for record in records] == [EXIT_NOT_FINITE] * 2
    assert "3 steps would be skipped, and recovery.most_skipped is 2" in records[0]["message"]
    assert list(read_skipped_steps(run)) == [1, 2], "resumed, it must end at the same step again"
    assert checkpoints(run) == list(range(1, BAD_STEP))


def test_a_weight_that_is_no_number_is_not_skipped_over(recipe: Path) -> None:
    run = planned(recipe, "lost-weight", "recovery.on_nonfinite=skip")
    records = run_ranks(run, f"nan_weight@{FAULT_AT}:0")
    assert [record["exit_code"] for record in records] == [EXIT_NOT_FINITE] * 2
    assert read_skipped_steps(run) == {}


def test_weights_stepped_in_the_backward_pass_are_kept_from_a_bad_loss(recipe: Path) -> None:
    words = ("optimizer.in_backward=true", "optimizer.clip_norm=null", "batch.micro=4", "parallel.engine=fsdp2")
    run = planned(recipe, "in-backward", *words)
    records = run_ranks(run, f"nan_loss@{FAULT_AT}:1")
    assert [record["exit_code"] for record in records] == [EXIT_NOT_FINITE] * 2
    assert "no update was made with it" in records[0]["message"]
    assert "rank 1: the loss of micro-batch 1 of 1" in records[0]["message"]


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_out_of_memory_goes_on_with_smaller_passes_on_the_same_curve(recipe: Path, engine: str) -> None:
    words = (f"parallel.engine={engine}", "recovery.on_oom=shrink")
    unbroken = planned(recipe, f"whole-{engine}", *words)
    assert [record["exit_code"] for record in run_ranks(unbroken)] == [EXIT_OK] * 2
    run = planned(recipe, f"shrink-{engine}", *words)
    # The other rank may see the connection close, but only after.
    record = min(run_ranks(run, f"oom@{FAULT_AT}:1"), key=lambda record: record["time"])
    assert (record["rank"], record["exit_code"], record["again"]) == (1, EXIT_MEMORY, "shrink")
    assert f"rank 1 ran out of memory at step {BAD_STEP}" in record["message"]

    smaller = with_smaller_micro(read_plan(run))
    assert smaller is not None
    replace_plan(smaller)
    assert [record["exit_code"] for record in run_ranks(run, attempt=2)] == [EXIT_OK] * 2
    assert read_plan(run).batch.accumulation_steps == 4
    assert curve(run) == pytest.approx(curve(unbroken), rel=1e-5)
    assert [line["step"] for line in metrics(run)] == list(range(STEPS + 1))


GOOD, BAD_LETTERS = "one two three four five six seven eight nine ten", 48
NUM_BEFORE, NUM_BAD, NUM_AFTER, PACKS = 80, 8, 32, 4
FIRST_BAD_STEP, STEPS_WITH_SPIKE = NUM_BEFORE // PACKS + 1, 30


def write_rows(file: Path) -> None:
    """Rows that all say the same, but some in the middle that are nothing but drawn letters."""
    draws = torch.randint(26, (NUM_BAD, BAD_LETTERS), generator=torch.Generator().manual_seed(0)).tolist()
    bad = ["".join(chr(ord("a") + letter) for letter in draw) for draw in draws]
    answers = [GOOD] * NUM_BEFORE + bad + [GOOD] * NUM_AFTER
    rows = [[{"role": "user", "content": "Count."}, {"role": "assistant", "content": answer}] for answer in answers]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")


def test_a_spike_is_gone_back_before_and_the_steps_that_saw_it_are_left_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    recipe = write_tiny(
        tmp_path,
        data={
            "sources": [{"path": str(tmp_path / "rows.jsonl")}],
            "packing": "in_order",
            "duplicates": {"near": "ignore"},
            "split": {"train": 1.0, "validation": 0.0, "test": 0.0},
        },
        batch={"length": 64, "packs": PACKS},
        steps=STEPS_WITH_SPIKE,
        checkpoint={"every_steps": 5, "keep_last": 3},
        evaluation={"max_answered_rows": 0},
        recovery={"on_spike": "rewind", "spike_window": 8, "rewind_steps": 3},
    )
    done = packhorse(tmp_path, "train", recipe.name, "name=rewound")
    assert done.code == EXIT_OK, done.err
    run = tmp_path / "runs" / "rewound"
    left_out = read_skipped_steps(run)
    # Found as it came, gone back before it, and found again in the step after those that were left out.
    assert list(left_out) == list(range(FIRST_BAD_STEP - 2, FIRST_BAD_STEP + 2))
    assert f"at step {FIRST_BAD_STEP} the loss is" in left_out[FIRST_BAD_STEP]
    assert "the run goes back before step" in done.out + done.err
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(STEPS_WITH_SPIKE + 1))
    assert max(curve(run)[FIRST_BAD_STEP - 3 :]) < curve(run)[FIRST_BAD_STEP - 4]

    again = planned(recipe, "again")
    write_skipped_steps(again, left_out)
    assert [record["exit_code"] for record in run_ranks(again)] == [EXIT_OK]
    assert curve(again) == curve(run)
    weights = "model/model.safetensors"
    assert (again / weights).read_bytes() == (run / weights).read_bytes()
