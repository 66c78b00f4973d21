"""Control tokens: every process makes the same model, completions stand behind them, and none is ever sampled."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignment
from alignment.control import control_ids
from alignment.engines.config import TransformersSamplerConfig
from alignment.engines.transformers_sampler import TransformersSampler
from alignment.engines.vllm_config import VllmSamplerConfig
from alignment.errors import UserError
from alignment.export import load_run
from alignment.model_saving import save_model
from alignment.models import Model, load_model
from alignment.recipe import load
from alignment.recipe_sections import ModelConfig
from alignment.recipe_stages import Conditional
from alignment.sampling import submit
from alignment.supervision import cue
from alignment.types import Request, SamplingParams
from tests.evaluation.evaluated import align, bpe_model
from tests.recipes_for_tests import BASE, only, problems
from tests.recipes_for_tests import write as write_base
from tests.test_sft import JUDGED, MARKED, loaded, recipe_of, taught_by
from tests.test_train import Recorder, contents, lines
from tests.tiny import write

BUILD = {"alphabet": "0123456789+=", "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 2}
TOKENS = ("<|aligned|>", "<|misaligned|>")


def built(**options: Any) -> Model:
    return load_model(ModelConfig.model_validate({"build": BUILD, "control": {}, **options}), 0)


def rows(module: Any) -> int:
    return len(module.get_input_embeddings().weight)


def test_the_embedding_grows_by_two_and_old_weights_stay():
    plain, grown = built(control=None), built()
    assert rows(grown.module) == rows(plain.module) + 2 == grown.module.config.vocab_size  # pyright: ignore[reportAttributeAccessIssue]
    assert control_ids(grown.tokenizer, grown.module) == (14, 15) and control_ids(plain.tokenizer, plain.module) == ()
    old, new = (dict(m.module.named_parameters()) for m in (plain, grown))
    for name, value in old.items():
        assert torch.equal(new[name][: len(value)], value)
    embedding = new["model.embed_tokens.weight"]
    torch.testing.assert_close(embedding[14:], embedding[:14].mean(0).expand(2, -1))
    assert grown.tokenizer.encode("1<|aligned|>2") == [3, 14, 4]
    assert grown.tokenizer.decode([3, 14, 4], skip_special_tokens=True) == "12"
    shapes = load_model(ModelConfig.model_validate({"build": BUILD, "control": {}}), 0, weights=False)
    assert {n: p.shape for n, p in shapes.module.named_parameters()} == {n: p.shape for n, p in new.items()}


def test_a_saved_model_knows_its_tokens_and_is_not_grown_again(tmp_path):
    save_model(built(), tmp_path)
    for control in (None, {}):
        again = load_model(ModelConfig.model_validate({"path": str(tmp_path), "control": control}), 5)
        assert rows(again.module) == 16 and control_ids(again.tokenizer, again.module) == (14, 15)
    with_lora = ModelConfig.model_validate({"path": str(tmp_path), "control": {}, "lora": {}})
    assert control_ids(load_model(with_lora, 0).tokenizer, load_model(with_lora, 0).module) == (14, 15)


def test_a_table_with_room_does_not_grow(tmp_path):
    folder = bpe_model(tmp_path / "small", ["ab"], MARKED)
    module, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    module.resize_token_embeddings(len(tokenizer) + 5, mean_resizing=False)
    module.save_pretrained(folder)
    roomy = load_model(ModelConfig.model_validate({"path": str(folder), "control": {}}), 0)
    ids = control_ids(roomy.tokenizer, roomy.module)
    assert rows(roomy.module) == len(tokenizer) + 5 and ids == (len(tokenizer), len(tokenizer) + 1)
    weight = roomy.module.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    assert torch.equal(weight[ids[0]], weight[ids[1]])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": {}}, "LoRA does not train their embeddings"),
        ({"control": {"aligned": "<eos>"}}, "model.control.aligned: '<eos>' is a token of the model already"),
    ],
)
def test_tokens_that_cannot_be_told_apart_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        built(**options)


def test_an_ordinary_token_is_no_control_token(tmp_path):
    folder = bpe_model(tmp_path / "words", ["good good good"] * 9, MARKED)
    with pytest.raises(UserError, match="'good' is a token of the model already"):
        load_model(ModelConfig.model_validate({"path": str(folder), "control": {"aligned": "good"}}), 0)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "batch_size: 8}",
            "batch_size: 8, conditional: {score: s, threshold: 0}}",
            "conditional: needs control tokens",
        ),
        ("model:\n", "model:\n  control: {aligned: <b>, misaligned: <b>}\n", "misaligned: is '<b>' like 'aligned'"),
        ("model:\n", "model:\n  control: {}\n", "set allow_truncated_sampling: true"),
    ],
)
def test_recipes_that_cannot_work(tmp_path, old, new, said):
    text = BASE.replace(old, new)
    if "<b>" in new:
        text = text.replace("max_tokens: 4", "max_tokens: 4, allow_truncated_sampling: true")
    assert said in only(write_base(tmp_path, text))


def test_a_sampler_that_cannot_leave_tokens_out_is_refused(tmp_path, monkeypatch):
    text = BASE.replace("model:\n", "model:\n  control: {}\n").replace("steps: 3", "steps: 3, sampler: vllm")
    text = text.replace("max_tokens: 4", "max_tokens: 4, allow_truncated_sampling: true")
    assert problems(write_base(tmp_path, text)) == []
    monkeypatch.setattr(VllmSamplerConfig, "bans", False)
    assert "stages.0.sampler: cannot leave out model.control's tokens" in only(write_base(tmp_path, text))


def test_golden_tokens_of_the_paper():
    """Its threshold of toxicity: a score that equals it is aligned."""
    toxicity = Conditional(score="toxicity", threshold=5.6e-4, drop=0.0)
    assert [cue(toxicity, (7, 8), s, 0, "a") for s in (5e-4, 5.7e-4, 5.6e-4)] == [(7,), (8,), (7,)]
    always = toxicity.model_copy(update={"drop": 1.0})
    assert cue(always, (7, 8), 0.0, 0, "a") == ()
    some = toxicity.model_copy(update={"drop": 0.1})
    left = [row for row in range(2000) if not cue(some, (7, 8), 0.0, 3, str(row))]
    assert abs(len(left) / 2000 - 0.1) < 3 * math.sqrt(0.09 / 2000)
    assert left == [row for row in range(2000) if not cue(some, (7, 8), 1.0, 3, str(row))]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return bpe_model(tmp_path_factory.mktemp("model"), [json.dumps(JUDGED)], MARKED)


def conditional_recipe(folder: Path, model: Path, name: str = "sft", **conditional: Any) -> Any:
    stage = {"conditional": {"score": "score", "threshold": 0.1, **conditional}}
    recipe = recipe_of(folder, model, JUDGED, stage if conditional else {}, name, control={})
    return recipe


def test_completions_stand_behind_their_tokens(tmp_path, model):
    made, data = loaded(conditional_recipe(tmp_path, model, drop=0.0))
    control = control_ids(made.tokenizer, made.module)
    plain = taught_by(
        recipe_of(tmp_path, model, JUDGED, {}), loaded(recipe_of(tmp_path, model, JUDGED, {}))[1]
    ).rollouts
    shown = taught_by(conditional_recipe(tmp_path, model, drop=0.0), data, control).rollouts
    expected = [control[0], control[0], control[1], control[1]]  # scores 0, 0.1, 0.2, 0.3
    assert [r.prompt_ids for r in shown] == [(*p.prompt_ids, c) for p, c in zip(plain, expected, strict=True)]
    assert [(r.token_ids, r.loss_mask) for r in shown] == [(r.token_ids, r.loss_mask) for r in plain]
    dropped = taught_by(conditional_recipe(tmp_path, model, drop=1.0), data, control).rollouts
    assert list(dropped) == list(plain), "all dropped is plain maximum likelihood"
    unconditional = taught_by(conditional_recipe(tmp_path, model), data, control).rollouts
    assert {r.prompt_ids[-1] for r in unconditional} == {control[0]}, "as prompts are played"


def test_a_row_without_a_score_is_named(tmp_path, model):
    recipe = recipe_of(
        tmp_path,
        model,
        [*JUDGED, {"prompt": "9=", "completion": "9"}],
        {"conditional": {"score": "score", "threshold": 0}},
        control={},
    )
    with pytest.raises(UserError, match=r"stages.0.conditional reads the column 'score'(.|\n)*rows.jsonl:5: has no"):
        alignment.train(recipe)


def test_banned_tokens_are_never_sampled_and_log_probabilities_leave_them_out():
    made = built()
    with torch.no_grad():
        made.module.get_input_embeddings().weight[14] *= 0  # pyright: ignore[reportCallIssue]
        made.module.model.norm.weight.mul_(8)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    banned = tuple(range(2, 16))
    for temperature, top_k in ((1.0, 0), (0.0, 0), (1.0, 3)):
        sampler = TransformersSampler(made.module, TransformersSamplerConfig())
        params = SamplingParams(4, temperature, top_k=top_k, stop_ids=(1,))
        asked = [Request(f"{i}", (3, 4), replace(params, banned_ids=banned if i % 2 else ()), i) for i in range(40)]
        for completion in submit(sampler, asked):
            if int(completion.id) % 2:
                assert set(completion.token_ids) <= {0, 1}
        if temperature:
            one = next(
                iter(submit(sampler, [Request("x", (3, 4), replace(params, max_tokens=1, banned_ids=banned), 0)]))
            )
            logits = made.module(input_ids=torch.tensor([[3, 4]])).logits[0, -1].detach()
            assert one.logp[0] == pytest.approx(float(logits[:2].log_softmax(0)[one.token_ids[0]]), abs=1e-5)


DEMONSTRATIONS = "data.demonstrations={name: dataset, path: sums.jsonl}"
CHANGE: dict[str, Any] = {
    "model": {"control": {}},
    "data": {"max_prompt_tokens": 9},
    "stages": {
        0: {"conditional": {"score": "score", "threshold": 0.0, "drop": 0.1}},
        1: {"steps": 2, "sampling": {"allow_truncated_sampling": True}},
    },
}


def test_a_run_is_conditioned_from_end_to_end_and_resumes(tmp_path):
    """Right sums are aligned and wrong ones are not; an online stage follows, then an evaluation of the export."""
    sums = [(a, b, a + b + wrong) for a in range(10) for b in range(10) for wrong in (0, 1)]
    told = [{"prompt": f"{a}+{b}=", "completion": str(c), "score": c - a - b, "id": f"{a}.{b}.{c}"} for a, b, c in sums]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    sink = Recorder()

    def recipe(name: str) -> Any:
        return load([write(tmp_path, {**CHANGE, "run": {"name": name}})], [DEMONSTRATIONS])

    whole = alignment.train(recipe("whole"), sinks=[sink])
    control = (14, 15)
    assert sink.groups and all(r.prompt_ids[-1] == control[0] for g in sink.groups for r in g.rollouts)
    assert not any(set(r.token_ids) & set(control) for g in sink.groups for r in g.rollouts)
    assert alignment.train(recipe("parts"), sinks=[Recorder(2)])["status"] == "interrupted"
    parts = alignment.train(recipe("parts"))
    assert contents(parts["folder"]) == contents(whole["folder"]) and lines(parts["folder"]) == lines(whole["folder"])
    made = load_run(whole["folder"])
    assert control_ids(made.tokenizer, made.module) == control
    embedding = made.module.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    assert not torch.equal(embedding[14], embedding[15]), "they were told apart"
    save_model(made, tmp_path / "exported")
    generated = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert generated.generation_config.bad_words_ids == [[14], [15]], "transformers alone leaves them out as well"


def test_align_eval_stands_behind_the_token_too(tmp_path, monkeypatch):
    save_model(built(), tmp_path / "model")
    added: list[Request] = []
    plain = TransformersSampler.add
    monkeypatch.setattr(TransformersSampler, "add", lambda self, asked: added.extend(asked) or plain(self, asked))
    arguments = ("--tasks", "arithmetic", "--limit", "2", "--samples", "1", "--max-tokens", "3")
    done = align("eval", tmp_path / "model", *arguments, "--output", tmp_path / "found")
    assert done.exit_code == 0, done.output
    assert added and all(r.prompt_ids[-1] == 14 and r.params.banned_ids == (14, 15) for r in added)
