"""Runs that mix demonstrations with rollouts: they learn from both, and go on exactly where they were stopped."""

from dataclasses import replace
from typing import Any

import pytest

import alignment
from alignment.algorithms.mixers import Hpt, NoMix
from alignment.algorithms.off_policy_mixers import Luffy
from alignment.data.load import LoadedData
from alignment.errors import UserError
from alignment.mixing import check_demonstrations, mixing_metrics, scored
from alignment.plan import make_plan
from alignment.recipe import OnlineStage, RecipeError, load
from alignment.score import Score
from alignment.types import Rollout
from tests.algorithms.test_mixers import AT, group, rollout, shown
from tests.test_train import Recorder, contents, lines
from tests.tiny import RECIPE, SUMS, tiny, write

MIXERS: dict[str, Any] = {
    "hpt": {"name": "hpt"},
    "soft": {"name": "hpt", "soft": [[1, 0.5, 0.5], [3, 1.0, 0.0]]},
    "blend": {"name": "blend", "rows": 4, "start": 1.0, "end": 0.1, "over_steps": 4},
    "relift": {"name": "relift", "batch_size": 3, "lr_ratio": 0.5},
    "amft": {"name": "amft", "rows": 4, "entropy_rate": 0.5},
}
JUDGING: dict[str, Any] = {
    "luffy": {"name": "luffy"},
    "srft": {"name": "srft"},
    "grao": {"name": "grao", "statistics": "all"},
}
SAME = {"data": {"demonstrations": SUMS | {"split": "train"}}, "evaluation": {"every": 0}}


def change(mixer: str, name: str) -> dict[str, Any]:
    stage = {"algorithm": {"mixer": (MIXERS | JUDGING)[mixer], "minibatches": 2}, "steps": 6, "prompts_per_step": 6}
    return SAME | {"run": {"name": name}, "stages": {1: stage}}


@pytest.mark.parametrize("mixer", MIXERS | JUDGING)
def test_a_mixed_run_goes_on_exactly(tmp_path, mixer):
    whole = alignment.train(tiny(tmp_path, change(mixer, "whole")))
    parts = tiny(tmp_path, change(mixer, "parts"))
    assert alignment.train(parts, sinks=[Recorder(6)])["exit_code"] == 130
    second = alignment.train(parts)
    assert contents(second["folder"]) == contents(whole["folder"])
    steps = [line for line in lines(whole["folder"]) if line["kind"] == "train" and line["stage"] == "rl"]
    assert steps == [s for s in lines(second["folder"]) if s["kind"] == "train" and s["stage"] == "rl"]
    if mixer == "relift":
        taught = [step for step in steps if "sft/loss" in step]
        assert taught and all(step["sft/optimizer_steps"] == 1 for step in taught)
        assert all(step["sft/lr"] == pytest.approx(0.5 * step["lr"]) for step in taught)
        assert any(name.startswith("learner/slot-sft") for name in contents(whole["folder"]))
    if mixer == "amft":
        assert steps[0]["mixer/mu"] == 0.8 and len({step["mixer/mu"] for step in steps}) == 6
    shown = sum(step["demonstrations"] for step in steps)
    assert shown > 0 and whole["stages"][1]["labels"]["demonstrations"] == shown


@pytest.mark.parametrize("mixer", JUDGING)
def test_demonstrations_are_scored_and_judged_beside_rollouts(tmp_path, mixer):
    sink = Recorder()
    alignment.train(tiny(tmp_path, change(mixer, "judged")), sinks=[sink])
    steps = [r.metrics for r in sink.records if r.kind == "train" and r.stage == "rl"]
    assert all(s["demonstrations"] == 6 and s["imitated"] == 1 and s["demonstrations_unscored"] == 0 for s in steps)
    assert all(s["without_demonstration"] == 0 and s["grad_norm"] > 0 and s["rollouts"] == 24 for s in steps)


class Judge:
    """Gives demonstrations the rewards that were set, in order; None is one that fails."""

    def __init__(self, *rewards: float | None) -> None:
        self.rewards = iter(rewards)

    def score(self, groups: Any, *, step: int = 0) -> Any:
        def judged(r: Rollout, reward: float | None) -> Rollout:
            score = Score(None, "error", "no") if reward is None else Score(reward, "ok")
            return r.judged({"match": score}, reward)

        return [replace(g, rollouts=tuple(judged(r, next(self.rewards)) for r in g.rollouts)) for g in groups]


def test_a_demonstration_whose_reward_fails_is_left_out():
    asked = [group(0, 0.0, 1.0), group(1, 1.0), group(1, 0.0)]  # a group may be there twice
    routed = Luffy().route(None, asked, shown(*asked), AT)["rl"]
    judge: Any = Judge(1.0, None, 0.5)
    found, missing = scored(routed, judge, 3)
    assert missing == 1 and [len(g.rollouts) for g in found] == [3, 1, 2]
    assert [g.rollouts[-1].reward for g in found] == [1.0, 1.0, 0.5]
    assert [g.rollouts[:2] for g in found][0] == asked[0].rollouts, "rollouts are left as they are"


def test_demonstrations_of_other_prompts_are_refused(tmp_path):
    other = SAME | {"data": {"demonstrations": SUMS | {"split": "demonstrations"}}}
    with pytest.raises(UserError, match="none of the .* prompts of data.train has one in data.demonstrations"):
        alignment.train(tiny(tmp_path, change("hpt", "other") | other))


def test_a_demonstration_that_is_too_long_is_refused(tmp_path):
    changed = change("blend", "long")
    changed["stages"][1]["learner"] = {"micro_batch_tokens": 12}
    recipe = tiny(tmp_path, changed)
    assert isinstance(recipe.stages[1], OnlineStage)
    check_demonstrations(recipe, LoadedData(demonstrations={"a": [demonstration(4, 8)]}))
    with pytest.raises(UserError, match=r"has 13 tokens, prompt included, more than learner.micro_batch_tokens \(12\)"):
        check_demonstrations(recipe, LoadedData(demonstrations={"a": [demonstration(4, 8), demonstration(4, 9)]}))


def demonstration(prompt: int, completion: int) -> Rollout:
    made = rollout("a", None, "demonstration")
    return replace(made, prompt_ids=(1,) * prompt, token_ids=(1,) * completion)


def test_the_plan_counts_a_second_set_of_moments(tmp_path):
    plain, taught = (make_plan(tiny(tmp_path, change(m, m))).stages[1].memory_bytes for m in ("hpt", "relift"))
    assert plain is not None and taught is not None and taught["optimizer"] == 2 * plain["optimizer"]
    eight = {"name": "deepspeed", "ranks": 2, "zero_stage": 1, "dtype": "bfloat16"}
    found = []
    for mixer in ("hpt", "relift"):
        changed = change(mixer, mixer)
        changed["stages"][1] |= {"learner": eight, "cluster": {"name": "ray"}, "sampler": {"name": "vllm"}}
        found.append(make_plan(tiny(tmp_path, changed)).stages[1].memory_bytes)
    assert found[1]["optimizer"] * 12 == pytest.approx(found[0]["optimizer"] * 20)


def test_nothing_is_mixed_while_the_policy_rests(tmp_path):
    algorithm = {"mixer": MIXERS["relift"], "advantage": "gae"}
    critic = {"name": "model", "pretraining_steps": 3}
    stage = {"algorithm": algorithm, "critic": critic, "steps": 5, "prompts_per_step": 6}
    sink = Recorder()
    alignment.train(tiny(tmp_path, SAME | {"stages": {1: stage}}), sinks=[sink])
    steps = [r.metrics for r in sink.records if r.kind == "train" and r.stage == "rl"]
    assert [s["mixer/buffer"] > 0 for s in steps] == [False, False, False, True, True]
    assert ["sft/loss" in s for s in steps] == [False, False, False, False, True]


def test_what_is_shown_and_what_is_missing_is_counted():
    asked = [group(0, 0.0), group(1, 1.0), group(2, 0.0)]
    known = shown(*asked[:2])
    routed = Hpt().route(None, asked, known, AT)
    counts = {"demonstrations": 1.0, "imitated": pytest.approx(1 / 3), "without_demonstration": 1.0}
    assert mixing_metrics(Hpt(), asked, routed, known) == counts
    assert mixing_metrics(NoMix(), asked, {"rl": asked}, known) == {}
    assert mixing_metrics(NoMix(), asked, routed, known) == {"imitated": pytest.approx(1 / 3)}


def test_a_mixer_without_demonstrations_is_refused_at_its_line(tmp_path):
    rl = {**RECIPE["stages"][1], "algorithm": {"mixer": "hpt"}}
    path = write(tmp_path, {"data": {"demonstrations": None}, "stages": [rl]})
    with pytest.raises(RecipeError, match=r"tiny\.yaml:\d+: stages\.0\.algorithm\.mixer: needs data\.demonstrations"):
        load([path])
