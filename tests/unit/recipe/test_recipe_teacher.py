"""The teacher of a distillation: what is refused before anything runs, and where its weights are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from packhorse.data.render.teacher_tokenizer import check_teacher_tokenizer
from packhorse.errors import UserError
from packhorse.plan.run_plan import Topology
from packhorse.plan.teacher import check_teacher, teacher_facts
from packhorse.recipe.rules.training import rule_findings
from packhorse.recipe.schema import Recipe


def recipe(teacher: dict[str, Any], model: dict[str, Any] | None = None, **objective: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "model": model or {"id": "o/student"},
            "objective": {"kind": "distil", "teacher": teacher, **objective},
            "data": {"sources": [{"path": "r.jsonl"}]},
            "optimizer": {"learning_rate": 1e-4},
            "epochs": 1,
        }
    )


@pytest.mark.parametrize(
    ("teacher", "objective", "fact"),
    [
        ({}, {}, "objective.teacher gives neither id nor path."),
        ({"id": "o/t", "path": "runs/t"}, {}, "objective.teacher gives id and path."),
        (
            {"path": "runs/t", "revision": "main"},
            {},
            "objective.teacher.revision is main, but there is no objective.teacher.id.",
        ),
        ({"id": "o/t"}, {"divergence": "jsd"}, "objective.divergence is jsd, and objective.top is 64."),
        (
            {"id": "o/t"},
            {"divergence": "reverse", "top": 8},
            "objective.divergence is reverse, and objective.top is 8.",
        ),
        ({"id": "o/t"}, {"divergence": "reverse", "top": "all"}, None),
        ({"id": "o/t", "revision": "main"}, {}, None),
    ],
)
def test_the_teacher_is_one_model_and_what_is_biased_is_refused(
    teacher: dict[str, Any], objective: dict[str, Any], fact: str | None
) -> None:
    found = [finding.fact for finding in rule_findings(recipe(teacher, **objective))]
    assert found == ([] if fact is None else [fact])


@pytest.mark.parametrize(
    ("top", "engine", "sequence", "fact"),
    [
        ("all", "zero3", 1, "objective.top is all, and parallel.engine is zero3."),
        ("all", "zero1", 1, "objective.top is all, and parallel.engine is zero1."),
        ("all", "fsdp2", 2, "objective.top is all, and parallel.sequence is 2."),
        ("all", "hsdp", 1, None),
        (64, "zero3_offload", 2, None),
    ],
)
def test_a_resident_teacher_is_refused_where_it_cannot_run(
    top: Any, engine: Any, sequence: int, fact: str | None
) -> None:
    topology = Topology(
        device="cuda", engine=engine, num_nodes=1, processes_per_node=4, threads_per_process=1, sequence=sequence
    )
    wanted = recipe({"id": "o/t"}, top=top)
    if fact is None:
        check_teacher(wanted, topology)
        return
    with pytest.raises(UserError, match="objective.top: 64") as refused:
        check_teacher(wanted, topology)
    assert str(refused.value).startswith(fact)


def run_folder(folder: Path, result: str, **model: Any) -> Path:
    (folder / result).mkdir(parents=True)
    plan = {"base_model": "/base", "recipe": {"model": {"id": "o/base", "revision": "abc", **model}}}
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return folder


def test_an_earlier_run_is_its_model_or_its_adapter_on_the_base(tmp_path: Path) -> None:
    full = teacher_facts(recipe({"path": str(run_folder(tmp_path / "full", "model"))}))
    assert (full.model.path, full.adapter) == (str(tmp_path / "full" / "model"), None)
    lora = teacher_facts(recipe({"path": str(run_folder(tmp_path / "lora", "adapter"))}))
    assert (lora.model.id, lora.model.revision, lora.adapter) == ("o/base", "abc", str(tmp_path / "lora" / "adapter"))
    local = teacher_facts(recipe({"path": str(run_folder(tmp_path / "local", "adapter", id=None, path="base"))}))
    assert local.model.path == "/base", "absolute, as the plan of that run has it"
    plain = teacher_facts(recipe({"id": "o/t", "revision": "main"}))
    assert (plain.model.id, plain.model.revision, plain.adapter) == ("o/t", "main", None)


def test_values_of_the_environment_stay_out_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHERS", str(tmp_path))
    run_folder(tmp_path / "full", "model")
    run_folder(tmp_path / "lora", "adapter")
    assert teacher_facts(recipe({"path": "${env:TEACHERS}/full"})).model.path == "${env:TEACHERS}/full/model"
    assert teacher_facts(recipe({"path": "${env:TEACHERS}/lora"})).adapter == "${env:TEACHERS}/lora/adapter"


@pytest.mark.parametrize(
    ("result", "model", "message"),
    [("logs", {}, "has not finished"), ("adapter", {"new_tokens": ["<call>"]}, "new tokens")],
)
def test_a_run_without_a_model_to_load_is_refused(
    result: str, model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        teacher_facts(recipe({"path": str(run_folder(tmp_path / "run", result, **model))}))


def tokenizer(folder: Path, *tokens: str) -> Path:
    folder.mkdir()
    Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=tokens[0])).save(
        str(folder / "tokenizer.json")
    )
    return folder


@pytest.mark.parametrize("downloads", [True, False])
def test_tokenizers_must_mean_the_same_by_each_id(downloads: bool, tmp_path: Path) -> None:
    student = {"path": str(tokenizer(tmp_path / "student", "?", "a", "b"))}
    same = {"path": str(tokenizer(tmp_path / "same", "?", "a", "b"))}
    other = {"path": str(tokenizer(tmp_path / "other", "?", "b", "a"))}
    more = {"path": str(tokenizer(tmp_path / "more", "?", "a", "b", "c"))}
    check_teacher_tokenizer(recipe(same, student), downloads)
    with pytest.raises(
        UserError, match="differ in 2 tokens, such as 'a': id 1 in the student's, id 2 in the teacher's"
    ):
        check_teacher_tokenizer(recipe(other, student), downloads)
    with pytest.raises(UserError, match="differ in 1 tokens, such as 'c': absent in the student's, id 3"):
        check_teacher_tokenizer(recipe(more, student), downloads)
    with pytest.raises(UserError, match="such as '<x>': a new token in the student's, absent in the teacher's"):
        check_teacher_tokenizer(recipe(same, student | {"new_tokens": ["<x>"]}), downloads)
