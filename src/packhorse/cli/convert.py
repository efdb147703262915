"""`packhorse convert`: rows in another form, for another trainer or a hosted service."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from rich.table import Table

from packhorse.cli.show.text import open_console, pairs, print_plain
from packhorse.data.convert.convert import Conversion, Target, convert_file
from packhorse.data.convert.prices import RULE, TokenCount, default_epochs, read_prices
from packhorse.data.formats.bad_row import closest
from packhorse.errors import EXIT_OK, UserError
from packhorse.recipe.locate import path_of
from packhorse.recipe.schema import Format, Source


def convert(source: str, target: str, to: str, format: str, force: bool) -> int:  # noqa: A002 (the name of the flag)
    """Write the rows of a file in another form, all or none; show dropped fields and the estimated price."""
    _check_choice("to", to, get_args(Target))
    _check_choice("format", format, get_args(Format))
    rows = Source.model_validate({"path": source, "format": format})
    done = convert_file(rows, path_of(target), to, force, Path("runs"))  # type: ignore[arg-type]
    console = open_console()
    print_plain(f"{done.num_rows:,} rows of {source} ({done.row_format}) written to {target} ({to})", console)
    if lines := _lines(done, to, source):
        console.print(pairs(lines))
    if to == "openai":
        console.print(_prices(done.tokens))
        console.print(pairs(_price_notes()))
    return EXIT_OK


def _lines(done: Conversion, to: str, source: str) -> list[tuple[str, str]]:
    lines = [("nulls", note)] if (note := done.removed_nulls.note(source)) else []
    if done.dropped:
        counted = ", ".join(f"{name} ({rows:,} rows)" for name, rows in done.dropped.most_common())
        lines.append(("dropped", f"{counted}: the form has no field for it"))
    if to == "openai":
        tokens = done.tokens
        epochs = default_epochs(tokens.num_examples)
        lines.append(("tokens", f"about {tokens.total():,}, an estimate that may be a quarter off: {RULE}"))
        lines.append(("epochs", f"{epochs}, the default of the service for {tokens.num_examples:,} examples"))
        most = min(model.most_tokens for model in read_prices().models)
        if tokens.num_longer(most):
            lines.append(("long", f"{tokens.num_longer(most):,} rows have more than about {most:,} tokens"))
    return lines


def _prices(tokens: TokenCount) -> Table:
    epochs = default_epochs(tokens.num_examples)
    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    for heading in ("$ per million tokens", "$ per epoch, about", f"$ for {epochs} epochs, about", "rows cut"):
        table.add_column(heading, justify="right")
    for model in read_prices().models:
        epoch = tokens.total(model.most_tokens) * model.dollars_per_million_tokens / 1e6
        figures = (model.dollars_per_million_tokens, epoch, epoch * epochs)
        table.add_row(
            model.name, *(f"{figure:,.2f}" for figure in figures), f"{tokens.num_longer(model.most_tokens):,}"
        )
    return table


def _price_notes() -> list[tuple[str, str]]:
    prices = read_prices()
    return [("prices", f"{prices.date}, {prices.source}"), ("note", f"{prices.notice}.")]


def _check_choice(flag: str, given: str, known: tuple[str, ...]) -> None:
    if given in known:
        return
    near = closest(given, known)
    raise UserError(
        f"--{flag} is {given}." if given else f"--{flag} is missing.",
        f"it must be one of {', '.join(known)}.",
        f"write --{flag} {near or known[0]}.",
    )
