"""What the page and the terminal share: percentages, findings, balance, histogram, text made fit to be looked at."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.data.audit_report import SplitAudit
from packhorse.data.ledger import LOSSES, SIDES, Entry, Ledger
from packhorse.report.balance import balance
from packhorse.report.findings import findings, measures
from packhorse.report.histogram import PLOT_HEIGHT, histogram
from packhorse.report.ledger_lines import ledger_lines, percentages
from packhorse.report.readable import clipped, readable
from report_cases import real_report


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        pytest.param([1, 1, 1], ["33.34 %", "33.33 %", "33.33 %"], id="the first of equal remainders is rounded up"),
        pytest.param([1, 2, 4], ["14.29 %", "28.57 %", "57.14 %"], id="largest remainders"),
        pytest.param([1, 999_999], ["<0.01 %", "100.00 %"], id="a single row of a million is not nothing"),
        pytest.param([5, 0], ["100.00 %", "0.00 %"], id="nothing is nothing"),
        pytest.param([0, 0], ["–", "–"], id="no rows"),
    ],
)
def test_percentages_by_hand(counts: list[int], shown: list[str]) -> None:
    assert percentages(counts) == shown


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=12).filter(any))
def test_shown_percentages_add_up_to_100(counts: list[int]) -> None:
    shown = [text.removesuffix(" %") for text in percentages(counts)]
    assert sum(0 if text == "<0.01" else round(100 * float(text)) for text in shown) == 10_000
    for count, text in zip(counts, shown):
        if text != "<0.01":
            assert abs(float(text) - 100 * count / sum(counts)) < 0.01 + 1e-9


def test_lines_of_the_ledger_hold_every_row_and_token_once() -> None:
    ledger = real_report().ledger
    lines = ledger_lines(ledger)
    assert [line.name for line in lines] == [*LOSSES, "tokens_cut", *SIDES]
    assert sum(line.rows for line in lines) == 8_673
    assert sum(line.tokens for line in lines) == 1_742_906
    by_name = {line.name: line for line in lines}
    assert (by_name["duplicate"].rows_percent, by_name["train"].rows_percent) == ("0.46 %", "84.22 %")
    assert [line.name for line in lines if not line.is_loss] == list(SIDES)


def test_findings_say_what_to_do_and_leave_out_what_is_not_there() -> None:
    gsm8k, tickets = real_report().cards
    found = {finding.name: finding for finding in findings(gsm8k, real_report().ledger)}
    assert "exact_duplicates" not in found
    assert found["personal:email"].sentence == "1 row holds an email address"
    assert found["personal:phone"].sentence == "4 rows hold a phone number"
    assert found["broken_encoding"].sentence == "7 rows look wrongly decoded"
    assert found["broken_encoding"].advice == "data.fix_encoding: true fixes them"
    assert [sample.where for sample in found["broken_encoding"].samples] == [
        "data/gsm8k_train.jsonl:97",
        "data/gsm8k_train.jsonl:5531",
    ]
    assert len(measures(tickets, real_report().ledger)) == 13


@pytest.mark.parametrize(
    ("dropped", "advice"),
    [(0, "data.duplicates.exact: drop keeps one of each"), (40, "in total, 40 copies are dropped")],
    ids=["kept", "dropped"],
)
def test_nobody_is_told_to_drop_copies_that_are_dropped(dropped: int, advice: str) -> None:
    ledger = Ledger(
        rows_in=Entry(rows=100, tokens=100),
        losses={"duplicate": Entry(rows=dropped, tokens=dropped)},
        kept={"train": Entry(rows=100 - dropped, tokens=100 - dropped)},
    )
    (exact,) = [one for one in findings(real_report().cards[1], ledger) if one.name == "exact_duplicates"]
    assert exact.advice == advice


def sides(**strata: dict[str, int]) -> dict[str, SplitAudit]:
    return {name: SplitAudit(sum(rows.values()), 1, 1, 1.0, rows) for name, rows in strata.items()}


def test_a_stratum_is_off_when_it_is_by_a_point_and_a_row() -> None:
    splits = sides(train={"en": 700, "es": 66, "de": 2}, validation={"en": 300, "es": 34, "de": 1})
    en, es, de = balance(splits, (0.7, 0.3, 0.0))
    assert (en.name, en.rows, en.is_off) == ("en", 1_000, False)
    assert (es.name, es.parts["train"].share, es.is_off) == ("es", 0.66, True)
    assert es.parts["validation"].deviation == pytest.approx(0.04)
    # Two of three rows are 67 %, and no whole number of rows is nearer to 70 %.
    assert (de.name, de.is_off) == ("de", False)


@pytest.mark.parametrize(
    ("splits", "shares"),
    [
        pytest.param(sides(train={"en": 7}, validation={"en": 3}), (0.7, 0.3, 0.0), id="one stratum"),
        pytest.param(sides(train={"en": 7, "es": 7}, validation={"en": 1}), (1.0, 0.0, 0.0), id="data.validation"),
        pytest.param({}, (0.7, 0.3, 0.0), id="no rows"),
    ],
)
def test_nothing_to_balance(splits: dict[str, SplitAudit], shares: tuple[float, float, float]) -> None:
    assert balance(splits, shares) == ()


def test_a_stratum_that_a_side_lacks_is_seen() -> None:
    lone, _ = balance(sides(train={"en": 20, "es": 10}, test={"es": 1}), (0.9, 0.0, 0.1))
    assert lone.name == "en"
    assert lone.parts["test"].rows == 0
    assert lone.is_off


def test_bars_stand_beside_each_other_with_heights_by_rows() -> None:
    drawing = histogram([(10, 5), (20, 10), (40, 0), (80, 1)], 20)
    assert drawing is not None
    assert [(bar.low, bar.high) for bar in drawing.bars] == [(1, 10), (11, 20), (21, 40), (41, 80)]
    assert [bar.height for bar in drawing.bars] == [PLOT_HEIGHT / 2, PLOT_HEIGHT, 0, PLOT_HEIGHT / 10]
    assert [bar.is_over for bar in drawing.bars] == [False, False, True, True]
    assert all(25 * at < bar.x and bar.x + bar.width < 25 * (at + 1) for at, bar in enumerate(drawing.bars))
    assert drawing.most_rows == 10


@pytest.mark.parametrize(
    ("length_tokens", "x"),
    [(20, 50.0), (40, 75.0), (28, 62.1), (80, 100.0), (1, 0.0), (81, None)],
    ids=["border", "next border", "half way by the logarithm", "last", "first", "beyond"],
)
def test_t_stands_where_its_bin_is(length_tokens: int, x: float | None) -> None:
    drawing = histogram([(10, 5), (20, 10), (40, 0), (80, 1)], length_tokens)
    assert drawing is not None
    assert drawing.limit_x == (None if x is None else pytest.approx(x, abs=0.1))


def test_a_bar_that_t_divides_still_fits_in_part() -> None:
    drawing = histogram([(10, 5), (20, 10), (40, 0), (80, 1)], 28)
    assert drawing is not None
    assert [bar.is_over for bar in drawing.bars] == [False, False, False, True]


@pytest.mark.parametrize("bins", [[], [(8, 0)]], ids=["no bins", "no rows"])
def test_no_rows_make_no_histogram(bins: list[tuple[int, int]]) -> None:
    assert histogram(bins, 8) is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", "a‹U+001B›[31mb"),
        ("\x00\x07\r\x7f\x9b", "‹U+0000›‹U+0007›‹U+000D›‹U+007F›‹U+009B›"),
        ("\u202eabc\u202c\u2066", "‹U+202E›abc‹U+202C›‹U+2066›"),
        ("\ufeffa\u200bb\u2028c", "‹U+FEFF›a‹U+200B›b‹U+2028›c"),
        ("\ud83d alone", "‹U+D83D› alone"),
        (
            "line\n\ttab مرحبا \U0001f469\u200d\U0001f467 e\u0301 \u200f",
            "line\n\ttab مرحبا \U0001f469\u200d\U0001f467 e\u0301 \u200f",
        ),
    ],
    ids=["escape", "control", "direction", "unseen", "half a character", "text stays"],
)
def test_hidden_characters_are_shown_by_number(text: str, shown: str) -> None:
    assert readable(text) == shown


@given(st.text(st.characters(codec=None)))
def test_readable_text_can_be_written(text: str) -> None:
    readable(text).encode("utf-8")


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    assert clipped("abcdefgh", 8) == "abcdefgh"
    assert clipped("abcdefghi", 8) == "abcdef ‹… 1 characters …› hi"
    assert clipped("x" * 5_000, 400).startswith("x" * 300 + " ‹… 4,600 characters …› ")
