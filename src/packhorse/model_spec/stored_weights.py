"""Weights as a folder stores them: their names and shapes, from the headers of safetensors files, without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from packhorse.errors import UserError
from packhorse.model_spec.parameters import Shape, list_parameters

INDEX_FILE: Final = "model.safetensors.index.json"
NUM_SHOWN: Final = 6


def check_stored_weights(folder: Path, shape: Shape | None) -> None:
    """Refuse a folder whose weights cannot be read, or are not those of its config.json.

    Args:
        folder: Folder of the model, or a snapshot of the hub's cache, which may hold only some of the files.
        shape: Shape of the model; None where it is not described. Then only the files are checked.

    Raises:
        UserError: A file is missing or truncated, or a weight is missing, unknown or of another shape.
    """
    _refuse_pickles(folder)
    stored: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(folder):
        stored |= _shapes_in(file, folder)
    # transformers fuses the experts of a mixture, so their names and shapes on disk are others.
    if not stored or shape is None or shape.measured_model is not None or shape.experts:
        return
    expected = {each.name: each.shape for each in list_parameters(shape)}
    names = {"lm_head.weight", "model.embed_tokens.weight"} if shape.tied else set()
    if not expected.keys() & stored.keys():
        return  # other names, which transformers may know how to convert
    for name in sorted(expected.keys() & stored.keys()):
        if stored[name] != expected[name]:
            raise misfit(str(folder), name, stored[name], expected[name])
    missing = {name for name in expected.keys() - stored.keys() if not (name in names and names & stored.keys())}
    known = expected.keys() | names
    # Older checkpoints also hold buffers, which transformers ignores.
    unexpected = {name for name in stored.keys() - known if not name.endswith("rotary_emb.inv_freq")}
    refuse_incomplete(str(folder), missing, unexpected)


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(file.name for file in folder.glob("*.bin") if file.name.startswith("pytorch_model"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"the model {folder} has its weights in {pickles[0]}, and no safetensors.",
            "a .bin file is a pickle, which can run code when it is opened; Packhorse reads no pickles.",
            "name a model with safetensors; if you trust the file, load it once with transformers and save it again: "
            "save_pretrained writes safetensors.",
        )


def require_safetensors(source: Path | None) -> None:
    """Refuse a start from the quantisation error where the weights on disk cannot be compared.

    Raises:
        UserError: The source is no local folder with safetensors files.
    """
    if source is None or not any(source.glob("*.safetensors")):
        raise UserError(
            f"method.initialization is loftq, and {source} holds no .safetensors file.",
            "it compares the quantised weights with those on disk.",
            "set model.path to a local folder with safetensors files, or method.initialization: default.",
        )


def misfit(source: str, name: str, stored: Iterable[int], expected: Iterable[int]) -> UserError:
    """Return the error for a weight of another shape than config.json describes."""
    return UserError(
        f"{name} is {list(stored)} in the checkpoint {source} and {list(expected)} in the model.",
        "its config.json describes another model than its weights.",
        "download the checkpoint again, or fix its config.json.",
    )


def refuse_incomplete(source: str, missing: Iterable[str], unexpected: Iterable[str], score: str | None = None) -> None:
    """Refuse a checkpoint for which transformers only warns.

    Args:
        source: Folder or hub name.
        missing: Weights of the model that the checkpoint lacks.
        unexpected: Weights of the checkpoint that the model lacks.
        score: Name of a reward model's head, which a language model lacks; it has an output head instead.

    Raises:
        UserError: Weights are missing or unexpected.
    """
    if score is not None:
        missing = {name for name in missing if name != score}
        unexpected = {name for name in unexpected if not name.startswith("lm_head.")}
    if missing:
        raise UserError(
            f"the checkpoint {source} lacks {_listed(missing)}.",
            "transformers would draw them at random, and the run would not start from the model that it names.",
            "choose a checkpoint of the same architecture, saved with its output head.",
        )
    if unexpected:
        raise UserError(
            f"the checkpoint {source} holds {_listed(unexpected)}, which the model does not have.",
            "transformers would drop them, and the model would not be the one that was saved.",
            "choose a checkpoint of the same architecture; an adapter's weights must be separate from their base.",
        )


def unreadable(source: str, reason: object) -> UserError:
    """Return the error for a file that is not safetensors."""
    return UserError(
        f"the weights of {source} are not safetensors: {reason}.",
        "the file is truncated, or another file under that name.",
        "download the model again.",
    )


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model; none where some are still to be downloaded."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return [file for file in [folder / "model.safetensors"] if file.is_file()]
    try:
        named: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable(str(folder), f"{INDEX_FILE} has no weight_map") from error
    files = [folder / name for name in sorted(set(named.values()))]
    absent = [file.name for file in files if not file.is_file()]
    # A snapshot of the hub's cache is completed by the download; a folder of the user is not.
    if absent and folder.parent.name == "snapshots":
        return []
    if absent:
        raise UserError(
            f"{folder} lacks {absent[0]}, one of {len(files)} files that {INDEX_FILE} names.",
            "the weights in it would be missing from the model.",
            "download the model again.",
        )
    return files


def _shapes_in(file: Path, folder: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="np") as stored:
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise unreadable(str(folder), f"{file.name}: {error}") from error


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names, key=_natural)
    more = f" and {len(ordered) - NUM_SHOWN} more" if len(ordered) > NUM_SHOWN else ""
    return ", ".join(ordered[:NUM_SHOWN]) + more


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]
