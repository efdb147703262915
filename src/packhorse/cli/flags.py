"""Commands and flags as values: what Fire reads, what `--help` prints, and how the text of a flag becomes a value."""

from __future__ import annotations

import difflib
import inspect
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from packhorse.errors import UserError

Value = str | int | float | bool | None
HELP_COLUMNS = 110


@dataclass(frozen=True)
class Flag:
    """A flag of a command.

    Attributes:
        name: Name as typed, without the two dashes.
        help: What the flag does, for `--help`.
        kind: How its text is read: as a switch, a count from 1, an index from 0, an amount above 0, or plain text.
        shows: What `--help` prints behind the name; empty for a switch.
        default: Value of a text flag that is not given.
    """

    name: str
    help: str
    kind: Literal["text", "switch", "count", "index", "amount"] = "text"
    shows: str = ""
    default: str = ""

    @property
    def argument(self) -> str:
        """Name of the parameter that takes the value."""
        return self.name.replace("-", "_")

    @property
    def typed(self) -> str:
        """The flag as `--help` shows it."""
        return f"--{self.name} {self.shows}".rstrip()

    def read(self, text: str) -> Value:
        """Return the value of the typed text.

        Raises:
            UserError: The text is not of the flag's kind.
        """
        if self.kind == "switch":
            if text not in ("True", "False"):
                raise UserError(
                    f"--{self.name} is {text}.",
                    f"--{self.name} is a switch and takes no value.",
                    f"write --{self.name} alone.",
                )
            return text == "True"
        if self.kind == "text":
            return text
        if not text:
            return None
        return self._amount(text) if self.kind == "amount" else self._count(text, least=int(self.kind == "count"))

    def _count(self, text: str, least: int) -> int:
        if text.isdecimal() and int(text) >= least:
            return int(text)
        raise UserError(
            f"--{self.name} is {text}.",
            f"--{self.name} must be a whole number of at least {least}.",
            f"write for example --{self.name} 8.",
        )

    def _amount(self, text: str) -> float:
        try:
            amount = float(text)
        except ValueError:
            amount = math.nan
        if 0 < amount < math.inf:
            return amount
        raise UserError(
            f"--{self.name} is {text}.",
            f"--{self.name} must be a number above 0.",
            f"write for example --{self.name} {self.shows}.",
        )


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        name: Name as typed; also the name of the function that runs it.
        summary: One sentence.
        usage: Command lines, each with a comment that may be empty.
        words: Positional words and their defaults; None marks a word that must be given.
        flags: Flags.
        more_words: Name of the argument that takes further positional words; empty if there may be none.
        takes_overrides: Whether `key=value` and unknown flags are overrides of the recipe.
        notes: Text below the flags.
        module: Module of `packhorse.cli` that holds the function; empty: the module of that name.
    """

    name: str
    summary: str
    usage: tuple[tuple[str, str], ...]
    words: tuple[tuple[str, str | None], ...] = ()
    flags: tuple[Flag, ...] = ()
    more_words: str = ""
    takes_overrides: bool = False
    notes: str = ""
    module: str = ""

    @property
    def switches(self) -> set[str]:
        """Flags without a value, as typed."""
        return {f"--{flag.name}" for flag in self.flags if flag.kind == "switch"}

    @property
    def help(self) -> str:
        """Text of `packhorse COMMAND --help`."""
        blocks = [self.summary, _two_columns(self.usage)]
        if self.flags:
            blocks.append(_two_columns([(flag.typed, flag.help) for flag in self.flags]))
        return "\n\n".join([*blocks, *([self.notes] if self.notes else [])]) + "\n"


@dataclass(frozen=True)
class Action:
    """What the user asked for: a command, and the arguments of its function. An action does nothing."""

    command: str
    arguments: dict[str, Any] = field(default_factory=dict)


def fire_function(command: Command) -> Callable[..., Action]:
    """Return the function that Fire sees: its signature is the command's words and flags, its result an `Action`."""
    words = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if default is None else default,
        )
        for name, default in command.words
    ]
    flags = [
        inspect.Parameter(
            flag.argument, inspect.Parameter.KEYWORD_ONLY, default="False" if flag.kind == "switch" else flag.default
        )
        for flag in command.flags
    ]
    more = "overrides" if command.takes_overrides else command.more_words
    positional = [inspect.Parameter(more, inspect.Parameter.VAR_POSITIONAL)] if more else []
    unknown = [inspect.Parameter("unknown", inspect.Parameter.VAR_KEYWORD)] * command.takes_overrides
    signature = inspect.Signature([*words, *positional, *flags, *unknown])

    def read(*args: str, **kwargs: str) -> Action:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        arguments: dict[str, Any] = {name: given[name] for name, _ in command.words}
        if command.takes_overrides:
            arguments["overrides"] = _overrides(command, given["overrides"], given["unknown"])
        if command.more_words:
            arguments[command.more_words] = list(given[command.more_words])
        return Action(
            command.name, arguments | {flag.argument: flag.read(given[flag.argument]) for flag in command.flags}
        )

    read.__signature__ = signature  # type: ignore[attr-defined]
    return read


def _overrides(command: Command, words: Sequence[str], unknown: dict[str, str]) -> list[str]:
    """Return what changes the recipe, words and flags alike.

    Raises:
        UserError: A flag is nearly one of the command's.
    """
    names = [flag.name for flag in command.flags]
    for name in unknown:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        if close:
            raise UserError(
                f"--{name} is neither a flag of packhorse {command.name} nor a field of the recipe.",
                "a flag that nothing reads would silently change nothing.",
                f"did you mean --{close[0]}?",
            )
    return [*words, *(f"{name}={value}" for name, value in unknown.items())]


def _two_columns(rows: Sequence[tuple[str, str]]) -> str:
    """Return one line per row; what the second column says is aligned, and wrapped at `HELP_COLUMNS`."""
    width = max((len(left) for left, right in rows if right), default=0)
    lines = []
    for left, right in rows:
        first, *more = textwrap.wrap(right, max(40, HELP_COLUMNS - width - 2)) or [""]
        lines.append(f"{left:<{width}}  {first}".rstrip())
        lines += [" " * (width + 2) + line for line in more]
    return "\n".join(lines)
