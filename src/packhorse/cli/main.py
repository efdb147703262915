"""The command line: Fire reads the words into an `Action`, which does nothing, and `main` runs it afterwards.

Fire runs a function before it reports a mistyped flag. So the functions that Fire sees are pure (see `fire_function`),
and a flag that a command does not know becomes an override, which the recipe loader refuses before anything happens.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import logging
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from packhorse.cli.commands import COMMAND_TABLE
from packhorse.cli.flags import Action, fire_function
from packhorse.errors import EXIT_BUG, EXIT_OK, EXIT_USER_ERROR, UserError
from packhorse.library_hooks import check_library_hooks
from packhorse.secrets import mask_output

HELP = {"-h", "--help"}


def run() -> None:
    """Run the `packhorse` command."""
    mask_output()
    # peft imports bitsandbytes, which logs on some processors that an optional kernel is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1:]))


def main(words: Sequence[str]) -> int:
    """Run one command line; return its exit code: 0, 2 for a user's mistake, 1 for a bug, 75 for stopped."""
    try:
        action = read_command(words)
        if isinstance(action, str):
            sys.stdout.write(action)
            return EXIT_OK
        command = COMMAND_TABLE[action.command]
        module = import_module(f"packhorse.cli.{command.module or command.name}")
        code: int = getattr(module, command.name)(**action.arguments)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except BrokenPipeError:  # the reader of a pipe (`| head`) has closed it
        return EXIT_OK
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        return 130
    except Exception as error:
        return _explain(error)
    return code


def _explain(error: Exception) -> int:
    """Print why a command failed with an error that is not a UserError; return the exit code."""
    if isinstance(error, ImportError):
        try:
            check_library_hooks()
        except UserError as missing:
            sys.stderr.write(f"{missing}\n")
            return missing.exit_code
    # Any word of the command line, or field of the recipe, may be a path, and every system call may find it too long.
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        sys.stderr.write(f"{_path_too_long(str(error.filename))}\n")
        return EXIT_USER_ERROR
    traceback.print_exception(error)
    sys.stderr.write("this is a bug of Packhorse; please report it with the lines above\n")
    return EXIT_BUG


def _path_too_long(path: str) -> UserError:
    longest = max((len(part.encode(errors="replace")) for part in path.split("/")), default=0)
    return UserError(
        f"the path {path[:60]}... has {len(path):,} characters, and a name in it {longest:,} bytes.",
        "a file system takes names of up to 255 bytes and paths of up to 4,095.",
        "use a shorter name.",
    )


def read_command(words: Sequence[str]) -> Action | str:
    """Read the words into an action, or into the text of `--help` or `--version`. Has no effect.

    Raises:
        UserError: The command is unknown, or its arguments do not fit.
    """
    name = next((word for word in words if not word.startswith("-")), None)
    if name is None:
        if "--version" in words:
            from packhorse.version import VERSION  # only here: it reads the metadata of the installed package

            return f"packhorse {VERSION}\n"
        return _overview() if not words or HELP & set(words) else _refuse_command(words[0])
    if name not in COMMAND_TABLE:
        return _overview() if name == "help" else _refuse_command(name)
    if HELP & set(words):
        return COMMAND_TABLE[name].help
    return _read_action(name, words)


def _read_action(name: str, words: Sequence[str]) -> Action:
    # Only here: `--help` and `--version` do not need Fire, which takes a third of their time to import.
    import fire
    from fire.core import FireExit
    from fire.decorators import SetParseFn

    command = COMMAND_TABLE[name]
    position = list(words).index(name)  # the first one: a run may have the name of a command
    # Fire would take the word after a switch as its value.
    typed = [
        f"{word}=True" if word in command.switches else word for word in (*words[:position], *words[position + 1 :])
    ]
    output = io.StringIO()
    try:
        # Fire prints the text of the result on stdout, here an empty line.
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            function = SetParseFn(str)(fire_function(command))
            action = fire.Fire(function, command=typed, name=f"packhorse {name}", serialize=lambda _: "")
    except FireExit as error:
        last = error.trace.elements[-1]
        raise _unreadable(name, typed, last.ErrorAsStr() if last.HasError() else "its words do not fit") from error
    if not isinstance(action, Action):  # Fire took a surplus word as the name of an attribute
        raise _unreadable(name, typed, "it has too many words")
    return action


def _unreadable(name: str, typed: Sequence[str], why: str) -> UserError:
    return UserError(
        f"packhorse {' '.join([name, *typed])} cannot be read: {why}",
        f"the command takes: {COMMAND_TABLE[name].usage[0][0]}",
        f"see `packhorse {name} --help`.",
    )


def _refuse_command(word: str) -> str:
    close = difflib.get_close_matches(word, COMMAND_TABLE, n=1)
    raise UserError(
        f"packhorse has no command {word}.",
        f"the commands are {', '.join(COMMAND_TABLE)}.",
        f"did you mean `packhorse {close[0]}`?" if close else "see `packhorse --help`.",
    )


def _overview() -> str:
    return "\n".join(
        [
            "packhorse: fine-tune language models, and prove each run before it takes a GPU.",
            "",
            *(f"  {command.name:<12}{command.summary}" for command in COMMAND_TABLE.values()),
            "",
            "packhorse COMMAND --help shows how to use a command. Start with `packhorse quickstart`.",
            "",
        ]
    )
