"""The recipe: what to learn, from what, how. Frozen, typed, complete; unknown keys are refused at every depth.

The string under each field documents it: `packhorse recipes reference` and docs/recipe.md are made from these.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from packhorse.recipe.methods import LoraMethod, Method
from packhorse.recipe.section import Fraction, Name, PositiveFloat, Section

Engine = Literal["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "zero3_nvme", "fsdp2", "hsdp"]
OptimizerName = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion", "lion_8bit", "muon"
]
Format = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "text_label",
    "text",
    "preference",
    "kto",
]


class ModelSection(Section):
    """The model to start from: exactly one of `id`, `path` and `config`."""

    id: str | None = None
    """Name on the Hugging Face hub, e.g. `meta-llama/Llama-3.1-8B-Instruct`."""
    revision: str | None = None
    """Commit, tag or branch of `id`; pin a commit for a run that can be repeated."""
    path: str | None = None
    """Local folder in Hugging Face form, or the folder of an earlier run of full fine-tuning."""
    config: dict[str, Any] | None = None
    """A fresh model, randomly initialised: `model_type` and the fields of that type's configuration."""
    tokenizer: str | None = None
    """Folder, hub name or `builtin:` name of the tokenizer; absent, the model's own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """How weights are stored. `auto`: float32 where they are trained, bfloat16 where frozen and `precision` is bf16."""
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    """Attention kernel that keeps packed documents apart. `auto`: varlen on CUDA, else SDPA per document."""
    new_tokens: list[str] = []
    """Tokens that the tokenizer lacks, added to it; beside an adapter, only their own rows of the embedding train."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""


class Source(Section):
    """Rows of one origin: exactly one of `path` and `id`."""

    path: str | None = None
    """File, folder or glob (.jsonl, .json, .csv, .tsv, .parquet, .arrow, also .gz and .zst) or `builtin:` name."""
    id: str | None = None
    """Data set on the Hugging Face hub."""
    revision: str | None = None
    """Commit or tag of `id`."""
    subset: str | None = None
    """Configuration of `id`, where it has several."""
    split: str = "train"
    """Split of `id`."""
    format: Format = "auto"
    """What the rows look like; `auto` finds it from the first rows' keys and says so."""
    columns: dict[str, str] = {}
    """Where a format's keys are called otherwise: `{messages: dialog, role: speaker, content: says}`."""
    roles: dict[str, str] = {}
    """Where roles are called otherwise: `{customer: user, agent: assistant}`."""
    weight: PositiveFloat | None = None
    """Share of this source in the rows that are used, relative to the other sources' weights; none is repeated."""
    rows: PositiveInt | None = None
    """Rows used of this source, drawn by their content; absent, all."""


class RetainSource(Source):
    """Rows of a skill that the model has already and must not lose."""

    replay_rows: Annotated[int, Field(ge=0)] = 0
    """Rows of its train share that are trained on again, beside the new ones; 0: none."""


class SplitSection(Section):
    """How rows are shared out: by a hash of their content, so the order of the file does not matter."""

    train: Fraction | None = None
    """Share that is trained on; without any share given, all three are chosen by the number of rows."""
    validation: Fraction | None = None
    """Share for evaluation during training and by `packhorse evaluate`."""
    test: Fraction | None = None
    """Share that is set aside, sealed: only `packhorse evaluate --test` opens it, and each look is counted."""
    stratify: list[str] = []
    """Row fields whose values keep the same shares on each side; `language` and `source` are known without a field."""
    group_by: str | None = None
    """Row field whose equal values stay on one side, e.g. `conversation_id`."""
    seed: int = 42
    """Another seed gives another sharing out."""


class DuplicatesSection(Section):
    """Rows that say the same. Whatever is chosen, copies never stand on two sides of the split."""

    exact: Literal["keep", "drop"] = "keep"
    """Rows of equal text: counted and kept, or all but one dropped."""
    near: Literal["keep", "drop", "ignore"] = "keep"
    """Rows of nearly equal text: counted and kept on one side, all but one dropped, or not looked for."""
    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Rows are near duplicates from this share of common 3-word shingles on (Jaccard, estimated by MinHash)."""


class DecontaminationSection(Section):
    """Rows that hold what an evaluation asks."""

    against: Annotated[list[Source], Field(min_length=1)]
    """Evaluation files."""
    ngram: Annotated[int, Field(ge=3)] = 13
    """A row is contaminated if it shares so many words in a row with one of theirs (Brown et al. 2020, app. C)."""
    action: Literal["report", "drop"] = "report"
    """Count these rows, or drop them."""


class TrainOnSection(Section):
    """Which part of a chat is trained on."""

    roles: Annotated[list[Literal["assistant", "user", "system", "tool"]], Field(min_length=1)] = ["assistant"]
    """Whose turns."""
    turns: Literal["all", "last"] = "all"
    """Every turn of these roles, or the last one."""
    thinking: Literal["keep", "mask", "remove"] = "keep"
    """What the assistant thinks (`<think>…</think>`, `reasoning_content`): trained on, only seen, or taken out."""


class DataSection(Section):
    """Rows, their form, and how they become token ids."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """Where rows come from."""
    validation: list[Source] = []
    """Validation rows kept elsewhere; then every row of `sources` is trained on and `split` is not used."""
    split: SplitSection = SplitSection()
    """Shares of train, validation and test."""
    retain: list[RetainSource] = []
    """Old skills: their validation share is evaluated, to show what was forgotten, and `replay_rows` are trained on."""
    template: str = "tokenizer"
    """`tokenizer` (its own), a file, or `chatml`, `qwen3`, `llama3`, `gemma`, `mistral`, `phi3`, `phi4`, `alpaca`."""
    train_on: TrainOnSection = TrainOnSection()
    """Which part of a chat is trained on; of plain text, all is."""
    control_tokens: Literal["raise", "escape", "keep"] = "raise"
    """Control tokens typed inside a row's text, such as `</s>`: refused, broken up by a space, or meant as such."""
    on_bad_row: Literal["raise", "drop"] = "raise"
    """Rows that cannot be read as they were meant: refused, all at once, or dropped and counted."""
    most_bad_rows: Fraction = 0.01
    """Largest share of bad rows that `on_bad_row: drop` takes."""
    fix_encoding: bool = False
    """Mend text that was decoded wrongly, such as `Ã³` for `ó` (ftfy)."""
    duplicates: DuplicatesSection = DuplicatesSection()
    """Rows that say the same."""
    decontaminate: DecontaminationSection | None = None
    """Rows that hold what an evaluation asks."""
    over_long: Literal["raise", "drop", "truncate", "split"] = "raise"
    """What happens to a row longer than `batch.length`; whatever happens is counted."""
    packing: Literal["mixed", "best_fit", "in_order", "none"] = "mixed"
    """`mixed`: packs are samples of the rows; `best_fit`: fewest packs; `in_order`: as in files; `none`: a row each."""


class BatchSection(Section):
    """The maths of a step; how devices share it is the plan's affair and never changes the result."""

    length: PositiveInt = 2048
    """Tokens in a pack (T)."""
    packs: PositiveInt = 16
    """Packs in one optimizer step, over all devices."""
    micro: PositiveInt | Literal["auto"] = "auto"
    """Packs in one forward pass of one device: memory and speed, never the result; `auto`: the fastest that fit."""


class OptimizerSection(Section):
    """How gradients become steps; no decay on biases and norms."""

    name: OptimizerName = "adamw"
    """AdamW (arXiv 1711.05101), its states in 8 bits or paged, Adafactor (1804.04235), Lion (2302.06675) or Muon."""
    learning_rate: PositiveFloat
    """Peak learning rate, reached after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Decoupled weight decay."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """Decay of the running mean of the gradient and of its square."""
    epsilon: PositiveFloat = 1e-8
    """Added to the denominator."""
    momentum: Fraction = 0.95
    """Muon's, for the matrices of the layers; all other weights take AdamW's steps beside it."""
    clip_norm: PositiveFloat | None = 1.0
    """The gradient's global norm is scaled down to this; null: it is not."""
    in_backward: bool = False
    """Step each weight as soon as its gradient is there, so that no two gradients exist at once."""


class ScheduleSection(Section):
    """Learning rate over the steps."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Course after the warm-up; `wsd`: constant, then down to the end (warmup-stable-decay, arXiv 2404.06395)."""
    decay_ratio: Fraction = 0.1
    """Share of all steps over which `wsd` goes down."""
    warmup_ratio: Fraction = 0.03
    """Share of all steps over which the learning rate rises linearly from 0."""
    warmup_steps: PositiveInt | None = None
    """The same as a number of steps; takes the place of `warmup_ratio`."""
    final_ratio: Fraction = 0.0
    """Learning rate at the end, as a share of the peak."""


class ParallelSection(Section):
    """How devices share the work."""

    engine: Engine | Literal["auto"] = "ddp"
    """Shards nothing (single, ddp), optimizer (zero1), gradients (zero2), weights (zero3, fsdp2); `auto`: the best."""
    processes: PositiveInt | Literal["auto"] = "auto"
    """Processes in all, one a GPU. `auto`: every GPU of this machine, or one process on the CPU."""
    sequence: PositiveInt = 1
    """Processes that share each pack, a part of its tokens each (Ulysses, arXiv 2309.14509): for a long T."""
    shard_group: PositiveInt | None = None
    """Processes that shard one copy of the weights under `hsdp`; absent, those of one node."""
    nvme: str | None = None
    """Folder on a fast local disk for what `zero3_nvme` keeps there."""
    checkpointing: bool | PositiveInt | Literal["auto"] = False
    """Recompute activations: a third more compute, far less memory; n: every n-th layer; `auto`: where it must be."""
    offload_activations: bool = False
    """Keep what is stored for the backward pass in host memory."""


class EvaluationSection(Section):
    """What is measured on held-out rows."""

    every_steps: PositiveInt | None = None
    """Validation loss each so many steps; it is always measured before the first and after the last step."""
    exact_match_rows: Annotated[int, Field(ge=0)] = 200
    """Rows answered greedily by base and tuned model in `packhorse evaluate`, per set; 0: none."""
    max_new_tokens: PositiveInt = 256
    """Longest answer generated."""
    group_by: str | None = None
    """Row field that makes the lines of the evaluation table, e.g. `family`."""


class CheckpointSection(Section):
    """What is kept so that a run can go on."""

    every_steps: PositiveInt | None = None
    """A checkpoint each so many steps; one is always written at the end and on a request to stop."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Keep the one with the lowest validation loss beside them."""
    asynchronous: bool = True
    """Write while training goes on; the step loop waits only for the copy to host memory."""
    on_full: Literal["stop", "continue"] = "stop"
    """Where the disk is full or refuses: end the run, or go on without this checkpoint; earlier ones stand."""


class RecoverySection(Section):
    """What happens when something goes wrong."""

    restarts: Annotated[int, Field(ge=0)] = 0
    """How often a run that failed starts again by itself from its newest sound checkpoint."""
    hang_seconds: PositiveInt = 600
    """A rank that says nothing for so long, or all ranks in one phase for so long, is a hang and ends the attempt."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is no number: end the run before the weights are touched, or leave the step out."""
    most_left_out: Annotated[int, Field(ge=0)] = 10
    """Steps that may be left out in all, by `on_nonfinite` and `on_spike`; one more ends the run."""
    on_spike: Literal["ignore", "warn", "rewind"] = "warn"
    """A loss far above the last ones: say so, or go back before it and leave its steps out."""
    spike_score: PositiveFloat = 8.0
    """Robust z-score from which a loss is a spike: its distance from the window's median, in 1.4826 x MAD."""
    spike_window: Annotated[int, Field(ge=8)] = 64
    """Steps whose losses it is compared with."""
    rewind_steps: PositiveInt = 5
    """Steps that a rewind leaves out; the last of them is the spike's own."""
    on_oom: Literal["stop", "shrink"] = "stop"
    """Out of GPU memory: end the run, or go on with half of `batch.micro` in twice the passes: the same maths."""


class TrackSection(Section):
    """Where figures go, beside RUN/metrics.jsonl, which is always written."""

    every_steps: PositiveInt = 1
    """A line of figures each so many steps."""
    noise_scale: bool = False
    """Measure the gradient noise scale, which says how large a batch still helps (arXiv 1812.06162)."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases; `auto`: online where a key is set, else offline in the run folder."""
    wandb_project: str = "packhorse"
    """Project that the run appears in."""
    tensorboard: bool = False
    """TensorBoard event files in the run folder."""


class SweepSection(Section):
    """Many runs of one recipe, as one job array: `packhorse submit` makes them. One of `grid` and `runs`."""

    grid: dict[str, Any] = {}
    """Lists of values for dotted fields, e.g. `optimizer.learning_rate: [1e-4, 3e-4]`; a run for each combination."""
    runs: list[dict[str, Any]] = []
    """Runs one by one, each by the fields that set it apart, e.g. `{optimizer.learning_rate: 1e-4, seed: 1}`."""


class Recipe(Section):
    """One training run, complete: the same recipe, data and seed give the same curve on any machine."""

    name: Name
    """Name of the run, and of its folder below `runs_folder`."""
    seed: int = 42
    """Order of the packs, dropout, fresh weights."""
    runs_folder: str = "runs"
    """Folder of run folders and prepared data; on a cluster, one that all nodes see."""
    model: ModelSection
    method: Method = LoraMethod()
    """What is trained: `full`, `partial`, `lora`, `qlora`, `ia3`, `prompt_tuning`, `prefix_tuning`, and its fields."""
    data: DataSection
    batch: BatchSection = BatchSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    steps: PositiveInt | None = None
    """Optimizer steps; or give `epochs`."""
    epochs: PositiveInt | None = None
    """Passes over the training rows; or give `steps`."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Arithmetic of the forward and backward pass; fp16 with a loss scaler."""
    tf32: bool = False
    """Let fp32 matrix products of NVIDIA GPUs round their inputs to 10 bits (TF32): faster, not exact."""
    parallel: ParallelSection = ParallelSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    recovery: RecoverySection = RecoverySection()
    track: TrackSection = TrackSection()
    sweep: SweepSection = SweepSection()

    def changed(self, section: str, **fields: Any) -> Recipe:  # noqa: ANN401
        """The recipe with these fields of a section, which are checked neither by type nor by rule."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=fields)})
