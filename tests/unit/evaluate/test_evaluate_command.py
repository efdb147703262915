"""`packhorse evaluate RUN --test`: opens the sealed rows once, and every report shows how often that was done."""

import json
from types import SimpleNamespace

import pytest
from evaluate_cases import ROWS
from opinion_cases import judge_server, said
from pyarrow import parquet

from packhorse.cli import evaluate as command
from packhorse.durable import append_line
from packhorse.errors import UserError
from packhorse.evaluate import evaluate_run
from packhorse.evaluate.models import Subject
from packhorse.evaluate.ratings import Rating
from packhorse.evaluate.stored import read_stored
from packhorse.recipe.evaluation import EvaluationSection, GateCriterion, JudgeSection
from packhorse.recipe.schema import DataSection, Source
from packhorse.workflows import evaluate as workflow
from packhorse.workflows import judge as judge_workflow


@pytest.fixture
def make_run(tmp_path, tiny, tokenizer, request_of, monkeypatch):
    """Finished runs on one prepared data folder; all that a plan is asked for here."""
    tiny.save_pretrained(tmp_path / "weights")
    plans = {}

    def make(name, data, **settings):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        recipe = SimpleNamespace(
            data=DataSection(sources=[Source(path="x")]),
            evaluation=EvaluationSection(group_by="language", max_answered_rows=2, max_new_tokens=4, **settings),
        )
        found = SimpleNamespace(folder=str(data))
        plans[name] = SimpleNamespace(run_folder=str(folder), recipe=recipe, data=found, base_model=None)
        return folder

    subject = Subject(request_of(tmp_path / "weights"), tmp_path / "weights", len(tokenizer))
    monkeypatch.setattr(command, "open_run", plans.__getitem__)
    monkeypatch.setattr(workflow, "require_data", lambda plan: plan.data)
    monkeypatch.setattr(evaluate_run, "subject_of", lambda plan: (subject, tokenizer))
    return make


def kept(folder, name):
    return json.loads((folder / name).read_text())


def shown(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_the_test_rows_are_measured_once_and_every_report_says_so(make_run, write_data, capsys):
    data = write_data(validation=ROWS[:4], test=ROWS[4:6])
    first, second = make_run("first", data), make_run("second", data)
    assert command.evaluate("first") == 0
    assert "the test set was opened" not in shown(capsys)
    assert kept(first, "evaluation.json")["num_test_looks"] == 0
    assert not (first / "evaluation-test.json").exists()

    assert command.evaluate("first", test=True) == 0
    text = shown(capsys)
    assert "the test set was opened once: first (" in text
    assert "first/evaluation-test.json" in text
    found = kept(first, "evaluation-test.json")
    assert {line["set"] for line in found["lines"]} == {"test"}
    assert [line["num_rows"] for line in found["lines"]] == [2, 2]
    assert found["num_test_looks"] == 1

    with pytest.raises(UserError, match="opened once: first"):
        command.evaluate("second", test=True)
    assert not (second / "evaluation-test.json").exists()

    assert command.evaluate("second", test=True, again=True) == 0
    assert "opened 2 times: first (" in shown(capsys)
    assert [look["run"] for look in kept(second, "evaluation-test.json")["test_looks"]] == ["first", "second"]
    assert command.evaluate("first") == 0
    assert "opened 2 times" in shown(capsys)
    assert kept(first, "evaluation.json")["num_test_looks"] == 2
    assert {line["set"] for line in kept(first, "evaluation.json")["lines"]} == {"validation"}


def test_answers_and_values_are_kept_by_row(make_run, write_data):
    folder = make_run("first", write_data(validation=ROWS[:2], test=ROWS[4:6]))
    command.evaluate("first")
    rows = parquet.read_table(folder / "evaluation" / "rows.parquet").to_pylist()
    assert [row["expected"] for row in rows] == ["apple!", "pear!"]
    assert [row["base/exact_match"] for row in rows] == [row["tuned/exact_match"] for row in rows]
    (line,) = kept(folder, "evaluation.json")["lines"][:1]
    tokens = sum(row["supervised_tokens"] for row in rows)
    mean = sum(row["tuned/loss"] * row["supervised_tokens"] for row in rows) / tokens
    assert line["tuned"]["loss"] == pytest.approx(mean)
    command.evaluate("first", test=True)
    assert {row["set"] for row in parquet.read_table(folder / "evaluation" / "test-rows.parquet").to_pylist()} == {
        "test"
    }


def test_a_judge_gets_answers_that_are_generated_once_and_opinions_are_added_to_the_table(
    make_run, write_data, monkeypatch
):
    monkeypatch.setattr(judge_workflow, "_token_counter", lambda plan: len)
    with judge_server(lambda prompt, _: said("Score: 5" if "say lime" in prompt else "Score: 4")) as server:
        judge = JudgeSection(url=server.url, model="m", mode="rubric")
        folder = make_run("first", write_data(validation=ROWS, retain=ROWS[5:6]), judge=judge)
        command.evaluate("first", judge=True)
        assert (folder / "evaluation" / "answers.jsonl").is_file()
        # Two rows per set at most, and base and tuned model are the same: one request per row.
        assert len(server.prompts) == 3
        monkeypatch.setattr(command, "evaluate_run", None)  # from here on no model is loaded
        command.evaluate("first", judge=True)
        monkeypatch.undo()
        assert len(server.prompts) == 3
    found = {line["set"]: line["metrics"][-1] for line in kept(folder, "evaluation.json")["lines"] if not line["group"]}
    assert [(name, found[name]["metric"]) for name in found] == [
        ("validation", "judge_score"),
        ("retain", "judge_score"),
    ]
    assert found["retain"]["tuned"] == 5


def test_a_later_evaluation_keeps_the_ratings_of_people(make_run, write_data, monkeypatch):
    folder = make_run("first", write_data(validation=ROWS))
    command.evaluate("first")
    rows = folder / "evaluation" / "rows.parquet"
    (row, *_) = read_stored(folder / "evaluation.json", rows, "first").rows()
    rating = Rating(
        rater="ana", kind="scores", row=row.fingerprint, set=row.set, key=row.key, first="base", base=2, tuned=4, at=""
    )
    append_line(folder / "evaluation" / "ratings.jsonl", rating)
    command.evaluate("first")
    (people,) = kept(folder, "evaluation.json")["people"]
    assert (people["kind"], people["num_rows"]) == ("scores", 1)
    (line, *_) = kept(folder, "evaluation.json")["lines"]
    assert [line["metrics"][-1][name] for name in ("metric", "base", "tuned")] == ["people_score", 2, 4]


def test_a_gate_that_is_not_met_ends_with_code_3(make_run, write_data, capsys):
    make_run("first", write_data(validation=ROWS), gate=[GateCriterion(metric="loss", min_gain=0.5)])
    assert command.evaluate("first") == 3
    assert "gate: NO-GO" in shown(capsys)


def test_a_metric_of_the_user_that_raises_is_not_zero(make_run, write_data, capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def score(row, answer):\n    return 1 / (row['answer']['content'] != 'pear!')\n")
    folder = make_run("first", write_data(validation=ROWS[:2]), metrics=[f"{tmp_path}/mine.py:score"])
    command.evaluate("first")
    (failure,) = kept(folder, "evaluation.json")["failures"]
    assert (failure["num_rows"], failure["first_row"]) == (1, "say pear")
    assert "ZeroDivisionError" in shown(capsys)
    result = kept(folder, "evaluation.json")["lines"][0]["metrics"][1]
    assert (result["num_pairs"], result["num_unscored"], result["tuned"]) == (1, 1, 1.0)


def test_a_killed_evaluation_has_looked(make_run, write_data, monkeypatch):
    make_run("first", write_data(validation=ROWS[:2], test=ROWS[4:6]))
    real = evaluate_run.compare

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_run, "compare", killed)
    with pytest.raises(KeyboardInterrupt):
        command.evaluate("first", test=True)
    monkeypatch.setattr(evaluate_run, "compare", real)
    with pytest.raises(UserError, match="opened once"):
        command.evaluate("first", test=True)


def test_a_run_that_has_not_finished_does_not_look(make_run, write_data, monkeypatch):
    data = write_data(validation=ROWS[:2], test=ROWS[4:6])
    make_run("first", data)

    def unfinished(_):
        raise UserError("runs/first has no model folder.", "training writes it.", "let it finish.")

    monkeypatch.setattr(evaluate_run, "subject_of", unfinished)
    with pytest.raises(UserError, match="no model folder"):
        command.evaluate("first", test=True)
    assert kept(data, "data.json")["test_looks"] == []


def test_no_test_rows_is_a_users_mistake(make_run, write_data):
    make_run("first", write_data(validation=ROWS[:2]))
    with pytest.raises(UserError, match="has no test rows"):
        command.evaluate("first", test=True)


def test_validation_is_measured_without_the_test_rows(make_run, write_data):
    data = write_data(validation=ROWS[:2], test=ROWS[4:6])
    (data / "test").rename(data / "elsewhere")
    folder = make_run("first", data)
    assert command.evaluate("first") == 0
    assert kept(folder, "evaluation.json")["lines"][0]["num_rows"] == 2
