"""Blind ratings: sides, continuation, agreement against published values, a page for the rater alone."""

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from html import unescape
from pathlib import Path
from threading import Thread

import pytest
from opinion_cases import read_result, write_evaluated
from pyarrow import parquet
from scipy.stats import binomtest

from packhorse.cli import rate as command
from packhorse.errors import UserError
from packhorse.evaluate.opinions import people_notes
from packhorse.evaluate.ratings import CHOICES, krippendorff_alpha
from packhorse.report.rating_page import RatingServer
from packhorse.workflows.rate import add_ratings, rating_session

NONE = None
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: 4 observers, 12 units.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
]
PAIRS = [(f"base {row}", f"tuned {row}") for row in range(20)]


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_that_of_the_published_example(level, alpha):
    units = [[value for value in unit if value is not None] for unit in zip(*PUBLISHED, strict=True)]
    assert round(krippendorff_alpha(units, level), 3) == alpha


def test_alpha_without_two_values_or_without_variation_is_not_defined():
    assert str(krippendorff_alpha([[1.0], [2.0]], "nominal")) == "nan"
    assert str(krippendorff_alpha([[1.0, 1.0], [1.0, 1.0]], "nominal")) == "nan"
    assert krippendorff_alpha([[1.0, 1.0], [2.0, 2.0]], "ordinal") == 1


def prefer(session, count, wanted="tuned"):
    """Rate rows: the answer that begins with `wanted` is better; return the rows as they were shown."""
    seen = []
    for _ in range(count):
        shown = session.next()
        session.rate(shown, *CHOICES["first" if shown.answers[0].startswith(wanted) else "second"])
        seen.append(shown)
    return seen


def test_choices_are_a_paired_test_and_are_kept_by_row(tmp_path):
    plan = write_evaluated(tmp_path, [*PAIRS, ("equal", "equal")])
    session = rating_session(plan, "ana", "choice")
    assert session.num_rows == 20, "equal answers are not shown"
    seen = [*prefer(session, 15), *prefer(session, 5, wanted="base")]
    assert session.next() is None
    # Sides are random: of 20 about 10, and never all.
    assert 3 <= sum(each.first == "base" for each in seen) <= 17
    result = add_ratings(plan)
    assert result == read_result(plan)
    wins = result.lines[0].result("people_wins")
    assert (wins.num_pairs, wins.base, wins.tuned) == (20, 5 / 20, 15 / 20)
    # With one rater a sign flip is a sign test; 9,999 draws are within 0.01 of the exact p.
    assert wins.p == pytest.approx(binomtest(15, 20).pvalue, abs=0.01)
    rows = parquet.read_table(Path(plan.run_folder) / "evaluation" / "rows.parquet")
    assert sum(value or 0 for value in rows["tuned/people_wins"].to_pylist()) == 15
    assert add_ratings(plan) == result, "added once"


def test_ratings_continue_and_the_last_one_of_a_row_counts(tmp_path):
    plan = write_evaluated(tmp_path, PAIRS)
    first = prefer(rating_session(plan, "ana", "choice"), 4)
    again = rating_session(plan, "ana", "choice")
    assert again.num_rated == 4
    assert again.next().row not in [each.row for each in first]
    assert again.last() == first[-1], "the sides of a row stay"
    again.rate(again.last(), *CHOICES["tie"])
    shown = again.next()
    again.skip(shown)
    assert again.next() != shown
    assert rating_session(plan, "ana", "scores").num_rated == 0, "scores are another question"
    assert add_ratings(plan).lines[0].result("people_wins").tuned == 3 / 4
    file = Path(plan.run_folder) / "evaluation" / "ratings.jsonl"
    file.write_text(file.read_text() + '{"rater": "an')
    prefer(rating_session(plan, "ana", "choice"), 1)
    assert rating_session(plan, "ana", "choice").num_rated == 5


def test_two_raters_see_one_order_of_rows_on_other_sides_and_their_agreement_is_reported(tmp_path):
    plan = write_evaluated(tmp_path, PAIRS)
    ana = prefer(rating_session(plan, "ana", "choice"), 12)
    bo = rating_session(plan, "bo", "choice")
    seen = [*prefer(bo, 8), *prefer(bo, 4, wanted="base")]
    assert [each.row for each in seen] == [each.row for each in ana]
    assert [each.first for each in seen] != [each.first for each in ana]
    result = add_ratings(plan)
    (people,) = result.people
    # 24 values, 20 tuned and 4 base; observed disagreement 8 of 24, expected 2 * 20 * 4 / 23 of 24.
    assert people.alpha == pytest.approx(1 - 8 * 23 / (2 * 20 * 4))
    assert (people.num_rows, people.num_shared) == (12, 12)
    assert result.lines[0].result("people_wins").tuned == 10 / 12, "the mean of both raters by row"
    notes = " ".join(people_notes(people))
    assert "12 rows (by rater: ana 12, bo 12)" in notes
    assert "alpha (nominal) is -0.15 on 12 shared rows; below 0.67" in notes


def test_two_raters_without_a_shared_row(tmp_path):
    plan = write_evaluated(tmp_path, PAIRS)
    prefer(rating_session(plan, "ana", "choice"), 2)
    bo = rating_session(plan, "bo", "choice")
    for _ in range(2):
        bo.skip(bo.next())
    prefer(bo, 2)
    (people,) = add_ratings(plan).people
    assert people.alpha is None
    assert "no row was rated by two raters" in " ".join(people_notes(people))


def test_ratings_of_other_answers_do_not_count(tmp_path):
    plan = write_evaluated(tmp_path, PAIRS)
    prefer(rating_session(plan, "ana", "choice"), 20)
    file = Path(plan.run_folder) / "evaluation" / "rows.parquet"
    table = parquet.read_table(file)
    changed = ["another", *table["tuned/answer"].to_pylist()[1:]]
    at = table.column_names.index("tuned/answer")
    parquet.write_table(table.set_column(at, "tuned/answer", [changed]), file)
    (people,) = add_ratings(plan).people
    assert (people.num_rows, people.num_outdated) == (19, 1)
    assert "1 ratings are of other answers" in " ".join(people_notes(people))


# --- the terminal --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return write_evaluated(tmp_path / "runs", [("base \x1b[31m<b>", f"tuned {row}") for row in range(12)])


def typed(monkeypatch, *lines):
    waiting = list(lines)

    def read(prompt):
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    monkeypatch.setattr("builtins.input", read)
    return waiting


def test_rows_are_rated_in_the_terminal_without_naming_a_model(run, monkeypatch, capsys):
    waiting = typed(monkeypatch, "1", "x", "r", "t", "b", "2", "s", "q", "never read")
    assert command.rate("runs/r", rater="ana") == 0
    assert waiting == ["never read"]
    shown = capsys.readouterr().out
    assert "--- answer 1 ---" in shown
    assert "question 0" in shown
    assert "reference answer:\n42" in shown
    assert "\x1b" not in shown
    assert "ana has rated 2 of 12 rows" in shown
    assert "people_wins" not in shown, "a rater who continues stays blind"
    assert [json.loads(line)["base"] + json.loads(line)["tuned"] for line in ratings(run)] == [1, 0, 1]
    assert read_result(run).people[0].num_rows == 2
    assert command.rate("runs/r", show=True) == 0
    assert "people, choices: 2 rows (by rater: ana 2)" in " ".join(capsys.readouterr().out.split())


def ratings(plan):
    return (Path(plan.run_folder) / "evaluation" / "ratings.jsonl").read_text().splitlines()


def test_scores_from_1_to_5(run, monkeypatch, capsys):
    typed(monkeypatch, "6 1", "5", "4 2", "5 1")
    command.rate("runs/r", rater="ana", scores=True)
    first, second = (json.loads(line) for line in ratings(run))
    assert {first["base"], first["tuned"]} == {4, 2}
    assert first[first["first"]] == 4
    assert {second["base"], second["tuned"]} == {5, 1}
    assert read_result(run).lines[0].result("people_score").num_pairs == 2


def test_mistakes_of_raters(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--rater is 'a"):
        command.rate("runs/r", rater="a\nb")
    with pytest.raises(UserError, match=r"no ratings of its present answers(.|\n)*packhorse rate runs/r"):
        command.rate("runs/r", show=True)
    (tmp_path / "runs/r/evaluation.json").unlink()
    with pytest.raises(UserError, match=r"runs/r/evaluation.json does not exist(.|\n)*packhorse evaluate runs/r"):
        command.rate("runs/r")


def test_ratings_that_cannot_be_kept_are_not_asked_for(run):
    (Path(run.run_folder) / "evaluation" / "ratings.jsonl").mkdir()
    with pytest.raises(UserError, match=r"evaluation/ratings.jsonl cannot be written: Is a directory"):
        command.rate("runs/r")


def test_equal_answers_cannot_be_rated(tmp_path):
    plan = write_evaluated(tmp_path, [("a", "a"), ("b", "<think>x</think>b")])
    with pytest.raises(UserError, match="the same answer to every row"):
        rating_session(plan, "ana", "choice")


# --- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(run):
    """A server of a session, and the session."""
    with RatingServer(rating_session(run, "ana", "choice")) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def request(url, form=None, host=None):
    """Return status, headers and text."""
    data = urllib.parse.urlencode(form).encode() if form is not None else None
    sent = urllib.request.Request(url, data, {"Host": host} if host else {})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sent) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def form_of(page, action):
    hidden = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page))
    return {name: unescape(value) for name, value in hidden.items()} | {"action": action}


def test_the_page_takes_ratings_and_shows_the_next_row(served, run):
    address = served.url.partition("?")[0]
    assert served.server_address[0] == "127.0.0.1"
    _, headers, page = request(served.url)
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "0 of 12 rated" in page
    assert "&lt;b&gt;" in page
    assert "\x1b" not in page
    status, _, after = request(address, form_of(page, "first"))
    assert (status, "1 of 12 rated" in after) == (200, True)
    _, _, back = request(address, form_of(after, "back"))
    assert form_of(back, "")["row"] == form_of(page, "")["row"]
    request(address, form_of(back, "tie"))
    (one, two) = (json.loads(line) for line in ratings(run))
    assert one["row"] == two["row"] == form_of(page, "")["row"]
    assert (one["base"] + one["tuned"], two["base"] + two["tuned"]) == (1, 0)
    assert one[one["first"]] == 1
    assert served.session.num_rated == 1


def test_nobody_else_can_read_or_post(served):
    address = served.url.partition("?")[0]
    _, _, page = request(served.url)
    form = form_of(page, "first")
    refused = [
        request(address),
        request(f"{address}?token=guess"),
        request(served.url, host="attacker.example"),
        request(f"{address}other?token={served.token}"),
        request(address, form | {"token": "guess"}),
        request(address, {name: value for name, value in form.items() if name != "token"}),
        request(address, form, host="attacker.example:80"),
    ]
    assert [status for status, _, _ in refused] == [403] * 7
    assert not any("answer" in text for _, _, text in refused)
    assert request(address, form | {"padding": "x" * 20_000})[0] == 400
    request(address, form | {"row": "none"})
    request(address, form | {"action": "scores", "first": "5", "second": "5"})
    assert served.session.num_rated == 0


def test_a_port_in_use_is_the_users_mistake(served, run):
    with pytest.raises(UserError, match=f"port {served.server_port} of this machine cannot be opened"):
        command.rate("runs/r", web=True, port=served.server_port)
