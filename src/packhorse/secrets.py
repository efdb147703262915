"""Find secrets in text, and replace them before the text is written.

A secret is the value of an environment variable with a name such as HF_TOKEN, or text in the form of a hub's token, a
cloud's key or a password in a URL. Code that writes text that may contain a secret writes `mask(text)`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TextIO, cast
from urllib.parse import quote

MASK: Final = "***"
SHORTEST_SECRET: Final = 8
"""Characters; a shorter value would occur by chance in any text."""

SECRET_NAME: Final = re.compile(
    r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?(_|$)|(^|_)(PAT|PWD|AUTH)$", re.IGNORECASE
)
# These name the location of a secret, or how it is used.
NO_SECRET_NAME: Final = re.compile(r"^(OLD)?PWD$|_(FILE|PATH|DIR|FOLDER|SOCK|URL|TYPE|TTL)$", re.IGNORECASE)

FORMS: Final[Mapping[str, re.Pattern[str]]] = {
    "a Hugging Face token": re.compile(r"(?<![A-Za-z0-9])(?P<secret>(?:hf|api_org)_[A-Za-z0-9]{16,})"),
    "an API key": re.compile(
        r"(?<![A-Za-z0-9])(?P<secret>sk-[A-Za-z0-9_-]*[A-Za-z0-9]{16}[A-Za-z0-9_-]*|wandb_v[0-9]_[A-Za-z0-9_]{16,}"
        r"|AIza[A-Za-z0-9_-]{35}|xox[abeoprs]-[A-Za-z0-9-]{16,})"
    ),
    "a GitHub or GitLab token": re.compile(
        r"(?<![A-Za-z0-9])(?P<secret>gh[opsur]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|glpat-[A-Za-z0-9_-]{16,})"
    ),
    "an AWS key": re.compile(r"(?<![A-Za-z0-9])(?P<secret>(?:AKIA|ASIA)[A-Z0-9]{16})(?![A-Za-z0-9])"),
    "a private key": re.compile(
        r"(?P<secret>-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z))", re.DOTALL
    ),
    "a password in an address": re.compile(r"(?<=://)(?P<secret>[^\s/:@'\"]*:[^\s/@'\"]+)(?=@)"),
    # Only after such a word: 40 hex digits alone are mostly a commit.
    "a key or a password": re.compile(
        r"(?:api[_-]?key|access[_-]?key|auth[_-]?token|access[_-]?token|bearer|secret|passwo?r?d)[\"']?\s*[:=\s]\s*[\"']?"
        r"(?P<secret>(?=[^\s\"',;&]*[0-9])[^\s\"',;&]{12,})",
        re.IGNORECASE,
    ),
}


def mask(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the text with each secret replaced by `***`.

    Args:
        text: Text that is about to be written.
        environment: Environment variables; the values of those with the name of a secret are replaced.
    """
    for value in _values(tuple(_secret_variables(environment).values())):
        text = text.replace(value, MASK)
    for form in FORMS.values():
        text = form.sub(_masked, text)
    return text


def secret_in(text: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return a description of the first secret in the text, such as "an AWS key"; None if there is none."""
    for name, value in _secret_variables(environment).items():
        if any(form in text for form in _values((value,))):
            return f"the value of the environment variable {name}"
    return next((kind for kind, form in FORMS.items() if form.search(text)), None)


def is_secret_variable(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether an environment variable holds a secret, by its name and the length of its value."""
    return name in _secret_variables(environment)


def mask_output() -> None:
    """Mask everything that this process writes to `sys.stdout` and `sys.stderr` from now on.

    This includes tracebacks, warnings and log lines of libraries, but not what compiled code and child processes write
    to the file descriptors.
    """
    sys.stdout, sys.stderr = masked(sys.stdout), masked(sys.stderr)


def masked(stream: TextIO) -> TextIO:
    """Return a stream that masks text before it writes it to `stream`, and otherwise behaves like `stream`."""
    return stream if isinstance(stream, _Masked) else cast(TextIO, _Masked(stream))


class _Masked:
    """Masks each write separately: buffered text would be lost when the process is killed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(mask(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)


def _masked(match: re.Match[str]) -> str:
    start, end = match.span("secret")
    return match.string[match.start() : start] + MASK + match.string[end : match.end()]


def _secret_variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if len(value) >= SHORTEST_SECRET and _is_secret_name(name) and not _is_path(value)
    }


@lru_cache(maxsize=4096)
def _is_secret_name(name: str) -> bool:
    return SECRET_NAME.search(name) is not None and NO_SECRET_NAME.search(name) is None


def _is_path(value: str) -> bool:
    """Return whether the value is a path, as that of GOOGLE_APPLICATION_CREDENTIALS."""
    return value.startswith("/") and Path(value).exists()


@lru_cache(maxsize=16)
def _values(secrets: tuple[str, ...]) -> tuple[str, ...]:
    """Return each secret unchanged, and as JSON, Python's `repr` and a URL write it; the longest first."""
    forms = {
        form for value in secrets for form in (value, json.dumps(value)[1:-1], repr(value)[1:-1], quote(value, ""))
    }
    return tuple(sorted(forms, key=len, reverse=True))
