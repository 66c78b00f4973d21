"""Rollouts found with a value model's help: trained on with importance weights, or imitated where all others failed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import alignment
from alignment.algorithms.decodings import ValueAugmented
from alignment.algorithms.value_losses import Scalar
from alignment.engines.value_model import ValueModel, ValueShape, save_value_model
from alignment.guidance import Guidance, guided_metrics
from alignment.origin import Origin
from alignment.recipe import RecipeError
from alignment.types import Group, Prompt, Rollout, SamplingParams, Score
from tests.test_train import Recorder
from tests.tiny import tiny

GUIDED = SamplingParams(4, tilt=(3.0,))
PLAIN = SamplingParams(4)


def group(*verdicts: tuple[bool, bool | None], uid: int = 0) -> Group:
    """Rollouts that are ``(steered, right)``; None failed to be scored."""
    rollouts = []
    for i, (steered, right) in enumerate(verdicts):
        score = Score(None, "error", "no") if right is None else Score(float(right), "ok" if right else "wrong")
        made = rollout(f"{uid}.{i}", GUIDED if steered else PLAIN)
        made = replace(made, source="steered" if steered else "policy")
        rollouts.append(replace(made, scores={"right": score}, reward=None if right is None else float(right)))
    return Group(uid, Prompt("p", {"prompt": "1+1="}), tuple(rollouts))


def rollout(id_: str, sampling: SamplingParams) -> Any:
    return Rollout(
        id_,
        "p",
        (1, 2),
        (3,),
        (True,),
        (-0.5,),
        "2",
        "stop",
        seed=0,
        sampler="s",
        sampling=sampling,
        versions=((0, 0),),
    )


def kept(use: Any, *groups: Group) -> list[list[str]]:
    guidance = Guidance(decoding=ValueAugmented("values"), use=use)
    return [[f"{r.id} {r.source}" for r in g.rollouts] for g in guidance.trained(groups)]


def test_a_mixed_group_keeps_everything():
    assert kept("mixed_group", group((False, True), (True, False))) == [["0.0 policy", "0.1 steered"]]


def test_what_was_found_is_imitated_where_all_others_failed():
    hard = group((False, False), (False, False), (True, True), (True, False))
    found = Guidance(decoding=ValueAugmented("values"), use="demonstrations").trained([hard])
    assert [(r.id, r.source, r.ratio_base) for r in found[0].rollouts] == [("0.2", "demonstration", "self")]
    assert kept("demonstrations", group((False, True), (False, False), (True, True))) == [["0.0 policy", "0.1 policy"]]
    assert kept("demonstrations", group((False, False), (True, False))) == [["0.0 policy"]], "nothing was found"
    assert kept("demonstrations", group((False, None), (True, True))) == [["0.0 policy"]], "it is not known to fail"


def test_the_last_rollouts_of_a_group_are_steered():
    guidance = Guidance(decoding=ValueAugmented(("a", "b"), beta=(1.0, 2.0)), rollouts=2)
    assert [p.tilt for p in guidance.params(PLAIN, 4)] == [(), (), (1.0, 2.0), (1.0, 2.0)]


def test_metrics_tell_both_kinds_apart():
    found = guided_metrics([group((False, True), (False, False), (True, True), (True, None))])
    assert found == {
        "guided/reward": 1.0,
        "guided/accuracy": 1.0,
        "unguided/reward": 0.5,
        "unguided/accuracy": 0.5,
    }
    assert guided_metrics([group((False, True))]) == {}


# Through the loop


def values_folder(recipe_folder: Path) -> Path:
    """A value model that likes the digit 4 more than anything."""
    model = Origin(tiny(recipe_folder).model, 5).make()
    values = ValueModel.of(model.module, ValueShape(Scalar(), "vocabulary"))
    with torch.no_grad():
        values.head.linear.bias[model.tokenizer.get_vocab()["4"]] = 1.0
    save_value_model(values, model.tokenizer, recipe_folder / "values")
    return recipe_folder / "values"


def run(folder: Path, guidance: Any, **change: Any) -> tuple[Recorder, dict[str, Any]]:
    sink = Recorder()
    stage = {"steps": 2, "guidance": guidance, "learner": {"name": "torch", "lr": 1e-2}, **change}
    rewards = [{"name": "format", "pattern": "4.*"}]
    result = alignment.train(tiny(folder, {"rewards": rewards, "stages": {0: {"steps": 1}, 1: stage}}), sinks=[sink])
    return sink, result


def test_a_mixed_group_is_trained_on_with_the_weights_of_its_tokens(tmp_path):
    values_folder(tmp_path)
    guidance = {"decoding": {"name": "value_augmented", "models": "values", "beta": 20.0}, "rollouts": 2}
    sink, result = run(tmp_path, guidance)
    steps = [r.metrics for r in sink.records if r.kind == "train" and r.stage == "rl"]
    assert result["status"] == "complete" and len(steps) == 2
    assert steps[0]["guided/accuracy"] > 0.5 > steps[0]["unguided/accuracy"]
    assert steps[0]["mismatch_kl"] > 0.01 and steps[0]["grad_norm"] > 0
    rollouts = [r for g in sink.groups if g.rollouts[0].sampling.tilt == () for r in g.rollouts]
    assert [r.sampling.tilt for r in rollouts[:4]] == [(), (), (20.0,), (20.0,)]
    tilted = [x for r in rollouts if r.sampling.tilt for x in r.behaviour_logp]
    assert max(tilted) > -0.05, "log-probabilities are those of the tilted distribution"


def test_demonstrations_that_a_value_model_found_teach_what_the_policy_could_not_do(tmp_path):
    values_folder(tmp_path)
    guidance = {
        "decoding": {"name": "value_augmented", "models": "values", "beta": 50.0},
        "use": "demonstrations",
    }
    sink, _ = run(tmp_path, guidance, steps=16, algorithm={"advantage": "dr_grpo", "correction": None})
    steps = [r.metrics for r in sink.records if r.kind == "train" and r.stage == "rl"]
    assert any(step["sampled_tokens"] < step["tokens"] for step in steps), "some tokens were imitated, not weighed"
    right = [step["unguided/accuracy"] for step in steps]
    assert sum(right[-4:]) / 4 > sum(right[:4]) / 4 + 0.2


BY_VALUES = {"decoding": {"name": "value_augmented", "models": "v"}}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"guidance": {"decoding": {"name": "best_of_n", "model": "v"}}}, "must be 'value_augmented'"),
        ({"guidance": {"decoding": {"name": "value_augmented", "models": "v"}, "rollouts": 4}}, "take at most 3"),
        (
            {"guidance": {"decoding": {"name": "value_augmented", "models": "v"}}, "algorithm": {"correction": None}},
            "needs importance weights: set algorithm.correction",
        ),
        (
            {"guidance": {**BY_VALUES, "rollouts": 3, "use": "demonstrations"}, "algorithm": {"advantage": "grpo"}},
            "group_size: 4, of which guidance takes 3 from the policy, is too small: .* needs at least 5",
        ),
        ({"guidance": {"decoding": {"name": "value_augmented", "modles": "v"}}}, "did you mean 'models'"),
    ],
)
def test_mistakes_are_told_before_anything_starts(tmp_path, stage, message):
    with pytest.raises(RecipeError, match=message):
        tiny(tmp_path, {"stages": {1: stage}})


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="stages.1.guidance.decoding.models: there is no folder nowhere"):
        run(tmp_path, {"decoding": {"name": "value_augmented", "models": "nowhere"}})
