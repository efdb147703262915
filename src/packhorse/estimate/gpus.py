"""Profiles of GPUs: the shipped table, a user's own file, and requests such as `8xH100-80GB`."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from packhorse.errors import UserError

TABLE: Final = Path(__file__).with_name("gpus.yaml")
OWN_VARIABLE: Final = "PACKHORSE_GPUS"
OWN_FILE: Final = "gpus.yaml"
MIB: Final = 2**20

Share = Annotated[float, Field(gt=0, le=1)]


class GpuProfile(BaseModel):
    """One kind of GPU; gpus.yaml explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    aliases: tuple[str, ...] = ()
    device_names: tuple[str, ...] = ()
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


@dataclass(frozen=True)
class GpuRequest:
    """Value of `--gpus`.

    Attributes:
        count: Number of GPUs in all.
        gpu: Kind of GPU; None where only a number was given.
    """

    count: int
    gpu: GpuProfile | None


def parse_gpus(text: str) -> GpuRequest:
    """Parse `8`, `8xH100-80GB`, or `H100-80GB` for one GPU.

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
    return GpuRequest(int(count or 1), find_gpu(name) if name else None)


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
    plain = _plain(device_name)
    return next((profile for profile in known_gpus().values() if plain in map(_plain, profile.device_names)), None)


def known_gpus() -> Mapping[str, GpuProfile]:
    """Return the shipped profiles and the user's own, by name.

    Raises:
        UserError: The user's own file is wrong.
    """
    table, own = _shipped(), _own_file()
    if own is not None:
        table = {**table, **_read_own(own)}
    return {name: _profile(name, table, own or TABLE) for name in table}


@cache
def _shipped() -> Mapping[str, Any]:
    table: Mapping[str, Any] = _read_yaml(TABLE)
    return table


def _read_yaml(path: Path) -> Any:  # noqa: ANN401
    # libyaml's loader, where PyYAML was built with it, takes a tenth of the time.
    text = path.read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506


def _own_file() -> Path | None:
    named = os.environ.get(OWN_VARIABLE)
    if named:
        return Path(named).expanduser()
    local = Path(OWN_FILE)
    return local if local.is_file() else None


def _read_own(path: Path) -> dict[str, Any]:
    try:
        table = _read_yaml(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read: {str(error).splitlines()[0]}.",
            "the file is read as your own GPU profiles.",
            f"fix it, or unset {OWN_VARIABLE}." if os.environ.get(OWN_VARIABLE) else "fix it, or rename it.",
        ) from error
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise UserError(
            f"{path} is not a table of GPU profiles.",
            "each entry is a name followed by its fields.",
            f"write NAME: on its own line, and below it {', '.join(_NEEDED)}.",
        )
    return {str(name): entry for name, entry in table.items()}


def _profile(name: str, table: Mapping[str, Any], source: Path, children: tuple[str, ...] = ()) -> GpuProfile:
    fields = dict(table[name])
    parent = fields.pop("extends", None)
    if parent is not None:
        if parent not in table or parent in (*children, name):
            raise UserError(
                f"{source}: {name} extends {parent!r}, which is not another entry.",
                "fields that an entry does not set are taken from the entry that it extends.",
                f"name one of {', '.join(sorted(set(table) - {name}))}.",
            )
        inherited = _profile(parent, table, source, (*children, name))
        fields = inherited.model_dump(exclude={"name", "aliases", "device_names"}) | fields
    try:
        return GpuProfile(name=name, **fields)
    except (ValidationError, TypeError) as error:
        what = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("?",), "msg": str(error)}
        raise UserError(
            f"{source}: {name} has a wrong {what['loc'][0]}: {what['msg']}.",
            "the plan computes memory and time from these fields.",
            f"give {name} each of {', '.join(_NEEDED)}, or `extends:` a similar GPU.",
        ) from error


def _lookup(name: str) -> GpuProfile | None:
    plain = _plain(name)
    return next((profile for profile in known_gpus().values() if plain in map(_plain, profile.spoken_names)), None)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()
