"""Rename the keys and roles of rows by a source's `columns` and `roles`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from packhorse.data.formats.bad_row import BadRowError, closest, names
from packhorse.data.formats.detect import KNOWN_KEYS, detect_format
from packhorse.data.formats.turns import ROLES, TURN_KEYS
from packhorse.data.read.row import Row
from packhorse.errors import UserError
from packhorse.recipe.objectives import RowFormat
from packhorse.recipe.schema import Source

CHAT_KEYS: Final = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "history")
OUR_ROLES: Final = ("system", "user", "assistant", "tool")
ABSENT: Final = object()
EACH: Final = ".*"


@dataclass(frozen=True)
class Renaming:
    """Mapping from a format's names to the names in the rows, and the names to ignore.

    Attributes:
        row_keys: Format key to row key, or to a path such as `answers.0.text`. With `*` as an index, as in
            `qas.*.question`, each element of the list becomes its own row; paths with equal beginnings go together.
        turn_keys: Format key of a turn to the key in the rows.
        roles: Role in the rows to our role.
        ignored: Keys of rows and turns that are removed before anything else.
    """

    row_keys: Mapping[str, str]
    turn_keys: Mapping[str, str]
    roles: Mapping[str, str]
    ignored: frozenset[str] = frozenset()

    def apply(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the row with the format's names; a key that the row lacks stays absent."""
        # The format's own names are removed too: with {question: q}, a row without q has no question.
        taken = {*self.row_keys.values(), *self.row_keys, *self.ignored}
        # Of a nested value, the path names the part that is used.
        taken |= {path.partition(".")[0] for path in self.row_keys.values() if path not in values}
        renamed = {key: value for key, value in values.items() if key not in taken}
        for key, path in self.row_keys.items():
            value = _at(values, path)
            if value is not ABSENT:
                renamed[key] = value
        if self.turn_keys or self.roles or self.ignored:
            for key in CHAT_KEYS:
                if isinstance(renamed.get(key), list):
                    renamed[key] = [self.turn(turn) for turn in renamed[key]]
                elif isinstance(renamed.get(key), dict):
                    renamed[key] = self.turn(renamed[key])
        return renamed

    def refuse_hidden(self, values: dict[str, Any]) -> None:
        """Raise BadRowError for a row or turn whose own key has the name that `columns` gives to another one."""
        turns = self._given_turns(values) if self.turn_keys else []
        for mapping, owner in ((self.row_keys, values), *((self.turn_keys, turn) for turn in turns)):
            for key, path in mapping.items():
                own = owner.get(key)
                if own is None or key in mapping.values() or key in self.ignored:
                    continue
                if (mapped := _at(owner, path)) is not ABSENT and mapped != own:
                    raise BadRowError(
                        f"columns maps {key} to {path}, and the row also has a key {key}.",
                        "its value would be lost.",
                        f"set the source's ignore: [{key}], or map it in columns too.",
                    )

    def ignored_in(self, values: dict[str, Any]) -> list[str]:
        """Return the names to ignore that a row has with a value, itself or in a turn."""
        if not self.ignored:
            return []
        keys = {
            key for owner in (values, *self._given_turns(values)) for key, value in owner.items() if value is not None
        }
        return sorted(self.ignored & keys)

    def _given_turns(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the turns of a row that is not renamed yet, with the messages of a tree."""
        lists = {key: _at(values, self.row_keys.get(key, key)) for key in (*CHAT_KEYS, "replies")}
        turns = _turns({key: value for key, value in lists.items() if value is not ABSENT})
        nodes = lists["replies"] if isinstance(lists["replies"], list) else []
        nodes = [node for node in nodes if isinstance(node, dict)]
        return turns + nodes + [reply for node in nodes for reply in self._given_turns(node)]

    def spread(self, values: dict[str, Any]) -> list[tuple[str, Renaming]]:
        """Return a renaming for each row that one row holds, with its indices, such as `[0.3]`."""
        if not any(EACH in path for path in self.row_keys.values()):
            return [("", self)]
        spread = _indexed_paths(values, self.row_keys)
        return [(f"[{'.'.join(map(str, at))}]", replace(self, row_keys=row_keys)) for at, row_keys in spread]

    def turn(self, turn: Any) -> Any:  # noqa: ANN401
        """Return a turn with the format's keys and roles; a value that is no object stays unchanged."""
        if not isinstance(turn, dict):
            return turn
        taken = {*self.turn_keys.values(), *self.turn_keys, *self.ignored}
        renamed = {key: value for key, value in turn.items() if key not in taken}
        renamed.update({key: turn[theirs] for key, theirs in self.turn_keys.items() if theirs in turn})
        # After the keys, so that roles also work in renamed columns.
        for key in ("role", "from"):
            given = renamed.get(key)
            if isinstance(given, str) and given in self.roles:
                renamed[key] = self.roles[given]
        return renamed


def renaming_of(source: Source | None) -> Renaming | None:
    """Return the mapping of a source's `columns`, `roles` and `ignore`; None if it has none of them.

    Raises:
        UserError: No format has such a key or role.
    """
    if source is None or not (source.columns or source.roles or source.ignore):
        return None
    for key, theirs in source.columns.items():
        if key not in KNOWN_KEYS and key not in TURN_KEYS:
            near = closest(key, KNOWN_KEYS | TURN_KEYS)
            raise UserError(
                f"columns maps {key} to {theirs}, and no format has a key {key}.",
                "columns maps a format's keys to the keys in the rows: {format's key: row's key}.",
                f"write {near}." if near else f"write one of {', '.join(sorted(KNOWN_KEYS | TURN_KEYS))}.",
            )
    for theirs, ours in source.roles.items():
        if ours not in ROLES:
            raise UserError(
                f"roles maps {theirs} to {ours}.",
                "roles maps the speakers in the rows to roles: {row's role: role}.",
                f"write one of {', '.join(OUR_ROLES)}.",
            )
    row_keys = {key: theirs for key, theirs in source.columns.items() if key not in TURN_KEYS}
    turn_keys = {key: theirs for key, theirs in source.columns.items() if key in TURN_KEYS}
    return Renaming(row_keys, turn_keys, source.roles, frozenset(source.ignore))


def check_columns(renaming: Renaming, first: Sequence[Row]) -> None:
    """Raise UserError for a mapping from a key that none of the first rows has."""
    rows = [row.values for row in first]
    renaming = renaming.spread(rows[0])[0][1]
    absent = [item for item in renaming.row_keys.items() if all(_at(values, item[1]) is ABSENT for values in rows)]
    if absent:
        raise _absent(absent, f"the row's keys are {names(rows[0])}", first[0].where)
    keys = [key for values in map(renaming.apply, rows) for turn in _turns(values) for key in turn]
    # The turns are renamed already: a key that was there under the row's name is there under the format's.
    absent = [item for item in renaming.turn_keys.items() if keys and item[0] not in keys]
    if absent:
        theirs = {mapped: key for key, mapped in renaming.turn_keys.items()}
        there = sorted({renaming.turn_keys.get(key, theirs.get(key, key)) for key in keys})
        raise _absent(absent, f"the keys of its turns are {names(there)}", first[0].where)


def formats_of(renaming: Renaming | None, first: Sequence[Row]) -> list[RowFormat | None]:
    """Return the format of each of the first rows, detected after renaming."""
    if renaming is None:
        return [detect_format(row.values) for row in first]
    return [detect_format(renaming.spread(row.values)[0][1].apply(row.values)) for row in first]


def _indexed_paths(values: Mapping[str, Any], paths: Mapping[str, str]) -> list[tuple[tuple[int, ...], dict[str, str]]]:
    """Return the paths with each `*` replaced by an index, for each element; the outermost list first."""
    beginnings = [path[: path.index(EACH)] for path in paths.values() if EACH in path]
    if not beginnings:
        return [((), dict(paths))]
    beginning = min(beginnings, key=len)
    elements = _at(values, beginning)
    if not isinstance(elements, list) or not elements:
        # A path that still has its `*` leads nowhere, and is reported as absent.
        return [((), dict(paths))]
    spread = []
    for at in range(len(elements)):
        head = beginning + EACH
        numbered = {
            key: f"{beginning}.{at}{path[len(head) :]}" if path.startswith(head) else path
            for key, path in paths.items()
        }
        spread += [((at, *inner), row_keys) for inner, row_keys in _indexed_paths(values, numbered)]
    return spread


def _turns(values: dict[str, Any]) -> list[dict[str, Any]]:
    lists = [values[key] if isinstance(values[key], list) else [values[key]] for key in CHAT_KEYS if key in values]
    return [turn for turns in lists for turn in turns if isinstance(turn, dict)]


def _absent(absent: Sequence[tuple[str, str]], existing: str, where: str) -> UserError:
    pairs = ", ".join(f"{key}: {theirs}" for key, theirs in absent)
    return UserError(
        f"columns has {{{pairs}}}, and the row has no {' and no '.join(theirs for _, theirs in absent)}; {existing}.",
        "the key would be missing from every row.",
        "write the row's key after the colon, exactly as in the rows.",
        where,
    )


def _at(values: Mapping[str, Any], path: str) -> Any:  # noqa: ANN401
    """Return the value of a key, or else the value at a path of keys and indices such as `answers.0.text`."""
    if path in values:
        return values[path]
    value: Any = values
    for step in path.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return ABSENT
    return value
