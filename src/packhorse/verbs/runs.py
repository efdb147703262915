"""Verbs that do something here: with a recipe, or with a run."""

from __future__ import annotations

from typing import Any

from packhorse.errors import UserError
from packhorse.verbs.words import Action, amount_of, count_of, overrides_of, switch_of


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
    return Action("data", "check", {"recipe": recipe, "overrides": overrides_of(overrides, more)})


def prepare(recipe: str, *overrides: str, **more: str) -> Action:
    """Turn rows into token ids, masks and packs on disk, once.

    packhorse prepare RECIPE [key=value …]
    """
    return Action("data", "prepare", {"recipe": recipe, "overrides": overrides_of(overrides, more)})


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
    return Action("convert", "convert", {**arguments, "force": switch_of("force", force)})


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
    --argv: the launch line alone, one per node. --diff RUN: what differs from a run's plan.
    --calibrate RUN: time by its steps.
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
    asked: dict[str, Any] = {"gpus": gpus, "nodes": count_of("nodes", nodes)}
    run = {"recipe": recipe, "overrides": overrides_of(overrides, more, flags)}
    forced = switch_of("force", force)
    if switch_of("write", write):
        return Action("train", "write_run", run | asked | {"force": forced})
    if switch_of("dry-run", dry_run):
        return Action("rehearse", "rehearse", run | asked | {"as_json": switch_of("json", json)})
    asked |= {"price": amount_of("price", price), "network_gbit": amount_of("network", network)}
    asked |= {
        "compare": switch_of("compare", compare),
        "as_json": switch_of("json", json),
        "argv": switch_of("argv", argv),
    }
    asked |= {"scale": switch_of("scale", scale), "diff": diff, "calibrate": calibrate}
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
    words = overrides_of(overrides, more, ("gpus", "resume", "restarts", "force"))
    arguments = {"recipe": recipe, "overrides": words, "gpus": count_of("gpus", gpus)}
    again = {"resume": switch_of("resume", resume), "restarts": count_of("restarts", restarts, at_least=0)}
    return Action("train", "train", arguments | again | {"force": switch_of("force", force)})


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
    switches = {"test": switch_of("test", test), "again": switch_of("again", again)}
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
