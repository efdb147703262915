"""What a manifest needs beside the plan: an image, and a volume that all nodes share. Values have strict patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan

IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}")
VOLUME = re.compile(r"([a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?):(/[A-Za-z0-9._@+,=/-]+)")
PATH = re.compile(r"/[A-Za-z0-9._@+,=/-]+")
LONGEST_NAME: Final = 50
"""Of 63 that a name in DNS may have: what Kubernetes puts behind it needs the rest."""


@dataclass(frozen=True)
class PlaceRequest:
    """Where the plan is to run.

    Attributes:
        image: Container image with Packhorse.
        claim: Name of the volume.
        mount: Absolute folder that it is mounted at, in every container.
    """

    image: str
    claim: str
    mount: str


def read_request(plan: RunPlan, image: str, volume: str) -> PlaceRequest:
    """Reads `--image` and `--volume NAME:/FOLDER`.

    Raises:
        UserError: One of them is missing or has another form, or what the run reads or writes is not on the volume.
    """
    if not IMAGE.fullmatch(image):
        raise UserError(
            f"--image is {image!r}.",
            "every node starts the same container, with Packhorse in it.",
            "give the name of an image, for example --image registry.example/packhorse:0.1.",
        )
    found = VOLUME.fullmatch(volume)
    if found is None:
        raise UserError(
            f"--volume is {volume!r}.",
            "run folder, data and weights lie on a volume that all nodes mount.",
            "give its name and folder, for example --volume training:/mnt/training.",
        )
    mount = found[2].rstrip("/")
    needed = {"the run folder": plan.run_folder}
    if plan.data is not None:
        needed["the prepared data"] = plan.data.folder
    if plan.recipe.model.path is not None and plan.base_model is not None:
        needed["the model"] = plan.base_model
    for what, path in needed.items():
        if not Path(path).is_relative_to(mount) or not PATH.fullmatch(path):
            raise UserError(
                f"{what} is {path!r}, which is not below {mount}.",
                "the containers see only their image and the volume, and a manifest takes plain paths only.",
                f"plan it there: runs_folder={mount}/runs, with the model and the rows below {mount}.",
            )
    return PlaceRequest(image, found[1], mount)


def name_of(plan: RunPlan) -> str:
    """The run's name as a name in DNS (RFC 1123): small letters, digits and dashes."""
    plain = re.sub(r"[^a-z0-9]+", "-", plan.recipe.name.lower())[:LONGEST_NAME].strip("-")
    return plain if plain[:1].isalpha() else f"run-{plain}".rstrip("-")
