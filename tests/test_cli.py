"""The command line: what it prints, where, and with which exit code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import alignment.cli as cli
from alignment.errors import UserError
from alignment.recipe import load
from tests.recipes_for_tests import BASE, write

runner = CliRunner()


def align(*args):
    return runner.invoke(cli.app, [str(arg) for arg in args], env={"COLUMNS": "200", "TERM": "dumb"})


def test_help_names_every_command_and_each_has_an_example():
    overview = align("--help")
    assert overview.exit_code == 0
    for name in ("train", "check", "list", "init", "export", "eval", "replay"):
        assert name in overview.stdout
        own = align(name, "--help")
        assert own.exit_code == 0 and f"Example: align {name} " in own.stdout
    assert align("--version").stdout.startswith("align ")
    assert align("trian").exit_code == 2


def test_help_needs_nothing_heavy():
    code = "import sys, alignment.cli; print(sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_check_prints_the_recipe_and_its_plan(tmp_path):
    result = align("check", write(tmp_path), "--set", "run.seed=5")
    assert result.exit_code == 0, result.output
    assert "  seed: 5\n" in result.stdout
    assert "8 prompts x 4 completions = 32 rollouts" in result.stdout
    assert "at most 384 (12 in a row)" in result.stdout
    assert "clip {clip_high: 0.28}" in result.stdout and "Memory is an estimate" in result.stdout


def test_check_prints_json_for_programs(tmp_path):
    path = write(tmp_path)
    found = json.loads(align("check", path, "--json").stdout)
    assert found["recipe"] == load([path]).resolved()
    assert found["plan"]["stages"][1]["rollouts"] == 32


def test_mistakes_go_to_stderr_with_exit_code_2_and_no_traceback(tmp_path):
    path = write(tmp_path, BASE.replace("seed: 0", "sed: 0").replace("steps: 4", "steps: four"))
    result = align("check", path, "--set", "run.keep_last=0")
    assert result.exit_code == 2 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["run.sed", "stages.1.steps", "run.keep_last"]
    assert lines[0].startswith(f"{path}:1: ") and lines[2].startswith("--set run.keep_last=0: ")
    for wrong in (tmp_path / "none.yaml", tmp_path):
        result = align("check", wrong)
        assert result.exit_code == 2 and str(wrong) in result.stderr and "Traceback" not in result.output
    assert align("train", tmp_path / "none.yaml").exit_code == 2
    assert align("check").exit_code == 2


def test_only_what_the_user_can_mend_is_told_without_a_traceback(tmp_path, monkeypatch):
    def failing(error):
        def make_plan(recipe, hardware):
            raise error

        monkeypatch.setattr("alignment.plan.make_plan", make_plan)
        return align("check", write(tmp_path))

    told = failing(UserError("no [bold]such[/bold] thing"))
    assert (told.exit_code, told.stderr) == (2, "no [bold]such[/bold] thing\n")
    assert isinstance(failing(ValueError("a bug")).exception, ValueError)
    assert failing(KeyboardInterrupt()).exit_code == 130


def test_train_passes_its_options_on_and_exits_as_the_run_says(tmp_path, monkeypatch):
    import alignment.trainer

    calls = []

    def train(recipe, **options):
        calls.append((recipe.run.seed, options))
        return {"exit_code": 75}

    monkeypatch.setattr(alignment.trainer, "train", train)
    result = align("train", write(tmp_path), "--set", "run.seed=3", "--fresh", "--init-from", "other@best")
    assert result.exit_code == 75, result.output
    assert calls == [(3, {"fresh_start": True, "init_from": "other@best"})]


def test_export_and_replay_pass_their_options_on(tmp_path, monkeypatch):
    import alignment.export
    import alignment.replay

    calls = []
    monkeypatch.setattr(alignment.export, "export", lambda *args: calls.append(args) or args[1])
    monkeypatch.setattr(alignment.replay, "replay", lambda *args: calls.append(args[:3]))
    assert align("export", "runs/a@3", tmp_path, "--merged").exit_code == 0
    assert align("export", "runs/a", tmp_path).exit_code == 0
    assert align("replay", "runs/a", "--step", 4, "--set", "x.y=1").exit_code == 0
    assert calls == [("runs/a@3", tmp_path, "merged"), ("runs/a", tmp_path, "auto"), ("runs/a", 4, ["x.y=1"])]
    both = align("export", "runs/a", tmp_path, "--merged", "--adapter")
    assert both.exit_code == 2 and "exclude each other" in both.stderr


def test_list_goes_from_kinds_to_options():
    kinds = align("list")
    assert kinds.exit_code == 0 and "policy_losses" in kinds.stdout and "exact_match" in kinds.stdout
    kind = align("list", "policy_losses")
    assert "clip_high" in kind.stdout and "gspo" in kind.stdout and "arXiv 1707.06347" in kind.stdout
    one = align("list", "policy_losses", "clip")
    assert "dual_clip" in one.stdout and "gspo" not in one.stdout and "evidence: end to end" in one.stdout
    assert ">= 0, <= 1" in one.stdout and re.search(r"dual_clip +null ", one.stdout)
    found = json.loads(align("list", "policy_losses", "clip", "--json").stdout)
    low = next(option for option in found["options"] if option["name"] == "clip_low")
    assert (low["type"], low["default"]) == ("float", 0.2) and low["description"]
    assert low["constraints"] == {"ge": 0, "le": 1}
    everything = json.loads(align("list", "--json").stdout)["kinds"]
    assert next(k for k in everything if k["kind"] == "policy_losses") == json.loads(
        align("list", "policy_losses", "--json").stdout
    )
    components = [component for k in everything for component in k["components"]]
    for component in components:
        assert component["summary"] and component["source"], component["name"]
    named = ("arithmetic", "procedural", "torch")
    types = {o["name"]: o["type"] for c in components for o in c["options"] if c["name"] in named}
    assert types["operators"] == "list of ('+' | '-' | '*')" and types["size"] == "int | null"
    assert types["betas"] == "list of 2 float" and types["split"] == "'train' | 'demonstrations' | 'eval'"
    assert types["task"] == "one of tasks" and types["sizes"] == "list of int"


def test_list_shows_the_levels_of_a_task():
    table = align("list", "tasks", "gcd").stdout
    assert re.search(r"level +size +problems +constant answer +example", table)
    assert re.search(r"1 +30 +819 +about 0\.2", table)
    found = json.loads(align("list", "tasks", "countdown", "--json").stdout)
    assert [(level["level"], level["size"], level["problems_exact"]) for level in found["levels"]] == [
        (1, 2, False),
        (2, 3, False),
        (3, 4, False),
    ]
    assert "at least" in align("list", "tasks", "countdown").stdout
    assert "levels" not in json.loads(align("list", "rewards", "countdown", "--json").stdout)


def test_list_says_what_there_is_instead(tmp_path):
    for args, meant in ((["polcy_losses"], "policy_losses"), (["advantages", "grop"], "grpo")):
        result = align("list", *args)
        assert result.exit_code == 2 and f"did you mean '{meant}'?" in result.stderr and "available: " in result.stderr
    assert "cannot import 'not_there'" in align("list", "--plugin", "not_there").stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        (tmp_path / "half_written.py").write_text("def f(:")
        assert "cannot import 'half_written': SyntaxError" in align("list", "--plugin", "half_written").stderr


def test_init_writes_a_project_that_checks_and_whose_test_passes(tmp_path):
    project = tmp_path / "new" / "my project"
    result = align("init", project)
    assert result.exit_code == 0, result.output
    written = sorted(str(path.relative_to(project)) for path in project.rglob("*") if path.is_file())
    data = ["data/demonstrations.jsonl", "data/eval.jsonl", "data/train.jsonl"]
    assert written == [*data, "my_rewards.py", "recipe.yaml", "test_my_rewards.py"]
    # In processes of their own: this one may know another my_rewards.
    check = [sys.executable, "-m", "alignment", "check", str(project / "recipe.yaml"), "--json"]
    checked = subprocess.run(check, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert checked.returncode == 0, checked.stderr
    found = json.loads(checked.stdout)
    assert found["recipe"]["run"]["name"] == "my-project"
    rows = [set((project / name).read_text().splitlines()) for name in data]
    prompts = [{json.loads(row)["prompt"] for row in each} for each in rows]
    assert not prompts[0] & prompts[1] and not prompts[1] & prompts[2] and not prompts[0] & prompts[2]
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], capture_output=True, text=True, cwd=project
    )
    assert tested.returncode == 0 and "4 passed" in tested.stdout, tested.stdout


def test_init_overwrites_nothing(tmp_path):
    (tmp_path / "recipe.yaml").write_text("mine")
    result = align("init", tmp_path)
    assert result.exit_code == 2 and "would be overwritten" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    (tmp_path / "file").write_text("")
    result = align("init", tmp_path / "file")
    assert result.exit_code == 2 and "choose another folder" in result.stderr
