"""`packhorse plan`: looking, from any laptop; nothing here imports torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from packhorse.commands.parameters import parameter_lines, show_parameters
from packhorse.data.identity import find_prepared
from packhorse.data.manifest import DataManifest, read_manifest
from packhorse.data.places import data_root
from packhorse.data.stored import require_sizes
from packhorse.durable import size
from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.run_folder import relative
from packhorse.plan.checkpoint_size import checkpoint_room
from packhorse.plan.hardware import detect_hardware
from packhorse.plan.make import make_plan
from packhorse.plan.run_plan import DataFacts, RunPlan
from packhorse.plan.topology import Ask
from packhorse.recipe.describe import summary
from packhorse.recipe.load import load_recipe
from packhorse.recipe.schema import Recipe


def plan(recipe: str, overrides: Sequence[str], gpus: int | None, nodes: int | None) -> int:
    """Shows what would run; prepares nothing, writes nothing."""
    loaded = load_recipe(recipe, overrides, check_environment=False)
    manifest = manifest_if_prepared(loaded)
    facts = data_facts(data_root(loaded) / manifest.content_hash, manifest) if manifest else None
    made = make_plan(loaded, Ask(gpus, nodes), detect_hardware(), facts)
    vocab_size = manifest.vocab_size if manifest else None
    _show(Console(), made, vocab_size)
    return EXIT_OK


def manifest_if_prepared(recipe: Recipe) -> DataManifest | None:
    """What is said of the prepared data; None where there is none, or it is far from here."""
    if not data_root(recipe).is_dir():
        return None
    try:
        return find_prepared(recipe)
    except UserError:
        return None


def require_data(plan: RunPlan) -> DataFacts:
    """The prepared data of a run, which must still be there, each file as long as it was written.

    Raises:
        UserError: It is gone, or a file of it is missing or has another size.
    """
    assert plan.data is not None, "a run folder is only made once its data is prepared"
    manifest = read_manifest(Path(plan.data.folder))
    if manifest is not None:
        require_sizes(Path(plan.data.folder), manifest)
        return plan.data
    raise UserError(
        f"the prepared data of this run, {plan.data.folder}, is gone.",
        "packs and held-out rows are read from there.",
        f"make it again: packhorse prepare {relative(plan.run_folder)}/recipe.yaml",
    )


def data_facts(folder: Path, manifest: DataManifest) -> DataFacts:
    """What the plan says of prepared data."""
    split = manifest.splits["train"]
    return DataFacts(
        folder=str(folder.absolute()),
        content_hash=manifest.content_hash,
        tokenizer=manifest.tokenizer,
        num_rows=split.num_rows,
        num_packs=split.num_packs,
        num_tokens=split.num_tokens,
        num_supervised_tokens=split.num_supervised_tokens,
        fill=split.fill,
    )


def _show(console: Console, made: RunPlan, vocab_size: int | None) -> None:
    topology, batch = made.topology, made.batch
    tokens = batch.packs_per_step * batch.length_tokens
    lines = [*summary(made.recipe), *parameter_lines(made.recipe, vocab_size)]
    lines += [
        ("topology", f"{topology.num_nodes} x {topology.processes_per_node} {topology.device}, {topology.engine}"),
        (
            "a step",
            f"{topology.world_size} processes x {batch.accumulation_steps} passes x {batch.micro_packs} packs"
            f" = {batch.packs_per_step} packs, {tokens:,} tokens",
        ),
    ]
    if made.data is not None:
        facts = made.data
        lines.append(("prepared", f"{facts.num_rows:,} rows in {facts.num_packs:,} packs, {facts.fill:.2%} full"))
    lines += [(decision.name, f"{decision.value}: {decision.reason}") for decision in made.decisions]
    lines += [("checkpoints", _room(made, vocab_size))]
    lines += [("run folder", made.run_folder), ("command", shown(made.argv))]
    console.print(pairs(lines))
    show_parameters(console, made.recipe, vocab_size)


def _room(made: RunPlan, vocab_size: int | None) -> str:
    room = checkpoint_room(made, vocab_size)
    if room is None:
        return "their size is known when the model is loaded; whether the disk holds them is not checked before"
    return f"{size(room.each_bytes)} each, {room.count} at once at most: {size(room.total_bytes)}"


def pairs(lines: Sequence[tuple[str, str]]) -> Table:
    """A label and a text a line, folded to the width of the terminal."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines:
        table.add_row(label, Text(text))
    return table


def shown(argv: Sequence[str]) -> str:
    """A command as it would be typed here."""
    return shlex.join(relative(word) for word in argv)
