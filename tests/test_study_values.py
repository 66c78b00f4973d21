"""The study of values: it runs, resumes, and its estimates and verdicts are what they are said to be."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.algorithms.decodings import tilt_logits
from alignment.models import load_model
from alignment.studies.cells import Cells
from alignment.studies.pages import insert
from studies.values import arms, measure, report, work
from studies.values.__main__ import CLAIM, PAGE, RESULTS, main
from studies.values.models import fit
from studies.values.settings import QUICK, Settings, built
from studies.values.verdict import judge, read_claim, verdict
from studies.values.world import make_world

WORDS = {"holds", "does not hold", "inconclusive", "regime not reached"}


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """The study sets how many torch uses."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Quick:
    """A finished quick run."""

    folder: Path

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Quick:
    folder = tmp_path_factory.mktemp("values")
    assert main(["--quick", "--out", str(folder)]) == 0
    return Quick(folder)


def test_a_quick_run_gives_verdicts_a_table_and_a_plot(quick):
    results, table = quick.results, (quick.folder / "table.md").read_text()
    assert {outcome["verdict"] for outcome in results["outcomes"]} <= WORDS
    assert results["outcomes"][0]["name"] == "vas_over_ppo" and "**Primary: " in table
    assert results["claim_sha256"] == hashlib.sha256(CLAIM.read_bytes()).hexdigest()
    for name in (*report.NAMES.values(), *report.HEADS.values(), "arXiv 2405.06639", "arXiv 2403.03950"):
        assert f"| {name} |" in table or f"({name})" in table
    assert {row["arm"] for row in results["arms"]} == set(report.NAMES)
    assert (quick.folder / "values.png").stat().st_size < 150_000


def test_a_finished_run_computes_nothing_again(quick, monkeypatch, capsys):
    before, cells = quick.results, (quick.folder / "cells.jsonl").read_bytes()
    monkeypatch.setattr(work, "make_world", lambda *_: pytest.fail("computed again"))
    assert main(["--quick", "--out", str(quick.folder)]) == 0
    assert main(["--quick", "--out", str(quick.folder), "--report"]) == 0
    assert quick.results == before and (quick.folder / "cells.jsonl").read_bytes() == cells
    assert "vas_over_ppo: " in capsys.readouterr().out


def test_only_what_is_missing_is_computed_and_comes_out_the_same(quick, tmp_path):
    lines = (quick.folder / "cells.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    path = tmp_path / "cells.jsonl"
    path.write_text("\n".join([*lines[:-1], lines[-1][:40]]))  # cut off in the middle of a line
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    again = [json.loads(line) for line in path.read_text().splitlines() if line != lines[-1][:40]]
    assert len(again) == len(lines)
    assert again[-1]["name"] == last["name"] and again[-1]["rows"][0]["error"] == pytest.approx(
        last["rows"][0]["error"], rel=1e-4
    )


def test_heads_may_be_tuned_for_each_share_of_noise_beside_the_claim(quick):
    claimed = quick.results
    assert main(["--quick", "--sensitivity", "--out", str(quick.folder)]) == 0
    results = quick.results
    assert results["outcomes"] == claimed["outcomes"] and results["heads"] == claimed["heads"]
    assert len(results["heads_apart"]) == 9 and len(results["outcomes_apart"]) == 5
    assert "Not part of the claim" in (quick.folder / "table.md").read_text()


def test_cells_of_other_settings_do_not_count(tmp_path):
    cells = Cells(tmp_path / "cells.jsonl", "a")
    cells.add("arm/1", 3, [{"x": 1}], 2.0)
    assert Cells(tmp_path / "cells.jsonl", "a").rows("arm/1", 3) == [{"x": 1}]
    assert Cells(tmp_path / "cells.jsonl", "b").rows("arm/1", 3) is None
    assert cells.seconds("arm", 9.0) == 2.0 and cells.seconds("other", 9.0) == 9.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--publish"], "leave --quick out"),
        (["--threads", "0"], "at least 1"),
        (["--claim", "nowhere.toml"], "is no claim"),
        (["--report"], "run the study to its end first"),
    ],
)
def test_errors_say_what_to_do(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_an_interrupted_run_says_how_it_goes_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "run", interrupted)
    assert main(["--quick", "--out", str(tmp_path)]) == 130
    assert "the same command goes on from there" in capsys.readouterr().out


# Estimates


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    reward, rank_by = [0.3, -1.0, 2.0, 0.5, 0.1, 1.5], [0.2, 0.9, 0.4, -0.3, 0.8, 0.1]
    subsets = list(itertools.combinations(range(6), n))
    wanted = sum(reward[max(subset, key=rank_by.__getitem__)] for subset in subsets) / len(subsets)
    assert measure.best_of(reward, rank_by, n) == pytest.approx(wanted)


def test_best_of_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="take 1 to 2"):
        measure.best_of([1.0, 2.0], [1.0, 2.0], 3)


def test_operations_are_those_of_a_count_by_hand():
    module = load_model(built((64, 2, 4, 160)), 0).module
    layer = 4 * 64 * 64 + 3 * 64 * 160  # queries, keys, values, output; the MLP
    policy = measure.operations_per_token(module)
    assert policy == 2 * (2 * layer + 256 * 64)
    assert measure.flop_plain(policy, 4, 12) == policy * (4 + 11)
    # Three of 12 tokens after a prompt of 4: the prompt once, eleven fed tokens each, all read by the value model.
    assert measure.flop_reranked(100, 10, 4, 12, 3) == 100 * (4 + 33) + 10 * (4 + 36)
    # Every step: the token before it and 20 candidates, the last token excepted, which nothing follows.
    assert measure.flop_steered(100, 10, 4, 12, 20) == 100 * 15 + 10 * (4 + 11 + 240)


def test_the_value_model_is_a_quarter_of_the_policy():
    sizes = [Settings().value_size, Settings().policy_size]
    value, policy = (sum(p.numel() for p in load_model(built(size), 0).module.parameters()) for size in sizes)
    assert 0.23 < value / policy < 0.26


def test_gold_at_a_kl_is_interpolated_and_never_beyond_the_farthest():
    points = [(2.0, 1.0), (0.0, 0.0), (4.0, 1.5)]
    assert [measure.at_kl(points, kl) for kl in (0, 1, 3, 9)] == pytest.approx([0, 0.5, 1.25, 1.5])


def test_intervals_are_students():
    low, high = measure.interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert (high - low) / 2 == pytest.approx(2.364624 * math.sqrt(6 / 8), rel=1e-4)  # quantile for 7 degrees
    assert measure.interval([1.0]) == (-math.inf, math.inf)


def test_the_kl_of_steering_is_that_of_its_distribution():
    settings = replace(
        QUICK, completion_tokens=1, text_steps=3, labels=32, eval_prompts=3, eval_samples=2, betas=(30.0,)
    )
    world = make_world(7, settings)
    model = fit(world, "scalar", 3e-3, world.labelled)
    [row] = arms.value_augmented(world, model, 5)
    total = 0.0
    for prompt in world.prompts(3, "eval"):
        with torch.no_grad():
            logits = world.policy.module(input_ids=torch.tensor([prompt])).logits[:, -1]
            candidates = logits.topk(5).indices
            values = torch.stack([model.values(torch.tensor([[*prompt, int(a)]]))[0, -1] for a in candidates[0]])
        steered = tilt_logits(logits, candidates, values[None, :, None], torch.tensor([[30.0]])).log_softmax(-1)
        total += float((steered.exp() * (steered - logits.log_softmax(-1))).sum())
    assert row["kl"] == pytest.approx(total / 3, rel=1e-3)
    ids = torch.tensor(world.prompts(3, "eval"))
    assert measure.sequence_kl(world.policy.module, world.policy.module, ids, 2) == 0


# Verdicts


def test_verdicts():
    assert verdict([0.5, 0.6, 0.4, 0.5], 0.2) == "holds"
    assert verdict([0.01, -0.02, 0.0, 0.02], 0.2) == "does not hold"
    assert verdict([1.0, -0.9, 0.8, 0.1], 0.2) == "inconclusive"
    assert verdict([0.1, 0.12, 0.09, 0.35], 0.2) == "inconclusive"  # above 0, but less than was claimed
    assert verdict([0.5], 0.2) == "inconclusive"  # one seed says nothing
    assert verdict([-0.05, -0.1, 0.0, -0.08], -0.2) == "holds"  # a margin
    assert verdict([-0.5, -0.6, -0.4, -0.5], -0.2) == "does not hold"
    assert verdict([0.5, 0.6, 0.4, 0.5], 0.2, regime=False) == "regime not reached"


def seed_rows(vas: float, ppo: float) -> list[dict[str, Any]]:
    """Arms whose gold rises with the KL at these slopes, and heads of equal errors."""
    rows = [{"arm": "frozen", "at": 1, "gold": 0.0, "kl": 0.0, "flop": 1}]
    slopes = {"vas": vas, "ppo": ppo, "rerank": 0.1, "oracle": 0.4, "vas_vocabulary": vas}
    rows += [{"arm": a, "at": k, "gold": s * k, "kl": k, "flop": k} for a, s in slopes.items() for k in (2.0, 5.0)]
    heads = [(head, noise) for head in report.HEADS for noise in (0.0, 0.1, 0.3)]
    rows += [{"arm": "head", "head": head, "noise": noise, "error": 0.5} for head, noise in heads]
    return [*rows, {"arm": "value_model", "explained_variance_end": 0.5}]


def test_contrasts_compare_what_they_name():
    claim = read_claim(CLAIM)
    kl = measure.best_of_n_kl(32)
    gates, (primary, *others) = judge(claim, {seed: seed_rows(0.5, 0.3 + 0.001 * seed) for seed in range(4)})
    assert all(gate["met"] for gate in gates) and primary.word == "holds"
    assert primary.differences[0] == pytest.approx(kl * 0.2)
    named = {outcome.name: outcome for outcome in others}
    assert named["vas_over_rerank_flop"].differences[0] == pytest.approx(kl * 0.5 - 0.2)  # two operations at vas
    assert named["hl_gauss_over_scalar"].word == "does not hold"
    worse = {seed: seed_rows(0.2, 0.5 + 0.001 * seed) for seed in range(4)}
    assert judge(claim, worse)[1][0].word == "does not hold"
    learnt_nothing = {0: [row | {"explained_variance_end": 0.1} for row in seed_rows(0.5, 0.3)]}
    assert {outcome.word for outcome in judge(claim, learnt_nothing)[1]} == {"regime not reached"}


# What is published


@pytest.mark.skipif(not RESULTS.is_file(), reason="nothing is published yet")
def test_what_is_published_is_judged_by_the_claim_as_it_stands():
    results = json.loads(RESULTS.read_text())
    assert results["claim_sha256"] == hashlib.sha256(CLAIM.read_bytes()).hexdigest()
    page = PAGE.read_text()
    assert insert(page, report.markdown(results)) == page
    assert results["settings"] == json.loads(json.dumps(Settings().to_json()))
    assert PAGE.with_suffix(".png").stat().st_size < 150_000
