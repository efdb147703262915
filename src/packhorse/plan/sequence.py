"""Whether the model's heads can be shared by the processes that share a pack."""

from __future__ import annotations

from packhorse.model_spec.configuration import find_configuration
from packhorse.plan.run_plan import Topology
from packhorse.recipe.schema import Recipe
from packhorse.recipe.sequence_rules import unshared_heads


def check_heads(recipe: Recipe, topology: Topology) -> None:
    """Refuses groups that cannot share the heads equally; a model that nothing here knows is checked once it is loaded.

    Raises:
        UserError: `parallel.sequence` does not divide the number of attention heads.
    """
    size = topology.sequence
    if size == 1:
        return
    configuration = find_configuration(recipe) or {}
    # Models that see and hear keep the shape of their language model one level down.
    heads = (configuration.get("text_config") or configuration).get("num_attention_heads")
    if heads is not None and heads % size:
        raise unshared_heads(size, heads, topology.world_size)
