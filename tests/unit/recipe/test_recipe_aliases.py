"""Words of other trainers get the line that a recipe has instead; the line is one that the recipe takes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from packhorse.errors import UserError
from packhorse.recipe import aliases
from packhorse.recipe.evaluation import EarlyStoppingSection
from packhorse.recipe.load import load_recipe
from packhorse.recipe.schema import recipe_view
from packhorse.yaml_source.nodes import Node

TABLE: dict[str, dict[str, Any]] = tomllib.loads(aliases.TABLE.read_text(encoding="utf-8"))
FIELDS = {path for path, _ in recipe_view().fields()}
BASE = """
name: x
model: {path: m}
data: {sources: [{path: rows.jsonl}]}
optimizer: {learning_rate: 1e-4}
steps: 1
"""


def mistakes(folder: Path, text: str) -> dict[str, str]:
    """Fix of each mistake of a recipe, by its fact."""
    (folder / "r.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(folder / "r.yaml"))
    return {mistake.fact: mistake.fix for mistake in caught.value.mistakes}


def field_of(line: str) -> str:
    """`data.sources[0].columns: {a: b}` -> `data.sources.columns`"""
    return re.sub(r"\[\d+\]", "", line.partition(":")[0])


def test_there_are_at_least_150_names() -> None:
    names = sum(len(TABLE[kind]) for kind in ("fields", "lines", "sentences"))
    assert names + sum(map(len, TABLE["values"].values())) >= 150


def test_every_counterpart_is_a_field_of_the_recipe() -> None:
    lines = [*TABLE["fields"].values(), *TABLE["lines"].values()]
    lines += [line for values in TABLE["values"].values() for line in values.values()]
    in_sources = {f"data.sources.{name}" for name in ("path", "id", "split", "columns")}
    in_optional = {f"evaluation.early_stopping.{name}" for name in EarlyStoppingSection.model_fields}
    assert {field_of(line) for line in lines} - FIELDS - in_sources - in_optional == set()


def test_no_name_of_another_trainer_is_a_field_at_the_top_of_a_recipe() -> None:
    top = {path for path in FIELDS if "." not in path}
    assert {name for kind in ("fields", "lines", "sentences") for name in TABLE[kind]} & top <= {"tf32"}


def test_every_name_is_refused_with_its_counterpart(tmp_path: Path) -> None:
    names = {name: kind for kind in ("fields", "lines", "sentences") for name in TABLE[kind] if name != "tf32"}
    found = mistakes(tmp_path, BASE + "".join(f"{name.upper()}: 7\n" for name in names))
    for name, kind in names.items():
        fix = found[f"{name.upper()} is not a field of the recipe."]
        expected = {
            "fields": f"write `{TABLE[kind][name]}: 7`.",
            "lines": f"write `{TABLE[kind][name]}`.",
            "sentences": f"remove {name.upper()}: {TABLE[kind][name]}.",
        }
        assert fix == expected[kind]


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("deepspeed: zero3.json", "write `parallel.engine: zero3`."),
        ("parallel: {tensor: 2}", "remove parallel.tensor: Packhorse has no tensor parallelism; parallel.engine fsdp2"),
        ("parallel: {expert_parallel_size: 2}", "remove parallel.expert_parallel_size: Packhorse has no expert"),
        ("precision: fp8", "write `precision: bf16`: Packhorse computes products in 16 bits"),
        ("save_steps: 100", "write `checkpoint.every_steps: 100`."),
        ("load_in_4bit: false", "remove load_in_4bit."),
        ("per-device-train-batch-size: 4", "remove per-device-train-batch-size: batch.packs is the number of packs"),
        ("optimizer.nam: adamw", "write `optimizer.name`"),
    ],
)
def test_examples(tmp_path: Path, line: str, fix: str) -> None:
    text = BASE + line if "." not in line.partition(":")[0] else BASE.replace("1e-4}", "1e-4, nam: adamw}")
    assert [given for given in mistakes(tmp_path, text).values() if given.startswith(fix)], mistakes(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "fix"),
    [
        ("model: {path: m}", "model: org/name", "write `model.id: org/name`."),
        ("model: {path: m}", "model: ./folder", "write `model.path: ./folder`."),
        ("data: {sources: [{path: rows.jsonl}]}", "data: rows.jsonl", "write `data.sources: [{path: rows.jsonl}]`."),
        ("steps: 1", "steps: 1\nmethod: LoRA", "write `method.kind: lora`."),
        ("steps: 1", "steps: 1\nmethod: freeze", "write `method: partial`."),
        ("{path: m}", "{path: m, dtype: bf16}", "write `model.dtype: bfloat16`."),
        ("steps: 1", "steps: 1\nprecision: BF16", "write `precision: bf16`."),
        ("1e-4}", "1e-4, name: adamw_torch}", "write `optimizer.name: adamw`."),
        ("steps: 1", "steps: 1\nschedule: {name: constant_with_warmup}", "write `schedule.name: constant`."),
    ],
)
def test_values_of_other_trainers(tmp_path: Path, old: str, new: str, fix: str) -> None:
    assert list(mistakes(tmp_path, BASE.replace(old, new)).values()) == [fix]


def test_a_name_that_nobody_knows_is_left_to_the_closest_field() -> None:
    assert aliases.fix_for_key(("leanring_rate",), Node(1, "r.yaml")) is None


def test_every_value_is_refused_with_its_counterpart() -> None:
    for key, values in TABLE["values"].items():
        for value, line in values.items():
            reason = TABLE["reasons"].get(key, {}).get(value)
            fix = f"write `{line}`: {reason}" if reason else f"write `{line}`"
            assert aliases.fix_for_value(tuple(key.split(".")), Node(value.upper(), "r.yaml")) == fix


def test_a_required_field_under_another_name_is_reported_once(tmp_path: Path) -> None:
    text = BASE.replace("learning_rate: 1e-4", "lr: 1e-4")
    assert list(mistakes(tmp_path, text).values()) == ["write `optimizer.learning_rate: 1e-4`."]


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("ckpt_steps", "steps"),
        ("decay_steps", "steps"),
        ("enable_jit_checkpoint", "checkpoint"),
        ("eval_accumulation_steps", "evaluation"),
        ("schedule_free", "schedule"),
        ("mixed_precision_mode", "precision"),
        ("base_revision", "precision"),
        ("optim_args", "optimizer"),
        ("parallelism_config", "parallel"),
    ],
)
def test_a_name_that_is_only_alike_gets_no_hint(tmp_path: Path, key: str, wrong: str) -> None:
    (fix,) = mistakes(tmp_path, f"{BASE}{key}: 3\n").values()
    assert fix.startswith("remove it, or use one of"), f"{key} is taken for {wrong}"


@pytest.mark.parametrize(
    ("field", "value", "wrong"),
    [
        ("schedule.name", "inverse", "linear"),
        ("checkpoint.on_full", "constant", "continue"),
    ],
)
def test_a_value_that_is_only_alike_gets_no_hint(tmp_path: Path, field: str, value: str, wrong: str) -> None:
    section, name = field.split(".")
    (fix,) = mistakes(tmp_path, f"{BASE}{section}: {{{name}: {value}}}\n").values()
    assert f": {wrong}`" not in fix


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("modle", "model"), ("epocs", "epochs"), ("stpes", "steps"), ("optimiser", "optimizer"), ("sed", "seed"),
     ("checkpoints", "checkpoint"), ("run_folder", "runs_folder"), ("trak", "track"), ("precison", "precision")],
)  # fmt: skip
def test_a_typing_mistake_gets_the_name(tmp_path: Path, typed: str, meant: str) -> None:
    assert f"write `{meant}`." in mistakes(tmp_path, f"{BASE}{typed}: 3\n").values()
