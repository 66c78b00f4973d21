"""Combinations that cannot work, plugins and modules beside a recipe, and secrets: found before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from alignment.recipe import load
from tests.recipes_for_tests import BASE, only, problems, write

ROOT = Path(__file__).parents[1]
PLUGIN = """\
from dataclasses import dataclass
from typing import ClassVar

from alignment.algorithms.advantages import advantages


@advantages.register("{name}", source="this test")
@dataclass(frozen=True)
class {cls}:
    \"\"\"Needs {needs}.\"\"\"

    needs: ClassVar[tuple[str, ...]] = ("{needs}",)

    def __call__(self, batch):
        return batch.values_BT
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.path=x"],
            "base.yaml:2: model: takes one of 'path' (a folder or a hub id) and 'build' (a new model); both",
        ),
        (
            ["model.build=null"],
            "base.yaml:2: model: takes one of 'path' (a folder or a hub id) and 'build' (a new model); n",
        ),
        (["model.build.alphabet='0120'"], "model.build.alphabet: each character once; given twice: '0'"),
        (
            ["model.build.hidden_size=30"],
            "model.build.hidden_size: 30 must be an even number for each of 2 heads: 28 or 32",
        ),
        (["model.build.kv_heads=3"], "model.build.kv_heads: 3 does not divide heads (2): 1, 2 would do"),
        (
            ["model.build.max_positions=11"],
            "model.build.max_positions: 11 is too short: data.max_prompt_tokens (8) + stages.1.sampling.max_tokens (4) "
            "need at least 12",
        ),
        (
            ["model.build.max_positions=63", "evaluation.sampling.max_tokens=56"],
            "model.build.max_positions: 63 is too short: data.max_prompt_tokens (8) + evaluation.sampling.max_tokens "
            "(56) need at least 64",
        ),
        (["data.train=null"], "base.yaml:13: stages.1: a stage 'online' needs data.train"),
        (["data.demonstrations=null"], "base.yaml:12: stages.0: a stage 'sft' needs data.demonstrations"),
        (["rewards=[]"], "base.yaml:13: stages.1: a stage 'online' needs at least one entry in rewards"),
        (["rewards=[exact_match, exact_match]"], "rewards.1: there is another reward column 'exact_match'; rename one"),
        (["run.sinks=[jsonl, jsonl]"], "run.sinks.1: there is another sink 'jsonl'; keep one"),
        (
            ["stages.0.name=rl"],
            "base.yaml:14: stages.1.name: there is another stage 'rl'; give each stage a 'name' of its own",
        ),
        (
            ["stages.1.algorithm.minibatches=3"],
            "stages.1.algorithm.minibatches: 3 does not divide prompts_per_step (8); minibatches 2 or 4 would do, or "
            "prompts_per_step 6 or 9",
        ),
        (
            ["stages.1.algorithm.minibatches=20"],
            "stages.1.algorithm.minibatches: 20 does not divide prompts_per_step (8); minibatches 8 would do, or "
            "prompts_per_step 20",
        ),
        (
            ["stages.1.learner.micro_batch_tokens=11"],
            "stages.1.learner.micro_batch_tokens: 11 does not hold the longest row: data.max_prompt_tokens (8) + "
            "sampling.max_tokens (4) need at least 12",
        ),
        (
            ["stages.1.group_size=1", "stages.1.curricula=[uniform]"],
            "stages.1.group_size: 1 is too small: algorithm.advantage compares the completions of a prompt with each "
            "other and needs at least 2",
        ),
        (
            ["stages.1.group_size=1", "stages.1.algorithm.advantage=reinforce_pp"],
            "stages.1.group_size: 1 is too small: curricula.1 compares",
        ),
        (["stages.1.sampling.top_p=0.9"], "stages.1.sampling.top_p: top_p leaves out tokens"),
        (["stages.1.sampling.top_k=5"], "stages.1.sampling.top_k: top_k leaves out tokens"),
        (["stages.1.sampling.temperature=0"], "stages.1.sampling.temperature: 0 samples greedily"),
        (["stages.1.max_staleness=2"], "stages.1.max_staleness: 2 is more than this sampler allows (0)"),
        (
            ["stages.1.learner=torch", "stages.1.sampler=vllm", "stages.1.cluster=ray"],
            "stages.1.learner: computes in the process of the run, on the first GPU that it sees, and Ray gives the "
            "same one to an engine: use 'deepspeed', or set cluster.device to 'cpu'",
        ),
        (
            ["stages.1.sampler={name: vllm, sleep: true}", "stages.1.learner=deepspeed", "stages.1.cluster=ray"],
            "stages.1.sampler.sleep: true gives a GPU's memory to a learner that shares it, and with cluster.placement "
            "'separate' none does",
        ),
    ],
)
def test_impossible_combinations(tmp_path, overrides, message):
    text = only(write(tmp_path), overrides=tuple(overrides))
    assert text.startswith((message, f"--set {overrides[0]}: {message}")), text


@pytest.mark.parametrize(
    "overrides",
    [
        ["stages.1.sampling={max_tokens: 4, top_p: 0.9, allow_truncated_sampling: true}"],
        ["stages.1.group_size=1", "stages.1.curricula=[uniform]", "stages.1.algorithm.advantage=reinforce_pp"],
        ["model.lora={rank: 2}"],
        ["stages.1.algorithm.minibatches=8", "stages.1.learner.micro_batch_tokens=12", "model.build.max_positions=12"],
        ["stages.1.algorithm.kl=k3"],
        ["rewards=[exact_match, {name: exact_match, as: again}, {environment: tool}]"],
        ["evaluation.sampling={max_tokens: 4, temperature: 0, top_k: 5}"],
        ["stages.1.learner=torch", "stages.1.sampler=vllm", "stages.1.cluster={name: ray, device: cpu}"],
        ["stages.1.sampler={name: vllm, sleep: true}", "stages.1.learner=torch"],
    ],
)
def test_combinations_that_work(tmp_path, overrides):
    assert problems(write(tmp_path), overrides=tuple(overrides)) == []


SETTINGS = {
    "embedded": "sampler: transformers, learner: torch",
    "one process": "sampler: vllm, learner: torch",
    "separate": "sampler: vllm, learner: deepspeed, cluster: ray",
    "colocated": "sampler: vllm, learner: deepspeed, cluster: {name: ray, placement: colocated}",
    "cpus": "sampler: vllm, learner: deepspeed, cluster: {name: ray, device: cpu}",
    "beside": "sampler: vllm, learner: torch, cluster: {name: ray, device: cpu}",
}
CARRIES = {
    "shared": {"embedded"},
    "memory": {"one process"},
    "object_store": {"separate", "colocated", "cpus", "beside"},
    "nccl": {"separate"},
    "ipc": {"colocated"},
}


@pytest.mark.parametrize("transport", CARRIES)
def test_a_transport_has_to_suit_what_it_connects(tmp_path, transport):
    path = write(tmp_path, BASE.replace("    learner: {name: torch, lr: 1e-3}\n", ""))
    for setting, engines in SETTINGS.items():
        found = problems(path, overrides=(f"stages.1={{{engines}, transport: {transport}}}",))
        if setting in CARRIES[transport]:
            assert found == [], setting
        else:
            (line,) = found
            assert f"stages.1.transport: '{transport}' needs " in line and "leave it out" in line, (setting, line)


def test_combinations_are_checked_beside_other_mistakes_but_not_on_top_of_them(tmp_path):
    path = write(tmp_path)
    found = problems(path, overrides=("run.seed=x", "stages.1.group_size=1", "stages.1.algorithm.advantage=grop"))
    places = [text.split(": ")[1] for text in found]
    assert sorted(places) == ["run.seed", "stages.1.algorithm.advantage", "stages.1.group_size"]
    assert "curricula.1" in found[2]  # of the advantage nothing is known, so nothing is said
    assert only(path, overrides=("stages.1.algorithm.minibatches=3", "stages.1.prompts_per_step=x")).endswith("'x'")


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ("values", "needs values, which a critic makes: give the stage one, such as critic: model (without a critic: "),
        ("role:judge", "needs the model role 'judge', which nothing in this recipe provides"),
        ("demonstrations", "needs data.demonstrations"),
        ("reference", None),
    ],
)
def test_what_components_need_must_be_there(tmp_path, needs, message):
    name = "needs_" + needs.replace(":", "_")
    (tmp_path / f"plugin_{name}.py").write_text(PLUGIN.format(name=name, cls=name.title(), needs=needs))
    text = BASE.replace("advantage: grpo", f"advantage: {name}")
    for line in BASE.splitlines(keepends=True):
        if "demonstrations" in line or "stage: sft" in line:
            text = text.replace(line, "")
    found = problems(write(tmp_path, text + f"plugins: [plugin_{name}]\n"))
    if message is None:
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith(f"base.yaml:19: stages.0.algorithm.advantage: {message}"), found
        assert needs != "values" or ("grpo" in found[0] and name not in found[0])


def test_plugins_that_fail_are_told_at_their_line(tmp_path):
    (tmp_path / "broken_plugin.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "raising_plugin.py").write_text("raise SystemExit('bye')\n")
    text = BASE + "plugins:\n  - broken_plugin\n  - raising_plugin\n  - broken_plugn\n"
    assert problems(write(tmp_path, text)) == [
        "base.yaml:27: plugins.0: cannot import 'broken_plugin': No module named 'no_such_module_anywhere'",
        "base.yaml:28: plugins.1: cannot import 'raising_plugin': SystemExit: bye",
        "base.yaml:29: plugins.2: there is no module 'broken_plugn', neither installed nor in "
        + f"{tmp_path}; did you mean 'broken_plugin'?",
    ]


def test_a_module_beside_the_recipe_that_another_one_hides_is_named(tmp_path):
    (tmp_path / "rewards.py").write_text("def short(completions, **columns):\n    return [1.0]\n")
    (tmp_path / "json.py").write_text("def short(completions, **columns):\n    return [1.0]\n")
    path = write(tmp_path)
    text = only(path, overrides=("rewards=[{function: rewards.short}]",))
    assert "rewards.py cannot be imported: the name 'rewards' belongs to " in text
    assert f"{ROOT}/rewards/__init__.py; rename the file, e.g. to my_rewards.py" in text
    assert "rename the file, e.g. to my_json.py" in only(path, overrides=("rewards=[{function: json.short}]",))
    assert problems(path) == []  # nobody asks for it
    (tmp_path / "rewards.py").rename(tmp_path / "beside_rewards.py")
    recipe = load([path], ["rewards=[{function: beside_rewards.short}]"])
    assert recipe.rewards[0].function == "beside_rewards.short" and recipe.plugin_folders == (tmp_path,)


def test_a_rewards_file_that_hides_the_shipped_rewards_is_named(tmp_path):
    (tmp_path / "rewards.py").write_text("def short(completions, **columns):\n    return [1.0]\n")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from alignment.recipe import load, RecipeError\n"
        f"try: load([{str(write(tmp_path))!r}])\n"
        "except RecipeError as error: print(error.problems[0])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "'rewards' is the package of rewards that ships with alignment, but" in result.stdout, result.stderr
    assert "rename that file, e.g. to my_rewards.py" in result.stdout


def test_a_copied_recipe_finds_what_lies_beside_the_original(tmp_path):
    (tmp_path / "copied_rewards.py").write_text("def short(completions, **columns):\n    return [1.0]\n")
    (tmp_path / "run").mkdir()
    copy = write(tmp_path / "run", BASE.replace("{name: exact_match", "{function: copied_rewards.short"))
    assert "there is no module 'copied_rewards'" in only(copy)
    recipe = load([copy], beside=tmp_path)
    assert recipe.folder == tmp_path and recipe.plugin_folders == (tmp_path,)


SECRET = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    "override", [f"model.path={SECRET}", f"model.revision={SECRET}", "model.hf_token=plain", SECRET]
)
def test_secrets_are_refused_and_never_shown(tmp_path, override):
    found = problems(write(tmp_path), overrides=(override,))
    assert found and not any(SECRET in text or "plain" in text for text in found)
    assert override == SECRET or any("looks like a secret" in text and "HF_TOKEN" in text for text in found)


def test_ordinary_names_are_no_secrets(tmp_path):
    assert problems(write(tmp_path), overrides=("run.name=sk-small", "run.output=tokens/secret_garden")) == []


def test_what_concerns_other_values_is_told_beside_mistakes_nearby(tmp_path):
    overrides = ("model.path=x", "model.dtype=int3", "run.seed=x", "stages.0.batch_size=x", "stages.0.name=rl")
    found = problems(write(tmp_path), overrides=(*overrides, "data.demonstrations=null", "data.train.split=x"))
    places = [text.split(": ")[1] for text in found]
    expected = [
        "model",
        "stages.0",
        "stages.1.name",
        "data.train.split",
        "model.dtype",
        "run.seed",
        "stages.0.batch_size",
    ]
    assert sorted(places) == sorted(expected), found


def test_a_control_that_does_nothing_is_told_with_its_line(tmp_path):
    controls = "stages.1.algorithm.entropy_controls=[clip_cov, kl_cov]"
    (warning,) = load([write(tmp_path)], [controls]).warnings
    assert str(warning).startswith(
        f"--set {controls}: stages.1.algorithm.entropy_controls.1: 'kl_cov' does nothing here"
    )
    own = BASE.replace("advantage: grpo", "advantage: grpo\n      entropy_controls:\n        - kl_cov")
    (warning,) = load([path := write(tmp_path, own)]).warnings
    line = next(i for i, text in enumerate(own.splitlines(), 1) if "kl_cov" in text)
    assert str(warning).startswith(f"{path}:{line}: stages.1.algorithm.entropy_controls.0: 'kl_cov'")
    assert "set algorithm.minibatches or epochs above 1" in str(warning)
    for several in ("minibatches", "epochs"):
        assert load([path], [f"stages.1.algorithm.{several}=2"]).warnings == []


ALGORITHM = "stages.1.algorithm"


def advised(folder: Path, controls: str, *overrides: str) -> list[str]:
    """What is said of a list of entropy controls, places apart."""
    chosen = [f"{ALGORITHM}.entropy_controls=[{controls}]", *(f"{ALGORITHM}.{o}" for o in overrides)]
    return [str(warning).rpartition(f"{ALGORITHM}.entropy_controls.")[2] for warning in load([folder], chosen).warnings]


def test_clip_cov_beside_a_loss_that_clips_elsewhere_is_told(tmp_path):
    path, twice = write(tmp_path), "minibatches=2"  # the recipe clips at 0.2 and 0.28
    (said,) = advised(path, "bonus, clip_cov", twice)
    assert said.startswith(
        "1: 'clip_cov' takes tokens as clipped at distances 1 and 1, and algorithm.policy_loss clips"
    )
    assert "clips at 0.2 and 0.28" in said and said.endswith("set clip_low: 0.2, clip_high: 0.28 here")
    assert len(advised(path, "{name: shuffled, of: clip_cov}", twice)) == 1
    for low, high in ((0.2, 0.2), (0.1, 0.28)):
        assert len(advised(path, f"{{name: clip_cov, clip_low: {low}, clip_high: {high}}}", twice)) == 1
    assert advised(path, "{name: clip_cov, clip_low: 0.2, clip_high: 0.28}", twice) == []
    assert advised(path, "clip_cov") == [], "with one update per batch no ratio is clipped"
    for other in ("reinforce", "gspo", "cispo", "grpo_guard"):
        assert advised(path, "clip_cov", twice, f"policy_loss={other}") == [], "no clip of single tokens by their ratio"


@pytest.mark.filterwarnings("ignore:.*sums advantages")
@pytest.mark.parametrize("advantage", ["dr_grpo", "rloo", "opo", "{name: grpo, normalise: none}"])
def test_controls_for_advantages_of_unit_scale_are_told_of_others(tmp_path, advantage):
    path, plain = write(tmp_path), f"advantage={advantage}"
    name = advantage.removeprefix("{name: ").partition(",")[0]
    steer, clip_cov = advised(path, "steer, clip_cov, kl_cov, bonus", plain, "epochs=2", "policy_loss=reinforce")
    assert steer.startswith("0: 'steer' has its floor for advantages of about unit scale, and")
    assert f"'{name}' leaves them on that of the rewards" in steer and steer.endswith("set floor for that scale")
    assert clip_cov.startswith("1: 'clip_cov' has its low and high for") and "set low and high for" in clip_cov
    (said,) = advised(path, "{name: shuffled, of: steer}", plain)
    assert said.startswith("0: 'shuffled' has its floor for")
    adapted = "{name: steer, floor: 0.01}, {name: steer, shape: linear}, {name: clip_cov, low: 0.1}"
    assert advised(path, adapted, plain) == []
    assert advised(path, "steer, clip_cov", plain, "weighting=normalise_then_sum") == [], "it whitens the sum"
    assert len(advised(path, "steer", plain, "weighting={name: normalise_then_sum, whiten: false}")) == 1
    held = "weighting={name: lagrangian, thresholds: {format: 0.5}, normalise: %s}"
    rewards = ["rewards=[exact_match, {name: format, pattern: x}]"]
    for normalise, warns in (("true", 0), ("false", 1)):
        overrides = [f"{ALGORITHM}.{o}" for o in ("entropy_controls=[steer]", plain, held % normalise)]
        assert len(load([path], [*rewards, *overrides]).warnings) == warns


@pytest.mark.parametrize("advantage", ["grpo", "reinforce_pp", "reinforce_pp_baseline"])
def test_of_advantages_that_are_normalised_nothing_is_told(tmp_path, advantage):
    assert advised(write(tmp_path), "steer, clip_cov", f"advantage={advantage}") == []


def test_generalised_advantages_are_of_unit_scale_if_they_are_whitened(tmp_path):
    path = write(tmp_path, BASE.replace("group_size: 4", "group_size: 4\n    critic: model"))
    assert advised(path, "steer", "advantage=gae") == []
    assert len(advised(path, "steer", "advantage={name: gae, normalise: none}")) == 1


def test_advantages_of_a_mixer_take_the_place_of_others(tmp_path):
    path = write(tmp_path, BASE.replace(", difficulty_filter", ""))
    assert advised(path, "steer", "advantage=dr_grpo", "mixer=srft") == []
    assert len(advised(path, "steer", "advantage=dr_grpo", "mixer=hpt")) == 1
