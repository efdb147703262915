"""CSV and TSV: quotes, headers and their absence, lines that cost no other row."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from reading_cases import mistake_of, read, read_all

from packhorse.errors import UserError

BY_NUMBER = {"question": "1", "answer": "2"}


def table(folder: Path, content: bytes, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_csv_with_crlf_and_quoted_line_breaks(tmp_path: Path) -> None:
    path = table(tmp_path, b'\xef\xbb\xbfprompt,completion\r\n"a, b","c\r\nd"\r\ne,"say ""f"""\r\n')
    assert read(path) == [
        ("rows.csv:2", {"prompt": "a, b", "completion": "c\r\nd"}),
        ("rows.csv:4", {"prompt": "e", "completion": 'say "f"'}),
    ]


def test_tsv_quotes_only_where_a_cell_begins_with_one(tmp_path: Path) -> None:
    path = table(tmp_path, b'q\ta\nshop "All for 1", 5"\t3\n"two\ttabs"\t"say ""f"""\n', "rows.tsv")
    assert [values for _, values in read(path)] == [
        {"q": 'shop "All for 1", 5"', "a": "3"},
        {"q": "two\ttabs", "a": 'say "f"'},
    ]


def test_columns_by_number_mean_that_there_is_no_header(tmp_path: Path) -> None:
    path = table(tmp_path, b"two and two?\t4\nthree?\t3\nmore\t1\t2\n", "rows.tsv")
    rows, mistakes = read_all(path, columns=BY_NUMBER)
    assert rows == [("rows.tsv:1", {"1": "two and two?", "2": "4"}), ("rows.tsv:2", {"1": "three?", "2": "3"})]
    assert mistakes == ["rows.tsv:3: the row has 3 cells and the first line 2 (1, 2); it begins more\\t1\\t2"]


def test_columns_by_name_keep_the_header(tmp_path: Path) -> None:
    path = table(tmp_path, b"q,a\nx,y\n")
    assert read(path, columns={"question": "q", "answer": "2"}) == [("rows.csv:2", {"q": "x", "a": "y"})]


SPANISH = [("¿Cuánto es 1,5 + 1,5?", "3,0"), ("Hola, ¿qué tal?", "Bien; gracias"), ("uno\ndos", "«sí»")]


def spreadsheet(delimiter: str, encoding: str = "utf-8-sig") -> bytes:
    """What Excel saves: quotes where a cell holds the delimiter, a quote or a line break; CRLF."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([("pregunta", "respuesta"), *SPANISH])
    return text.getvalue().encode(encoding)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_the_delimiter_and_the_encoding_of_a_spreadsheet_are_found(
    tmp_path: Path, name: str, delimiter: str, encoding: str
) -> None:
    rows, mistakes = read_all(table(tmp_path, spreadsheet(delimiter, encoding), name))
    assert mistakes == []
    assert [tuple(values.values()) for _, values in rows] == SPANISH
    assert list(rows[0][1]) == ["pregunta", "respuesta"]


def test_a_delimiter_is_not_guessed_from_the_text_of_one_column(tmp_path: Path) -> None:
    path = table(tmp_path, b"text\none; two\nthree; four\n")
    assert [values for _, values in read(path)] == [{"text": "one; two"}, {"text": "three; four"}]
    commas = table(tmp_path, b"a;b,c\n1;2,3\n")
    assert [values for _, values in read(commas)] == [{"a;b": "1;2", "c": "3"}]


def test_a_given_delimiter_has_priority(tmp_path: Path) -> None:
    path = table(tmp_path, b"a;b,c\n1;2,3\n")
    assert [values for _, values in read(path, delimiter=";")] == [{"a": "1", "b,c": "2,3"}]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(
            b"two and two?,4\nthree?,3\n", "the first line has a column named 4, which looks like a value", id="number"
        ),
        pytest.param(b"w" * 101 + b",b\n1,2\n", "which looks like a value of a row", id="long"),
        pytest.param(b"a,b,a\n1,2,3\n", "the header has two columns named a.", id="twice"),
        pytest.param(b"a,,\n1,2,3\n", "the header has two columns named nothing.", id="nameless twice"),
        pytest.param(b'a,"b"c\n1,2\n', "rows.csv:1: the row is quoted wrongly", id="quotes"),
        pytest.param(b"a,\xff\n1,2\n", "rows.csv:1: the header is not UTF-8", id="bytes"),
        pytest.param(b'a,b\n"1,2\n3,4\n', "rows.csv:2: the row is quoted wrongly: unexpected end", id="open quote"),
        pytest.param(b'a,b\n"1\n2"x,3\n4,5\n', "rows.csv:2: the row is quoted wrongly", id="quoted over lines"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, content: bytes, told: str) -> None:
    assert told in mistake_of(table(tmp_path, content))


def test_a_headerless_file_is_told_how_to_be_read(tmp_path: Path) -> None:
    message = mistake_of(table(tmp_path, b"two and two?\t4\n", "rows.tsv"))
    assert 'columns: {question: "1", answer: "2"}' in message


def test_a_broken_line_costs_its_own_row_alone(tmp_path: Path) -> None:
    content = b'a,b\n1,2\n"x"y,3\n\xff,4\n5\n"6\n\xfe",7\n8,9\n10,\r11\n12,13\0'
    rows, mistakes = read_all(table(tmp_path, content))
    assert rows == [
        ("rows.csv:2", {"a": "1", "b": "2"}),
        ("rows.csv:8", {"a": "8", "b": "9"}),
        ("rows.csv:10", {"a": "12", "b": "13\0"}),
    ]
    assert [mistake.partition(";")[0] for mistake in mistakes] == [
        "rows.csv:3: the row is quoted wrongly: ',' expected after '\"'",
        "rows.csv:4: the row is not UTF-8: byte 0xff at column 1 (invalid start byte)",
        "rows.csv:5: the row has 1 cells and the first line 2 (a, b)",
        "rows.csv:6: the row is not UTF-8: byte 0xfe at column 1 (invalid start byte)",
        "rows.csv:9: the row is quoted wrongly: new-line character seen in unquoted field",
    ]
    assert mistakes[0].endswith('it begins "x"y,3')


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    assert read(table(tmp_path, b"\n\na\n\n1\n\n2")) == [("rows.csv:5", {"a": "1"}), ("rows.csv:7", {"a": "2"})]


def test_no_row_is_taken_from_after_a_cell_that_went_wrong_over_lines(tmp_path: Path) -> None:
    # The second line may be a row, or the rest of a cell: nobody knows, so dropping bad rows is no way out.
    path = table(tmp_path, b'a,b\n"1\n2"x,3\n4,5\n')
    with pytest.raises(UserError, match="rows.csv:2: the row is quoted wrongly"):
        read_all(path)
