"""The table of commands and flags: the one place where each is written."""

from __future__ import annotations

from packhorse.cli.flags import Command, Flag

RECIPE, RUN = ("recipe", None), ("run", None)
GPUS_HERE = Flag("gpus", "number of processes, one per GPU", "count", "2")
GPUS_ANYWHERE = Flag("gpus", "GPUs in total, and their kind: 8, 8xH100-80GB, auto, autoxH100-80GB", shows="8xH100-80GB")
NODES = Flag("nodes", "number of machines that share the GPUs", "count", "2")
RESTARTS = Flag("restarts", "restart a failed run up to N times from its newest valid checkpoint", "index", "N")
FORCE = Flag("force", "run even if the GPUs cannot hold the plan", "switch")
DRY_RUN = Flag("dry-run", "print the job scripts and the commands, submit nothing", "switch")
SUBMIT = (
    NODES,
    Flag("gpus-per-node", "GPUs on each node; default: as the site profile says", "count", "8"),
    Flag("site", "site profile of the cluster; default: ./site.yaml (`packhorse site` writes one)", shows="FILE|NAME"),
    Flag("time", "time limit of one job; a longer run continues in the next job", shows="24:00:00"),
    DRY_RUN,
    FORCE,
)

_TABLE = (
    Command(
        "recipes",
        "List the shipped recipes, show or copy one, import a file of another trainer, or print the reference.",
        (
            ("packhorse recipes", ""),
            ("packhorse recipes show quickstart/full", ""),
            ("packhorse recipes copy quickstart/full my.yaml", ""),
            (
                "packhorse recipes import axolotl.yml [--out my.yaml] [--gpus 8]",
                "a file of axolotl, LLaMA-Factory, TRL or torchtune",
            ),
            ("packhorse recipes reference", "all fields of a recipe"),
        ),
        words=(("action", "list"), ("name", ""), ("target", "")),
        flags=(
            Flag("out", "file to write", shows="my.yaml"),
            Flag("trainer", "import: axolotl, llamafactory, trl or torchtune; default: detected", shows="NAME"),
            Flag("gpus", "import: number of GPUs that the file is meant for; default: 1", "count", "8"),
        ),
    ),
    Command(
        "check",
        "Check a recipe and its data, and show what the model will see. Trains nothing.",
        (("packhorse check RECIPE [key=value …]", ""),),
        words=(RECIPE,),
        takes_overrides=True,
    ),
    Command(
        "prepare",
        "Tokenize and pack the rows of a recipe, once, on disk.",
        (("packhorse prepare RECIPE [key=value …]", ""), ("packhorse prepare RUN", "data of a submitted run")),
        words=(RECIPE,),
        takes_overrides=True,
    ),
    Command(
        "convert",
        "Convert rows to messages, Alpaca or OpenAI form; for OpenAI, also estimate the price of a hosted run.",
        (("packhorse convert IN OUT --to messages|alpaca|openai [--format auto] [--force]", ""),),
        words=(("source", None), ("target", None)),
        flags=(
            Flag("to", "form to write", shows="FORM"),
            Flag("format", "form of the rows in IN; auto detects it", shows="FORM", default="auto"),
            Flag("force", "overwrite OUT", "switch"),
        ),
    ),
    Command(
        "plan",
        "Show what would run and why, whether it fits, how long it takes and what it costs. Needs no GPU.",
        (
            ("packhorse plan RECIPE [--gpus 8xH100-80GB] [--nodes 1] [key=value …]", ""),
            ("packhorse plan RECIPE --gpus 8xA100-40GB --compare", "compare engines, micro-batches and checkpointing"),
            ("packhorse plan RECIPE --gpus 8xH100-80GB --scale", "speed on 1 to 4,096 GPUs, and what limits it"),
            ("packhorse plan RECIPE --gpus auto", "the fewest GPUs of each kind that hold the run"),
            ("packhorse plan RECIPE --gpus 32 --dry-run", "run one step of a small model as rank 0 of 32, on this CPU"),
            ("packhorse plan RECIPE --gpus 16 --nodes 2 --write", "prepare the data and create the run folder"),
        ),
        words=(RECIPE,),
        flags=(
            GPUS_ANYWHERE,
            NODES,
            Flag("price", "price of one GPU hour", "amount", "2.50"),
            Flag("network", "Gbit/s per GPU between nodes", "amount", "400"),
            Flag("compare", "compare all configurations and say why each lost", "switch"),
            Flag("scale", "estimate the speed on many numbers of GPUs", "switch"),
            Flag("json", "print one JSON value", "switch"),
            Flag("argv", "print only the launch command, one line per node", "switch"),
            Flag("diff", "print what differs from the plan of a run", shows="RUN"),
            Flag("calibrate", "correct the time estimate by the measured steps of a run", shows="RUN"),
            Flag("dry-run", "run one step of a small model without a GPU", "switch"),
            Flag("write", "create the run folder for a job script", "switch"),
            Flag("force", "with --write: even if the GPUs cannot hold the plan", "switch"),
        ),
        takes_overrides=True,
    ),
    Command(
        "train",
        "Train a recipe on this machine; of a recipe with a sweep, all runs, one after the other.",
        (
            ("packhorse train RECIPE [--gpus 2] [--restarts 3] [--force] [key=value …]", ""),
            ("packhorse train RUN --resume", "resume on this machine, also a run of a cluster"),
        ),
        words=(RECIPE,),
        flags=(
            GPUS_HERE,
            Flag("resume", "resume a run; for a run of this machine the same as `packhorse resume RUN`", "switch"),
            RESTARTS,
            FORCE,
        ),
        takes_overrides=True,
    ),
    Command(
        "tune",
        "Measure a few steps of a recipe with other settings on this machine, and print the fastest. Changes nothing.",
        (
            ("packhorse tune RECIPE [--gpus 2] [--steps 20] [key=value …]", ""),
            (
                "packhorse tune RECIPE --candidates parallel.compile=true,batch.micro=2",
                "only these; `+` joins fields of one: batch.micro=2+parallel.compile=true",
            ),
        ),
        words=(RECIPE,),
        flags=(
            Flag("steps", "steps of each candidate, of which the second half is measured; default: 20", "count", "N"),
            Flag("candidates", "what to try; default: compiled layers, checkpointing, attention", shows="KEY=VALUE,…"),
            GPUS_HERE,
            Flag("json", "print one JSON value", "switch"),
        ),
        takes_overrides=True,
        notes="Each candidate is a short run NAME-tune-N on the same packs; it is removed once it is measured.",
    ),
    Command(
        "submit",
        "Submit a recipe or an existing run to a Slurm cluster. The run resumes automatically after a failure.",
        (
            ("packhorse submit RECIPE [--nodes 2] [--gpus-per-node 8] [--time 24:00:00] [key=value …]", ""),
            ("packhorse submit RUN [--nodes 2] [--gpus-per-node 8] [parallel.engine=zero3 …]", ""),
            ("packhorse submit RECIPE --array seed=1,2,3", "one run per value, as a job array; so does `sweep:`"),
            ("packhorse submit RECIPE --site university --dry-run", ""),
        ),
        words=(RECIPE,),
        flags=(
            *SUBMIT,
            Flag("array", "field to vary, and its values", shows="seed=1,2,3"),
            Flag("at-once", "largest number of runs of a sweep that run at the same time", "count", "N"),
        ),
        takes_overrides=True,
    ),
    Command(
        "pipeline",
        "Submit a chain of jobs: prepare, train, evaluate, verify. Each starts when the one before has succeeded.",
        (
            ("packhorse pipeline RECIPE [--nodes 2] [--gpus-per-node 8] [--time 24:00:00] [key=value …]", ""),
            ("packhorse pipeline RECIPE --dry-run", ""),
        ),
        words=(RECIPE,),
        flags=SUBMIT,
        takes_overrides=True,
        notes="If a job fails, the jobs after it do not run; `packhorse resume RUN` submits them again.",
        module="submit",
    ),
    Command(
        "status",
        "Show the state of a run: jobs, metrics, attempts, lost steps. For a sweep: one line per run.",
        (("packhorse status RUN", ""),),
        words=(RUN,),
    ),
    Command(
        "logs",
        "Print the logs of a run's newest attempt: job, launcher and rank 0, or one rank.",
        (("packhorse logs RUN [--rank 3] [--follow]", ""),),
        words=(RUN,),
        flags=(
            Flag("rank", "print the log of this rank only", "index", "N"),
            Flag("follow", "keep printing new lines until the run ends", "switch"),
        ),
    ),
    Command(
        "profile",
        "Show where the time of a step went: phases, kernels, waits for the GPU. Needs a run with track.profile.",
        (
            ("packhorse profile RUN [--rank 3]", ""),
            ("packhorse train RECIPE 'track.profile={steps: [10, 13]}'", "records these steps"),
        ),
        words=(RUN,),
        flags=(
            Flag("rank", "rank whose trace is read; default: 0", "index", "N"),
            Flag("json", "print one JSON value", "switch"),
        ),
    ),
    Command(
        "cancel",
        "Stop a run so that it can be resumed: training saves and stops, waiting jobs leave the queue.",
        (("packhorse cancel RUN [--now]", ""),),
        words=(RUN,),
        flags=(Flag("now", "stop at once, without saving", "switch"),),
    ),
    Command(
        "resume",
        "Resume a run or a sweep where it ran before: on this machine, or by submitting its failed jobs again.",
        (
            ("packhorse resume RUN", ""),
            ("packhorse resume RUN [--gpus 2] [--restarts 3] [--force] [parallel.engine=zero3 …]", ""),
        ),
        words=(RUN,),
        flags=(GPUS_HERE, RESTARTS, FORCE),
        takes_overrides=True,
        notes="Flags and overrides are for runs of this machine; jobs are submitted again with their own scripts.",
    ),
    Command(
        "doctor",
        "Find what would break a run: on this machine, in this job, or on the nodes of a cluster.",
        (
            ("packhorse doctor [RUN]", "this machine; inside a job, all of its nodes"),
            ("packhorse doctor [RUN] --site SITE [--nodes 2]", "nodes of a cluster, in a job of five minutes"),
        ),
        words=(("run", ""),),
        flags=(
            Flag("site", "site profile of the cluster", shows="FILE|NAME"),
            Flag("nodes", "number of nodes to examine", "count", "2"),
            Flag("gpus-per-node", "GPUs on each node; default: as the site profile says", "index", "8"),
            Flag("fast", "skip bandwidth, renames and W&B", "switch"),
            Flag("dry-run", "print the command only", "switch"),
        ),
        notes="The exit code is 1 if a check fails; the first failed check is named below the table.",
    ),
    Command(
        "manifest",
        "Print a run for another launcher: a SkyPilot task, or a Kubeflow TrainJob or PyTorchJob.",
        (
            ("packhorse manifest RUN --to sky|trainjob|pytorchjob --image IMAGE --volume NAME:/FOLDER", ""),
            ("packhorse manifest RECIPE --to … --image … --volume … --gpus 16xH100-80GB --nodes 2 [key=value …]", ""),
        ),
        words=(RECIPE,),
        flags=(
            Flag("to", "sky, trainjob or pytorchjob", shows="PLACE"),
            Flag("image", "container image", shows="IMAGE"),
            Flag(
                "volume", "volume that all nodes share, and its mount folder, which holds the run folder", shows="V:/F"
            ),
            Flag("gpus", "GPUs in total, and their kind", shows="16xH100-80GB"),
            NODES,
        ),
        takes_overrides=True,
        notes="For machines without a scheduler, `packhorse plan RECIPE --argv --nodes 2` prints one command per node.",
    ),
    Command(
        "verify",
        "Read the checkpoints and the prepared data of a run, and name every damaged file.",
        (("packhorse verify RUN", ""),),
        words=(RUN,),
    ),
    Command(
        "evaluate",
        "Compare base and tuned model on held-out rows: loss, perplexity, exact match.",
        (
            ("packhorse evaluate RUN", ""),
            ("packhorse evaluate SWEEP", "each finished run; best first, paired tests against the best, folds pooled"),
            ("packhorse evaluate RUN --test", "measure the sealed test rows, once; every opening is recorded"),
            ("packhorse evaluate RUN --test --again", "open them again"),
            ("packhorse evaluate RUN --against RUN2", "another run's tuned model, or a model folder, for the base"),
            ("packhorse evaluate RUN --ranks 8", "shared by 8 GPUs, sharded as the run was"),
            ("packhorse evaluate RUN --endpoint http://localhost:8000/v1 --model NAME", "answers of a served model"),
            ("packhorse evaluate RUN --judge [evaluation.judge.model=NAME …]", "a language model judges the answers"),
            ("packhorse evaluate RUN --tasks FOLDER", "also benchmark tasks of yours, in lm-eval's form"),
        ),
        words=(RUN,),
        flags=(
            Flag("test", "measure the sealed test rows", "switch"),
            Flag("again", "with --test: although they were opened before", "switch"),
            Flag("tasks", "also measure the tasks of a YAML file or a folder (packhorse[tasks])", shows="PATH"),
            Flag("against", "run or model folder that the tuned model is compared with", shows="RUN|FOLDER|base"),
            Flag("ranks", "processes that measure; default: the run's number of GPUs, if they are here", "count", "8"),
            Flag("endpoint", "OpenAI-compatible endpoint that answers as the tuned model", shows="URL"),
            Flag("model", "name of the tuned model at the endpoint", shows="NAME"),
            Flag("base-endpoint", "endpoint that answers as the base; default: --endpoint", shows="URL"),
            Flag("base-model", "name of the base at its endpoint; default: the base answers here", shows="NAME"),
            Flag("api-key-env", "environment variable with the key of the endpoints", shows="NAME"),
            Flag("judge", "let the model of `evaluation.judge` judge the answers; resumes and is capped", "switch"),
        ),
        takes_overrides=True,
    ),
    Command(
        "rate",
        "Compare base and tuned answers blind, as a person: which is better, or a score each. Can be continued.",
        (
            ("packhorse rate RUN [--rater NAME]", "in the terminal"),
            ("packhorse rate RUN --web [--port 8765]", "on a page for a browser on this machine"),
            ("packhorse rate RUN --show", "results of all raters, and their agreement"),
        ),
        words=(RUN,),
        flags=(
            Flag("rater", "name of the person; default: the name of the user", shows="NAME"),
            Flag("scores", "give each answer 1 to 5, instead of the better one or a tie", "switch"),
            Flag("web", "serve a page on the loopback address; its address holds a secret token", "switch"),
            Flag("port", "with --web: port of the page; default: a free one", "count", "8765"),
            Flag("show", "print the evaluation with the ratings so far", "switch"),
        ),
    ),
    Command(
        "runs",
        "List the runs of a folder: state, step, losses, verdict of the evaluation, time. Sweeps are grouped.",
        (("packhorse runs [FOLDER]", "default: runs; or the folder of a sweep"),),
        words=(("folder", "runs"),),
        flags=(Flag("json", "print one JSON value", "switch"),),
    ),
    Command(
        "report",
        "Write one page about a run: verdict, curves, speed, attempts, data, wins and losses. Opens without a network.",
        (("packhorse report RUN", "writes RUN/report.html, and its figures as RUN/report.json"),),
        words=(RUN,),
    ),
    Command(
        "compare",
        "Compare runs: what differs, final figures, and paired tests of the tuned models on rows that both answered.",
        (("packhorse compare RUN RUN …", "each run against the first"),),
        words=(("first", None), ("second", None)),
        flags=(Flag("json", "print one JSON value", "switch"),),
        more_words="others",
    ),
    Command(
        "export",
        "Write the trained model for other programs: merged into one Hugging Face folder, or as GGUF files; proven.",
        (
            ("packhorse export RUN", "adapter and base as one model, in RUN/export/merged"),
            ("packhorse export RUN --to gguf", "for llama.cpp, Ollama and LM Studio; one file of the type Q8_0"),
            ("packhorse export RUN --to gguf --quantize Q4_K_M,Q8_0", "one file per type"),
        ),
        words=(RUN,),
        flags=(
            Flag("to", "merged or gguf", shows="FORM", default="merged"),
            Flag("quantize", "gguf: types of files, e.g. F16, Q8_0, Q6_K, Q4_K_M", shows="Q4_K_M,Q8_0", default="Q8_0"),
            Flag("dtype", "merged: bfloat16, float16 or float32; default: as training computed", shows="DTYPE"),
            Flag("unrounded", "merged: QLoRA into the weights on disk, not into those in few bits", "switch"),
            Flag("out", "folder of the result; default: inside RUN/export", shows="FOLDER"),
        ),
    ),
    Command(
        "chat",
        "Chat with the model of a run in the terminal.",
        (("packhorse chat RUN", ""),),
        words=(RUN,),
        module="evaluate",
    ),
    Command(
        "site",
        "Write a first profile of this cluster from what Slurm reports, with comments.",
        (("packhorse site [site.yaml] [--partition gpu] [--name mycluster]", ""),),
        words=(("target", "site.yaml"),),
        flags=(
            Flag("partition", "partition to describe", shows="gpu"),
            Flag("name", "name of the profile", shows="mycluster"),
        ),
    ),
    Command(
        "quickstart",
        "Train and evaluate the quickstart recipes on this machine: full fine-tuning, then LoRA on its result.",
        (("packhorse quickstart", ""),),
    ),
)
COMMAND_TABLE = {command.name: command for command in _TABLE}
