"""Message trees: the best-ranked path, or every path, and nothing of a tree read as plain text."""

from __future__ import annotations

from typing import Any

import pytest
from formats_cases import said

from packhorse.data.formats.key_counts import KeyCounts
from packhorse.data.formats.rows import convert_rows, detect_format, resolve_format
from packhorse.data.read.row import Row, RowMistakes
from packhorse.recipe.schema import Source

Read = tuple[list[tuple[str, list[str]]], list[str], KeyCounts]


def asked(text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text": text, "role": "prompter", "replies": list(replies), **more}


def answered(text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**asked(text, *replies, **more), "role": "assistant"}


TREE = asked(
    "How?",
    answered("badly", rank=1),
    answered("well", asked("And?", answered("so"), answered("best", rank=2), answered("thus", rank=0.5)), rank=0),
    answered("no rank"),
    message_id="m0",
    lang="en",
    parent_id=None,
    labels={"spam": {"value": 0.0, "count": 3}},
)


def read(values: dict[str, Any], **source: Any) -> Read:
    given = Source.model_validate({"path": "rows.jsonl", **source})
    mistakes, counts = RowMistakes("rows.jsonl"), KeyCounts()
    rows = [Row("rows.jsonl:3", values)]
    found = resolve_format(given.format, rows, given)
    assert found == "tree"
    made = list(convert_rows(rows, found, mistakes, given, counts))
    taken = [(one.where, [content for _, content in said(one.messages)]) for one in made]
    return taken, [str(mistake) for mistake in mistakes.recorded], counts


def test_the_reply_with_the_lowest_rank_is_followed() -> None:
    taken, mistakes, counts = read(TREE)
    assert mistakes == []
    assert taken == [("rows.jsonl:3", ["How?", "well", "And?", "thus"])]
    assert counts.kept == {"message_id": 1, "lang": 1}
    assert counts.ignored["replies outside the best path"] == 1


def test_the_first_reply_without_ranks() -> None:
    taken, _, counts = read(asked("How?", answered("a"), answered("b", asked("c"))))
    assert taken[0][1] == ["How?", "a"]
    assert counts.ignored["replies outside the best path"] == 1
    taken, _, counts = read(asked("How?", answered("a")))
    assert counts.ignored["replies outside the best path"] == 0


def test_every_path_is_a_row() -> None:
    taken, mistakes, counts = read(TREE, paths="all")
    assert mistakes == []
    assert taken == [
        ("rows.jsonl:3[0]", ["How?", "badly"]),
        ("rows.jsonl:3[1.0.0]", ["How?", "well", "And?", "so"]),
        ("rows.jsonl:3[1.0.1]", ["How?", "well", "And?", "best"]),
        ("rows.jsonl:3[1.0.2]", ["How?", "well", "And?", "thus"]),
        ("rows.jsonl:3[2]", ["How?", "no rank"]),
    ]
    assert counts.ignored["replies outside the best path"] == 0


def test_a_tree_in_prompt_as_open_assistant_exports_it() -> None:
    taken, mistakes, counts = read({"message_tree_id": "m0", "tree_state": "ready_for_export", "prompt": TREE})
    assert (len(taken), mistakes) == (1, [])
    assert taken[0][1] == ["How?", "well", "And?", "thus"]
    assert counts.kept["message_tree_id"] == 1


def test_other_roles_keys_and_ignored_keys_of_messages() -> None:
    tree = {"text": "a", "by": "me", "replies": [{"text": "b", "by": "bot", "draft": "x" * 99 + " y" * 99}]}
    mapped = {"columns": {"role": "by"}, "roles": {"me": "user", "bot": "assistant"}}
    _, (mistake,), _ = read(tree, format="tree", **mapped)
    assert "the row has draft, which replies does not read" in mistake
    taken, mistakes, counts = read(tree, format="tree", ignore=["draft"], **mapped)
    assert (taken[0][1], mistakes, counts.ignored["draft"]) == (["a", "b"], [], 1)


@pytest.mark.parametrize(
    ("values", "fact"),
    [
        (asked("How?"), "the chat has no assistant turn"),
        (asked("How?", answered("a", images=["x"])), "the row has images, which replies does not read"),
        (asked("How?", answered("a", rank="first"), answered("b")), "is 'first'"),
        (asked("How?", answered("a", rank=float("nan")), answered("b")), "is nan"),
        (asked("How?", {**answered("a"), "replies": "none"}), "replies is 'none'"),
        (asked("How?", {**answered("a"), "replies": ["b"]}), "a reply is not an object"),
        (asked("How?", {**answered("a"), "role": "asistant"}), "turn 2 has the role 'asistant'"),
        (asked("How?", {**answered("a"), "text": 3}), "content of turn 2 is int"),
    ],
    ids=["no answer", "images", "rank", "NaN", "text", "list of texts", "role", "number"],
)
def test_refused(values: dict[str, Any], fact: str) -> None:
    taken, (mistake,), _ = read(values)
    assert taken == []
    assert mistake.startswith("rows.jsonl:3: ")
    assert fact in mistake


def test_a_count_of_replies_is_no_tree() -> None:
    assert detect_format({"text": "a post", "replies": 3}) == "text"
