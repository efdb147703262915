"""Secrets in a recipe: none may stand there, since a recipe is copied, committed and written into every run folder."""

from __future__ import annotations

from collections.abc import Iterator

from packhorse.errors import Mistake
from packhorse.recipe.locate import ENVIRONMENT_REFERENCE
from packhorse.secrets import is_secret_variable, secret_in
from packhorse.yaml_source.nodes import Node

WHERE_SECRETS_ARE_READ = "HF_TOKEN (hub) and WANDB_API_KEY (W&B) are read from the environment by themselves"


def secret_mistakes(node: Node, field: str = "") -> Iterator[Mistake]:
    """Finds keys and values that are a secret, or refer to a variable that holds one."""
    if isinstance(node.value, str):
        yield from _of_text(node.value, field, node)
    elif isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from _of_text(str(key), f"a key of {field or 'the recipe'}", child)
            yield from secret_mistakes(child, f"{field}.{key}" if field else str(key))
    elif isinstance(node.value, list):
        for number, child in enumerate(node.value):
            yield from secret_mistakes(child, f"{field}.{number}")


def _of_text(text: str, field: str, node: Node) -> Iterator[Mistake]:
    kind = secret_in(text)
    if kind is not None:
        yield Mistake(
            f"{field} holds {kind}.",
            "the recipe is written into the run folder, the plan and W&B, and the command line is seen by all users.",
            f"take it out, and change it where it was made, as it may have been seen; {WHERE_SECRETS_ARE_READ}, "
            "and a path may refer to any other variable as ${env:NAME}.",
            node.where,
        )
    for name in ENVIRONMENT_REFERENCE.findall(text):
        if is_secret_variable(name):
            yield Mistake(
                f"{field} refers to ${{env:{name}}}, and the name {name} says that its value is a secret.",
                "fields hold names and paths, which are written down and shown.",
                f"take it out ({WHERE_SECRETS_ARE_READ}), or give what is no secret another name, as in ${{env:NAME}}.",
                node.where,
            )
