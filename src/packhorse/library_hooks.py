"""Private and undocumented names of other libraries that Packhorse uses, and a check that they still exist.

A name listed in `library_hooks.toml` may change in any release of its library. `pyproject.toml` therefore caps these
libraries at the newest tested version, and `check_library_hooks` looks for each name in the installed files before a
run is launched. The check reads source text and imports nothing, so that it costs milliseconds.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

from packhorse.errors import UserError


@dataclass(frozen=True)
class LibraryHook:
    """Names of one file of another library, as one module of Packhorse uses them.

    Attributes:
        library: Distribution and top-level package.
        file: Source file that defines the names, below the package's folder.
        used_by: Module or package below `packhorse` that uses the names.
        guard: Test, below `tests`, that fails where a name is still there and means something else.
        names: Classes, functions and attributes.
    """

    library: str
    file: str
    used_by: str
    guard: str
    names: tuple[str, ...]


def library_hooks() -> list[LibraryHook]:
    """Return the table of `library_hooks.toml`."""
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return [LibraryHook(**{**hook, "names": tuple(hook["names"])}) for hook in table["hook"]]


def missing_names(hooks: Iterable[LibraryHook], site: Path | None = None) -> list[tuple[str, str]]:
    """Return (library, "file: name") for each name that a library lacks.

    Args:
        hooks: Names to look for.
        site: Folder that holds the libraries' folders; the installed libraries if None.
    """
    missing = []
    for hook in hooks:
        try:
            folder = site or Path(str(distribution(hook.library).locate_file("")))
        except PackageNotFoundError:
            continue
        file = folder / hook.library / hook.file
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        missing += [
            (hook.library, f"{hook.file}: {name}") for name in hook.names if not re.search(rf"\b{name}\b", text)
        ]
    return missing


def check_library_hooks(hooks: Iterable[LibraryHook] | None = None) -> None:
    """Check that the installed libraries have each listed name.

    Raises:
        UserError: A library lacks a name; gives the installed and the tested versions.
    """
    missing = missing_names(library_hooks() if hooks is None else hooks)
    if not missing:
        return
    libraries = sorted({library for library, _ in missing})
    shown = "; ".join(f"{library}/{name}" for library, name in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    tested = [supported_versions(library) for library in libraries]
    raise UserError(
        f"{', '.join(f'{library} {version(library)}' for library in libraries)} lacks names that Packhorse uses: "
        f"{shown}{more}.",
        f"private names change between releases; Packhorse is tested with {', '.join(tested)}.",
        f"run `pip install {' '.join(map(repr, tested))}`.",
    )


def supported_versions(library: str) -> str:
    """Return what Packhorse's own metadata requires of a library, for example `torch<2.14,>=2.13`."""
    for line in requires("packhorse") or []:
        name = re.match(r"[\w-]+", line)
        if "extra ==" not in line and name is not None and name[0] == library:
            return line.partition(";")[0].strip()
    return library
