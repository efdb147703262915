"""The schema of a recipe: frozen and typed; unknown keys are refused at every depth.

The string under each field documents it: `packhorse recipes reference` and docs/recipe.md are generated from these.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from packhorse.recipe.aliases import fix_for_key, fix_for_value
from packhorse.recipe.evaluation import EvaluationSection
from packhorse.recipe.methods import LoraMethod, Method
from packhorse.recipe.objectives import Objective, PairedObjective, RowFormat, SftObjective
from packhorse.yaml_source.schema import Fraction, Name, PositiveFloat, SchemaView, Section

Engine = Literal["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "zero3_nvme", "fsdp2", "hsdp"]
OptimizerName = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion", "lion_8bit", "muon"
]
Format = Literal["auto", RowFormat]
Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$", json_schema_extra={"takes": "a date such as 2026-01-31"})]


class ModelSection(Section):
    """The model to start from: exactly one of `id`, `path` and `config`."""

    id: str | None = None
    """Name on the Hugging Face hub, e.g. `meta-llama/Llama-3.1-8B-Instruct`."""
    revision: str | None = None
    """Commit, tag or branch of `id`; pin a commit for a run that can be repeated."""
    path: str | None = None
    """Local folder in Hugging Face form, or the folder of an earlier run of full fine-tuning."""
    config: dict[str, Any] | None = None
    """A fresh model with random weights: `model_type` and the fields of its configuration."""
    tokenizer: str | None = None
    """Folder, hub name or `builtin:` name of the tokenizer; default: the tokenizer of the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Stored type of the weights. `auto`: float32 if they are trained, bfloat16 if frozen and `precision` is bf16."""
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    """Attention kernel that separates packed documents. `auto`: varlen on CUDA, else SDPA per document."""
    new_tokens: list[str] = []
    """Tokens to add to the tokenizer; with an adapter, only their rows of the embedding are trained."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Turn it on only after reading that code."""


class Source(Section):
    """Rows of one data set: exactly one of `path` and `id`."""

    path: str | None = None
    """File, folder or glob (.jsonl, .json, .csv, .tsv, .parquet, .arrow, optionally .gz or .zst) or `builtin:` name."""
    id: str | None = None
    """Data set on the Hugging Face hub."""
    revision: str | None = None
    """Commit or tag of `id`."""
    subset: str | None = None
    """Configuration of `id`, if it has several."""
    split: str = "train"
    """Split of `id`."""
    key: str | None = None
    """Key of the list with the rows, in a .json file such as `{"train": […], "test": […]}`."""
    format: Format = "auto"
    """Format of the rows; `auto` detects it from the keys of the first rows and reports it."""
    columns: dict[str, str] = {}
    """Other names for the keys of the format: `{messages: dialog, role: speaker, content: says}`."""
    delimiter: str | None = None
    """Character between the cells of .csv and .tsv, such as `;` or `"\\t"`; default: found from the first rows."""
    roles: dict[str, str] = {}
    """Other names for the roles: `{customer: user, agent: assistant}`."""
    keep_nulls: bool = False
    """Keep nulls of Parquet and Arrow rows; by default they are removed, as Arrow adds one for each absent key."""
    ignore: list[str] = []
    """Keys of rows and turns to train without, e.g. `[documents]`; a key that may be part of a chat is else refused."""
    paths: Literal["best", "all"] = "best"
    """Message trees: follow the reply with the lowest `rank`, or make one row of each path."""
    weight: PositiveFloat | None = None
    """Share of this source among the rows used, relative to the weights of other sources; no row is repeated."""
    good_rating: float | None = None
    """Format `rated`: the lowest rating of a good answer; lower ones are bad."""
    rows: PositiveInt | None = None
    """Number of rows used, drawn by a hash of their content; default: all."""


class RetainSource(Source):
    """Rows of a skill that the model already has and must not lose."""

    replay_rows: Annotated[int, Field(ge=0)] = 0
    """Rows of its train split that are trained on again, in addition to the new rows; 0: none."""


class SplitSection(Section):
    """Split of the rows by a hash of their content, so that their order in the file does not matter."""

    train: Fraction | None = None
    """Share to train on; if no share is given, all three are chosen by the number of rows."""
    validation: Fraction | None = None
    """Share for evaluation during training and by `packhorse evaluate`."""
    test: Fraction | None = None
    """Share that is sealed: only `packhorse evaluate --test` reads it, and each reading is counted."""
    stratify: list[str] = []
    """Row fields whose values keep equal shares in each split; `language` and `source` are detected automatically."""
    group_by: str | None = None
    """Row field; rows with equal values stay in one split, e.g. `conversation_id`."""
    seed: int = 42
    """Another seed gives another split."""


class DuplicatesSection(Section):
    """Duplicate rows. The rows of `sources` are split so that copies are never in two splits."""

    exact: Literal["keep", "drop"] = "keep"
    """Rows with equal text: keep them all, or drop all but one; they are counted."""
    near: Literal["keep", "drop", "ignore"] = "keep"
    """Rows with nearly equal text: keep them in one split, drop all but one, or do not search for them."""
    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Smallest share of common 3-word shingles of near duplicates (Jaccard index, estimated by MinHash)."""
    leaks: Literal["raise", "drop", "keep"] = "raise"
    """Rows that are also in a given `validation` or `test`: refuse them, drop them from the others, or keep them."""


class DecontaminationSection(Section):
    """Rows that contain text of an evaluation set."""

    against: Annotated[list[Source], Field(min_length=1)]
    """Evaluation sets."""
    ngram: Annotated[int, Field(ge=3)] = 13
    """Number of consecutive words that a contaminated row shares with an evaluation row (Brown et al. 2020, app. C)."""
    action: Literal["report", "drop"] = "report"
    """Count contaminated rows, or drop them."""


class TrainOnSection(Section):
    """Part of a chat that is trained on."""

    roles: Annotated[list[Literal["assistant", "user", "system", "tool"]], Field(min_length=1)] = ["assistant"]
    """Roles whose turns are trained on."""
    turns: Literal["all", "last"] = "all"
    """All turns of these roles, or the last one."""
    thinking: Literal["keep", "mask", "remove"] = "keep"
    """Thinking of the assistant (`<think>…</think>`, `reasoning_content`): train on it, mask it, or remove it."""


class DataSection(Section):
    """Rows, their format, and how they become token ids."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """Data sets to train on."""
    validation: list[Source] = []
    """Separate validation rows; `split` then draws no validation rows from `sources`."""
    test: list[Source] = []
    """Separate test rows, sealed: only `packhorse evaluate --test` reads them, and each reading is counted."""
    split: SplitSection = SplitSection()
    """Shares of train, validation and test rows."""
    retain: list[RetainSource] = []
    """Old skills: their validation rows are evaluated to measure forgetting, and `replay_rows` are trained on."""
    template: str = "tokenizer"
    """`tokenizer` (its own), a file, or `chatml`, `qwen3`, `llama3`, `gemma`, `mistral`, `phi3`, `phi4`, `alpaca`."""
    template_date: Day | None = None
    """Date that the template writes in training and in use, if it writes the current date (`strftime_now`)."""
    train_on: TrainOnSection = TrainOnSection()
    """Part of a chat that is trained on; all plain text is trained on."""
    half_thinking: Literal["raise", "open"] = "raise"
    """An answer with `</think>` and no `<think>`, where the template knows thinking: refuse it, or add `<think>`."""
    control_tokens: Literal["raise", "escape", "keep"] = "raise"
    """Control tokens in the text of a row, such as `</s>`: refuse them, break them up by a space, or keep them."""
    on_bad_row: Literal["raise", "drop"] = "raise"
    """Rows with mistakes: stop and report them all, or drop and count them."""
    most_bad_rows: Fraction = 0.01
    """Largest share of bad rows that `on_bad_row: drop` accepts."""
    strip: bool = False
    """Remove white space around the text of each turn of a chat."""
    fix_encoding: bool = False
    """Fix text that was decoded wrongly, such as `Ã³` for `ó` (ftfy)."""
    duplicates: DuplicatesSection = DuplicatesSection()
    """Duplicate rows."""
    decontaminate: DecontaminationSection | None = None
    """Rows that contain text of an evaluation set."""
    over_long: Literal["raise", "drop", "truncate", "split"] = "raise"
    """Action for a row longer than `batch.length`; such rows are counted."""
    packing: Literal["mixed", "best_fit", "in_order", "none"] = "mixed"
    """`mixed`: random packs; `best_fit`: fewest packs; `in_order`: in file order; `none`: one row per pack."""


class BatchSection(Section):
    """The maths of a step; the plan decides how devices share it, which never changes the result."""

    length: PositiveInt = 2048
    """Tokens in a pack (T)."""
    packs: PositiveInt = 16
    """Packs in one optimizer step, over all devices."""
    micro: PositiveInt | Literal["auto"] = "auto"
    """Packs in one forward pass of one device: changes memory and speed only; `auto`: the fastest that fits."""


class OptimizerSection(Section):
    """Optimizer and its parameters; biases and norms have no weight decay."""

    name: OptimizerName = "adamw"
    """AdamW (arXiv 1711.05101), also with 8-bit or paged states, Adafactor (1804.04235), Lion (2302.06675) or Muon."""
    learning_rate: PositiveFloat
    """Peak learning rate, reached after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Decoupled weight decay."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """Decay of the running mean of the gradient and of its square."""
    epsilon: PositiveFloat = 1e-8
    """Added to the denominator."""
    momentum: Fraction = 0.95
    """Momentum of Muon, which steps the matrices of the layers; AdamW steps all other weights."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global norm of the gradient; larger gradients are scaled down; null: no clipping."""
    in_backward: bool = False
    """Step each weight as soon as its gradient is computed, so that gradients need less memory."""


class ScheduleSection(Section):
    """Learning rate over the steps."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Schedule after the warm-up; `wsd`: constant, then decay at the end (warmup-stable-decay, arXiv 2404.06395)."""
    decay_ratio: Fraction = 0.1
    """Share of all steps in which `wsd` decays."""
    warmup_ratio: Fraction = 0.03
    """Share of all steps in which the learning rate rises linearly from 0."""
    warmup_steps: PositiveInt | None = None
    """Number of warm-up steps; replaces `warmup_ratio`."""
    final_ratio: Fraction = 0.0
    """Final learning rate as a share of the peak."""


class ParallelSection(Section):
    """How devices share the work."""

    engine: Engine | Literal["auto"] = "ddp"
    """Shards nothing (single, ddp), optimizer (zero1), gradients (zero2), weights (zero3, fsdp2); `auto`: fastest."""
    processes: PositiveInt | Literal["auto"] = "auto"
    """Number of processes, one per GPU. `auto`: all GPUs of this machine, or one process on the CPU."""
    sequence: PositiveInt = 1
    """Processes that share the tokens of each pack (Ulysses, arXiv 2309.14509), for long packs."""
    shard_group: PositiveInt | None = None
    """Processes that shard one copy of the weights under `hsdp`; default: the processes of one node."""
    nvme: str | None = None
    """Folder on a fast local disk for the weights and optimizer states of `zero3_nvme`."""
    checkpointing: bool | PositiveInt | Literal["selective", "auto"] = False
    """Recompute activations to save memory; N: every Nth layer; `selective`: all but attention; `auto`: if needed."""
    offload_activations: bool = False
    """Keep the activations for the backward pass in host memory."""
    compile: bool | Literal["auto"] = False
    """Compile each decoder layer (torch.compile) into fewer kernels; `auto`: on GPUs, where method and engine allow."""

    @property
    def recomputed_every(self) -> int:
        """N where every Nth layer is recomputed, the first included; 0 where none is."""
        assert self.checkpointing != "auto", "auto is resolved before layers are counted"
        # `true` stands for every layer; in Python it equals the number 1.
        return 1 if self.checkpointing == "selective" else int(self.checkpointing)


class CheckpointSection(Section):
    """Checkpoints, from which a run resumes."""

    every_steps: PositiveInt | None = None
    """Write a checkpoint every N steps; one is always written at the end and on a request to stop."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    asynchronous: bool = True
    """Write in the background; the step loop waits only for the copy to host memory."""
    on_full: Literal["stop", "continue"] = "stop"
    """If a checkpoint cannot be written: end the run, or continue without it; earlier ones are kept."""


class RecoverySection(Section):
    """Reaction to failures."""

    restarts: Annotated[int, Field(ge=0)] = 0
    """How often a failed run restarts automatically from its newest complete checkpoint."""
    hang_seconds: PositiveInt = 600
    """Time without a heartbeat of a rank, or with all ranks in one phase, after which the attempt is ended as hung."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If a loss or gradient is NaN or Inf: end the run before the weights change, or skip the step."""
    most_skipped: Annotated[int, Field(ge=0)] = 10
    """Most steps that `on_nonfinite` and `on_spike` may skip in total; one more ends the run."""
    on_spike: Literal["ignore", "warn", "rewind"] = "warn"
    """If a loss is far above the recent ones: log a warning, or return to an earlier checkpoint and skip its steps."""
    spike_score: PositiveFloat = 8.0
    """Robust z-score above which a loss is a spike: its distance from the median of the window, in 1.4826 x MAD."""
    spike_window: Annotated[int, Field(ge=8)] = 64
    """Number of previous losses to compare with."""
    rewind_steps: PositiveInt = 5
    """Number of steps that a rewind skips; the last one is the step of the spike."""
    on_oom: Literal["stop", "shrink"] = "stop"
    """If GPU memory runs out: end the run, or resume with half of `batch.micro` in twice the passes (same maths)."""


class ProfileSection(Section):
    """Steps of which torch's profiler writes a trace to RUN/profile; `packhorse profile RUN` reads it."""

    steps: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]
    """First and last step, e.g. `[10, 13]`; a few only, after the first ones: the trace grows with each step."""
    all_ranks: bool = False
    """Write a trace of every rank; by default of rank 0 only."""


class TrackSection(Section):
    """Where metrics are logged, in addition to RUN/metrics.jsonl."""

    every_steps: PositiveInt = 1
    """Log metrics every N steps."""
    profile: ProfileSection | None = None
    """Record where the time of some steps goes; the result of training is unchanged."""
    noise_scale: bool = False
    """Measure the gradient noise scale, which estimates the largest useful batch (arXiv 1812.06162)."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases; `auto`: online if a key is set, else offline in the run folder."""
    wandb_project: str = "packhorse"
    """W&B project of the run."""
    tensorboard: bool = False
    """Write TensorBoard event files in the run folder."""


class SweepSection(Section):
    """Several runs of one recipe, submitted as one job array by `packhorse submit`. One of `grid` and `runs`."""

    grid: dict[str, Any] = {}
    """Lists of values for dotted fields, e.g. `optimizer.learning_rate: [1e-4, 3e-4]`; one run per combination."""
    runs: list[dict[str, Any]] = []
    """The changed fields of each run, e.g. `{optimizer.learning_rate: 1e-4, seed: 1}`."""


class Recipe(Section):
    """One complete training run: equal recipe, data and seed give the same curve on any machine."""

    name: Name
    """Name of the run and of its folder in `runs_folder`."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Seed of the order of packs, of dropout and of fresh weights."""
    runs_folder: str = "runs"
    """Folder of the run folders and prepared data; on a cluster, a folder that all nodes share."""
    model: ModelSection
    method: Method = LoraMethod()
    """Training method: `full`, `partial`, `lora`, `qlora`, `ia3`, `prompt_tuning`, `prefix_tuning`, and its fields."""
    objective: Objective = SftObjective()
    """Loss: `sft`, `dpo`, `ipo`, `kto`, `orpo`, `simpo`, `cpo`, `reward` or `distil`, and its fields."""
    data: DataSection
    batch: BatchSection = BatchSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    steps: PositiveInt | None = None
    """Optimizer steps; or give `epochs`."""
    epochs: PositiveInt | None = None
    """Passes over the training rows; or give `steps`."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Arithmetic of the forward and backward pass; fp16 uses a loss scaler."""
    tf32: bool = False
    """Round the inputs of fp32 matrix products on NVIDIA GPUs to 10 bits (TF32): faster, less exact."""
    deterministic: bool = False
    """Use only deterministic GPU kernels: slower; a resumed run then equals an unbroken one bit for bit on GPUs."""
    parallel: ParallelSection = ParallelSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    recovery: RecoverySection = RecoverySection()
    track: TrackSection = TrackSection()
    sweep: SweepSection = SweepSection()

    @model_validator(mode="after")
    def _no_dropout_by_default(self) -> Recipe:
        if not isinstance(self.objective, PairedObjective) or not isinstance(self.method, LoraMethod):
            return self
        return self if "dropout" in self.method.model_fields_set else self.changed("method", dropout=0.0)

    def changed(self, section: str, **fields: Any) -> Recipe:  # noqa: ANN401
        """Return the recipe with these fields of a section, without any check of types or rules."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=fields)})


@cache
def recipe_view() -> SchemaView:
    """Return the schema of a recipe for messages and the reference page."""
    return SchemaView(
        Recipe, "the recipe", extra_keys=["extends"], fix_for_key=fix_for_key, fix_for_value=fix_for_value
    )
