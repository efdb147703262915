"""Message trees (OpenAssistant): a message with its replies, which have replies in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf, isnan
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, names, shown
from packhorse.data.formats.chats import chat_example
from packhorse.data.formats.example import Example
from packhorse.data.formats.turns import messages_of
from packhorse.data.formats.unread import refuse_carriers
from packhorse.data.read.row import Row

Node = dict[str, Any]
Path = tuple[tuple[int, ...], list[Node], bool]
"""Indices of the replies, the replies, and whether the tree has no other path."""
NODE_KEYS: Final = frozenset(("text", "role", "replies"))
OTHER_REPLIES: Final = "replies outside the best path"


def tree_paths(row: Row, select: str, renamed: Callable[[Any], Any]) -> Iterator[tuple[Row, bool]]:
    """Yield a row for the best path of a tree, or for each path from its first message to a last one.

    The `replies` of such a row are the messages of the path, one after another.

    Args:
        row: Row of the format tree.
        select: `best` follows the reply with the lowest `rank`, or the first one; `all` yields every path.
        renamed: Function that gives a message its keys and roles by the source's `columns` and `roles`.

    Yields:
        The row of a path, and whether the tree has other paths that are not used.

    Raises:
        BadRowError: A reply is not an object, or a rank is not a number.
    """
    values = row.values
    # The export of whole trees has the first message in `prompt`.
    if isinstance(values.get("prompt"), dict):
        values = {**{key: value for key, value in values.items() if key != "prompt"}, **values["prompt"]}
    first = renamed(values)
    for indices, path, is_only in _paths(first, select, renamed):
        where = row.where if select == "best" else f"{row.where}[{'.'.join(map(str, indices))}]"
        yield Row(where, {**first, "replies": path}), not is_only


def from_tree(row: Row) -> Example:
    """Return the example of one path of a tree; the other keys of its first message are fields."""
    replies = row.values["replies"]
    nodes = [row.values, *replies]
    turns = [{"role": node.get("role"), "content": node.get("text")} for node in nodes]
    example = chat_example(row, messages_of(turns, "the tree"), NODE_KEYS)
    said = [message.content for message in example.messages or ()]
    for node in replies:
        refuse_carriers({key: value for key, value in node.items() if key not in NODE_KEYS}, said, "replies")
    others = dict.fromkeys(f"replies.*.{key}" for node in replies for key in node if key not in NODE_KEYS)
    return replace(example, unused=tuple(others))


def _paths(
    node: Node, select: str, renamed: Callable[[Any], Any]
) -> Iterator[tuple[tuple[int, ...], list[Node], bool]]:
    """Yield indices, messages after the node, and whether the node has no other path."""
    replies = node.get("replies")
    if replies is None or replies == []:
        yield (), [], True
        return
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise BadRowError(
            f"replies is {shown(replies)}." if not isinstance(replies, list) else "a reply is not an object.",
            "a message of a tree has a list of replies, which are messages.",
            "write replies as a list of objects with text, role and replies.",
        )
    listed = [renamed(reply) for reply in replies]
    wanted = range(len(listed)) if select == "all" else [min(range(len(listed)), key=lambda at: _rank(listed[at]))]
    for at in wanted:
        for indices, path, is_only in _paths(listed[at], select, renamed):
            yield (at, *indices), [listed[at], *path], is_only and len(wanted) == len(listed)


def _rank(node: Node) -> float:
    rank = node.get("rank")
    # Without a rank, a reply comes after those with one.
    if rank is None:
        return inf
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or isnan(rank):
        raise BadRowError(
            f"the rank of a reply with the keys {names(node)} is {shown(rank)}.",
            "the reply with the lowest rank is the best one.",
            "write a number, or null.",
        )
    return rank
