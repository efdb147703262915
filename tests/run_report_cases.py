"""Run folders made by hand for reports: a finished run with a little of everything, hostile text in every text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from packhorse.data.data_manifest import DataManifest, SourceRecord, SplitCounts, TestLook
from packhorse.data.ledger import Entry, Ledger
from packhorse.evaluate.metrics.metric import Metric
from packhorse.evaluate.metrics.text import EXACT
from packhorse.evaluate.opinions import JudgeResult, PeopleResult, RaterResult
from packhorse.evaluate.results import Comparison, ComparisonLine, LabelResult, MetricFailure, Score
from packhorse.evaluate.verdict import MetricValues, adjusted, gate_results, metric_result
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import Prediction, RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.evaluation import EvaluationSection, GateCriterion
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.attempts import AttemptRecord
from packhorse.run_folder.folder import create_run
from packhorse.run_folder.status import Status, write_status
from report_cases import HOSTILE
from tiny import TINY

LOSS = Metric("loss", "graded", "nats", lambda *_: 0.0, higher_is_better=False)
NUM_STEPS, SPIKE_STEP, NAN_STEP = 2_000, 777, 900
GIB = 2**30
GATE = (
    GateCriterion(metric="exact_match", min_gain=0.02),
    GateCriterion(metric="loss", set="retain", max_drop=0.05),
)
# 40 answers: 14 rows only the tuned model answers right, 2 only the base, 24 both: 65 % -> 95 %.
BASE_RIGHT, TUNED_RIGHT = [0] * 14 + [1] * 26, [1] * 14 + [0] * 2 + [1] * 24


def write_run(folder: Path, name: str = "r", state: str = "waiting", **files: str) -> RunPlan:
    """Write a run folder with these files and this state."""
    fields = TINY | {"name": name, "runs_folder": str(folder), "steps": NUM_STEPS}
    plan = make_plan(Recipe.model_validate(fields), DeviceRequest(), Hardware(num_cores=2, gpus=()), None)
    predicted = Prediction(
        gpu="H100-80GB", memory_bytes=8 * GIB, required_bytes=4 * GIB, phase="backward", step_seconds=0.5
    )
    plan = plan.model_copy(update={"num_steps": NUM_STEPS, "predicted": predicted})
    create_run(plan, {file.replace("_json", ".json"): text for file, text in files.items()})
    run = Path(plan.run_folder)
    step = NUM_STEPS if state == "finished" else 0
    write_status(run, Status(state=state, step=step, num_steps=NUM_STEPS, attempt=2))
    return plan


def write_finished(folder: Path, name: str = "r", hostile: bool = False) -> RunPlan:
    """Write a finished, evaluated run; of a hostile one every text would break a careless page."""
    plan = write_run(folder, name, "finished")
    run = Path(plan.run_folder)
    texts = HOSTILE if hostile else ["What is 2 + 2?", "It is four."]
    (run / "metrics.jsonl").write_text("\n".join(metrics_lines()) + "\n", encoding="utf-8")
    attempts = [
        AttemptRecord(attempt=1, started_at=1e9, ended_at=1e9 + 1_200, first_step=0, last_step=1_200, outcome="killed"),
        AttemptRecord(
            attempt=2,
            started_at=1e9 + 1_300,
            ended_at=1e9 + 2_300,
            first_step=1_000,
            last_step=2_000,
            outcome="finished",
            message=" ".join(texts).encode(errors="replace").decode(),
        ),
    ]
    (run / "attempts.jsonl").write_text("".join(f"{each.model_dump_json()}\n" for each in attempts))
    (run / "data.json").write_text(manifest(texts).model_dump_json(), encoding="utf-8")
    (run / "evaluation.json").write_text(comparison(texts).model_dump_json(), encoding="utf-8")
    write_rows(run, texts)
    return plan


def metrics_lines() -> list[str]:
    """One line per step: a loss of 2 with a spike of 50 and one NaN, seconds that divide 10:80:10, two speeds."""
    lines = []
    for step in range(1, NUM_STEPS + 1):
        loss: Any = {SPIKE_STEP: 50.0, NAN_STEP: "nan"}.get(step, 2.0)
        line = {
            "step": step,
            "train/loss": loss,
            "train/learning_rate": 1e-3 * step / NUM_STEPS,
            "train/grad_norm": 1.0 + 0.1 * (step % 7),
            "speed/tokens_per_second": 1_000 if step <= NUM_STEPS // 2 else 3_000,
            "speed/mfu": 0.25,
            "speed/step_seconds": 1.0,
            "speed/data_seconds": 0.1,
            "speed/compute_seconds": 0.8,
            "speed/other_seconds": 0.1,
            "memory/peak_bytes": 3 * GIB,
            "time/elapsed_seconds": float(step),
        }
        if step % 500 == 0:
            line["evaluation/loss"] = 2.5 - step / 2_000
        lines.append(json.dumps(line))
    return lines


def comparison(texts: list[str]) -> Comparison:
    """40 answered rows, groups, retain rows that became worse, labels, a gate, a metric that failed, a look."""
    noise = np.random.default_rng(0).normal(0, 0.1, 40)
    group, label = (text.encode(errors="replace").decode() for text in (texts[0], texts[-1]))
    matrix = LabelResult(
        labels=("yes", label),
        confusion=((17, 3, 0), (1, 18, 1)),
        accuracy=0.875,
        macro_f1=0.88,
        weighted_f1=0.88,
        macro_precision=0.9,
        macro_recall=0.87,
    )
    lines = [
        line_of((LOSS, 2 + noise, 1 + 2 * noise), (EXACT, BASE_RIGHT, TUNED_RIGHT)),
        line_of((LOSS, 2 + noise[:20], 1 + noise[:20]), (EXACT, BASE_RIGHT[:20], TUNED_RIGHT[:20]), group=group),
        line_of((LOSS, 1 + noise, 1.4 + noise / 2), (EXACT, [1] * 12, [1] * 12), name="retain"),
    ]
    lines[0] = lines[0].model_copy(update={"base_labels": matrix, "tuned_labels": matrix})
    tested = adjusted(lines)
    failure = MetricFailure(set="validation", metric=group, num_rows=3, first_row=label, error=f"ValueError: {label}")
    return Comparison(
        lines=tested,
        samples=(),
        gate=gate_results(tested, EvaluationSection(gate=list(GATE))),
        failures=(failure,),
        judge=JudgeResult(
            model=group,
            mode="pairwise",
            num_rows=40,
            num_identical=0,
            num_unparsed=1,
            wins=30,
            losses=4,
            ties=5,
            num_both=39,
            num_agreed=35,
            num_named=70,
            num_first=50,
            position_p=0.0004,
            num_replies=80,
        ),
        people=(
            PeopleResult(
                kind="choice",
                raters=(RaterResult(rater=group, num_rated=9, num_first=5, num_named=8),),
                num_rows=9,
                num_shared=0,
                num_outdated=0,
                alpha=None,
            ),
        ),
        test_looks=(TestLook(run=group, at="2026-01-02T03:04:05+00:00"),),
    )


def line_of(*values: Any, name: str = "validation", group: str | None = None) -> ComparisonLine:
    """Return a line of (metric, base, tuned)."""
    results = []
    for metric, base, tuned in values:
        at = np.arange(len(base))
        held = MetricValues(metric, at, np.asarray(base, float), np.asarray(tuned, float), np.ones(len(base)))
        results.append(metric_result(held, held.tested(at, np.ones(len(base), bool)), 0.03))
    score = Score(loss=1.0, num_supervised_tokens=1, num_exact=0, num_answered=1)
    return ComparisonLine(set=name, group=group, num_rows=40, base=score, tuned=score, metrics=tuple(results))


def write_rows(run: Path, texts: list[str], count: int = 40) -> None:
    """Write rows.parquet: the answers of `comparison`, repeated up to `count` rows."""
    shown = [text.encode(errors="replace").decode() for text in texts]
    at = range(count)
    columns = {
        "set": ["validation"] * count,
        "document": list(at),
        "cluster": list(at),
        "supervised_tokens": [5] * count,
        "base/loss": [2.0] * count,
        "tuned/loss": [1.0] * count,
        "key": [f"{row:064x}" for row in at],
        "prompt": [f"{row}: {shown[row % len(shown)]}" for row in at],
        "messages": [json.dumps([{"role": "user", "content": f"{row}: {shown[row % len(shown)]}"}]) for row in at],
        "expected": [shown[(row + 1) % len(shown)] for row in at],
        "base/answer": [shown[(row + 2) % len(shown)] for row in at],
        "tuned/answer": [shown[(row + 3) % len(shown)] for row in at],
        "base/exact_match": [float(BASE_RIGHT[row % 40]) for row in at],
        "tuned/exact_match": [float(TUNED_RIGHT[row % 40]) for row in at],
    }
    (run / "evaluation").mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), run / "evaluation" / "rows.parquet")


def manifest(texts: list[str]) -> DataManifest:
    """100 rows, of which 90 are kept."""
    text = texts[0].encode(errors="replace").decode()
    counts = SplitCounts(num_rows=40, num_tokens=400, num_supervised_tokens=100, num_packs=4, fill=0.9)
    return DataManifest(
        version="0.1.0",
        content_hash="0123456789abcdef",
        tokenizer="/tokenizer",
        vocab_size=10,
        template="tokenizer",
        stop_token="</s>",
        length_tokens=256,
        settings={},
        shares=(0.5, 0.4, 0.1),
        shares_reason="given",
        sources=(SourceRecord(path=text, sha256="f" * 64, rows=100, format="messages", use="train"),),
        splits={"train": counts, "validation": counts, "test": counts},
        fields=(),
        ledger=Ledger(
            rows_in=Entry(rows=100, tokens=1_000),
            losses={"duplicate": Entry(rows=10, tokens=100)},
            kept={
                "train": Entry(rows=40, tokens=400),
                "validation": Entry(rows=40, tokens=400),
                "test": Entry(rows=10, tokens=100),
            },
        ),
        notes=(text,),
        test_rows="a" * 16,
    )
