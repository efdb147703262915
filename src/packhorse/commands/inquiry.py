"""What is asked of a recipe, and what an answer can be based on; nothing is prepared or written."""

from __future__ import annotations

from dataclasses import dataclass

from packhorse.commands.costs import Terms, basis_of
from packhorse.commands.parameters import Unknown
from packhorse.commands.prepared import facts_of, manifest_if_prepared
from packhorse.data.data_manifest import DataManifest
from packhorse.estimate.gpus import parse_gpus
from packhorse.estimate.plan_estimate import EstimateInputs
from packhorse.estimate.search.candidates import SearchRequest
from packhorse.plan.topology import DeviceRequest, detect_hardware
from packhorse.recipe.schema import Recipe


@dataclass(frozen=True)
class Inquiry:
    """A recipe on GPUs that need not be here, with data that need not be prepared.

    Attributes:
        wanted: The recipe, its data and the GPUs.
        basis: What is known of model, packs and GPU, or what is not.
        manifest: Of the data, where it is prepared.
    """

    wanted: SearchRequest
    basis: EstimateInputs | Unknown
    manifest: DataManifest | None

    @property
    def known(self) -> EstimateInputs | None:
        """The basis of figures; None where there can be none."""
        return None if isinstance(self.basis, Unknown) else self.basis

    @property
    def vocab_size(self) -> int | None:
        """Of the tokenizer, where the data is prepared."""
        return self.manifest.vocab_size if self.manifest is not None else None


def inquire(recipe: Recipe, ask: DeviceRequest, terms: Terms) -> Inquiry:
    """Looks at this machine, at the model's shape and for prepared data.

    Args:
        recipe: With its overrides.
        ask: GPUs and nodes of the command line.
        terms: What it says of them beside their number.

    Raises:
        UserError: As `costs.basis_of`.
    """
    manifest, here = manifest_if_prepared(recipe), detect_hardware()
    facts = facts_of(recipe, manifest) if manifest is not None else None
    return Inquiry(SearchRequest(recipe, ask, here, facts), basis_of(recipe, manifest, here, terms), manifest)


def read_gpus(
    gpus: str, nodes: int | None, network_gbit: float | None = None, price: float | None = None
) -> tuple[DeviceRequest, Terms]:
    """What `--gpus`, `--nodes` and what belongs to them say.

    Raises:
        UserError: `--gpus` is no number of GPUs, or no GPU is called so.
    """
    asked = parse_gpus(gpus) if gpus else None
    kind = asked.gpu if asked else None
    return DeviceRequest(asked.count if asked else None, nodes), Terms(kind, network_gbit, price)
