"""Benchmark tasks of the user: YAML files in lm-eval's form and their rows, checked before a model is loaded."""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import datasets
import yaml
from lm_eval.api.registry import get_aggregation, metric_registry
from lm_eval.config.group import GroupConfig
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager

from packhorse.errors import UserError

SUFFIXES: Final = (".yaml", ".yml")
KEYS: Final = frozenset(
    {field.name for of in (TaskConfig, GroupConfig) for field in fields(of)}
    | {"class", "group", "include", "tag", "task_list"}
)
"""Keys that lm-eval reads in a task file or a group file."""
READ_MORE: Final = "the keys are those of lm-eval's task guide."


@dataclass(frozen=True)
class TaskFile:
    """A YAML file as written.

    Attributes:
        path: Path as the user typed it.
        nodes: Key and value of each line of the file's mapping.
    """

    path: Path
    nodes: Mapping[str, tuple[yaml.Node, yaml.Node]]

    def text(self, key: str) -> str | None:
        """Return the text of a key; None if the file lacks it or has no text there."""
        value = self.nodes[key][1] if key in self.nodes else None
        return value.value if isinstance(value, yaml.ScalarNode) else None

    def where(self, node: yaml.Node | None = None) -> str:
        """Return `file:line` of a node; the file alone without one."""
        return str(self.path) if node is None else f"{self.path}:{node.start_mark.line + 1}"

    @property
    def includes(self) -> list[yaml.ScalarNode]:
        """Names of the files that this one includes."""
        value = self.nodes["include"][1] if "include" in self.nodes else None
        found = value.value if isinstance(value, yaml.SequenceNode) else [value]
        return [node for node in found if isinstance(node, yaml.ScalarNode)]


def load_tasks(path: Path) -> dict[str, Any]:
    """Return lm-eval's tasks by name, with their rows read and every row's prompt and answer rendered once.

    Args:
        path: A task file, or a folder of them. Files of rows are relative to the folder.

    Raises:
        UserError: There is no such file, a file has a mistake, or rows cannot be read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about defaults, such as the mean over rows
    folder = path if path.is_dir() else path.parent
    files = [_read(file) for file in _files(path)]
    for file in files:
        _check(file)
    named = _named(files)
    tasks: dict[str, Any] = {}
    datasets.disable_progress_bars()
    with contextlib.chdir(folder):
        manager = TaskManager(include_path=".", include_defaults=False)
        for name, file in named.items():
            if name not in tasks:
                tasks |= _loaded(manager, name, file)
    return tasks


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(
            f"--tasks is {path}, which does not exist.",
            "benchmark tasks are YAML files in lm-eval's form.",
            "give a task file, or a folder of task files.",
        )
    found = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES)
    if not found:
        raise UserError(
            f"{path} has 0 files that end in .yaml or .yml.",
            "benchmark tasks are YAML files in lm-eval's form.",
            "give a task file, or a folder of task files.",
        )
    return found


def _read(path: Path) -> TaskFile:
    """Return keys and values with their lines; tags such as `!function` stay unread."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = str(path) if mark is None else f"{path}:{mark.line + 1}"
        reason = getattr(error, "problem", None) or str(error)
        raise UserError(
            f"it is no YAML: {reason}.", "a task file is read as YAML.", f"correct {path}.", where
        ) from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError("it has no keys.", "a task file is a list of `key: value`.", f"correct {path}.", str(path))
    return TaskFile(path, {str(key.value): (key, value) for key, value in root.value})


def _check(file: TaskFile) -> None:
    """Refuse unknown keys, unknown metrics and missing files."""
    for name, (key, _) in file.nodes.items():
        if name not in KEYS:
            close = difflib.get_close_matches(name, KEYS, 1)
            fix = f"write `{close[0]}`." if close else f"remove `{name}`."
            raise UserError(f"there is no key `{name}` in a task.", READ_MORE, fix, file.where(key))
    for node in file.includes:
        if not (file.path.parent / node.value).is_file():
            why = "an included file is relative to the file that includes it."
            raise UserError(f"there is no file {node.value}.", why, "correct the path.", file.where(node))
    # With a function `process_results`, metrics have names of the user's; an included file may have one.
    if "process_results" not in file.nodes and not file.includes:
        for node in _metrics(file):
            if node.value not in metric_registry:
                close = difflib.get_close_matches(node.value, list(metric_registry), 1, cutoff=0.4)
                why = f"lm-eval's metrics are {', '.join(sorted(metric_registry))}."
                fix = f"write `{close[0] if close else 'exact_match'}`."
                raise UserError(f"there is no metric `{node.value}`.", why, fix, file.where(node))


def _metrics(file: TaskFile) -> Iterator[yaml.ScalarNode]:
    """Yield the names in `metric_list`, except functions and those of Hugging Face's evaluate."""
    listed = file.nodes["metric_list"][1] if "metric_list" in file.nodes else None
    for entry in listed.value if isinstance(listed, yaml.SequenceNode) else ():
        given = {key.value: value for key, value in entry.value} if isinstance(entry, yaml.MappingNode) else {}
        name = given.get("metric")
        if isinstance(name, yaml.ScalarNode) and name.tag.endswith(":str") and "hf_evaluate" not in given:
            yield name


def _named(files: Sequence[TaskFile]) -> dict[str, TaskFile]:
    """Return the file of each group and task, groups first: a group may change the settings of its tasks."""
    included = {(file.path.parent / node.value).resolve() for file in files for node in file.includes}
    named: dict[str, TaskFile] = {}
    for key in ("group", "task"):
        for file in files:
            name = file.text(key)
            if name is None or (key == "task" and "group" in file.nodes):
                continue
            if name in named:
                fact = f"the name `{name}` is also in {named[name].path}."
                why = "results are listed by the names of the tasks."
                raise UserError(fact, why, "give one of them another name.", file.where(file.nodes[key][0]))
            named[name] = file
    for file in files:
        if file not in named.values() and file.path.resolve() not in included:
            raise UserError(
                "it has neither a key `task` nor `group`.", READ_MORE, "begin it with `task: NAME`.", str(file.path)
            )
    return named


def _loaded(manager: TaskManager, name: str, file: TaskFile) -> dict[str, Any]:
    """Return the task of that name, or the tasks of a group."""
    try:
        tasks: dict[str, Any] = manager.load([name])["tasks"]
        for task in tasks.values():
            for doc in task.eval_docs:
                task.doc_to_text(doc)
                task.doc_to_target(doc)
                if task.config.doc_to_choice is not None:
                    task.doc_to_choice(doc)
    except Exception as error:  # lm-eval, datasets, Jinja and functions of the user raise what they like
        raise UserError(
            f"lm-eval cannot load {name}: {_reason(error)}.",
            "the rows of every task are read and rendered before a model is loaded.",
            f"correct {file.path}, or the rows that it names.",
            file.where(_cause(file, str(error))),
        ) from error
    for task in tasks.values():
        for metric, aggregation in task.aggregation().items():
            if aggregation is not get_aggregation("mean"):
                raise UserError(
                    f"the metric `{metric}` of {name} has no value for each row.",
                    "base and tuned model are compared row by row, on the mean over rows.",
                    "use a metric with a value for each row, for example acc or exact_match.",
                    file.where(file.nodes["metric_list"][0] if "metric_list" in file.nodes else None),
                )
    return tasks


def _reason(error: Exception) -> str:
    """Return the first line of the error and of what caused it: a library may hide the useful one."""
    causes = [error] if error.__cause__ is None else [error, error.__cause__]
    texts = [f"no key {each}" if isinstance(each, KeyError) else str(each).strip() for each in causes]
    lines = [text.partition("\n")[0] or type(error).__name__ for text in texts]
    return ": ".join(dict.fromkeys(line.rstrip(".") for line in lines))


def _cause(file: TaskFile, message: str) -> yaml.Node | None:
    """Return the key whose text has a word that the message quotes, or that the message contains."""
    quoted = re.findall(r"['`]([^'`]+)['`]", message)
    for name, (key, _) in file.nodes.items():
        text = file.text(name)
        if text and name != "task" and any(word in text for word in quoted):
            return key
    return None
