"""How a step's packs are shared: the system side of the batch; the result never depends on it."""

from __future__ import annotations

from packhorse.errors import UserError
from packhorse.plan.run_plan import BatchSplit, Decision, Device
from packhorse.recipe.schema import BatchSection, Recipe

# A forward pass of about this many tokens keeps one device busy; more only costs memory.
TOKENS_PER_PASS = 4096


def settled(recipe: Recipe, device: Device) -> Recipe:
    """The recipe without `auto` in `parallel`, where there is no card to choose for.

    Raises:
        UserError: The run is on GPUs: what fits them is not known.
    """
    parallel = recipe.parallel
    asked = [name for name in ("engine", "checkpointing") if getattr(parallel, name) == "auto"]
    if not asked:
        return recipe
    if device == "cuda":
        fields = " and ".join(f"parallel.{name}" for name in asked)
        raise UserError(
            f"{fields} {'is' if len(asked) == 1 else 'are'} auto, and how much memory the run takes of which GPU is not"
            " known.",
            "the fastest way that fits is chosen by the figures of the GPU and the shape of the model.",
            f"name the GPU, for example packhorse plan RECIPE --gpus 8xH100-80GB, or set {fields}.",
        )
    # Host memory is not scarce as a GPU's is, and one way is as fast as another.
    plain = {name: "ddp" if name == "engine" else False for name in asked}
    return recipe.changed("parallel", **plain)


def choose_batch(batch: BatchSection, data_ranks: int, sequence: int = 1) -> tuple[BatchSplit, Decision]:
    """Splits `batch.packs` into data ranks x accumulation steps x micro packs.

    Args:
        batch: Of the recipe.
        data_ranks: Shares that the packs of a step are dealt into.
        sequence: Processes that work on one share together.

    Raises:
        UserError: The packs cannot be shared equally, or `batch.micro` does not divide a share.
    """
    if batch.packs % data_ranks:
        below, above = batch.packs // data_ranks * data_ranks, -(-batch.packs // data_ranks) * data_ranks
        values = f"{below} or {above}" if below else str(above)
        who = f"{data_ranks} processes" if sequence == 1 else f"{data_ranks} groups of {sequence} processes"
        raise UserError(
            f"batch.packs is {batch.packs}, which {who} cannot share equally.",
            "every optimizer step gives each process the same number of packs.",
            f"set batch.packs to {values}, or run fewer processes.",
        )
    share = batch.packs // data_ranks
    micro, reason = _choose_micro(batch, share, sequence)
    split = BatchSplit(
        length_tokens=batch.length,
        packs_per_step=batch.packs,
        micro_packs=micro,
        accumulation_steps=share // micro,
    )
    value = f"{micro} packs a pass, {split.accumulation_steps} passes a step"
    return split, Decision(name="batch.micro", value=value, reason=reason)


def _choose_micro(batch: BatchSection, share: int, sequence: int) -> tuple[int, str]:
    if batch.micro == "auto":
        most = max(1, TOKENS_PER_PASS * sequence // batch.length)
        micro = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
        shared = f" shared by {sequence}" * (sequence > 1)
        return micro, f"{micro} x {batch.length} tokens{shared} keep a device busy (about {TOKENS_PER_PASS} do)"
    if share % batch.micro:
        fits = [n for n in range(1, share + 1) if share % n == 0]
        nearest = min(fits, key=lambda n: abs(n - int(batch.micro)))
        raise UserError(
            f"batch.micro is {batch.micro}, which does not divide the {share} packs of each process.",
            "each process runs its share of a step in passes of equal size.",
            f"set batch.micro to {nearest}, or to auto.",
        )
    return batch.micro, "batch.micro of the recipe"
