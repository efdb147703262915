"""Let a judge compare the answers of an evaluation, and add its verdicts to the result in the run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from packhorse.errors import UserError
from packhorse.evaluate.judge.ask import Judge, api_key
from packhorse.evaluate.judge.prompts import JudgePrompt
from packhorse.evaluate.judge.verdicts import judged, prompts_of
from packhorse.evaluate.opinions import JUDGE_SCORE, JUDGE_WINS
from packhorse.evaluate.results import Comparison
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.evaluation import JudgeSection
from packhorse.recipe.load import overridden_fields, override_recipe
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import EVALUATION_FOLDER, JUDGE_FILE
from packhorse.workflows.evaluate import read_evaluation, write_evaluation

SECTION = "evaluation.judge"


def judge_settings(plan: RunPlan, overrides: Sequence[str]) -> JudgeSection:
    """Return the judge of the run's recipe with overrides; raise what can be known before a model is loaded.

    Args:
        plan: Plan of the run.
        overrides: Texts such as `evaluation.judge.model=NAME`.

    Raises:
        UserError: The recipe has no judge, an override is of another section, the variable of the API key is not set,
            or the template cannot be read.
    """
    for field in overridden_fields(overrides):
        if field != SECTION and not field.startswith(f"{SECTION}."):
            raise UserError(
                f"{field} cannot be changed in an evaluation.",
                "a run is evaluated by its recipe; only the judge may be another one.",
                f"remove it; fields of {SECTION} can be given.",
            )
    recipe = override_recipe(plan.recipe, overrides) if overrides else plan.recipe
    settings = recipe.evaluation.judge
    if settings is None:
        run = relative(plan.run_folder)
        raise UserError(
            f"--judge is given, and the recipe of {run} has no {SECTION}.",
            "it names the endpoint and the model that judges.",
            f"name them here: packhorse evaluate {run} --judge {SECTION}.url=http://localhost:8000/v1 "
            f"{SECTION}.model=NAME",
        )
    api_key(settings)
    JudgePrompt(settings)
    return settings


def judge_run(
    plan: RunPlan,
    settings: JudgeSection,
    test: bool,
    announce: Callable[[str], None],
    show: Callable[[int], None],
) -> Comparison:
    """Return the stored evaluation of a run with the verdicts of a judge; also write it. Loads no model.

    Args:
        plan: Plan of an evaluated run.
        settings: The judge.
        test: Whether the evaluation of the test rows is judged.
        announce: Takes one sentence about the requests before the first is sent.
        show: Takes the number of replies so far.

    Raises:
        UserError: There is no evaluation, the requests are above a limit, or the endpoint fails.
    """
    folder = Path(plan.run_folder)
    stored = read_evaluation(folder, test).without(JUDGE_WINS, JUDGE_SCORE)
    prompts = prompts_of(stored.rows(), settings)
    judge = Judge(settings, folder / EVALUATION_FOLDER / JUDGE_FILE, _token_counter(plan))
    texts = [text for each in prompts for text in each.texts]
    announce(str(judge.estimate(texts)))
    judge.ask(texts, show)
    metric, opinions, result = judged(prompts, judge, settings, _base_names(plan))
    stored = stored.with_opinions(metric, opinions, plan.recipe.evaluation).with_notes(judge=result)
    write_evaluation(stored, folder, test)
    return stored.comparison


def _token_counter(plan: RunPlan) -> Callable[[str], int]:
    # Only here: transformers takes seconds to import.
    from packhorse.data.render.tokenizer import tokenizer_of

    assert plan.data is not None
    tokenizer = tokenizer_of(plan.recipe, Path(plan.data.tokenizer))
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _base_names(plan: RunPlan) -> list[str]:
    """Return the name of the base model, and its kind if its config is on this machine."""
    if plan.base_model is None:
        return []
    config = Path(plan.base_model) / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    return [plan.base_model, *([str(kind)] if kind else [])]
