"""Profiles of GPUs: the shipped table, a user's own file, and requests such as `8xH100-80GB`."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from packhorse.errors import Mistake, UserError
from packhorse.yaml_source.findings import place, schema_findings
from packhorse.yaml_source.nodes import FileKind, Node, kind_of, plain, read_yaml, shown_path
from packhorse.yaml_source.schema import SchemaView

TABLE: Final = Path(__file__).with_name("gpus.yaml")
OWN_VARIABLE: Final = "PACKHORSE_GPUS"
OWN_FILE: Final = "gpus.yaml"
MIB: Final = 2**20

TABLE_FILE: Final = FileKind(
    "a table of GPU profiles",
    "H100-96GB: {extends: H100-80GB, memory_mib: 97871}",
    "write the name of each GPU and its fields below it",
)
NOT_INHERITED: Final = ("aliases", "device_names", "sky")

Share = Annotated[float, Field(gt=0, le=1)]


class GpuProfile(BaseModel):
    """One kind of GPU; gpus.yaml explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    aliases: tuple[str, ...] = ()
    device_names: tuple[str, ...] = ()
    sky: str = ""
    memory_mib: PositiveInt
    bf16_tflops: PositiveFloat
    fp16_tflops: PositiveFloat
    tf32_tflops: PositiveFloat
    fp32_tflops: PositiveFloat
    bandwidth_gb: PositiveFloat
    link: Literal["switch", "mesh", "pcie"]
    link_gb: PositiveFloat
    pcie_gb: PositiveFloat
    network_gb: PositiveFloat
    matmul_share: Share
    attention_share: Share
    power_watts: PositiveFloat
    compute_capability: PositiveFloat | None = None

    @property
    def memory_bytes(self) -> int:
        """Memory of the card."""
        return self.memory_mib * MIB

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth of the card's memory."""
        return self.bandwidth_gb * 1e9

    @property
    def spoken_names(self) -> tuple[str, ...]:
        """Name and aliases."""
        return (self.name, *self.aliases)

    def peak_flops(self, precision: str, tf32: bool = False) -> float:
        """Return the peak of matrix products, FLOP/s, under the recipe's `precision` and `tf32`."""
        if precision == "fp32":
            return (self.tf32_tflops if tf32 else self.fp32_tflops) * 1e12
        return (self.bf16_tflops if precision == "bf16" else self.fp16_tflops) * 1e12


_NEEDED: Final = tuple(
    name for name, field in GpuProfile.model_fields.items() if field.is_required() and name != "name"
)


def parse_gpus(text: str) -> tuple[int, GpuProfile | None]:
    """Parse the value of `--gpus`: `8`, `8xH100-80GB`, or `H100-80GB` for one GPU.

    Returns:
        Number of GPUs in all, and their kind; None where only a number was given.

    Raises:
        UserError: The text has another form, no GPU has that name, or the user's own file is wrong.
    """
    found = re.fullmatch(r"\s*(?:(\d+)\s*(?:[x×*]\s*(.+?))?|(.+?))\s*", text, re.IGNORECASE)
    count, kind, alone = found.groups() if found else (None, None, None)
    # `3090` is a card, not three thousand of an unknown one.
    if count is not None and kind is None and _lookup(count) is not None:
        count, alone = None, count
    if (count is None and alone is None) or (count is not None and int(count) < 1):
        raise UserError(
            f"--gpus is {text!r}.",
            "it must be a number of GPUs of at least 1, and may have the kind of GPU after an x.",
            "write for example --gpus 8 or --gpus 8xH100-80GB.",
        )
    name = kind or alone
    return int(count or 1), find_gpu(name) if name else None


def find_gpu(name: str) -> GpuProfile:
    """Return the profile with a name or alias; case and separators do not matter.

    Raises:
        UserError: No GPU has that name, or the user's own file is wrong.
    """
    found = _lookup(name)
    if found is not None:
        return found
    profiles = known_gpus()
    spoken = {_plain(word): profile.name for profile in profiles.values() for word in profile.spoken_names}
    near = dict.fromkeys(spoken[word] for word in difflib.get_close_matches(_plain(name), spoken, n=5, cutoff=0.5))
    listed = ", ".join(list(near)[:3] or profiles)
    raise UserError(
        f"no GPU is called {name!r}.",
        "the plan needs its memory, speed and links.",
        f"take {'the closest' if near else 'one of'}: {listed}; or describe yours in ./{OWN_FILE} or the file that"
        f" {OWN_VARIABLE} names ({', '.join(_NEEDED)}).",
    )


def gpu_of_device(device_name: str) -> GpuProfile | None:
    """Return the profile of a device by its name in nvidia-smi or torch; None where no profile matches."""
    spoken = _plain(device_name)
    return next((profile for profile in known_gpus().values() if spoken in map(_plain, profile.device_names)), None)


def known_gpus() -> Mapping[str, GpuProfile]:
    """Return the shipped profiles and the user's own, by name.

    Raises:
        UserError: The user's own file is wrong.
    """
    own = _own_file()
    table = {**_shipped_table(), **(_read_table(own) if own is not None else {})}
    return {name: _profile(name, table) for name in table}


def _own_file() -> Path | None:
    named = os.environ.get(OWN_VARIABLE)
    if named:
        return Path(named).expanduser()
    local = Path(OWN_FILE)
    return local if local.is_file() else None


@cache
def _shipped_table() -> Mapping[str, Node]:
    return _read_table(TABLE)


def _read_table(path: Path) -> dict[str, Node]:
    root, mistakes = read_yaml(path, shown_path(path), TABLE_FILE)
    for name, entry in root.value.items():
        if not isinstance(entry.value, dict):
            why, fix = "each GPU has a section with its fields.", f"write `{TABLE_FILE.example}`."
            mistakes.append(Mistake(f"{name} is {kind_of(entry.value)}.", why, fix, entry.where))
    if mistakes:
        raise UserError.of(mistakes)
    table: dict[str, Node] = root.value
    return table


def _profile(name: str, table: Mapping[str, Node]) -> GpuProfile:
    entry = _with_inherited(name, table, ())
    values: Any = plain(entry)
    try:
        return GpuProfile.model_validate({**values, "name": name})
    except ValidationError as error:
        findings = schema_findings(error, entry, SchemaView(GpuProfile, "a GPU profile", extra_keys=["extends"]))
        named = [replace(finding, fact=f"{name}.{finding.fact}") for finding in findings]
        raise UserError.of(place(finding, entry) for finding in named) from error


def _with_inherited(name: str, table: Mapping[str, Node], above: tuple[str, ...]) -> Node:
    """Return the entry with the fields of the entries that it extends; `above` are the entries that led here."""
    entry = table[name]
    fields = {key: node for key, node in entry.value.items() if key != "extends"}
    parent: Node | None = entry.value.get("extends")
    if parent is None:
        return replace(entry, value=fields)
    if parent.written not in table or parent.written in (*above, name):
        raise UserError(
            f"{name} extends {parent.written!r}.",
            "an entry takes missing fields from the entry that it extends, and there is no other entry of that name.",
            f"write one of {', '.join(sorted(set(table) - {name}))}.",
            parent.where,
        )
    inherited = _with_inherited(parent.written, table, (*above, name)).value
    kept = {key: node for key, node in inherited.items() if key not in NOT_INHERITED}
    return replace(entry, value={**kept, **fields})


def _lookup(name: str) -> GpuProfile | None:
    spoken = _plain(name)
    return next((profile for profile in known_gpus().values() if spoken in map(_plain, profile.spoken_names)), None)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()
