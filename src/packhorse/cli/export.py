"""`packhorse export`: the result of a run in the form of other programs, proven and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from packhorse.cli.show.text import open_console
from packhorse.errors import EXIT_NO_GO, EXIT_OK, UserError
from packhorse.evaluate.results import shown_change
from packhorse.export.gguf.export import GgufExport
from packhorse.run_folder.folder import open_run, relative
from packhorse.workflows.export import export_gguf_files

FORMS: Final = ("gguf", "ollama", "lm-studio")


def export(run: str, to: str = "gguf", quantize: str = "Q8_0", out: str = "") -> int:
    """Write the trained model as GGUF files for llama.cpp, Ollama and LM Studio.

    Returns:
        Exit code: 3 if a file's loss rises by more than `evaluation.smallest_effect`.

    Raises:
        UserError: The form is not known, the run has not finished, or a file cannot be proven.
    """
    if to not in FORMS:
        raise UserError(f"--to is {to}.", f"known are {', '.join(FORMS)}.", "write for example --to gguf.")
    plan = open_run(run)
    with byte_progress() as progress:
        found, folder = export_gguf_files(plan, [name for name in quantize.split(",") if name], out, progress)
    name, effect = Path(plan.run_folder).name, plan.recipe.evaluation.smallest_effect
    open_console().print(render(found, folder, name, effect))
    return EXIT_NO_GO if any(file.outcome == "lost" for file in found.files) else EXIT_OK


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar of bytes on a terminal while the block runs; yield the function that takes what is being written."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def render(found: GgufExport, folder: Path, name: str, smallest_effect: float) -> RenderableType:
    """Return the proof in sentences, the table of files, and the commands that use them."""
    proof = found.proof
    first = found.files[0].path
    lines = [
        f"tokens     {proof.num_texts} texts have the ids of training in llama.cpp"
        + (f"; {proof.num_normalised} only after Unicode normalisation" if proof.num_normalised else ""),
        f"numbers    fp32, {proof.num_layers} layers: log-probabilities within {proof.largest_difference:.1g} nats of "
        f"transformers (bound {proof.bound:g})",
    ]
    commands = [
        f"llama.cpp  llama-server -m {relative(first)}",
        f"Ollama     ollama create {name} -f {relative(folder)}/Modelfile",
        # LM Studio sees no file outside PUBLISHER/MODEL folders.
        f"LM Studio  lms import {relative(first)} --user-repo packhorse/{name} --hard-link -y",
    ]
    note = f"kept: the loss rises by less than {smallest_effect:g} nats (evaluation.smallest_effect); lost: by more\n"
    return Group(*map(Text, lines), _table(found), Text(note), *map(Text, commands))


def _table(found: GgufExport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("type")
    for name in ("MB", "KL, nats", "same token %", "loss: model → file", "change, 95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for file in found.files:
        result = file.loss
        change = shown_change(result.difference, "nats") if result.difference is not None else ""
        if result.low is not None and result.high is not None:
            change += f" [{shown_change(result.low, 'nats')}, {shown_change(result.high, 'nats')}]"
        table.add_row(
            file.file_type,
            f"{file.bytes / 1e6:,.1f}",
            f"{file.quality.kl:.2g}",
            f"{100 * file.quality.top_1:.1f}",
            f"{result.base:.4f} → {result.tuned:.4f}",
            change,
            file.outcome,
        )
    return table
