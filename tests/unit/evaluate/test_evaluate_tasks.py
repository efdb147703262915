"""`packhorse evaluate --tasks`: the user's tasks in lm-eval's form, against answers counted by hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluate_cases import ROWS
from transformers import LlamaForCausalLM

from packhorse.errors import UserError
from packhorse.evaluate.compare import Evaluation
from packhorse.evaluate.models import Subject
from packhorse.evaluate.results import Comparison
from packhorse.recipe.evaluation import EvaluationSection
from packhorse.report.evaluation_words import headline_of
from packhorse.workflows import evaluate as workflow

pytest.importorskip("lm_eval")
# Only here: these import lm-eval.
from packhorse.evaluate.tasks.compare_tasks import measure_tasks, with_tasks
from packhorse.evaluate.tasks.task_files import load_tasks

SAY = """task: say
dataset_path: json
dataset_kwargs: {data_files: {test: say.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 12, until: []}
metric_list:
  - metric: exact_match
"""
CHOOSE = """include: choice.yaml
task: choose
dataset_kwargs: {data_files: {test: choose.jsonl}}
doc_to_text: "{{question}}"
"""
CHOICE = """dataset_path: json
test_split: test
output_type: multiple_choice
doc_to_target: "{{right}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm}
"""


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("say", SAY), ("choose", CHOOSE), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(text)
    said = [{"question": row["messages"][0]["content"], "answer": row["messages"][1]["content"]} for row in ROWS]
    others = [row["answer"] for row in (*said[1:], said[0])]
    chosen = [{**row, "choices": sorted([row["answer"], other])} for row, other in zip(said, others)]
    chosen = [{**row, "right": row["choices"].index(row["answer"])} for row in chosen]
    for name, rows in (("say", [*said, *said[:3]]), ("choose", chosen)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def learnt(tiny, tokenizer):
    """Learns all rows by heart, with the chat template."""
    rows = [
        tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        for row in ROWS
    ]
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows])
    labels = torch.full_like(ids, -100)
    for at, row in enumerate(rows):
        mask = torch.tensor(row["assistant_masks"]).bool()
        labels[at, : len(mask)][mask] = ids[at, : len(mask)][mask]
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-2)
    tiny.train()
    for _ in range(150):
        tiny(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tiny.eval()


def test_each_task_and_metric_has_a_verdict(tasks, tmp_path, tiny, tokenizer, request_of):
    tiny.save_pretrained(tmp_path / "base")
    learnt(tiny, tokenizer).save_pretrained(tmp_path / "model")
    subject = Subject(request_of(tmp_path / "base"), tmp_path / "model", len(tokenizer))
    empty = Evaluation(Comparison(lines=(), samples=()), [])
    evaluation = with_tasks(empty, measure_tasks(load_tasks(tasks), subject, tokenizer), EvaluationSection())
    lines = {line.set: line for line in evaluation.comparison.lines}
    assert {name: [(each.metric, each.num_pairs) for each in line.metrics] for name, line in lines.items()} == {
        "task:choose": [("acc", 16), ("acc_norm", 16)],
        "task:say": [("exact_match", 19)],
    }
    (said,) = lines["task:say"].metrics
    # Three rows are there twice, so there are 16 independent ones, and no McNemar of 19.
    assert (said.num_clusters, said.test) == (16, "sign-flip permutation of clusters")
    assert (said.base, said.tuned, said.verdict) == (0, 1, "better")
    rows = [row for row in evaluation.rows if row["set"] == "task:say"]
    assert all(row["tuned/answer"] == row["expected"] != row["base/answer"] for row in rows)
    accuracy = lines["task:choose"].result("acc")
    assert (accuracy.test, accuracy.unit, accuracy.tuned) == ("exact McNemar", "%", 1)
    # Chosen without lm-eval: the likelier of both answers after the chat prompt.
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    right = 0
    for row, other in zip(ROWS, (*ROWS[1:], ROWS[0])):
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        sums = []
        for answer in (row["messages"][1]["content"], other["messages"][1]["content"]):
            ids = torch.tensor([tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits[0, :-1].log_softmax(-1)
            sums.append(sum(float(logs[at - 1, ids[0, at]]) for at in range(len(before), ids.shape[1])))
        right += sums[0] > sums[1]
    assert 0 < right < 16
    assert accuracy.base == right / 16
    assert headline_of(evaluation.comparison).sentence.startswith("The tuned model is better than its base: acc")
    assert Comparison.model_validate_json(evaluation.comparison.model_dump_json()).lines[0].metrics


@pytest.mark.parametrize(
    ("file", "wrong", "expected"),
    [
        ("say.yaml", ("doc_to_text", "doc_to_txt"), r"say.yaml:6: there is no key `doc_to_txt`.*\n.*\n.*`doc_to_text`"),
        (
            "say.yaml",
            ("exact_match", "exact_mach"),
            r"say.yaml:10: there is no metric `exact_mach`.*(\n.*)*`exact_match`",
        ),
        ("say.yaml", ("{{question}}", "{{qestion}}"), r"say.yaml:6: lm-eval cannot load say: 'qestion' is undefined"),
        ("say.yaml", ("say.jsonl", "sag.jsonl"), r"say.yaml: lm-eval cannot load say: .*sag.jsonl"),
        ("say.yaml", ("generate_until", "generate"), r"say.yaml:5: lm-eval cannot load say: .*'generate'"),
        ("say.yaml", ("test_split: test", "test_split: tests"), r"say.yaml:4: lm-eval cannot load say: no key .tests"),
        ("say.yaml", ("exact_match", "bleu"), r"say.yaml:9: the metric `bleu` of say has no value for each row"),
        ("say.yaml", ("task: say", "tag: say"), r"say.yaml: it has neither a key `task` nor `group`"),
        ("say.yaml", ("task: say", "task: choose"), r"say.yaml:1: the name `choose` is also in .*choose.yaml"),
        ("say.yaml", ("  - metric", " - [metric"), r"say.yaml:1\d: it is no YAML: .*"),
        ("choose.yaml", ("choice.yaml", "chioce.yaml"), r"choose.yaml:1: there is no file chioce.yaml"),
        ("say.jsonl", ('"question"', '"question'), r"say.yaml.*: lm-eval cannot load say: .*JSON"),
    ],
)
def test_a_mistake_is_named_before_a_model_is_loaded(tasks, file, wrong, expected):
    text = (tasks / file).read_text()
    assert wrong[0] in text
    (tasks / file).write_text(text.replace(*wrong, 1))
    with pytest.raises(UserError, match=expected):
        load_tasks(tasks)


def test_a_choice_longer_than_the_context_is_named(tasks, tmp_path, tiny, tokenizer, request_of):
    tiny.save_pretrained(tmp_path / "base")
    subject = Subject(request_of(tmp_path / "base"), tmp_path / "base", len(tokenizer))
    rows = (tasks / "choose.jsonl").read_text().splitlines()
    rows[4] = json.dumps({**json.loads(rows[4]), "choices": ["kiwi!", "plum! " * 130]})
    (tasks / "choose.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"row 5 of choose has a choice of \d\d\d tokens; .* context has 128"):
        measure_tasks(load_tasks(tasks / "choose.yaml"), subject, tokenizer)


def test_a_file_alone_is_measured_alone(tasks, tmp_path):
    assert list(load_tasks(tasks / "choose.yaml")) == ["choose"]
    with pytest.raises(UserError, match="which does not exist"):
        load_tasks(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="0 files"):
        load_tasks(tmp_path / "empty")


def test_without_the_extra_nothing_is_opened(tasks, monkeypatch):
    monkeypatch.setattr(workflow, "find_spec", lambda _: None)
    monkeypatch.setattr(workflow, "_require_inputs", lambda _: None)
    with pytest.raises(UserError, match=r"(?s)lm-eval is not installed.*pip install 'packhorse\[tasks\]'"):
        workflow.evaluate_run(SimpleNamespace(), workflow.EvaluationRequest(test=True, tasks=Path(tasks)))
