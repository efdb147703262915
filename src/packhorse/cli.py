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
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import fire
from fire.core import FireExit
from fire.decorators import SetParseFn

from packhorse.errors import EXIT_BUG, EXIT_OK, EXIT_USER_ERROR, UserError
from packhorse.masking import mask_output


@dataclass(frozen=True)
class Action:
    """What the user asked for: a function of `packhorse.commands`, and its arguments."""

    module: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


def recipes(action: str = "list", name: str = "", target: str = "") -> Action:
    """List the shipped recipes, show one, copy one, or print the reference of all fields.

    packhorse recipes
    packhorse recipes show quickstart/full
    packhorse recipes copy quickstart/full my.yaml
    packhorse recipes reference
    """
    return Action("recipes", "recipes", {"action": action, "name": name, "target": target})


def check(recipe: str, *overrides: str, **more: str) -> Action:
    """Check a recipe, its data, template and mask; nothing is trained.

    packhorse check RECIPE [key=value …]
    """
    return Action("data", "check", {"recipe": recipe, "overrides": _overrides(overrides, more)})


def prepare(recipe: str, *overrides: str, **more: str) -> Action:
    """Turn rows into token ids, masks and packs on disk, once.

    packhorse prepare RECIPE [key=value …]
    """
    return Action("data", "prepare", {"recipe": recipe, "overrides": _overrides(overrides, more)})


def convert(
    source: str,
    target: str,
    to: str = "",
    format: str = "auto",  # noqa: A002
    force: str = "False",
) -> Action:
    """Write rows in another form: messages, Alpaca, or OpenAI's for hosted fine-tuning, with what it would cost.

    packhorse convert IN OUT --to messages|alpaca|openai [--format auto] [--force]
    """
    arguments = {"source": source, "target": target, "to": to, "row_format": format}
    return Action("convert", "convert", {**arguments, "force": _switch("force", force)})


def plan(
    recipe: str,
    *overrides: str,
    gpus: str = "",
    nodes: str = "",
    price: str = "",
    network: str = "",
    compare: str = "False",
    scale: str = "False",
    json: str = "False",
    argv: str = "False",
    diff: str = "",
    calibrate: str = "",
    dry_run: str = "False",
    write: str = "False",
    force: str = "False",
    **more: str,
) -> Action:
    """Show what would run and why, whether it fits, how long it takes and what it costs; needs no GPU.

    packhorse plan RECIPE [--gpus 8xH100-80GB] [--nodes 1] [--price 2.50] [--network 400] [--json] [key=value …]
    packhorse plan RECIPE --gpus 8xA100-40GB --compare   every engine, micro-batch and checkpointing, and why each lost
    packhorse plan RECIPE --gpus 8xH100-80GB --scale     the same on 1 to 4,096 GPUs, and what stops it
    packhorse plan RECIPE --gpus auto                    the fewest GPUs of each kind that hold it; autoxH100: of one
    packhorse plan RECIPE --gpus 32 --dry-run            one step of a small model as rank 0 of 32, on this CPU
    packhorse plan RECIPE --gpus 16 --nodes 2 --write    prepares the data and makes the run folder, for a job script

    --price P: of a GPU hour. --network N: Gbit/s of one GPU between nodes. --json: one JSON value.
    --argv: the launch line alone. --diff RUN: what differs from a run's plan. --calibrate RUN: time by its steps.
    --write --force: even if the GPUs cannot hold it.
    """
    flags = (
        "gpus",
        "nodes",
        "price",
        "network",
        "compare",
        "scale",
        "json",
        "argv",
        "diff",
        "calibrate",
        "dry_run",
        "write",
        "force",
    )
    asked: dict[str, Any] = {"gpus": gpus, "nodes": _count("nodes", nodes)}
    run = {"recipe": recipe, "overrides": _overrides(overrides, more, flags)}
    forced = _switch("force", force)
    if _switch("write", write):
        return Action("train", "write_run", run | asked | {"force": forced})
    if _switch("dry-run", dry_run):
        return Action("rehearse", "rehearse", run | asked | {"as_json": _switch("json", json)})
    asked |= {"price": _amount("price", price), "network_gbit": _amount("network", network)}
    asked |= {"compare": _switch("compare", compare), "as_json": _switch("json", json), "argv": _switch("argv", argv)}
    asked |= {"scale": _switch("scale", scale), "diff": diff, "calibrate": calibrate}
    return Action("plan", "plan", run | {"asked": asked})


def train(
    recipe: str,
    *overrides: str,
    gpus: str = "",
    resume: str = "False",
    restarts: str = "",
    force: str = "False",
    **more: str,
) -> Action:
    """Train a recipe on this machine, or go on with a run.

    packhorse train RECIPE [--gpus 2] [--restarts 3] [--force] [key=value …]
    packhorse train RUN --resume [--gpus 2] [--restarts 3] [--force] [parallel.engine=zero3 …]

    --restarts N: a run that fails starts again by itself from its newest sound checkpoint, N times at most.
    --force: even if the plan says that the GPUs cannot hold it.
    """
    words = _overrides(overrides, more, ("gpus", "resume", "restarts", "force"))
    arguments = {"recipe": recipe, "overrides": words, "gpus": _count("gpus", gpus)}
    again = {"resume": _switch("resume", resume), "restarts": _count("restarts", restarts, at_least=0)}
    return Action("train", "train", arguments | again | {"force": _switch("force", force)})


def status(run: str) -> Action:
    """Show a run's state, its last figures, its attempts, and what was lost.

    packhorse status RUN
    """
    return Action("status", "status", {"run": run})


def verify(run: str) -> Action:
    """Read a run's checkpoints and prepared data, and name each file that is not as it was written.

    packhorse verify RUN
    """
    return Action("verify", "verify", {"run": run})


def evaluate(run: str, *, test: str = "False", again: str = "False") -> Action:
    """Measure base beside tuned on held-out rows: loss, perplexity, exact match.

    packhorse evaluate RUN
    packhorse evaluate RUN --test            opens the sealed test rows, once; the look is counted
    packhorse evaluate RUN --test --again    opens them once more
    """
    switches = {"test": _switch("test", test), "again": _switch("again", again)}
    if switches["again"] and not switches["test"]:
        raise UserError(
            "--again is given without --test.",
            "only the test rows are sealed; the others may be measured as often as you like.",
            "write --test --again, or leave --again out.",
        )
    return Action("evaluate", "evaluate", {"run": run, **switches})


def chat(run: str) -> Action:
    """Talk to a run's model in the terminal.

    packhorse chat RUN
    """
    return Action("evaluate", "chat", {"run": run})


def quickstart() -> Action:
    """Train and evaluate the quickstart's recipes on this machine: full fine-tuning, then LoRA on its result.

    packhorse quickstart
    """
    return Action("quickstart", "quickstart")


VERBS: dict[str, Callable[..., Action]] = {
    verb.__name__: verb
    for verb in (recipes, check, prepare, convert, plan, train, status, verify, evaluate, chat, quickstart)
}
SWITCHES = ("--resume", "--write", "--force", "--test", "--again", "--compare", "--scale", "--json", "--argv")


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


def _overrides(positional: Sequence[str], more: dict[str, str], flags: Sequence[str] = ()) -> list[str]:
    for name in more:
        close = difflib.get_close_matches(name, flags, n=1, cutoff=0.7)
        if close:
            raise UserError(
                f"--{name} is neither a flag nor a field of the recipe.",
                "a word that nobody reads would change nothing, silently.",
                f"did you mean --{close[0]}?",
            )
    return [*positional, *(f"{name}={value}" for name, value in more.items())]


def _count(name: str, text: str, at_least: int = 1) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or int(text) < at_least:
        raise UserError(
            f"--{name} is {text}.",
            f"it says how many {name}.",
            f"give a whole number of {at_least} or more, for example --{name} 8.",
        )
    return int(text)


def _amount(name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if not 0 < amount < math.inf:
        raise UserError(
            f"--{name} is {text}.",
            "time and price are multiples of it.",
            f"give a number above 0, for example --{name} {'2.50' if name == 'price' else '400'}.",
        )
    return amount


def _switch(name: str, text: str) -> bool:
    if text not in ("True", "False"):
        raise UserError(f"--{name} is {text}.", "it is a switch and takes no value.", f"write --{name} alone.")
    return text == "True"


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
