"""Preference stages as whole runs: given and sampled pairs, each loss and reference, resuming, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import alignment
from alignment import preference
from alignment.algorithms.preferences import preference_losses
from alignment.batching import collate
from alignment.cli import app
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.errors import UserError
from alignment.pairings import AllPairs, BestWorst, compared
from alignment.recipe import load
from alignment.reference_cache import ReferenceCache
from alignment.score import Score
from alignment.types import Group, Prompt, Rollout, SamplingParams
from tests.test_train import Recorder, contents, lines

ALPHABET = "0123456789+="
PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str((a + b + 3) % 10), "completion": str(a + b),
     "answer": str(a + b), "chosen_score": 1.0, "rejected_score": 0.25}
    for a in range(4) for b in range(4)
]  # fmt: skip
LOSSES = [
    "dpo", "robust_dpo", "ipo", "hinge", "length_normalized_dpo", "simpo", "orpo", "mm_dpo", "kto", "bco",
    "mapo", "sparse_po",
]  # fmt: skip


def recipe(folder: Path, stage: dict, rows=PAIRS, **changes) -> Path:
    """A tiny recipe whose only stage is ``stage``, beside a file of pairs."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"name": "dataset", "path": "pairs.jsonl"}
    whole = {
        "run": {"name": "tiny", "output": str(folder / "runs"), "sinks": ["jsonl"], "save_every": 0},
        "model": {
            "build": {"alphabet": ALPHABET, "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 2,
                      "intermediate_size": 64, "max_positions": 32},
        },
        "data": {"preferences": data, "eval_preferences": data, "max_prompt_tokens": 8},
        "rewards": ["exact_match"],
        "evaluation": {"every": 0, "sampling": {"max_tokens": 3}},
        "stages": [{"stage": "preference", "steps": 3, "learner": {"name": "torch", "lr": 1e-2}, **stage}],
    }  # fmt: skip
    whole = {**whole, **{key: {**whole[key], **value} for key, value in changes.items()}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    return path


def given(**stage) -> dict:
    return {"pairs": {"name": "given", "batch_size": 8}, **stage}


SAMPLED = {
    "pairs": "best_worst",
    "prompts_per_step": 4,
    "group_size": 4,
    "sampling": {"max_tokens": 3},
}
TRAIN = {"train": {"name": "dataset", "path": "pairs.jsonl"}}
# a reward that an untrained model sometimes earns, so that there are pairs
FORMAT = [{"name": "format", "pattern": "[0-4].*"}]


def sampled(folder: Path, **stage) -> Path:
    path = recipe(folder, {**SAMPLED, **stage}, data=TRAIN)
    whole = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**whole, "rewards": FORMAT}), encoding="utf-8")
    return path


def trained(path: Path, *sinks, **options) -> dict:
    return alignment.train(path, sinks=sinks, **options)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_teaches_the_preferred_side(tmp_path, loss):
    path = recipe(tmp_path, given(losses=[loss], steps=12))
    result = trained(path)
    records = [line for line in lines(result["folder"]) if line["kind"] == "train"]
    assert records[-1]["margin"] > records[0]["margin"] + 0.05
    assert records[-1]["held_out/ranking"] > records[0]["held_out/ranking_before"]
    assert records[0]["pairs"] == 8 and records[0]["optimizer_steps"] == 1
    (stage,) = result["stages"]
    assert stage["labels"] == {"pairs": 16}
    assert stage["measured"] == {
        "ranking": {"before": records[0]["held_out/ranking_before"], "after": records[-1]["held_out/ranking"]}
    }


@pytest.mark.parametrize("loss", ["dpo", "kto", "mapo"])
def test_packing_changes_nothing(tmp_path, loss):
    """Though the sides of one pair stand beside those of others."""
    found = []
    for packing in (False, True):
        learner = {"name": "torch", "lr": 1e-2, "packing": packing, "pack_tokens": 24, "micro_batch_tokens": 60}
        changes = {"run": {"name": f"packing-{packing}"}}
        path = recipe(tmp_path, given(losses=[loss], learner=learner), **changes)
        found.append([line for line in lines(trained(path)["folder"]) if line["kind"] == "train"])
    for alone, packed in zip(*found, strict=True):
        assert packed.keys() == alone.keys()
        for name in ("loss", "margin", "grad_norm"):
            assert packed[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5)


def test_every_registered_loss_is_among_those():
    ours = {entry.name for entry in preference_losses if entry.cls.__module__.startswith("alignment.")}
    assert ours == {*LOSSES, "nll"}


def test_a_policy_that_is_the_reference_has_the_loss_of_a_coin(tmp_path):
    first = lines(trained(recipe(tmp_path, given(losses=["dpo"], steps=1)))["folder"])[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6) and first["margin"] == pytest.approx(0.0, abs=1e-5)


def test_mpo_is_a_weighted_list(tmp_path):
    losses = [{"name": "dpo", "weight": 0.8}, {"name": "bco", "weight": 0.2}, "nll"]
    first = lines(trained(recipe(tmp_path, given(losses=losses, steps=2)))["folder"])[0]
    assert first["loss/dpo"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["loss/bco"] == pytest.approx(2 * 0.6931472, abs=1e-6)
    assert first["loss"] == pytest.approx(0.831777 + first["loss/nll"], abs=1e-5)


@pytest.mark.parametrize(
    "reference", ["copy", "cached", {"name": "ema", "decay": 0.5}, {"name": "refreshed", "every": 2}]
)
@pytest.mark.parametrize("lora", [False, True])
def test_references(tmp_path, reference, lora):
    path = recipe(
        tmp_path, given(reference=reference, steps=3), model={"lora": {"rank": 2, "alpha": 4}} if lora else {}
    )
    if lora:
        whole = yaml.safe_load(path.read_text())
        whole["model"]["build"]["intermediate_size"] = 64
        path.write_text(yaml.safe_dump(whole))
    records = lines(trained(path)["folder"])
    name = reference if isinstance(reference, str) else reference["name"]
    assert records[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    # of the third step: at the end of a round of two the policy is the reference again, and a moving one is nearer
    if name == "refreshed":
        assert records[2]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    else:
        assert records[2]["loss"] < 0.693


def test_a_cached_reference_is_a_copied_one(tmp_path):
    losses = {}
    for name in ("copy", "cached"):
        folder = tmp_path / name
        folder.mkdir()
        found = lines(trained(recipe(folder, given(reference=name, steps=4)))["folder"])
        losses[name] = [line["loss"] for line in found]
    assert losses["copy"] == pytest.approx(losses["cached"], abs=1e-6)


@pytest.mark.parametrize(
    "stage",
    [
        given(losses=["dpo"]),
        given(losses=[{"name": "dpo", "weight": 0.8}, {"name": "bco", "weight": 0.2}, "nll"]),
        given(losses=["kto"]),
        given(losses=["mapo", "nll"]),
        given(losses=["kto", "bco"], labelled=True),
        given(losses=[{"name": "sparse_po", "dropout": 0.1, "masks": "independent"}]),
        given(reference="cached"),
        given(reference={"name": "ema", "decay": 0.5}),
        {**SAMPLED, "losses": ["dpo"]},
        {**SAMPLED, "pairs": {"name": "all", "every": 2}, "reference": {"name": "refreshed", "every": 2}},
    ],
    ids=["dpo", "mpo", "kto", "mapo", "unpaired", "sparse_po", "cached", "ema", "online", "iterative"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stage):
    found = {}
    for name, stop in (("whole", None), ("resumed", 3)):
        folder = tmp_path / name
        folder.mkdir()
        build = recipe if "group_size" not in stage else lambda f, s: sampled(f, **s)
        build = build if "labelled" not in stage else lambda f, s: labelled(f, **s)
        path = build(folder, {**{key: value for key, value in stage.items() if key != "labelled"}, "steps": 6})
        if stop:
            assert trained(path, Recorder(stop_after=stop))["status"] == "interrupted"
        result = trained(path)
        assert result["status"] == "complete"
        found[name] = contents(result["folder"]), lines(result["folder"])
    ours, theirs = found["whole"], found["resumed"]
    assert ours[0].keys() == theirs[0].keys()
    for name, data in ours[0].items():
        assert data == theirs[0][name], name
    assert ours[1] == theirs[1]


def test_online_and_iterative_are_one_recipe_with_other_intervals(tmp_path):
    seen = {}
    for every in (1, 3):
        folder = tmp_path / str(every)
        folder.mkdir()
        path = sampled(folder, pairs={"name": "best_worst", "every": every}, steps=6)
        records = lines(trained(path)["folder"])
        seen[every] = [line.get("rollouts") for line in records if line["kind"] == "train"]
    assert seen[1] == [16] * 6
    assert seen[3] == [48, None, None, 48, None, None]


def test_what_is_learned_does_not_depend_on_the_sampling_temperature(tmp_path, monkeypatch):
    """One step on the very same completions, said to be sampled at two temperatures."""
    kept, found, plain = [], [], preference._compared

    def recorded(job, stage, pairs, step):
        kept.extend([] if kept else pairs)
        params = job.params(stage.sampling)
        same = [replace(p, rollouts=tuple(replace(r, sampling=params) for r in p.rollouts)) for p in kept]
        return plain(job, stage, same, step)

    monkeypatch.setattr(preference, "_compared", recorded)
    for temperature in (0.3, 1.0):
        (tmp_path / str(temperature)).mkdir()
        stage = {"losses": ["dpo", "simpo"], "steps": 1, "sampling": {"max_tokens": 3, "temperature": temperature}}
        (record,) = lines(trained(sampled(tmp_path / str(temperature), **stage))["folder"])
        found.append([record[name] for name in ("loss", "grad_norm", "logp/chosen", "logp/rejected", "entropy")])
    assert found[0] == found[1] and kept[0].rollouts[0].sampling.temperature == 0.3


def test_entropies_are_computed_where_completions_are_sampled(tmp_path):
    for name, build in (("given", lambda f: recipe(f, given(steps=1))), ("sampled", lambda f: sampled(f, steps=1))):
        (tmp_path / name).mkdir()
        (record,) = (r for r in lines(trained(build(tmp_path / name))["folder"]) if r["kind"] == "train")
        assert ("entropy" in record) == (name == "sampled") and record["logp"] < 0


def test_a_curriculum_with_a_model_of_its_own_chooses_what_is_sampled(tmp_path):
    stage = {
        "curricula": [{"name": "prompt_curriculum", "oversample": 2}],
        "prompt_value": {"name": "model", "lr": 1e-3},
    }
    records = lines(trained(sampled(tmp_path, **stage, steps=3, pairs={"name": "best_worst", "every": 2}))["folder"])
    assert [line["rollouts"] for line in records if "rollouts" in line] == [32, 32]
    assert records[0]["prompt_value/fitted_tokens"] > 0 and "prompt_value/fitted_tokens" not in records[1]


def test_the_ground_truth_guides(tmp_path):
    losses = ["dpo", {"name": "nll", "of": "ground_truth", "weight": 0.5}]
    shown = {"demonstrations": {"name": "dataset", "path": "pairs.jsonl"}}
    records = lines(trained(recipe(tmp_path, given(losses=losses, steps=10), data=shown))["folder"])
    assert records[0]["loss"] == pytest.approx(0.6931472 + 0.5 * records[0]["loss/nll"], abs=1e-5)
    assert records[-1]["loss/nll"] < records[0]["loss/nll"] and records[0]["rows"] == 16


LABELLED = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b if wanted else (a + b + 3) % 10), "label": wanted}
    for a in range(4) for b in range(4) for wanted in ((a + b) % 3 > 0,)
]  # fmt: skip


def labelled(folder: Path, rows=LABELLED, **stage) -> Path:
    """A recipe with rows that were judged by themselves, and pairs that are held out."""
    path = recipe(folder, given(**stage), rows=rows)
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    whole = yaml.safe_load(path.read_text())
    whole["data"]["eval_preferences"] = {"name": "dataset", "path": "held_out.jsonl"}
    path.write_text(yaml.safe_dump(whole))
    return path


@pytest.mark.parametrize("stage", [{"losses": ["kto"]}, {"losses": ["bco"], "reference": "cached"}], ids=["kto", "bco"])
def test_completions_that_were_judged_by_themselves_teach(tmp_path, stage):
    result = trained(labelled(tmp_path, **stage, steps=12))
    records = [line for line in lines(result["folder"]) if line["kind"] == "train"]
    assert records[0]["pairs"] == 0 and records[0]["rows"] == 8 and "margin" not in records[0]
    ahead = [line["ratio/chosen"] - line["ratio/rejected"] for line in (records[0], records[-1])]
    assert ahead[1] > ahead[0] + 0.05
    assert records[-1]["held_out/ranking"] > records[0]["held_out/ranking_before"]
    assert result["stages"][0]["labels"] == {"judgements": 16}


def test_the_plan_counts_completions(tmp_path):
    done = CliRunner().invoke(app, ["check", str(labelled(tmp_path, losses=["kto"]))])
    assert done.exit_code == 0 and re.search(r"rows +8 completions", done.output) and "1 x 8 rows" in done.output


def test_pairs_may_stand_beside_them(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "completion"} for row in PAIRS[:8]] + LABELLED[8:]
    pairs = {"name": "given", "batch_size": 16}
    first = lines(trained(labelled(tmp_path, rows=rows, losses=["kto"], steps=1, pairs=pairs))["folder"])[0]
    assert first["pairs"] == 8 and first["rows"] == 24
    with pytest.raises(UserError, match=r"'dpo' learns from pairs, and .*pairs.jsonl:9 has one completion and a label"):
        trained(labelled(tmp_path, rows=rows, losses=["dpo"]), fresh_start=True)


def test_a_likelihood_of_what_was_wanted_asks_for_a_row_that_was(tmp_path):
    losses = ["kto", {"name": "nll", "weight": 0.1}]
    unwanted = [row for row in LABELLED if not row["label"]]
    with pytest.raises(UserError, match=r"'nll' raises .* every row of data.preferences has label: false"):
        trained(labelled(tmp_path, rows=unwanted, losses=losses))
    assert trained(labelled(tmp_path, losses=losses, steps=1), fresh_start=True)["status"] == "complete"


def rollout(name: str, reward: float | None, tokens=(1, 2)) -> Rollout:
    scores = {} if reward is None else {"r": Score(reward)}
    return Rollout(
        name, "p", (5, 6), tokens, (True,) * len(tokens), (0.0,) * len(tokens), name, "stop", 0, "test",
        SamplingParams(4), (), scores=scores, reward=reward,
    )  # fmt: skip


def group(*rewards) -> Group:
    return Group(7, Prompt("p", {"prompt": "x"}), tuple(rollout(str(i), r) for i, r in enumerate(rewards)))


def test_pairs_of_a_group():
    names = [[r.id for r in pair.rollouts] for pair in BestWorst().pairs(group(0.0, None, 3.0, 1.0))]
    assert names == [["2", "0"]]
    assert BestWorst().pairs(group(1.0, 1.0, None)) == [] == BestWorst(min_gap=5.0).pairs(group(0.0, 1.0))
    found = [[r.id for r in pair.rollouts] for pair in AllPairs().pairs(group(0.0, 1.0, 1.0, 2.0))]
    assert found == [["1", "0"], ["2", "0"], ["3", "0"], ["3", "1"], ["3", "2"]]


def test_a_mismatched_row_has_another_prompts_completion_of_its_own_side():
    pairs = [
        Group(i, Prompt(f"p{i}", {"prompt": f"x{i // 2}"}), (rollout("a", 1.0, (i,)), rollout("b", 0.0, (i, i))))
        for i in (1, 2, 3)
    ]  # the second and the third have one prompt
    groups, sides = compared(pairs, True, None)
    assert sides == [1, -1] * 3 + [0] * 6
    assert [g.rollouts[0].token_ids for g in groups[3:]] == [(3,), (3, 3), (1,), (1, 1), (1,), (1, 1)]
    assert compared(pairs[1:], True, None) == (pairs[1:], [1, -1] * 2), "there is no other prompt"
    groups, sides = compared(pairs[:2], False, {pairs[1].prompt.key: [rollout("shown", None, (9,))]})
    assert sides == [1, -1, 1, -1, 2] and groups[2].rollouts[0].id == "shown"


def test_a_cache_is_ragged_and_filled_by_uid(tmp_path):
    first = torch.tensor([0, 1, 3, 4])  # a pair between two completions that were judged by themselves
    cache = ReferenceCache(torch.arange(7).float(), torch.tensor([0, 1, 3, 6, 7]), first)
    path = tmp_path / "cache.safetensors"
    cache.write(path)
    again = ReferenceCache.read(path)
    assert torch.equal(again.logp, cache.logp) and torch.equal(again.start, cache.start)
    pairs = [Group(uid, Prompt("p", {}), (rollout("a", None),) * count) for uid, count in ((1, 2), (0, 1), (2, 1))]
    batch = collate(pairs, 0, (), ())
    mask_BT = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    batch = replace(batch, ids_BT=torch.zeros(4, 4, dtype=torch.int64), loss_mask_BT=mask_BT)
    filled = cache.filled(batch, pairs).ref_logp_BT
    assert filled is not None and filled[mask_BT].tolist() == [1, 2, 3, 4, 5, 0, 6]
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        ReferenceCache.read(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**PAIRS[0], "rejected": PAIRS[0]["chosen"]}], "pairs.jsonl:17: 'chosen' and 'rejected' are equal"),
        ([{"prompt": "1+1=", "chosen": "2"}], "pairs.jsonl:17: has 'chosen' alone"),
        ([{**PAIRS[0], "chosen": "x"}], "pairs.jsonl:17: .*'x'"),
        (
            [{**PAIRS[0], "chosen": "12345"}],
            "pairs.jsonl:17: 'chosen' has 6 tokens, more than data.max_completion_tokens",
        ),
        ([{"prompt": "1+1=", "completion": "2", "label": 1}], "pairs.jsonl:17: 'label' must be true, .* not 1"),
        ([{"prompt": "1+1=", "label": True}], "pairs.jsonl:17: has no 'completion'"),
        ([{"prompt": "1+1=", "completion": "x", "label": True}], "pairs.jsonl:17: .*'x'"),
        ([{"prompt": "1+1=", "completion": "12345", "label": True}], "pairs.jsonl:17: 'completion' has 6 tokens, more"),
        ([{**PAIRS[0], "chosen_score": "good"}], "pairs.jsonl:17: 'chosen_score' must be a number"),
    ],
)
def test_a_bad_row_is_named_with_its_remedy(tmp_path, rows, message):
    path = recipe(tmp_path, given(), rows=[*PAIRS, *rows], data={"max_completion_tokens": 4})
    with pytest.raises(UserError, match=message):
        trained(path)
    assert not list((tmp_path / "runs").rglob("checkpoints/*"))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({**given(), "prompts_per_step": 4}, "stages.0.prompts_per_step: says how completions are sampled"),
        ({**SAMPLED, "reference": "cached"}, "stages.0.reference: 'cached' is computed once"),
        ({**given(losses=["kto"], reference="cached")}, "stages.0.reference: 'cached' has nothing of prompts with"),
        (
            {**given(losses=["mapo"], reference="cached")},
            "stages.0.reference: 'cached' has no distributions, which 'mapo'",
        ),
        (
            {**given(losses=["kto"]), "pairs": {"name": "given", "batch_size": 1}},
            "stages.0.pairs.batch_size: 1 gives 'kto' no completion of another prompt",
        ),
        (
            {**SAMPLED, "losses": ["kto"], "prompts_per_step": 1},
            "stages.0.prompts_per_step: 1 gives 'kto' no completion of another prompt",
        ),
        ({**given(losses=["simpo"], reference="cached")}, "stages.0.reference: is not looked at by simpo"),
        ({**SAMPLED, "group_size": 1}, "stages.0.group_size: 1 makes no pair"),
        ({**SAMPLED, "max_staleness": 1}, "stages.0.max_staleness: .*"),
        ({**SAMPLED, "learner": {"name": "torch", "micro_batch_tokens": 16}}, "16 does not hold the two sides of the"),
        ({**SAMPLED, "losses": ["bco"], "reference": {"name": "ema"}}, "stages.0.reference: 'bco' compares rewards"),
        ({**given(), "prompt_value": "model"}, "stages.0.prompt_value: says how completions are sampled"),
        ({**SAMPLED, "curricula": ["uniform", "sample_buffer"]}, "stages.0.curricula.1: 'sample_buffer' picks what to"),
        ({**given(losses=[])}, "losses is empty"),
        ({**given(losses=["dpoo"])}, "'dpoo' is not one of the preference_losses; did you mean 'dpo'"),
        ({**given(losses=["dpo", {"name": "nll", "of": "ground_truth"}])}, "needs data.demonstrations"),
    ],
)
def test_a_stage_that_cannot_work_is_refused(tmp_path, stage, message):
    with pytest.raises(UserError, match=message):
        load([recipe(tmp_path, stage, data=TRAIN)])


@pytest.mark.parametrize("loss", ["mapo", "sparse_po"])
def test_masks_of_tokens_go_with_every_learner(tmp_path, loss):
    for name, changes in (("torch", {}), ("deepspeed", {"cluster": "ray", "sampler": "vllm"})):
        path = recipe(tmp_path, given(losses=[loss], learner=name, **changes))
        result = CliRunner().invoke(app, ["check", str(path)])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("loss", "names", "message"),
    [
        ("mapo", "ATTENTION", "Layer: its attention part is not found, and 'mapo' asks for its activations"),
        ("sparse_po", "LAYERS", "its layers are not found"),
    ],
)
def test_a_model_that_masks_cannot_look_into_is_named_before_there_is_a_learner(
    tmp_path, monkeypatch, loss, names, message
):
    monkeypatch.setattr(TorchLearnerConfig, "build", lambda *_: pytest.fail("there is a learner"))
    monkeypatch.setattr(f"alignment.engines.activations.{names}", ())
    with pytest.raises(UserError, match=message):
        trained(recipe(tmp_path, given(losses=[loss])))


@pytest.mark.parametrize("section", ["preferences", "train"])
def test_a_divergence_that_one_prompt_cannot_tell_is_refused(tmp_path, section):
    stage = {"losses": ["kto"]}
    if section == "train":
        path = sampled(tmp_path, **stage)
    else:
        path = recipe(tmp_path, given(**stage))
    rows = [PAIRS[0], {**PAIRS[0], "chosen": "4"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = f"'kto' estimates .* all rows of data.{section} have one prompt, .* take 'bco'"
    with pytest.raises(UserError, match=said):
        trained(path)


def test_pairs_that_do_not_fit_are_refused_with_the_row(tmp_path):
    path = recipe(tmp_path, given(learner={"name": "torch", "micro_batch_tokens": 8}))
    with pytest.raises(UserError, match=r"pairs.jsonl:\d+, 6 tokens each at most, .* raise that to 12"):
        trained(path)
    path = recipe(tmp_path, given(losses=["mm_dpo"]), rows=[{k: v for k, v in PAIRS[0].items() if "score" not in k}])
    said = "'mm_dpo' needs a score of each side, which the pair .*pairs.jsonl:1 lacks: .* or sample pairs"
    with pytest.raises(UserError, match=said):
        trained(path)
