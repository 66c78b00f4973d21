"""docs/deepspeed.md: its stage loads, and it names options, files and modules that there are."""

import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from alignment.engines.deepspeed_config import DeepSpeedLearnerConfig
from alignment.engines.deepspeed_moments import PIECE, piece_file
from alignment.engines.deepspeed_zero import PERSISTENT_ELEMENTS
from alignment.recipe import load
from alignment.recipe_values import differences
from tests.evaluation.evaluated import align
from tests.recipes_for_tests import BASE

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/deepspeed.md").read_text()


def test_its_stage_loads(tmp_path):
    (keys,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
    values: Any = YAML(typ="safe").load(BASE)
    values["stages"] = [{**values["stages"][1], **YAML(typ="safe").load(keys), "sampler": "vllm"}]
    with (tmp_path / "recipe.yaml").open("w") as file:
        YAML().dump(values, file)
    (stage,) = load([tmp_path / "recipe.yaml"]).stages
    learner = stage.learner
    assert isinstance(learner, DeepSpeedLearnerConfig)
    assert (learner.ranks, learner.zero_stage, learner.dtype) == (8, 2, "bfloat16")


def test_its_command_shows_the_options():
    (name,) = re.findall(r"`align (list learners deepspeed)`", PAGE)
    done = align(*name.split())
    assert done.exit_code == 0, done.output
    for option in re.findall(r"`(zero_stage|micro_batch_tokens|max_skipped_steps|timeout_s|offload|ranks)\b", PAGE):
        assert option in done.stdout


def test_its_names_are_those_of_the_code():
    for module in re.findall(r"`(deepspeed_\w+\.py)`", PAGE):
        assert (ROOT / "alignment/engines" / module).is_file()
    assert f"{PERSISTENT_ELEMENTS:,} elements" in PAGE
    assert piece_file(Path("slot-rl"), 1, 2).name == "slot-rl.rank-00001-of-00002.safetensors"
    assert PIECE.fullmatch("PARAMETER.exp_avg[3:5]")


def test_a_run_may_go_on_with_other_ranks_and_another_stage_and_nothing_else_of_the_learner():
    def changed(**options: Any) -> list[bool]:
        before = {"stages": [{"learner": {"name": "deepspeed", "ranks": 2, "zero_stage": 2, "lr": 1.0}}]}
        after = {"stages": [{"learner": before["stages"][0]["learner"] | options}]}
        return [may for _, _, _, may in differences(before, after)]

    assert changed(ranks=4, zero_stage=3) == [True, True]
    assert changed(lr=2.0) == [False]
