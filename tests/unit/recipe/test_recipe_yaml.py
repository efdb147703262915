"""Reading YAML: scalars of YAML 1.2, lines, and syntax errors in plain English."""

from pathlib import Path

import pytest

from packhorse.errors import UserError
from packhorse.recipe.load import RECIPE_FILE
from packhorse.yaml_source.nodes import parse_scalar, parse_yaml, plain, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 0.0001),
        ("2e-4", 0.0002),
        ("1E5", 100000.0),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+3", 3),
        ("-1.5e+3", -1500.0),
        ("0", 0),
        ("0.0", 0.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("007", "007"),
        ("0o17", "0o17"),
        ("0x1f", "0x1f"),
        ("1__0", "1__0"),
        ("_1", "_1"),
        ("1e999", "1e999"),
        (".inf", ".inf"),
        ("1e", "1e"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        (".", "."),
        ("٣", "٣"),
    ],
)
def test_scalars(text, value):
    found = parse_scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_quoted_text_stays_text():
    root, mistakes = parse_yaml("a: '1e-4'\nb: \"true\"\nc: |\n  12\n", "x")
    assert plain(root) == {"a": "1e-4", "b": "true", "c": "12\n"}
    assert mistakes == []


def test_lines_of_keys_and_items():
    root, _ = parse_yaml("a:\n  b: 1\n\n  c:\n    - x\n    -\n      d: 2\n", "x")
    section = root.value["a"]
    assert section.line == 1
    assert section.value["b"].line == 2
    assert section.value["c"].line == 4
    assert [item.line for item in section.value["c"].value] == [5, 7]
    assert section.value["c"].value[1].value["d"].where == "x:7"


def test_aliases_are_read():
    root, _ = parse_yaml("a: &x [1, 2]\nb: *x\n", "x")
    assert plain(root) == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\n\tb: 2\n", 2, "tab"),
        ("a: 1\nb: c: d\n", 2, "second `: `"),
        ("a: [1, 2\nb: 3\n", 2, "not YAML"),
        ("a: 1\nb: 'x\n", 3, "quote"),
        ("a:\n  b: 1\n c: 2\n", 3, "indent"),
        ("a: 1\nb: *nothing\n", 2, "alias"),
        ("a: 1\n---\nb: 2\n", 2, "several documents"),
        ("a: 1\nb: @x\n", 2, "reserves"),
        ("a: 1\nb: \x07\n", 2, "U+0007"),
        ("b: 1\na: &x [*x]\n", 2, "never end"),
        ("# nothing\n\n", 1, "empty"),
        ("", 1, "empty"),
        ("null\n", 1, "empty"),
        ("- a\n- b\n", 1, "a list"),
        ("just words\n", 1, "text"),
        ("[" * 3000, 1, "nests"),
    ],
)
def test_syntax_errors_have_line_and_words(tmp_path, text, line, words):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(path, "x.yaml", RECIPE_FILE)
    (mistake,) = caught.value.mistakes
    assert mistake.where == f"x.yaml:{line}"
    assert words in f"{mistake.fact} {mistake.why}"
    assert mistake.why
    assert mistake.fix


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "x:3", "twice, first in line 1"),
        ("s:\n  a: 1\n  a: 3\n", "x:3", "twice, first in line 2"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "x:3", "<<"),
        ("a: !!python/object:os.system x\n", "x:1", "!!python/object:os.system"),
        ("a: 1\n[b]: 2\n", "x:2", "a key is a list"),
    ],
)
def test_single_bad_keys(text, where, words):
    _, (mistake,) = parse_yaml(text, "x")
    assert mistake.where == where
    assert words in mistake.fact


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(UserError, match="UTF-8") as caught:
        read_yaml(path, "x.yaml", RECIPE_FILE)
    assert caught.value.mistakes[0].where == "x.yaml:2"


def test_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert plain(read_yaml(path, "x.yaml", RECIPE_FILE)[0]) == {"a": 1}


def test_a_folder_is_not_a_file():
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(Path("/"), "/", RECIPE_FILE)
