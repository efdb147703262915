"""`packhorse export`: the result of a run in the form of other programs, proven and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from packhorse.cli.show.text import open_console, print_plain
from packhorse.errors import EXIT_NO_GO, EXIT_OK, UserError
from packhorse.evaluate.results import shown_change
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.layout import MERGE_FILE
from packhorse.workflows.export import Merged, export_gguf_files, export_merged_model

if TYPE_CHECKING:  # an extra
    from packhorse.export.gguf.export import GgufExport

FORMS: Final = ("merged", "gguf")


def export(
    run: str, to: str = "merged", quantize: str = "Q8_0", dtype: str = "", unrounded: bool = False, out: str = ""
) -> int:
    """Write the trained model as one model in Hugging Face form, or as GGUF files.

    Returns:
        Exit code: 3 if a GGUF file's loss rises by more than `evaluation.smallest_effect`.

    Raises:
        UserError: The form is not known, the run has not finished, or a result cannot be proven.
    """
    if to not in FORMS:
        raise UserError(f"--to is {to}.", f"known are {', '.join(FORMS)}.", "write for example --to gguf.")
    plan = open_run(run)
    console = open_console()
    if to == "merged":
        with byte_progress() as progress:
            merged = export_merged_model(plan, dtype, unrounded, out, progress)
        for line in merged_lines(merged):
            print_plain(line, console)
        return EXIT_OK
    with byte_progress() as progress:
        found, folder = export_gguf_files(plan, [name for name in quantize.split(",") if name], out, progress)
    console.print(render(found, plan.recipe.evaluation.smallest_effect))
    for line in commands(found, folder, Path(plan.run_folder).name):
        print_plain(line, console)
    return EXIT_NO_GO if any(file.outcome == "lost" for file in found.files) else EXIT_OK


def merged_lines(merged: Merged) -> list[str]:
    """Return the proof of a merge in sentences."""
    proof, where = merged.proof, relative(merged.folder)
    if proof is None:
        return [f"{where} is the whole model in Hugging Face form already: training wrote it."]
    lines = [
        f"saved as   {where}, with {MERGE_FILE}",
        f"proven     on {proof.num_positions} positions of held-out rows, KL in nats: adapter to merged "
        f"{proof.adapter_to_merged:.1e}, base to adapter {proof.base_to_adapter:.1e}, rounding alone "
        f"{proof.rounding_floor:.1e}",
    ]
    if proof.trained_to_merged is not None:
        lines.append(
            f"unrounded  training saw the base in few bits: trained to merged {proof.trained_to_merged:.1e} nats (KL)"
        )
    return lines


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar of bytes on a terminal while the block runs; yield the function that takes what is being written."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def render(found: GgufExport, smallest_effect: float) -> RenderableType:
    """Return the proof in sentences, and the table of files."""
    proof = found.proof
    lines = [
        f"tokens     {proof.num_texts} texts have the ids of training in llama.cpp"
        + (f"; {proof.num_normalised} only after Unicode normalisation" if proof.num_normalised else ""),
        f"numbers    fp32, {proof.num_layers} layers: log-probabilities within {proof.largest_difference:.1g} nats of "
        f"transformers (bound {proof.bound:g})",
    ]
    note = f"kept: the loss rises by less than {smallest_effect:g} nats (evaluation.smallest_effect); lost: by more\n"
    return Group(*map(Text, lines), _table(found), Text(note))


def commands(found: GgufExport, folder: Path, name: str) -> list[str]:
    """Return the commands that use the first file."""
    first = relative(found.files[0].path)
    return [
        f"llama.cpp  llama-server -m {first}",
        f"Ollama     ollama create {name} -f {relative(folder)}/Modelfile",
        # LM Studio sees no file outside PUBLISHER/MODEL folders.
        f"LM Studio  lms import {first} --user-repo packhorse/{name} --hard-link -y",
    ]


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
