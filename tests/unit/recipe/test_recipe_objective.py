"""Rules on the objective, and what changes with it."""

import pytest

from packhorse.recipe.load import load_recipe

REFUSED = {
    "dropout": (["objective=dpo", "method={kind: lora, dropout: 0.05}"],
                "method.dropout is 0.05, and objective is dpo."),
    "prompt-tuning": (["objective=orpo", "method=prompt_tuning"], "method is prompt_tuning, and objective is orpo."),
    "truncate": (["objective=simpo", "data.over_long=truncate"],
                 "data.over_long is truncate, and objective is simpo."),
    "split": (["objective=kto", "data.over_long=split"], "data.over_long is split, and objective is kto."),
    "roles": (["objective=dpo", "data.train_on={roles: [assistant, user]}"],
              "data.train_on.roles is ['assistant', 'user'], and objective is dpo."),
    "masked-thinking": (["objective=cpo", "data.train_on={thinking: mask}"],
                        "data.train_on.thinking is mask, and objective is cpo."),
    "in-backward": (["objective=dpo", "optimizer.in_backward=true", "optimizer.clip_norm=null"],
                    "optimizer.in_backward is true, and objective is dpo."),
    "noise-scale": (["objective=dpo", "track.noise_scale=true"], "track.noise_scale is true, and objective is dpo."),
    "two-references": (["objective={kind: dpo, reference: {id: a/b, path: x}}"],
                       "objective.reference gives id and path."),
    "no-reference": (["objective={kind: ipo, reference: {}}"], "objective.reference gives neither id nor path."),
    "revision-of-a-folder": (["objective={kind: kto, reference: {path: x, revision: abc}}"],
                             "objective.reference.revision is abc, but there is no objective.reference.id."),
    "smoothed-hinge": (["objective={kind: dpo, loss: hinge, label_smoothing: 0.1}"],
                       "objective.label_smoothing is 0.1, and objective.loss is hinge."),
    "no-weights": (["objective={kind: kto, desirable_weight: 0, undesirable_weight: 0}"],
                   "objective.desirable_weight and objective.undesirable_weight are 0."),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "fact"), REFUSED.values(), ids=REFUSED)
def test_refused(good, mistakes_of, overrides, fact):
    assert [mistake.fact for mistake in mistakes_of(good, *overrides)] == [fact]


@pytest.mark.parametrize("objective", ["sft", "dpo", "ipo", "kto", "orpo", "simpo", "cpo", "reward"])
def test_a_word_is_an_objective(good, objective):
    recipe = load_recipe(good, [f"objective={objective}", "method=lora"])
    assert recipe.objective.kind == objective
    assert recipe.method.dropout == (0.05 if objective == "sft" else 0)
