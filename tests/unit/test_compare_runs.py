"""`packhorse compare`: differences, final figures, and paired tests on shared rows against values computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from packhorse.cli.main import main
from packhorse.errors import UserError
from packhorse.evaluate.results import MetricResult
from packhorse.evaluate.shared_rows import compare_shared
from packhorse.plan.run_plan import DataFacts, RunPlan, write_plan
from packhorse.workflows.compare import compare_runs
from run_report_cases import write_finished, write_run


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # workers of xdist have one of their own


def write_answers(
    file: Path, right: dict[str, int], tokens: int = 5, name: str = "validation", loss: float = 1.0
) -> Path:
    """Write rows.parquet: by key whether the tuned model is right; the last line is a row that was not answered."""
    count = len(right) + 1
    columns = {
        "set": [name] * count,
        "key": [*(key.partition("#")[0] for key in right), None],
        "cluster": list(range(count)),
        "supervised_tokens": [tokens] * count,
        "base/loss": [9.0] * count,
        "tuned/loss": [loss] * count,
        "base/exact_match": [*(0.0 for _ in right), None],
        "tuned/exact_match": [*map(float, right.values()), None],
        "tuned/answer": [*(str(value) for value in right.values()), None],
        "tuned/ended": [*(True for _ in right), None],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), file)
    return file


def answers(*values: int, first: int = 0) -> dict[str, int]:
    return {f"k{first + number}": value for number, value in enumerate(values)}


def exact_match(first: Path, second: Path) -> MetricResult:
    (found,) = [each for each in compare_shared(first, second, 0.03) if each.result.metric == "exact_match"]
    assert found.set == "validation"
    return found.result


def test_rows_are_paired_by_content_and_not_by_position(tmp_path: Path) -> None:
    # 12 rows only the second answers right, 2 only the first, 6 both; the first has 5 rows more, the second 3.
    mine = answers(*[0] * 12, *[1] * 2, *[1] * 6) | answers(*[1] * 5, first=100)
    yours = answers(*[1] * 12, *[0] * 2, *[1] * 6) | answers(*[0] * 3, first=200)
    backwards = dict(reversed(yours.items()))
    result = exact_match(write_answers(tmp_path / "a.parquet", mine), write_answers(tmp_path / "b.parquet", backwards))
    assert (result.num_pairs, result.num_differing) == (20, 14)
    assert (result.base, result.tuned) == (0.4, 0.9)
    # Exact McNemar: 2 * (1 + 14 + 91) / 2**14
    assert result.p == pytest.approx(212 / 2**14)
    assert (result.test, result.verdict) == ("exact McNemar", "better")


def test_rows_with_equal_content_are_paired_in_order(tmp_path: Path) -> None:
    first = write_answers(tmp_path / "a.parquet", {"k": 1, "k#2": 0})
    second = write_answers(tmp_path / "b.parquet", {"k": 1, "k#2": 0, "k#3": 1})
    result = exact_match(first, second)
    assert (result.num_pairs, result.num_differing) == (2, 0)


def test_the_loss_is_compared_only_where_tokens_are_equal(tmp_path: Path) -> None:
    first = write_answers(tmp_path / "a.parquet", answers(1, 1))
    lower = write_answers(tmp_path / "b.parquet", answers(1, 1), loss=0.25)
    other = write_answers(tmp_path / "c.parquet", answers(1, 1), tokens=6)
    names = [[each.result.metric for each in compare_shared(first, file, 0.03)] for file in (lower, other)]
    assert names == [["loss", "exact_match"], ["exact_match"]]
    assert compare_shared(first, lower, 0.03)[0].result.difference == -0.75


@pytest.mark.parametrize("kind", ["other rows", "other set", "absent", "damaged"])
def test_without_shared_rows_the_reason_is_named(tmp_path: Path, kind: str) -> None:
    first = write_answers(tmp_path / "a.parquet", answers(1, 1))
    second = tmp_path / "b.parquet"
    if kind == "damaged":
        second.write_bytes(b"PAR1 no")
    elif kind != "absent":
        begin = 50 if kind == "other rows" else 0
        write_answers(second, answers(1, first=begin), name="validation" if begin else "retain")
    reason = {"absent": "is missing", "damaged": "cannot be read"}.get(kind, "answered 2 and 1 rows, and none")
    with pytest.raises(UserError, match=reason):
        compare_shared(first, second, 0.03)


def with_answers(plan: RunPlan, right: dict[str, int]) -> str:
    write_answers(Path(plan.run_folder) / "evaluation" / "rows.parquet", right)
    return plan.run_folder


def test_p_is_adjusted_for_all_lines_of_the_table(tmp_path: Path) -> None:
    first = with_answers(write_run(tmp_path, "a", "finished"), answers(*[0] * 20))
    # 11 of 20: p = 2 / 2**11 = 0.00098 each; two lines of exact match; equal losses get no verdict.
    others = [with_answers(write_run(tmp_path, name, "finished"), answers(*[1] * 11, *[0] * 9)) for name in ("b", "c")]
    found = compare_runs([first, *others])
    results = [each.result for comparison in found.paired for each in comparison.results]
    assert [result.metric for result in results] == ["loss", "exact_match"] * 2
    assert [result.p_adjusted for result in results[1::2]] == pytest.approx([2 * 2 / 2**11, 2 * 2 / 2**11])
    assert {result.verdict for result in results[1::2]} == {"better"}


def test_what_differs_and_the_final_figures_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_finished(tmp_path, "one"), write_finished(tmp_path, "two")
    recipe = two.recipe.model_copy(update={"seed": 99})
    facts = DataFacts(
        folder="/d", content_hash="feedfeed", tokenizer="t", num_rows=1, num_packs=1, num_tokens=1,
        num_supervised_tokens=1, fill=1.0,
    )  # fmt: skip
    changed = two.model_copy(update={"recipe": recipe, "data": facts, "packhorse_version": "9.9"})
    write_plan(changed, Path(two.run_folder))
    assert main(["compare", one.run_folder, two.run_folder]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in (
        ["seed", str(one.recipe.seed), "99"],
        ["data", "hash", "none", "feedfeed"],
        ["Packhorse", "version", one.packhorse_version, "9.9"],
        ["validation", "loss", "1.5", "1.5"],
        ["tokens", "per", "second", "3,000", "3,000"],
        ["peak", "memory", "3.00", "GiB", "3.00", "GiB"],
    ):
        assert line in lines
    assert not any(line[:1] in (["name"], ["runs_folder"]) for line in lines)
    (row,) = [line for line in lines if line[:2] == ["validation", "exact_match"]]
    assert row[2:7] == ["40", "95.0", "%", "→", "95.0"]


def test_runs_without_shared_rows_are_compared_in_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [write_finished(tmp_path, "one").run_folder, write_run(tmp_path, "two", "stopped").run_folder]
    assert main(["compare", *names]) == 0
    out = capsys.readouterr().out
    assert "2,000 of 2,000" in out
    assert out.count("rows.parquet is missing") == 1
    assert "fix: evaluate the run again with `packhorse evaluate RUN`" in out
    assert main(["compare", *names, "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["paired"][0]["results"] == []
    assert "is missing" in found["paired"][0]["problem"]
    assert [figures["state"] for figures in found["figures"]] == ["finished", "stopped"]


def test_one_run_is_no_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_run(tmp_path).run_folder
    assert main(["compare", name, name]) == 2
    assert "a comparison needs two different runs" in capsys.readouterr().err
    assert main(["compare", name, str(tmp_path / "absent")]) == 2
