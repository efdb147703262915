"""Whether the decoder layers are compiled (torch.compile), and which methods, engines and kernels prevent it."""

from __future__ import annotations

from packhorse.errors import UserError
from packhorse.model_spec.configuration import find_configuration
from packhorse.model_spec.parameters import read_shape
from packhorse.plan.compatibility import name_of
from packhorse.plan.run_plan import Decision, Topology
from packhorse.recipe.methods import LoraMethod, QloraMethod
from packhorse.recipe.schema import Recipe

FIELD = "parallel.compile"


def compile_decision(recipe: Recipe, topology: Topology, attention: str) -> list[Decision]:
    """Return the decision for a recipe that sets `parallel.compile`; none for one that does not.

    Args:
        recipe: Recipe of the run.
        topology: Placement of the processes.
        attention: Attention kernel of the plan.

    Raises:
        UserError: `parallel.compile` is true, and layers of this run cannot be compiled.
    """
    wish = recipe.parallel.compile
    if wish is False:
        return []
    obstacle = _obstacle(recipe, topology, attention)
    if wish is True:
        if obstacle is not None:
            fact, why = obstacle
            raise UserError(f"{FIELD} is true, and {fact}.", f"{why}.", f"set {FIELD} to false or auto.")
        return [Decision(name=FIELD, value="true", reason=f"{FIELD} of the recipe; compiling takes a minute or more")]
    off = ": ".join(obstacle) if obstacle is not None else _left_off(recipe, topology)
    on = "auto on GPUs: fewer kernels, a minute or more of compiling at the start; predicted, not measured yet"
    return [Decision(name=FIELD, value="false" if off else "true", reason=off or on)]


def _left_off(recipe: Recipe, topology: Topology) -> str:
    """Return why `auto` does not compile layers that can be compiled; empty if it does."""
    if topology.device == "cpu":
        return "auto on a CPU: compiling takes longer than it saves"
    if isinstance(recipe.method, QloraMethod):
        return "auto does not compile layers with quantised weights: that was tried on a CPU only"
    if read_shape(find_configuration(recipe)) is None:
        return "auto compiles only layers of a known architecture"
    return ""


def _obstacle(recipe: Recipe, topology: Topology, attention: str) -> tuple[str, str] | None:
    """Return what prevents compiling, and why; None if nothing does. Each was found by trying it."""
    method, name, engine = recipe.method, name_of(recipe.method), topology.engine
    obstacles = (
        (
            engine.startswith("zero3"),
            f"parallel.engine is {engine}",
            "DeepSpeed gathers the weights of each module in hooks, at which a compiled layer would be cut",
        ),
        (
            isinstance(method, QloraMethod) and method.quantization == "int8",
            f"method is {name}",
            "bitsandbytes keeps the state of a product outside of what torch can compile",
        ),
        (
            isinstance(method, LoraMethod) and method.dora,
            f"method is {name}",
            "peft's code for DoRA cuts each layer into many graphs",
        ),
        (
            method.kind == "prefix_tuning",
            f"method is {name}",
            "the number of documents decides where its keys are put, so every pack would be compiled again",
        ),
        (
            recipe.parallel.checkpointing == "selective",
            "parallel.checkpointing is selective",
            "selective checkpointing finds attention among single operators, which a compiled layer does not run",
        ),
        (
            topology.device == "cuda" and attention != "varlen",
            f"model.attention is {attention}",
            "SDPA runs once per document, so every pack would be compiled again; varlen attention runs once",
        ),
    )
    return next(((fact, why) for is_met, fact, why in obstacles if is_met), None)
