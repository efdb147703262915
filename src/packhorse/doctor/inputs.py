"""Check that this node finds the run's weights and data; nothing is downloaded."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

from packhorse.data.data_manifest import read_data_manifest, size_faults
from packhorse.doctor.facts import DoctorRequest, InputFacts
from packhorse.doctor.rendezvous import describe_error
from packhorse.errors import UserError
from packhorse.recipe.locate import path_of

CONFIG_FILE: Final = "config.json"
INDEX_FILE: Final = "model.safetensors.index.json"
HUB_CACHE: Final = HF_HUB_CACHE
WANDB_URL: Final = "https://api.wandb.ai"
WANDB_SECONDS: Final = 3.0


def check_inputs(node_id: int, request: DoctorRequest) -> InputFacts:
    """Check weights, prepared data, and on the first node, where rank 0 logs, W&B."""
    model_found, model_fault = _find_model(request)
    host, error = "", ""
    if node_id == 0 and not request.fast and request.wandb in ("auto", "online"):
        host, error = _reach_wandb()
    return InputFacts(
        model_found=model_found,
        model_fault=model_fault,
        may_fetch=bool(request.model_id) and not HF_HUB_OFFLINE,
        data_fault=_data_fault(request.data_folder),
        wandb_host=host,
        wandb_error=error,
    )


def _find_model(request: DoctorRequest) -> tuple[str, str]:
    """Return the folder of the weights, and its fault."""
    if request.model_folder:
        try:
            folder = path_of(request.model_folder)
        except UserError as error:
            return "", error.mistakes[0].fact
        return str(folder), weights_fault(folder)
    if not request.model_id:
        return "", ""
    cached = try_to_load_from_cache(request.model_id, CONFIG_FILE, cache_dir=HUB_CACHE, revision=request.model_revision)
    if not isinstance(cached, str):
        return "", f"{request.model_id} is not in {HUB_CACHE}"
    folder = Path(cached).parent
    return str(folder), weights_fault(folder)


def weights_fault(folder: Path) -> str:
    """Return what a model folder lacks; empty if it is complete."""
    try:
        if not (folder / CONFIG_FILE).is_file():
            return f"{folder} has no {CONFIG_FILE}"
        index = folder / INDEX_FILE
        if not index.is_file():
            return "" if any(file.is_file() for file in folder.glob("*.safetensors")) else f"{folder} has no weights"
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except OSError as error:
        return f"{folder}: {error.strerror}"
    except (ValueError, KeyError, AttributeError) as error:
        return f"{folder / INDEX_FILE} cannot be read: {error}"
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    return f"{folder} lacks {len(missing)} of {len(shards)} weight files: {missing[0]}" if missing else ""


def _data_fault(folder: str) -> str:
    if not folder:
        return ""
    path = Path(folder)
    try:
        manifest = read_data_manifest(path)
    except UserError as error:
        return error.mistakes[0].fact
    if manifest is None:
        return f"{folder} has no prepared data"
    return next(iter(size_faults(path, manifest).values()), "")


def _reach_wandb() -> tuple[str, str]:
    url = urlsplit(os.environ.get("WANDB_BASE_URL") or WANDB_URL)
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=WANDB_SECONDS).close()
    except OSError as error:
        return host, describe_error(error)
    return host, ""
