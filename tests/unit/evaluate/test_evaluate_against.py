"""Other models than those of the run: another run, a model folder, models behind endpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from evaluate_cases import ROWS, chat_of
from transformers import LlamaForCausalLM

from packhorse.errors import UserError
from packhorse.evaluate import evaluate_run, sides
from packhorse.evaluate.endpoint import EndpointClient
from packhorse.evaluate.endpoint_answers import openai_messages
from packhorse.evaluate.evaluate_run import Means, compare_on_held_out, compare_on_test
from packhorse.evaluate.models import Subject
from packhorse.evaluate.score import document_losses, total_loss
from packhorse.recipe.evaluation import EvaluationSection, GateCriterion
from packhorse.recipe.schema import DataSection, Source
from packhorse.workflows import evaluate as workflow
from prepared import write_prepared

LOSS_GATE = [GateCriterion(metric="loss", min_gain=0.5)]


@pytest.fixture
def write_model(tmp_path, tiny_config, tokenizer):
    def write(name: str, seed: int, own_tokenizer: Any = None) -> Path:
        torch.manual_seed(seed)
        LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / name)
        (own_tokenizer or tokenizer).save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def write_split(tmp_path, tokenizer):
    def write(name: str, rows: list[dict[str, Any]], split: str = "validation") -> Path:
        encoded = [
            tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
            for row in rows
        ]
        made = [(each["input_ids"], each["assistant_masks"], row) for each, row in zip(encoded, rows)]
        return write_prepared(tmp_path / name, {split: made}, len(tokenizer), fields=("language",))

    return write


@pytest.fixture
def make_run(tmp_path, write_model, request_of, tokenizer, monkeypatch):
    """Finished runs of full fine-tuning on one base; a run's name is in its plan."""
    subjects = {}

    def make(name: str, data: Path, tuned: Path, content_hash: str = "same") -> Any:
        base = tmp_path / "base" if (tmp_path / "base").exists() else write_model("base", 1)
        subjects[name] = Subject(request_of(base), tuned, len(tokenizer))
        settings = EvaluationSection(max_answered_rows=6, max_new_tokens=4, gate=LOSS_GATE)
        return SimpleNamespace(
            run_folder=str(tmp_path / "runs" / name),
            base_model=None,
            recipe=SimpleNamespace(data=DataSection(sources=[Source(path="x")]), evaluation=settings),
            data=SimpleNamespace(folder=str(data), content_hash=content_hash),
        )

    monkeypatch.setattr(evaluate_run, "subject_of", lambda plan: (subjects[Path(plan.run_folder).name], tokenizer))
    return make


def loss_of(folder: Path, documents: Any) -> float:
    return total_loss(document_losses(LlamaForCausalLM.from_pretrained(folder).eval(), documents)).nats_per_token


def test_another_run_replaces_the_base_on_the_rows_that_both_hold_out(make_run, write_split, write_model, form):
    mine, theirs = write_model("mine", 2), write_model("theirs", 3)
    first = make_run("first", write_split("data", ROWS[:6]), mine)
    second = make_run("second", write_split("other", [ROWS[9], *ROWS[2:5]]), theirs, "another")
    evaluation = compare_on_held_out(first, Means(against=second))
    shared = evaluate_run.read_sets(write_split("shared", ROWS[2:5]), EvaluationSection(), form)[0].documents
    (line,) = evaluation.comparison.lines
    assert (line.num_rows, evaluation.comparison.reference, evaluation.comparison.gate) == (3, "second", ())
    assert (line.base.loss, line.tuned.loss) == pytest.approx(
        (loss_of(theirs, shared), loss_of(mine, shared)), abs=1e-5
    )
    assert {row["prompt"] for row in evaluation.rows} == {row["messages"][0]["content"] for row in ROWS[2:5]}

    apart = make_run("apart", write_split("apart", ROWS[10:12]), theirs, "another")
    with pytest.raises(UserError, match="hold out 6 and 2 rows, and none of them is in both"):
        compare_on_held_out(first, Means(against=apart))
    sealed = make_run("sealed", write_split("sealed", ROWS[:2], "test"), mine)
    with pytest.raises(UserError, match="different prepared data"):
        compare_on_test(sealed, means=Means(against=second))


def test_a_folder_replaces_the_base_and_the_result_of_the_run_stays(
    make_run, write_split, write_model, form, monkeypatch
):
    mine, other = write_model("mine", 2), write_model("other", 3)
    plan = make_run("first", write_split("data", ROWS[:4]), mine)
    monkeypatch.setattr(workflow, "require_data", lambda plan: plan.data)
    comparison = workflow.evaluate_run(plan, workflow.EvaluationRequest(against=str(other)))
    documents = evaluate_run.read_sets(Path(plan.data.folder), EvaluationSection(), form)[0].documents
    assert comparison.lines[0].base.loss == pytest.approx(loss_of(other, documents), abs=1e-5)
    run = Path(plan.run_folder)
    assert json.loads((run / "evaluation" / "against-other.json").read_text())["reference"] == "other"
    assert (run / "evaluation" / "against-other.parquet").is_file()
    assert not (run / "evaluation.json").exists()
    with pytest.raises(UserError, match="nowhere, which does not exist"):
        workflow.evaluate_run(plan, workflow.EvaluationRequest(against=str(run / "nowhere")))


def test_with_another_tokenizer_only_answers_are_compared(make_run, write_split, write_model, tokenizer):
    mine = write_model("mine", 2)
    own = type(tokenizer).from_pretrained(mine)
    own.add_tokens(["fruit"])
    plan = make_run("first", write_split("data", ROWS[:3]), mine)
    with pytest.raises(UserError, match="embedding"):  # the model of a folder must fit its own tokenizer
        compare_on_held_out(plan, Means(against=write_model("small", 3, own)))
    grown = LlamaForCausalLM.from_pretrained(mine)
    grown.resize_token_embeddings(len(own), mean_resizing=False)
    grown.save_pretrained(mine.with_name("small"))
    comparison = compare_on_held_out(plan, Means(against=mine.with_name("small"))).comparison
    (line,) = comparison.lines
    assert math.isnan(line.base.loss)
    assert math.isnan(line.tuned.loss)
    assert line.tuned.num_answered == 3
    assert "tokenizers differ" in comparison.notes[0]


def client(name: str, answer: Callable[[list[dict[str, Any]]], httpx.Response]) -> EndpointClient:
    def respond(request: httpx.Request) -> httpx.Response:
        return answer(json.loads(request.content)["messages"])

    return EndpointClient("http://served/v1", name, transport=httpx.MockTransport(respond), sleep=lambda _: None)


def says(text: str) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})


def test_served_models_are_compared_without_weights_and_answers_are_kept(
    make_run, write_split, write_model, monkeypatch
):
    plan = make_run("first", write_split("data", ROWS[:3]), write_model("mine", 2))
    right = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in ROWS}
    asked: list[str] = []

    def knows(messages: list[dict[str, Any]]) -> httpx.Response:
        asked.append(messages[-1]["content"])
        return says(right[messages[-1]["content"]]) if len(asked) != 2 else httpx.Response(400, text="too long")

    monkeypatch.setattr(sides, "load_base", None)  # no weights are loaded
    monkeypatch.setattr(sides, "load_tuned", None)
    monkeypatch.setattr("packhorse.evaluate.endpoint_answers.REQUESTS_AT_ONCE", 1)
    means = Means(endpoint=client("tuned", knows), base_endpoint=client("base", lambda _: says("?")))
    with pytest.raises(UserError, match="HTTP 400: too long"):
        compare_on_held_out(plan, means)
    first = len(asked)
    comparison = compare_on_held_out(plan, means).comparison
    (line,) = comparison.lines
    assert (line.base.num_exact, line.tuned.num_exact, line.tuned.num_answered) == (0, 3, 3)
    assert "endpoints" in comparison.notes[0]
    assert asked[0] not in asked[first:], "an answer that had arrived is not requested again"
    answered = len(asked)
    compare_on_held_out(plan, means)
    assert len(asked) == answered


def test_a_served_tuned_model_beside_a_local_base_has_losses_too(make_run, write_split, write_model):
    plan = make_run("first", write_split("data", ROWS[:3]), write_model("mine", 2))
    local = compare_on_held_out(plan).comparison.lines[0]
    served = compare_on_held_out(plan, Means(endpoint=client("tuned", lambda _: says("fig!")))).comparison
    assert (served.lines[0].base, served.notes) == (local.base, ())
    assert served.lines[0].tuned.loss == pytest.approx(local.tuned.loss, abs=1e-6)
    assert {sample.tuned for sample in served.samples} == {"fig!"}


def test_calls_of_tools_are_sent_in_openais_form():
    call = {"type": "function", "function": {"name": "price", "arguments": {"of": "fig"}}}
    chat = [
        {"role": "user", "content": "how much?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call], "reasoning_content": "hm"},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
    ]
    sent = list(openai_messages([*chat, *chat_of("and?", "")[:1]]))
    assert [turn["role"] for turn in sent] == ["user", "assistant", "tool", "tool", "user"]
    calls = sent[1]["tool_calls"]
    assert [json.loads(each["function"]["arguments"]) for each in calls] == [{"of": "fig"}] * 2
    assert [turn["tool_call_id"] for turn in sent[2:4]] == [each["id"] for each in calls]
    assert calls[0]["id"] != calls[1]["id"]
    assert "reasoning_content" not in sent[1]
