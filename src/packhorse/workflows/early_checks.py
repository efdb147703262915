"""Refuse, before a GPU is taken, what the worker would refuse: as far as files on this machine say it.

docs/errors.md lists every proof, where it is made, and why those of the worker cannot be made earlier.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from packhorse.data.render.teacher_tokenizer import check_teacher_tokenizer
from packhorse.data.resolve import vocabulary_size
from packhorse.errors import UserError
from packhorse.model_spec.configuration import Configuration, find_configuration, model_folder
from packhorse.model_spec.method_names import check_method, names_of_parameters, unknown_ia3
from packhorse.model_spec.parameters import Shape, list_parameters, read_shape
from packhorse.model_spec.stored_weights import check_stored_weights, require_safetensors
from packhorse.model_spec.supported import check_model, require_embeddings, text_part
from packhorse.model_spec.trainable import IA3_TARGETS
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import DataFacts, RunPlan
from packhorse.plan.topology import DeviceRequest, detect_hardware
from packhorse.recipe.methods import Ia3Method, LoraMethod
from packhorse.recipe.schema import Recipe
from packhorse.workflows.model_shape import known_shape

TRIED_GPUS = (1, 2, 8, 16)


def check_start(recipe: Recipe) -> None:
    """Refuse a model, its weights, its tokenizer or a method on it that the worker would refuse.

    What is not on this machine is not checked.

    Raises:
        UserError: The worker would end with the same message.
    """
    check_model(recipe)
    _check_trackers(recipe)
    configuration = find_configuration(recipe)
    if configuration is None:
        return
    # Names do not depend on the vocabulary, which a fresh model takes from its tokenizer.
    shape = read_shape({"vocab_size": 1, **configuration})
    _check_weights(recipe, shape)
    _check_vocabulary(recipe, configuration)
    check_teacher_tokenizer(recipe, downloads=False)
    if shape is None:
        known_shape(recipe, None)  # attaches the method to the model, without memory
    else:
        _check_names(recipe, shape)


def _check_trackers(recipe: Recipe) -> None:
    if recipe.track.mlflow and find_spec("mlflow") is None:
        raise UserError(
            "track.mlflow is true, and mlflow is not installed.",
            "figures are logged through its Python package.",
            "run `pip install 'packhorse[mlflow]'`, or set track.mlflow to false.",
        )


def _check_vocabulary(recipe: Recipe, configuration: Configuration) -> None:
    rows, is_fresh = text_part(configuration).get("vocab_size"), recipe.model.config is not None
    # A pretrained model gets rows for new tokens; a fresh one without vocab_size takes the tokenizer's.
    if not isinstance(rows, int) or (recipe.model.new_tokens and not is_fresh):
        return
    size = vocabulary_size(recipe)
    if size is not None:
        require_embeddings(rows, size + len(recipe.model.new_tokens), is_fresh)


def _check_names(recipe: Recipe, shape: Shape) -> None:
    names = names_of_parameters(shape.family, list_parameters(shape), shape.names, shape.tied, shape.layers)
    check_method(recipe.method, names)
    if isinstance(recipe.method, Ia3Method) and recipe.method.target == "auto" and shape.family not in IA3_TARGETS:
        raise unknown_ia3(shape.family, names.linear)


def _check_weights(recipe: Recipe, shape: Shape | None) -> None:
    folder = model_folder(recipe)
    if folder is not None and folder.is_dir():
        check_stored_weights(folder, shape)
    if isinstance(recipe.method, LoraMethod) and recipe.method.initialization == "loftq":
        if recipe.model.path is None:
            require_safetensors(Path(recipe.model.id or ""))
        elif folder is not None and folder.is_dir():
            require_safetensors(folder)


def plan_on_some_machine(recipe: Recipe, data: DataFacts | None) -> RunPlan:
    """Return a plan for this machine, or for GPUs if the recipe needs them.

    Args:
        recipe: Recipe of one run.
        data: Counts of the rows; None before they are read.

    Raises:
        UserError: The recipe can run neither here nor on GPUs.
    """
    here, parallel = detect_hardware(), recipe.parallel
    counts = {*TRIED_GPUS, parallel.sequence, 2 * (parallel.shard_group or 1)}
    if isinstance(parallel.processes, int):
        counts = {parallel.processes}
    error: UserError | None = None
    for request in (DeviceRequest(), *(DeviceRequest(gpus=count) for count in sorted(counts))):
        try:
            return make_plan(recipe, request, here, data)
        except UserError as refused:
            # The last refusal is the one on most GPUs: that a CPU lacks something is no mistake of the recipe.
            error = refused
    assert error is not None
    raise error
