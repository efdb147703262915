"""The command line. Fire reads the words into an `Action`, which does nothing; `main` acts on it afterwards.

Fire runs a function before it reports a mistyped flag: so verbs are pure, and every flag that a verb does not know
comes back as an override, which the recipe loader refuses by name before anything happens.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import inspect
import io
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

import fire
from fire.core import FireExit
from fire.decorators import SetParseFn

from packhorse.errors import EXIT_BUG, EXIT_OK, EXIT_USER_ERROR, UserError
from packhorse.secrets import mask_output
from packhorse.verbs.clusters import doctor, manifest
from packhorse.verbs.jobs import cancel, logs, pipeline, resume, site, status, submit
from packhorse.verbs.runs import chat, check, convert, evaluate, plan, prepare, quickstart, recipes, train, verify
from packhorse.verbs.words import Action

VERBS: dict[str, Callable[..., Action]] = {
    verb.__name__: verb
    for verb in (
        recipes,
        check,
        prepare,
        convert,
        plan,
        train,
        submit,
        pipeline,
        status,
        logs,
        cancel,
        resume,
        doctor,
        manifest,
        verify,
        evaluate,
        chat,
        site,
        quickstart,
    )
}
SWITCHES = (
    "--resume",
    "--write",
    "--force",
    "--test",
    "--again",
    "--compare",
    "--scale",
    "--json",
    "--argv",
    "--fast",
    "--follow",
    "--now",
    "--dry-run",
)


def run() -> None:
    """Entry point of the `packhorse` command."""
    mask_output()
    # peft imports bitsandbytes, which says on some processors that an optional kernel is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1:]))


def main(words: Sequence[str]) -> int:
    """Runs one command line; returns the exit code: 0, 2 for a user's mistake, 1 for a bug, 75 for stopped."""
    try:
        action = read_command(words)
        if isinstance(action, str):
            sys.stdout.write(action)
            return EXIT_OK
        commands = import_module(f"packhorse.commands.{action.module}")
        code: int = getattr(commands, action.function)(**action.arguments)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has seen enough.
        return EXIT_OK
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        return 130
    except Exception as error:
        return _bug_or_too_long(error)
    return code


def _bug_or_too_long(error: Exception) -> int:
    # Any word of the command line, or field of the recipe, may name a path, and any look at it may find it too long.
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        sys.stderr.write(f"{_too_long(str(error.filename))}\n")
        return EXIT_USER_ERROR
    traceback.print_exception(error)
    sys.stderr.write("this is a bug of Packhorse; please report it with the lines above\n")
    return EXIT_BUG


def _too_long(path: str) -> UserError:
    longest = max((len(part.encode(errors="replace")) for part in path.split("/")), default=0)
    return UserError(
        f"the path {path[:60]}... has {len(path):,} characters, and a name in it {longest:,} bytes.",
        "a file system takes names of up to 255 bytes and paths of up to 4,095.",
        "give it a shorter name.",
    )


def read_command(words: Sequence[str]) -> Action | str:
    """Reads the words into an action, or into help text; has no effect.

    Raises:
        UserError: The command is unknown, or its arguments do not fit.
    """
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is None:
        return _overview() if not words or {"-h", "--help"} & set(words) else _refuse_verb(words[0])
    if verb not in VERBS:
        return _overview() if verb == "help" else _refuse_verb(verb)
    if {"-h", "--help"} & set(words):
        return _help(verb)
    # Fire would take the word after a switch as its value.
    at = list(words).index(verb)  # the first one: a run may be called like a command
    given = [f"{word}=True" if word in SWITCHES else word for word in (*words[:at], *words[at + 1 :])]
    parsed = {name: SetParseFn(str)(function) for name, function in VERBS.items()}
    said = io.StringIO()
    try:
        # On stdout Fire prints the value's text, an empty line here.
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            action = fire.Fire(parsed, command=[verb, *given], name="packhorse", serialize=lambda _: "")
    except FireExit as error:
        raise UserError(
            f"packhorse {' '.join([verb, *given])} cannot be read: {_fire_words(error)}",
            f"the command takes: {_usage(verb)}",
            f"see `packhorse {verb} --help`.",
        ) from error
    assert isinstance(action, Action)
    return action


def _refuse_verb(word: str) -> str:
    close = difflib.get_close_matches(word, VERBS, n=1)
    raise UserError(
        f"packhorse has no command {word}.",
        f"it has {', '.join(VERBS)}.",
        f"did you mean `packhorse {close[0]}`?" if close else "see `packhorse --help`.",
    )


def _fire_words(error: FireExit) -> str:
    last = error.trace.elements[-1]
    return last.ErrorAsStr() if last.HasError() else "its words do not fit"


def _overview() -> str:
    lines = [f"  {name:<12}{_first_line(verb)}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "packhorse: fine-tunes language models, and proves each run before it takes a GPU.",
            "",
            *lines,
            "",
            "packhorse COMMAND --help shows how to use a command. Start with `packhorse quickstart`.",
            "",
        ]
    )


def _help(verb: str) -> str:
    return inspect.getdoc(VERBS[verb]) + "\n"  # type: ignore[operator]


def _usage(verb: str) -> str:
    text = inspect.getdoc(VERBS[verb]) or ""
    return next(line for line in text.splitlines() if line.startswith("packhorse "))


def _first_line(verb: Callable[..., Action]) -> str:
    return (inspect.getdoc(verb) or "").splitlines()[0]
