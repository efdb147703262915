"""Evaluate the finished runs of a sweep: one table, best first, with paired tests; folds are pooled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packhorse.data.data_manifest import DataManifest
from packhorse.durable import replace_file
from packhorse.errors import UserError
from packhorse.evaluate.results import MetricResult
from packhorse.evaluate.shared_rows import base_against_tuned, compare_pooled
from packhorse.evaluate.statistics.paired import mean_and_deviation
from packhorse.evaluate.sweep_results import SweepEvaluation, SweepLine
from packhorse.evaluate.verdict import adjusted_results
from packhorse.recipe.sweep import FOLD
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.layout import DATA_FILE, SWEEP_EVALUATION_FILE
from packhorse.run_folder.status import read_status
from packhorse.run_folder.sweep import SweepMember, read_sweep
from packhorse.workflows.evaluate import evaluate_run, result_file, rows_file

SET = "validation"


@dataclass(frozen=True)
class _Combination:
    """Evaluated runs that differ in the fold alone.

    Attributes:
        members: The runs.
        folders: Folder of each run.
        effect: `evaluation.smallest_effect` of the recipe.
        results: Base against tuned model by metric, on the rows of all runs.
    """

    members: Sequence[SweepMember]
    folders: Sequence[Path]
    effect: float
    results: Mapping[str, MetricResult]

    @property
    def files(self) -> list[Path]:
        """Values by row of each run."""
        return [rows_file(folder) for folder in self.folders]


def evaluate_sweep(folder: Path, report: Callable[[str], None] = lambda line: None) -> SweepEvaluation:
    """Evaluate each finished run that has no evaluation yet, and compare them; also write the result into the folder.

    Args:
        folder: Folder of the sweep.
        report: Takes a line about each run that is evaluated.

    Raises:
        UserError: No run, or no set of folds, is finished; or folds were prepared from different rows.
    """
    left_out: dict[str, str] = {}
    for member in read_sweep(folder).runs:
        if problem := _evaluated(folder.with_name(member.name), report):
            left_out[member.name] = problem
    combinations = []
    for members in _by_combination(read_sweep(folder).runs):
        missing = [member.name for member in members if member.name in left_out]
        if missing:
            rest = [member.name for member in members if member.name not in left_out]
            left_out |= dict.fromkeys(rest, f"its folds are pooled, and {missing[0]} is missing")
        else:
            combinations.append(_combination(folder, members))
    if not combinations:
        name, why = next(iter(left_out.items()))
        raise UserError(
            f"no run of {relative(folder)} can be compared; {name}: {why}.",
            "runs are compared when they are finished and evaluated, and folds when all of them are.",
            f"train what is left: packhorse resume {relative(folder)}.",
        )
    evaluation = SweepEvaluation(set=SET, lines=tuple(_lines(combinations)), left_out=left_out)
    replace_file(folder / SWEEP_EVALUATION_FILE, evaluation.model_dump_json(indent=2) + "\n")
    return evaluation


def _evaluated(run: Path, report: Callable[[str], None]) -> str:
    """Evaluate a run if it is finished and has no evaluation yet; return why it has none, else an empty text."""
    status = read_status(run)
    if status is None or status.state != "finished":
        return "not started" if status is None else f"{status.state} at step {status.step} of {status.num_steps}"
    if result_file(run).is_file() and rows_file(run).is_file():
        return ""
    report(f"evaluating {relative(run)}")
    try:
        evaluate_run(open_run(str(run)))
    except UserError as error:
        return error.mistakes[0].fact.removesuffix(".")
    return ""


def _by_combination(members: Sequence[SweepMember]) -> list[list[SweepMember]]:
    """Return the runs of each combination of values, which differ in the fold alone."""
    found: dict[tuple[str, ...], list[SweepMember]] = {}
    for member in members:
        found.setdefault(_without_fold(member), []).append(member)
    return list(found.values())


def _without_fold(member: SweepMember) -> tuple[str, ...]:
    return tuple(word for word in member.overrides if not word.startswith(f"{FOLD}="))


def _combination(folder: Path, members: Sequence[SweepMember]) -> _Combination:
    folders = [folder.with_name(member.name) for member in members]
    _check_same_rows(folders)
    effect = open_run(str(folders[0])).recipe.evaluation.smallest_effect
    results = base_against_tuned([rows_file(run) for run in folders], SET, effect)
    return _Combination(members, folders, effect, {result.metric: result for result in results})


def _check_same_rows(folders: Sequence[Path]) -> None:
    """Refuse folds of different rows: a row could then be in two folds or in none."""
    texts = [(run / DATA_FILE).read_text(encoding="utf-8") for run in folders] if len(folders) > 1 else []
    sources = [[each.sha256 for each in DataManifest.model_validate_json(text).sources] for text in texts]
    for run, of_run in zip(folders, sources):
        if of_run != sources[0]:
            raise UserError(
                f"{relative(run)} was prepared from other rows than {relative(folders[0])}.",
                "each row must be in exactly one fold.",
                "train the folds again from the same files, under another name.",
            )


def _lines(combinations: Sequence[_Combination]) -> list[SweepLine]:
    metric = _headline(combinations)
    sign = -1 if combinations[0].results[metric].higher_is_better else 1
    # Combinations without a value of the metric come last.
    ranked = sorted(combinations, key=lambda each: (_tuned(each, metric) is None, sign * (_tuned(each, metric) or 0)))
    compared = [_against(ranked[0], other, metric) for other in ranked[1:]]
    tests = [result for result, _ in compared if result is not None]
    # What a reader sees in one table is one family.
    adjusted = iter(adjusted_results([*(each.results[metric] for each in ranked), *tests]))
    of_base = [next(adjusted) for _ in ranked]
    lines = []
    for each, result, (against, problem) in zip(ranked, of_base, [(None, ""), *compared], strict=True):
        mean, deviation = _over_folds(each, metric)
        lines.append(
            SweepLine(
                runs=tuple(member.name for member in each.members),
                overrides=_without_fold(each.members[0]),
                result=result,
                fold_mean=mean,
                fold_deviation=deviation,
                against_best=next(adjusted) if against is not None else None,
                problem=problem,
            )
        )
    return lines


def _headline(combinations: Sequence[_Combination]) -> str:
    """Return the first metric of answers that all combinations have, else the loss."""
    shared = [
        result
        for name, result in combinations[0].results.items()
        if all(name in each.results and each.results[name].num_pairs for each in combinations)
    ]
    return next((result.metric for result in shared if result.unit != "nats"), "loss")


def _tuned(combination: _Combination, metric: str) -> float | None:
    return combination.results[metric].tuned


def _against(best: _Combination, other: _Combination, metric: str) -> tuple[MetricResult | None, str]:
    """Return the paired comparison with the best on shared rows, or why there is none."""
    try:
        found = compare_pooled(best.files, other.files, best.effect)
    except UserError as error:
        return None, error.mistakes[0].fact
    result = next((each.result for each in found if each.set == SET and each.result.metric == metric), None)
    return result, "" if result is not None else f"the shared rows have no {metric}"


def _over_folds(combination: _Combination, metric: str) -> tuple[float | None, float | None]:
    if len(combination.files) < 2:
        return None, None
    values = []
    for file in combination.files:
        results = base_against_tuned([file], SET, combination.effect)
        values += [each.tuned for each in results if each.metric == metric and each.tuned is not None]
    return mean_and_deviation(values) if len(values) > 1 else (None, None)
