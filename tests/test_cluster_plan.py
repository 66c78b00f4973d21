"""How stages lie on a cluster: the layout, what does not go together, and remedies, each of which has to hold."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from alignment.architectures import Shape
from alignment.cluster_plan import Hardware, StageOnCluster, counted, gib
from alignment.cluster_view import show_cluster
from alignment.model_size import CONTEXT, GIB
from alignment.plan import make_plan
from alignment.recipe import load

RECIPES = Path(__file__).parents[1] / "recipes"


def planned(recipe: str, hardware: Hardware, *overrides: str) -> StageOnCluster:
    (stage,) = make_plan(load([RECIPES / f"{recipe}.yaml"], overrides), hardware).cluster
    return stage


def test_separate_engines_lie_before_the_ranks():
    (node,) = planned("gsm8k_8gpu", Hardware(1, 8)).nodes
    assert node == (*(f"engine {i}" for i in range(4)), *(f"rank {i}" for i in range(4)))


def test_colocated_ranks_share_the_engines_gpus_and_an_engine_stays_on_a_node():
    first, second = planned("simplerl_zoo_7b", Hardware(2, 8)).nodes
    assert first == tuple(f"rank {i} + engine {i // 2}" for i in range(8))
    assert second == tuple(f"rank {i} + engine {i // 2}" for i in range(8, 16))


def test_one_process_takes_one_gpu_and_the_others_idle():
    stage = planned("gsm8k_one_gpu", Hardware(1, 2))
    assert stage.nodes == (("learner + engine", ""),) and stage.idle == 1
    assert "1 GPU would be idle; cluster: ray uses more than one" in stage.notes


def test_a_learner_in_the_process_of_the_run_beside_engines_on_cpus():
    overrides = ["stages.0.learner=torch", "stages.0.cluster={name: ray, device: cpu}"]
    stage = planned("gsm8k_8gpu", Hardware(1, 8), *overrides)
    assert "rl fits" in shown(stage, Hardware(1, 8))
    assert "cluster.device is cpu, so ranks and engines stay off these GPUs; set it to auto to use them" in stage.notes


def test_learner_and_sampler_in_one_process_take_a_gpu_on_ray_too():
    stage = planned("gsm8k_one_gpu", Hardware(1, 2), "stages.0.sampler=transformers", "stages.0.cluster=ray")
    assert stage.nodes == (("learner + sampler", ""),) and "to spare" in shown(stage, Hardware(1, 2))


def test_following_the_advice_to_share_is_not_refused():
    hardware = Hardware(2, 1)
    _, stage = make_plan(load([RECIPES / "quickstart_cluster.yaml"]), hardware).cluster
    (problem,) = stage.problems
    assert "Set cluster.placement to colocated and max_staleness to 0" in problem
    sets = ["stages.1.cluster.placement=colocated", "stages.1.max_staleness=0", "stages.1.sampler.sleep=true"]
    _, stage = make_plan(load([RECIPES / "quickstart_cluster.yaml"], sets), hardware).cluster
    assert not any("colocated" in problem for problem in stage.problems)


UNFIT = [
    ("gsm8k_one_gpu", Hardware(1, 1, 40), ()),
    ("gsm8k_8gpu", Hardware(1, 4), ()),
    ("gsm8k_8gpu", Hardware(1, 8, 16), ()),
    ("gsm8k_8gpu", Hardware(1, 8), ("stages.0.sampler.tensor_parallel=5",)),
    ("gsm8k_8gpu", Hardware(1, 8), ("stages.0.sampler.engines=6",)),
    ("simplerl_zoo_7b", Hardware(1, 8), ()),
    ("simplerl_zoo_7b", Hardware(2, 8, 24), ()),
    ("simplerl_zoo_7b", Hardware(2, 8), ("stages.0.sampler.gpu_memory_utilization=0.95",)),
    ("simplerl_zoo_7b", Hardware(2, 8), ("stages.0.learner.zero_stage=1",)),
    ("dapo_32b", Hardware(2, 8), ()),
    ("simplerl_zoo_7b", Hardware(2, 8), ("stages.0.learner.ranks=8",)),
    ("gsm8k_8gpu", Hardware(1, 4), ("stages.0.max_staleness=0",)),
    ("tina_1.5b_lora", Hardware(1, 1, 8), ()),
]


@pytest.mark.parametrize(("recipe", "hardware", "overrides"), UNFIT)
def test_a_remedy_that_is_named_does_hold(recipe, hardware, overrides):
    stage = planned(recipe, hardware, *overrides)
    assert not stage.fits
    told = [line for line in stage.remedies if "would do" in line and not line.startswith("no change")]
    for line in told:
        changes = [re.split(r", (?=[a-z]+\.)", change) for change in line.partition(": ")[2].split("; ")]
        together = [sum(changes, [])] if "together" in line else changes
        assert len(together) == len({*map(tuple, together)}) and all(map(all, together)), line
        for change in together:
            sets = [f"stages.0.{setting.replace(': ', '=')}" for setting in change]
            assert planned(recipe, hardware, *overrides, *sets).fits, (line, sets)
    assert told or any("GPUs" in line for line in stage.remedies), "what it would take is said in any case"


def test_most_of_these_can_be_mended():
    told = [planned(recipe, hardware, *overrides).remedies for recipe, hardware, overrides in UNFIT]
    assert sum(any("would do" in line for line in lines) for lines in told) >= len(UNFIT) - 2


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["stages.0.sampler.tensor_parallel=5"], "does not divide the model (12 heads, 2 key-value heads, 8960 in the"),
        (["stages.0.sampler.tensor_parallel=16"], "each of 4 engines needs 16 GPUs on one node"),
        (
            ["stages.0.cluster.placement=colocated", "stages.0.max_staleness=0", "stages.0.sampler.engines=6"],
            "2 GPUs of engines would have no rank to bring new weights (transport ipc); 6 ranks would do",
        ),
        (["stages.0.sampler.engines=5"], "needs 4 learner GPUs + 5 engine GPUs; the cluster has 8 GPUs on 1 node"),
        (
            ["stages.0.prompts_per_step=2", "stages.0.group_size=2", "stages.0.algorithm.minibatches=2"],
            "2 rows of a mini-batch for 4 ranks leaves some without any; at most 2 would do",
        ),
    ],
)
def test_what_does_not_go_together_is_told_with_what_would(overrides, told):
    hardware = Hardware(16, 8) if "=16" in overrides[0] else Hardware(1, 8)
    assert told in "\n".join(planned("gsm8k_8gpu", hardware, *overrides).problems)


def test_gpus_and_engines_without_work_are_worth_a_note():
    notes = "\n".join(planned("gsm8k_8gpu", Hardware(1, 8), "stages.0.learner.ranks=3").notes)
    assert "1 GPU would be idle; raise learner.ranks or sampler.engines" in notes
    few = planned("gsm8k_8gpu", Hardware(1, 8), "stages.0.prompts_per_step=2", "stages.0.algorithm.minibatches=1")
    assert any("2 prompts of a step for 4 engines" in note for note in few.notes)


def shown(stage: StageOnCluster, hardware: Hardware) -> str:
    out = io.StringIO()
    show_cluster([stage], hardware, Console(file=out, width=160))
    return out.getvalue()


def test_it_is_shown_by_runs_of_gpus_with_a_verdict():
    text = shown(planned("simplerl_zoo_7b", Hardware(2, 8)), Hardware(2, 8))
    assert re.search(r"node 1 +GPUs 0-7 rank 8 \+ engine 4 to rank 15 \+ engine 7", text)
    assert re.search(r"update +25.2 GiB", text) and re.search(r"sampling +67.4 GiB", text)
    assert "rl fits: 8.6 GiB to spare where it is tightest (learner and engine in turns, sampling)" in text


def test_what_lacks_gpus_is_shown_without_ranks_that_are_nowhere():
    text = shown(planned("gsm8k_8gpu", Hardware(1, 4)), Hardware(1, 4))
    assert "rl does not fit:\n  cluster: the run needs 4 learner GPUs + 4 engine GPUs" in text
    assert "these would do together: sampler.engines: 2; learner.ranks: 2" in text and "host memory" not in text


def test_numbers_are_told_in_words():
    assert counted(3_445_261, "row") == "3,445,261 rows" and counted(1, "GPU") == "1 GPU"
    assert gib(1.5 * GIB) == "1.5 GiB" and gib(-2 * GIB) == "-2.0 GiB" and gib(GIB / 400) == "2.6 MiB"


def test_it_can_be_written_as_json():
    stage = json.loads(json.dumps(planned("dapo_32b", Hardware(4, 8)).to_json(), allow_nan=False))
    assert stage["fits"] and stage["idle"] == 0 and len(stage["nodes"]) == 4
    (holding,) = stage["holdings"]
    assert holding["peak"] + holding["spare"] == holding["limit"]
    assert holding["peak"] == sum(holding["phases"][holding["fullest"]].values())


BODY = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
}  # fmt: skip


def asked(folder: Path, workers: int, *models: dict) -> tuple[str, str]:
    """Overrides: rewards by one model of 8B parameters."""
    for name, content in (("config.json", BODY), ("value_model.json", {})):
        (folder / name).write_text(json.dumps(content))
    rewards = [{"name": "reward_model", "path": str(folder), "as": f"m{i}", **m} for i, m in enumerate(models)]
    return f"rewards={json.dumps(rewards)}", f"scoring.workers={workers}"


@pytest.mark.parametrize(("recipe", "gpus"), [("gsm8k_one_gpu", 1), ("gsm8k_8gpu", 8)])
@pytest.mark.parametrize(("dtype", "each"), [("float32", 4), ("bfloat16", 2)])
def test_reward_models_on_gpus_are_counted_for_each_process_that_scores(tmp_path, recipe, gpus, dtype, each):
    model = {"device": "cuda", "dtype": dtype}
    stage = planned(recipe, Hardware(1, gpus), *asked(tmp_path, 3, model, {**model, "weight": 0.5}))
    parts = [phase.get("reward models") for holding in stage.holdings for phase in holding.phases.values()]
    shape = Shape.read(BODY)
    assert shape is not None and {*parts} == {3 * (CONTEXT + each * shape.parameters)}, "one copy in a process"
    assert any("fewer scoring.workers" in note for note in stage.notes) and not stage.fits
    stage = planned(recipe, Hardware(1, gpus), *asked(tmp_path, 3, {"dtype": dtype}))
    assert stage.fits and not any("reward models" in p for h in stage.holdings for p in h.phases.values())


def test_an_engine_leaves_room_for_reward_models(tmp_path):
    overrides = asked(tmp_path, 1, {"device": "cuda", "dtype": "bfloat16"})
    (told,) = planned("gsm8k_8gpu", Hardware(1, 8), *overrides).remedies
    share = told.removeprefix("this would do: sampler.gpu_memory_utilization: ")
    assert planned("gsm8k_8gpu", Hardware(1, 8), *overrides, f"stages.0.sampler.gpu_memory_utilization={share}").fits


def test_a_reward_model_that_a_stage_makes_is_counted_after_it(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    rows = {"name": "dataset", "path": "rows.jsonl"}
    members = [{"name": "reward_model", "stage": "rm", "member": i, "device": "cuda", "as": f"m{i}"} for i in range(2)]
    whole = {
        "run": {"name": "x"}, "model": {"path": "meta-llama/Llama-3.1-8B", "dtype": "bfloat16"}, "rewards": members,
        "data": {"train": rows, "preferences": rows}, "scoring": {"workers": 2},
        "stages": [
            {"stage": "reward_model", "name": "rm", "steps": 1, "members": 2},
            {"stage": "online", "name": "rl", "steps": 1, "prompts_per_step": 1},
        ],
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(whole))
    before, after = make_plan(load([tmp_path / "r.yaml"]), Hardware(1, 1)).cluster
    policy = Shape.read(BODY)
    assert policy is not None and "reward models" not in before.holdings[0].phases["update"]
    assert after.holdings[0].phases["update"]["reward models"] == 2 * (CONTEXT + 2 * 4 * policy.parameters)
