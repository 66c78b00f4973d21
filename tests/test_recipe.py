"""Reading, merging and validating recipes: every mistake at its place, and nothing but RecipeError."""

import io
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from alignment.algorithms.advantages import Rloo
from alignment.algorithms.policy_losses import Clip, Gspo
from alignment.recipe import _read, differences, load
from alignment.recipe_tree import RecipeError, plain
from alignment.reward_registry import reward_functions
from tests.recipes_for_tests import BASE, only, problems, write


def test_a_recipe_becomes_components(tmp_path):
    recipe = load([write(tmp_path)])
    warmup, rl = recipe.stages
    assert (warmup.stage, warmup.steps, rl.stage, rl.group_size) == ("sft", 3, "online", 4)
    assert rl.algorithm.policy_loss == Clip(clip_high=0.28)
    assert rl.learner.lr == 1e-3
    assert [type(c).__name__ for c in rl.curricula] == ["Uniform", "DifficultyFilter"]
    assert recipe.rewards[0].column == "exact_match" and recipe.rewards[0].weight == 1.0
    assert recipe.run.folder == Path("runs/base")
    assert recipe.folder == tmp_path
    assert recipe.wants("jsonl") and not recipe.wants("wandb")


def test_defaults_and_derived_values(tmp_path):
    recipe = load([write(tmp_path, name="my recipe!.yaml")], ["run={seed: 3}", "stages.1.algorithm.epochs=2"])
    assert recipe.run.name == "base"
    assert [s.updates_per_step for s in recipe.stages] == [1, 2]
    bare = write(tmp_path, BASE.replace("run: {name: base, seed: 0}\n", ""), name="my recipe!.yaml")
    assert load([bare]).run.name == "my-recipe-"


def test_numbers_and_words_are_those_of_yaml_1_2(tmp_path):
    path = write(tmp_path)
    recipe = load([path], ["stages.1.learner.lr=1e-4", "run.seed=012", "run.name=on", "stages.1.learner.eps=.5"])
    assert (recipe.stages[1].learner.lr, recipe.run.seed, recipe.run.name) == (1e-4, 12, "on")
    assert only(path, overrides=("model.trust_remote_code=on",)) == (
        "--set model.trust_remote_code=on: model.trust_remote_code: expected true or false, given the text 'on'"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "base.yaml: is empty"),
        ("# nothing\n", "base.yaml: is empty"),
        ("- 1\n", "base.yaml:1: expected a mapping such as 'run: ...', given a list"),
        ("just text\n", "base.yaml:1: expected a mapping"),
        ("run:\n\tname: x\n", "base.yaml:2: a tab is used for indentation; YAML allows only spaces there"),
        ("run: {name: x\nmodel: 3\n", "base.yaml:2: is not valid YAML"),
        ("run: a: b\n", "base.yaml:1: is not valid YAML: mapping values are not allowed here; put text"),
        ("run: *gone\n", "base.yaml:1: is not valid YAML: found undefined alias 'gone'; define the anchor"),
        ("run: 1\n---\nrun: 2\n", "base.yaml:2: is not valid YAML"),
        ("run: &r\n  name: *r\n", "base.yaml:1: run.name: an alias refers to the value that it is part of"),
        ("run: !!python/object:os.system x\n", "base.yaml:1: run: the tag"),
        ("run:\n  seed: .nan\n", "base.yaml:2: run.seed: '.nan' is not a number"),
        ("run: {seed: 99999999999999999999}\n", "base.yaml:1: run.seed: '99999999999999999999' is not a whole number"),
        ('run: "\\ud800"\n', "base.yaml:1: run: holds half a character"),
        ("run: 'a\x01b'\n", "base.yaml:1: holds a control character"),
        ("run: " + "[" * 1500 + "\n", "base.yaml"),
        ("run: " + "[" * 300 + "]" * 300 + "\n", "base.yaml:1: is nested too deeply"),
    ],
)
def test_what_is_not_a_recipe_is_told_at_its_line(tmp_path, text, message):
    found = problems(write(tmp_path, text))
    assert any(line.startswith(message) for line in found), found
    assert all("is required" in line for line in found if not line.startswith(message)), found


def test_files_that_cannot_be_read(tmp_path):
    assert only(tmp_path / "none.yaml") == "none.yaml: no such file"
    assert only(tmp_path).endswith("is a folder; give the recipe file in it")
    (tmp_path / "latin.yaml").write_bytes(b"run:\n  name: caf\xe9\n")
    assert only(tmp_path / "latin.yaml") == "latin.yaml:2: is not UTF-8 text; save it as UTF-8"
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert problems(tmp_path / "bom.yaml") == []
    with pytest.raises(RecipeError, match="at least one file"):
        load([])


def test_duplicate_keys_are_all_found(tmp_path):
    text = BASE.replace("run: {name: base, seed: 0}", "run: {name: base, seed: 0, name: other}\nrun: 3")
    assert problems(write(tmp_path, text)) == [
        f"base.yaml:1: run.name: the key is given twice, first at {tmp_path}/base.yaml:1; keep one".replace(
            f"{tmp_path}/", ""
        ),
        "base.yaml:2: run: the key is given twice, first at base.yaml:1; keep one",
    ]
    text = text.replace("seed: 0", "seed: zero, keep_last: .nan").replace("group_size: 4", "group_size: 1")
    places = list(dict.fromkeys(line.split(": ")[1] for line in problems(write(tmp_path, text))))
    assert places == ["run.keep_last", "run.name", "run.seed", "run", "stages.1.group_size"]
    assert len(problems(write(tmp_path), overrides=("stages.7.steps=1", "run.seed=x", "rewards.0.weight=.nan"))) == 3


def test_every_mistake_at_once(tmp_path):
    text = (
        BASE.replace("clip_high: 0.28", "clip_hihg: 0.28")
        .replace("seed: 0", "seed: zero")
        .replace("name: exact_match", "name: exact_mach")
        .replace("split: eval", "split: evl")
        .replace("[9]}, split: evl}", "[0]}, split: evl}")
        .replace("batch_size: 8", "batchsize: 8")
        .replace("prompts_per_step: 8", "prompts_per_step: 7\n    max_staleness: 1")
        .replace("      advantage: grpo", "      minibatches: 4")
    )
    assert problems(write(tmp_path, text)) == [
        "base.yaml:1: run.seed: expected a whole number, given the text 'zero'",
        "base.yaml:7: data.eval.task.sizes.0: expected a number >= 1, given the number 0",
        "base.yaml:7: data.eval.split: expected one of 'train', 'demonstrations' or 'eval', given the text 'evl'; did "
        "you mean 'eval'?",
        "base.yaml:10: rewards.0.name: 'exact_mach' is not one of the rewards; did you mean 'exact_match'? (available: "
        f"{', '.join(reward_functions.names())})",
        "base.yaml:12: stages.0.batchsize: there is no key 'batchsize'; did you mean 'batch_size'? (keys: stage, name, "
        "steps, batch_size, loss_on, objective, conditional, aggregation, sampler, learner, cluster, transport)",
        "base.yaml:17: stages.1.max_staleness: 1 is more than this sampler allows (0): it shares its weights with the "
        "learner, so rollouts are never stale; set it to 0",
        "base.yaml:22: stages.1.algorithm.minibatches: 4 does not divide prompts_per_step (7); minibatches 1 or 7 "
        "would do, or prompts_per_step 4 or 8",
        "base.yaml:25: stages.1.algorithm.policy_loss.clip_hihg: 'clip' has no option 'clip_hihg'; did you mean "
        "'clip_high'? (options: clip_low, clip_high, dual_clip)",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.sed=3", "run.sed: there is no key 'sed'; did you mean 'seed'?"),
        ("modle.path=x", "modle: there is no key 'modle'; did you mean 'model'?"),
        ("run.eval_every=3", "run.eval_every: there is no key 'eval_every'; evaluation.every says"),
        ("run.seed=true", "run.seed: expected a whole number, given true"),
        ("run.seed='3'", "run.seed: expected a whole number, given the text '3'"),
        ("run.seed=-1", "run.seed: expected a number >= 0, given the number -1"),
        ("run.name=..", "run.name: expected a name of letters, digits, '.', '_' and '-' that starts with"),
        ("run.name=a/b", "run.name: expected a name"),
        ("run.name=3", "run.name: expected text, given the number 3; put it in quotes"),
        ("run.sinks=[consol]", "run.sinks.0: 'consol' is not one of the sinks; did you mean 'console'?"),
        ("run.sinks=console", "run.sinks: expected a list, given the text 'console'"),
        ("model=gpt", "model: expected a mapping, given the text 'gpt'"),
        ("model.lora.targets=3", "model.lora.targets: expected one of 'all-linear' or a list, given the number 3"),
        ("model.lora.targets=[3]", "model.lora.targets.0: expected text, given the number 3"),
        (
            "data.train.split=null",
            "data.train.split: expected one of 'train', 'demonstrations' or 'eval', given nothing",
        ),
        ("data.train={name: dataset}", "data.train.path: is required"),
        ("data.train=procedurl", "data.train: 'procedurl' is not one of the sources; did you mean 'procedural'?"),
        ("data.train.name=[1]", "data.train.name: '[1]' is not one of the sources (available: dataset, "),
        ("data.train.task=artihmetic", "data.train.task: 'artihmetic' is not one of the tasks; did you mean"),
        (
            "data.train.task.nme=gcd",
            "data.train.task.nme: 'arithmetic' has no option 'nme' (options: sizes, operators)",
        ),
        ("data.train.task.sizes=[0]", "data.train.task.sizes.0: expected a number >= 1, given the number 0"),
        ("data.train.task.operators=['/']", "data.train.task.operators.0: expected one of '+', '-' or '*', given"),
        ("data.train.task={name: sorting, sizes: [200]}", "data.train.task: sizes [200]: there are only 100 different"),
        ("data.train.task=7", "data.train.task: expected a name, or a mapping with 'name' and options, given the num"),
        ("stages.0.stage=[1]", "stages.0.stage: 'stage' must be text, given a list (available: sft, preference, "),
        ("rewards=[{weight: 1}]", "rewards.0: needs 'name' (available: countdown"),
        ("rewards=[7]", "rewards.0: expected a name, or a mapping with 'name', 'function' or 'environment'"),
        ("rewards.0.weight=heavy", "rewards.0.weight: expected a number, given the text 'heavy'"),
        ("rewards.0.colum=x", "rewards.0.colum: 'exact_match' has no option 'colum'; did you mean 'column'?"),
        ("rewards=[{function: short}]", "rewards.0.function: expected the dotted path of a function in a module"),
        ("rewards=[{function: json.dumpz}]", "rewards.0.function: module 'json' has no function 'dumpz'; did you mean"),
        ("rewards=[{function: trll.rewards.f}]", "rewards.0.function: there is no module 'trll.rewards'"),
        ("stages=[]", "stages: expected a list of at least 1 items, given a list"),
        ("stages=[{steps: 1}]", "stages.0: needs 'stage' (available: sft, preference, "),
        ("stages=[{stage: sft}]", "stages.0.steps: is required"),
        ("stages.0.stage=onlin", "stages.0.stage: 'onlin' is not one of the stages; did you mean 'online'?"),
        ("stages.1.steps=2.5", "stages.1.steps: expected a whole number, given the number 2.5"),
        ("stages.1.algorithm=ppo", "stages.1.algorithm: expected a mapping, given the text 'ppo'"),
        ("stages.1.algorithm.advantage.nme=x", "stages.1.algorithm.advantage.nme: 'grpo' has no option 'nme'"),
        ("stages.1.algorithm.kl.name=k5", "stages.1.algorithm.kl.name: 'k5' is not one of the kl_penalties"),
        ("stages.1.algorithm.entropy_controls=[bonnus]", "stages.1.algorithm.entropy_controls.0: 'bonnus' is not one"),
        (
            "stages.1.algorithm.entropy_controls=[{name: bonus, c: 1}]",
            "stages.1.algorithm.entropy_controls.0.c: 'bonus'",
        ),
        ("stages.1.curricula=[uniform, uniform]", "stages.1.curricula: curricula: 'uniform' must be the"),
        ("stages.1.learner.betas=[0.9, true]", "stages.1.learner.betas.1: expected a number, given true"),
        ("stages.7.steps=1", "stages: there is no item 7: items are numbered from 0 (0 warmup, 1 rl)"),
        ("stages.rl.steps=1", "stages: there is no item rl: items are numbered from 0 (0 warmup, 1 rl)"),
        ("stages.-1.steps=3", "stages: there is no item -1: items are numbered from 0 (0 warmup, 1 rl)"),
        ("rewards.1.weight=3", "rewards: there is no item 1: items are numbered from 0 (0 exact_match)"),
        ("rewards.0.weight=.nan", "rewards.0.weight: '.nan' is not a number"),
        ("stages.1.sampling.temperature=.inf", "stages.1.sampling.temperature: expected a finite number"),
        ("plugins=[not_there]", "plugins.0: there is no module 'not_there'"),
        ("plugins=[a.py/b]", "plugins.0: 'a.py/b' is not the name of a module"),
        ("plugins=rewards", "plugins: expected a list, given the text 'rewards'"),
    ],
)
def test_mistakes_say_what_is_allowed(tmp_path, override, message):
    text = only(write(tmp_path), overrides=(override,))
    assert text.startswith((f"--set {override}: {message}", f"base.yaml:1: {message}")), text


@pytest.mark.parametrize("override", ["seed", "=3", "run..seed=3", ".=1", "run.seed=[1", "run.seed=*x"])
def test_overrides_that_are_none(tmp_path, override):
    assert only(write(tmp_path), overrides=(override,)).startswith(f"--set {override}: ")


def test_files_merge_and_keep_their_lines(tmp_path):
    base = write(tmp_path)
    over = write(
        tmp_path,
        "run:\n  seed: 7\nstages:\n  1:\n    group_size: 16\n    learner: {betas: [0.8, 0.9]}\n"
        "    algorithm: {policy_loss: {clip_low: 0.1}, advantage: rloo}\n",
        "over.yaml",
    )
    recipe = load([base, over], ["stages.1.group_size=2", "run.seed=8"])
    rl = recipe.stages[1]
    assert (recipe.run.name, recipe.run.seed, rl.group_size, rl.learner.lr) == ("base", 8, 2, 1e-3)
    assert rl.learner.betas == (0.8, 0.9)
    assert rl.algorithm.policy_loss == Clip(clip_low=0.1, clip_high=0.28) and rl.algorithm.advantage == Rloo()
    bad = write(tmp_path, "run:\n  keep_last: 0\nstages:\n  0: {steps: x}\n", "bad.yaml")
    assert problems(base, bad, overrides=("run.seed=x",)) == [
        "bad.yaml:2: run.keep_last: expected a number >= 1, given the number 0",
        "bad.yaml:4: stages.0.steps: expected a whole number, given the text 'x'",
        "--set run.seed=x: run.seed: expected a whole number, given the text 'x'",
    ]


def test_another_component_takes_no_options_along(tmp_path):
    base = write(tmp_path)
    over = write(tmp_path, "stages: {1: {algorithm: {policy_loss: {name: gspo, clip_low: 0.1}}}}\n", "over.yaml")
    assert load([base, over]).stages[1].algorithm.policy_loss == Gspo(clip_low=0.1)
    assert load([base], ["stages.1.algorithm.policy_loss.name=gspo"]).stages[1].algorithm.policy_loss == Gspo()
    assert load([base], ["stages.1.algorithm.policy_loss.name=clip"]).stages[1].algorithm.policy_loss.clip_high == 0.28
    # The names of runs and stages are labels: they take nothing away.
    renamed = load([base], ["run.name=other", "run.seed=4", "stages.1.name=other"])
    assert renamed.stages[1].group_size == 4 and renamed.stages[1].name == "other"
    assert load([base], ["run.seed=4", "run.name=other"]).run.seed == 4
    assert load([base], ["stages.1.algorithm.advantage.eps=0.5"]).stages[1].algorithm.advantage.eps == 0.5


def test_anchors_aliases_and_merge_keys(tmp_path):
    text = BASE.replace("    learner: {name: torch, lr: 1e-3}", "    learner: &l {name: torch, lr: 1e-3}")
    text += "  - {<<: {stage: sft, steps: 9}, name: last, steps: 5, learner: *l}\n"
    last = load([write(tmp_path, text)]).stages[2]
    assert (last.stage, last.steps, last.learner.lr) == ("sft", 5, 1e-3)


def test_a_resolved_recipe_reads_back_equal(tmp_path):
    (tmp_path / "rt_rewards.py").write_text("def short(completions, limit=3, **columns):\n    return [1.0]\n")
    path = write(tmp_path)
    recipe = load(
        [path],
        [
            "rewards=[{name: exact_match, as: right, weight: 2}, {name: exact_match, column: other}, "
            "{environment: used}, {function: rt_rewards.short, weight: -0.5, group_level: true, options: {limit: 4}}]",
            "run.sinks=[jsonl, {name: wandb, project: mine}]",
            "stages.1.algorithm.kl={name: k3, coefficient: 0.1}",
            "stages.1.algorithm.entropy_controls=[bonus]",
            "stages.1.algorithm.correction=null",
            "model.lora={rank: 4, targets: [q_proj]}",
            "evaluation.sampling={temperature: 0, max_tokens: 3}",
        ],
    )
    assert [r.column for r in recipe.rewards] == ["right", "exact_match", "used", "short"]
    assert [r.weight for r in recipe.rewards] == [2, 1, 1, -0.5]
    text = io.StringIO()
    YAML().dump(recipe.resolved(), text)
    again = load([write(tmp_path, text.getvalue(), "again.yaml")])
    assert again == recipe and again.resolved() == recipe.resolved()
    assert load([path]) != recipe


def test_differences_tell_what_a_run_may_continue_with(tmp_path):
    path = write(tmp_path)
    old = load([path]).resolved()
    assert differences(old, load([path]).resolved()) == []
    sets = ["stages.1.steps=9", "run.save_every=7", "run.sinks=[jsonl]", "evaluation.every=1", "scoring.workers=3"]
    sets += ["run.keep_last=5", "run.rollouts_every=1", "run.flight_steps=0"]
    found = differences(old, load([path], sets).resolved())
    assert found and all(allowed for *_, allowed in found)
    assert ("stages.1.steps", 4, 9, True) in found and ("run.sinks.1.name", "jsonl", None, True) in found
    assert differences(old, load([path], ["run.name=moved", "run.output=elsewhere"]).resolved()) == []
    sets = ["stages.1.group_size=5", "run.seed=1", "stages.1.algorithm.advantage=rloo", "rewards.0.weight=2"]
    found = differences(old, load([path], sets).resolved())
    assert not any(allowed for *_, allowed in found)
    assert ("stages.1.algorithm.advantage.name", "grpo", "rloo", False) in found
    assert ("run.seed", 0, 1, False) in found


def test_checking_imports_nothing_heavy(tmp_path):
    path = write(tmp_path, BASE + "plugins: []\n")
    code = (
        "import sys; from alignment.recipe import load; from alignment.plan import make_plan; import alignment.cli\n"
        f"make_plan(load([{str(path)!r}], ['rewards=[exact_match, {{function: trl.rewards.think_format_reward}}]']))\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'transformers', 'trl', 'peft', 'datasets'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["sft", "online", "torch", "clip", "grpo", "exact_match", "jsonl", "k1", "uniform", [], {}, [[]]]),
    st.dictionaries(st.sampled_from(["name", "stage", "function", "steps", "zz"]), st.integers(0, 3), max_size=2),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), values=st.lists(_VALUES, min_size=1, max_size=3))
def test_whatever_is_changed_only_recipe_errors_are_raised(tmp_path, seed, values):
    data = YAML(typ="safe").load(BASE)
    choose = random.Random(seed)
    for value in values:
        holder = data
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = choose.choice([*keys, "new"]) if isinstance(holder, dict) else choose.choice(keys)
            inner = holder.get(key) if isinstance(holder, dict) else holder[key]
            if not inner or not isinstance(inner, dict | list) or choose.random() < 0.3:
                break
            holder = inner
        if choose.random() < 0.2 and key in keys:
            del holder[key]
        else:
            holder[key] = value
        if not data:
            break
    text = io.StringIO()
    YAML(typ="safe").dump(data, text)
    try:
        load([write(tmp_path, text.getvalue())])
    except RecipeError as error:
        assert all(str(problem.mark) for problem in error.problems)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(BASE)), length=st.integers(0, 5), inserted=st.text(max_size=4))
def test_whatever_is_typed_only_recipe_errors_are_raised(tmp_path, at, length, inserted):
    (tmp_path / "base.yaml").write_bytes((BASE[:at] + inserted + BASE[at + length :]).encode("utf-8", "surrogatepass"))
    try:
        load([tmp_path / "base.yaml"])
    except RecipeError as error:
        assert error.problems


def test_evaluation_is_greedy_and_as_long_as_training_unless_it_says_otherwise(tmp_path):
    path = write(tmp_path)

    def sampling(*overrides):
        found = load([path], overrides).evaluation.sampling
        return found.temperature, found.max_tokens

    assert sampling() == (0.0, 4)
    assert sampling("evaluation.sampling.max_tokens=9") == (0.0, 9)
    assert sampling("evaluation.sampling.temperature=0.7") == (0.7, 4)
    supervised = "stages=[{stage: sft, steps: 1}]"
    assert sampling(supervised, "evaluation.sampling.max_tokens=9") == (0.0, 9)
    assert sampling(supervised, "model.build.max_positions=264")[0] == 0.0


def test_a_model_is_looked_for_beside_the_recipe_then_in_the_working_directory(tmp_path, monkeypatch):
    for name in ("lab", "elsewhere"):
        (tmp_path / name).mkdir()
    here, there = tmp_path / "elsewhere/tiny", tmp_path / "lab/tiny"
    monkeypatch.chdir(here.parent)
    recipe = load([write(there.parent)], ["model={build: null, path: tiny}"])
    assert recipe.located_model() == recipe.model  # a hub id
    here.mkdir()
    assert recipe.located_model().path == str(here)
    there.mkdir()
    assert recipe.located_model().path == str(there)
    assert recipe.resolved()["model"]["path"] == "tiny"


def test_an_empty_mapping_replaces_what_was_there(tmp_path):
    base = BASE.replace("{name: exact_match, weight: 1.0}", "{function: a.b, options: {x: 1, y: 2}}")
    path = write(tmp_path, base)
    layer = write(tmp_path, "stages: {1: {algorithm: {}}}\n", name="layer.yaml")

    def options(*overrides):
        root, found = _read([path], overrides)
        assert not found
        return plain(root)["rewards"][0]["options"]

    assert options("rewards.0.options={}") == {}
    assert options("rewards.0.options={z: 3}") == {"x": 1, "y": 2, "z": 3}
    root, _ = _read([path, layer], [])
    assert plain(root)["stages"][1]["algorithm"] == {} and plain(root)["stages"][1]["name"] == "rl"
    nothing = write(tmp_path, "{}\n", name="nothing.yaml")
    assert plain(_read([path, nothing], [])[0]) == plain(_read([path], [])[0])
    assert plain(_read([path], ["run={}"])[0])["run"] == {"name": "base"}
