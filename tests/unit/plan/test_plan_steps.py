"""As many steps as are planned are run, and they see each pack once an epoch, on any number of ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from packhorse.data.data_manifest import read_data_manifest
from packhorse.data.packs.batches import BatchPlan
from packhorse.data.packs.loader import PackLoader
from packhorse.data.packs.store import PackStore, open_store
from packhorse.data.prepare import prepare
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import DataFacts, RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.load import load_recipe
from packhorse.recipe.shipped import list_recipes
from packhorse.workflows.prepared_data import data_facts
from prepared import LENGTH_TOKENS, write_prepared

BOX = Hardware(num_cores=8, gpus=())
WORLDS = (1, 2, 4)
# The adapters take theirs from the run of quickstart/full, which is not made here.
TOKENIZER = "model.tokenizer=builtin:tokenizer"
NAMES = [recipe.name for recipe in list_recipes()]
# Their data comes from the hub: the same number of packs per step replaces it.
LARGE = [name for name in NAMES if not name.startswith("quickstart/")]


@dataclass(frozen=True)
class Seen:
    """What all ranks read in a number of steps.

    Attributes:
        packs: How often each.
        num_tokens: Total number of tokens, without null packs.
    """

    packs: Counter[int]
    num_tokens: int


def facts_of(folder: Path) -> DataFacts:
    manifest = read_data_manifest(folder)
    assert manifest is not None
    return data_facts(folder, manifest)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


def store_of(folder: Path, num_packs: int) -> DataFacts:
    """So many packs of one document each, of different lengths."""
    place = folder / str(num_packs)
    if not place.is_dir():
        longer = LENGTH_TOKENS // 2 + 1  # no two of them share a pack
        documents = [
            (range(1, 1 + length), [1] * length, {}) for length in (longer + at % 20 for at in range(num_packs))
        ]
        write_prepared(place, {"train": documents})
    return facts_of(place)


def seen(plan: RunPlan, store: PackStore, steps: range) -> Seen:
    """By the loader of each rank, as the worker makes it."""
    topology, split = plan.topology, plan.batch
    batch_plan = BatchPlan(store.pack_costs, split.packs_per_step, plan.recipe.seed, store.in_order)
    packs: Counter[int] = Counter()
    num_tokens = 0
    for rank in range(topology.data_ranks):
        loader = PackLoader(store, batch_plan, rank, topology.data_ranks, split.accumulation_steps, device_pin=False)
        for step in steps:
            batch = loader.step(step)
            taken = loader.rows(step)
            assert len(batch.micro_batches) == len(taken) == split.accumulation_steps
            packs.update(pack for passed in taken for pack in passed)
            real = (micro for micro, passed in zip(batch.micro_batches, taken, strict=True) if passed)
            num_tokens += sum(micro.num_tokens for micro in real)
        loader.close()
    return Seen(packs, num_tokens)


def check_epochs(plan: RunPlan, store: PackStore) -> None:
    """No step too many, none too few."""
    epochs, steps = plan.recipe.epochs or 1, plan.num_steps
    assert steps is not None
    every = seen(plan, store, range(steps))
    assert every.packs == dict.fromkeys(range(store.num_packs), epochs)
    assert every.num_tokens == epochs * int(store.pack_tokens.sum())
    last = seen(plan, store, range(steps - 1, steps))
    assert last.packs, "the last step sees packs that no other did in this epoch"


def test_step_that_is_larger_than_an_epoch_is_in_the_plan(stores: Path) -> None:
    recipe = load_recipe("quickstart/lora")
    for num_packs, is_larger in ((recipe.batch.packs, False), (recipe.batch.packs - 1, True)):
        plan = make_plan(recipe, DeviceRequest(gpus=1), BOX, store_of(stores, num_packs))
        (reason,) = [decision.reason for decision in plan.decisions if decision.name == "steps"]
        assert ("a step is larger than an epoch" in reason) == is_larger


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", LARGE)
def test_a_shipped_recipe_runs_as_many_steps_as_are_planned(name: str, world: int, stores: Path) -> None:
    recipe = load_recipe(name)
    facts = store_of(stores, 2 * recipe.batch.packs + 3)
    plan = make_plan(recipe, DeviceRequest(gpus=world), BOX, facts)
    assert plan.steps_per_epoch == 3, "the third is short"
    assert plan.num_steps == 3 * (recipe.epochs or 1)
    check_epochs(plan, open_store(Path(facts.folder), "train"))


@pytest.mark.parametrize("num_packs", [1, 4, 7, 8, 9, 16])
@pytest.mark.parametrize("world", WORLDS)
def test_a_last_step_that_is_short_or_full_is_counted(world: int, num_packs: int, stores: Path) -> None:
    recipe = load_recipe("llama3.1-8b/full", ["batch.packs=8", "epochs=3", "batch.micro=1"])
    facts = store_of(stores, num_packs)
    plan = make_plan(recipe, DeviceRequest(gpus=world), BOX, facts)
    assert plan.num_steps == 3 * -(-num_packs // 8)
    check_epochs(plan, open_store(Path(facts.folder), "train"))


def test_ranks_that_share_packs_count_once(stores: Path) -> None:
    recipe = load_recipe("llama3.1-8b/full", ["batch.packs=8", "parallel.sequence=2"])
    facts = store_of(stores, 9)
    plan = make_plan(recipe, DeviceRequest(gpus=4), BOX, facts)
    assert (plan.topology.data_ranks, plan.num_steps) == (2, 4)
    check_epochs(plan, open_store(Path(facts.folder), "train"))


@cache
def quickstart_data(name: str, folder: Path) -> DataFacts:
    return facts_of(prepare(load_recipe(name, [f"runs_folder={folder}", TOKENIZER])).folder)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("quickstart/")])
def test_a_quickstart_plans_the_steps_of_an_epoch_of_its_real_packs(name: str, stores: Path) -> None:
    facts = quickstart_data(name, stores)
    store = open_store(Path(facts.folder), "train")
    for world in WORLDS:
        words = [f"runs_folder={stores}", TOKENIZER, f"parallel.processes={world}"]
        plan = make_plan(load_recipe(name, words), DeviceRequest(), BOX, facts)
        assert plan.num_steps == load_recipe(name).steps, "the recipe's own"
        once = make_plan(load_recipe(name, [*words, "steps=null", "epochs=1"]), DeviceRequest(), BOX, facts)
        assert once.num_steps == plan.steps_per_epoch == -(-store.num_packs // plan.batch.packs_per_step)
        check_epochs(once, store)
