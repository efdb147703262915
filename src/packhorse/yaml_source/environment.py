"""References to environment variables (`${env:NAME}`) in YAML files, and secrets, which no file may contain."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Final

from packhorse.errors import Mistake
from packhorse.secrets import is_secret_variable, secret_in
from packhorse.yaml_source.nodes import Node

ENVIRONMENT_REFERENCE: Final = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
ANY_REFERENCE: Final = re.compile(r"\$\{[^}]*\}?")
WHERE_SECRETS_ARE_READ = "HF_TOKEN (hub) and WANDB_API_KEY (W&B) are read from the environment automatically"


def environment_mistakes(root: Node) -> list[Mistake]:
    """Return a mistake for each reference to a variable that is not set, and for each `${...}` of another form."""
    return [mistake for node in _texts(root) for mistake in _reference_mistakes(node)]


def secret_mistakes(node: Node, why: str, field: str = "") -> Iterator[Mistake]:
    """Yield a mistake for each key or value that is a secret, or refers to a variable that holds one.

    Args:
        node: The tree to search.
        why: Who could read the secret, as the reason in the message.
        field: Dotted name of the node; empty for the root.
    """
    if isinstance(node.value, str):
        yield from _secrets_in(node.value, field, node, why)
    for key, child in node.children():
        if isinstance(key, str):
            yield from _secrets_in(key, f"a key of {field or 'the file'}", child, why)
        yield from secret_mistakes(child, why, f"{field}.{key}" if field else str(key))


def _secrets_in(text: str, field: str, node: Node, why: str) -> Iterator[Mistake]:
    kind = secret_in(text)
    if kind is not None:
        yield Mistake(
            f"{field} contains {kind}.",
            why,
            f"remove it, and revoke it at the service that issued it, as others may have seen it; "
            f"{WHERE_SECRETS_ARE_READ}, and a path may refer to any other variable with ${{env:NAME}}.",
            node.where,
        )
    for name in ENVIRONMENT_REFERENCE.findall(text):
        if is_secret_variable(name):
            yield Mistake(
                f"{field} refers to ${{env:{name}}}, whose name says that its value is a secret.",
                "fields hold names and paths, which are written to files and shown.",
                f"remove the reference ({WHERE_SECRETS_ARE_READ}), or rename the variable if its value is not secret.",
                node.where,
            )


def _texts(node: Node) -> Iterator[Node]:
    if isinstance(node.value, str):
        yield node
    for _, child in node.children():
        yield from _texts(child)


def _reference_mistakes(node: Node) -> Iterator[Mistake]:
    for reference in ANY_REFERENCE.findall(node.value):
        match = ENVIRONMENT_REFERENCE.fullmatch(reference)
        if match is None:
            yield Mistake(
                f"`{reference}` is not a known reference.",
                "only environment variables can be referred to.",
                "write ${env:NAME}.",
                node.where,
            )
        elif match.group(1) not in os.environ:
            yield Mistake(
                f"the environment variable {match.group(1)} is not set.",
                f"the file refers to it with {reference}.",
                f"run `export {match.group(1)}=VALUE` before this command.",
                node.where,
            )
