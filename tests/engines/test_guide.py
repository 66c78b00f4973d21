"""Value-augmented sampling in the embedded sampler: exact by brute force, whoever is decoded together."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from alignment.algorithms.corrections import Tis
from alignment.algorithms.decodings import Emulated, ValueAugmented
from alignment.algorithms.value_losses import HlGauss
from alignment.engines.alongside import Alongside
from alignment.engines.guide import Guide, Row, Steered
from alignment.engines.steering import SteeringPlan
from alignment.engines.value_model import open_value_model
from alignment.errors import UserError
from alignment.tensorfile import read_tensors
from alignment.types import Request, SamplingParams
from tests.engines.guided import run, sampler, site, tokenizer, value_folder, worst
from tests.engines.helpers import tiny

POLICY = tiny("Qwen3", 0)
PROMPTS = [(3, 4, 5), (7,), (3, 4, 5), (1, 2, 3, 4, 5, 6, 7, 8), (9, 9), (3, 4, 6)]


def requests(count=8, tilts=((1.0,),), first=0, **options):
    """Of several lengths and prompts, so that rows join together and leave one after the other."""
    return [
        Request(
            f"r{i}",
            PROMPTS[i % 6],
            SamplingParams(**({"max_tokens": 3 + 5 * i % 17} | options), tilt=tilts[i % len(tilts)]),
            90 + i,
        )
        for i in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("values")
    made = {
        "scalar": value_folder(place / "scalar", 5),
        "other": value_folder(place / "other", 6, architecture="Llama"),
        "gpt2": value_folder(place / "gpt2", 7, architecture="GPT2"),
        "histogram": value_folder(place / "histogram", 8, loss=HlGauss(low=-2, high=2, bins=9)),
        "vocabulary": value_folder(place / "vocabulary", 9, kind="vocabulary"),
    }
    return {name: str(folder) for name, folder in made.items()}


@pytest.mark.parametrize("name", ["scalar", "other", "gpt2", "histogram", "vocabulary"])
@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_k": 40}, {"top_k": 4, "centre": False}])
def test_recorded_logp_is_that_of_the_tilted_distribution(folders, name, options):
    decoding = ValueAugmented(folders[name], 2.0, **options)
    asked = requests(8, (decoding.tilt,), temperature=0.8)
    found = run(sampler(POLICY, decoding), asked)
    assert worst(POLICY, decoding, asked, found) < 2e-5
    plain = run(sampler(POLICY), [replace(r, params=replace(r.params, tilt=())) for r in asked])
    assert sum(plain[i].token_ids != c.token_ids for i, c in found.items()) >= 5, "it does something"


def test_all_tokens_are_candidates_of_a_vocabulary_wide_head(folders):
    decoding = ValueAugmented(folders["vocabulary"], 2.0, top_k=0)
    asked = requests(6, (decoding.tilt,))
    assert worst(POLICY, decoding, asked, run(sampler(POLICY, decoding), asked)) < 2e-5


def test_several_models_weighed_by_each_request_beside_requests_that_are_not_steered(folders):
    decoding = ValueAugmented((folders["scalar"], folders["vocabulary"], folders["gpt2"]), top_k=6)
    tilts = ((1.0, 0.5, 2.0), (), (-3.0, 0.0, 0.0), (0.0, 4.0, 1.0), (0.0, 0.0, 0.0))
    asked = requests(20, tilts)
    engine = sampler(POLICY, decoding, batch_rows=8)
    together = run(engine, asked)
    assert worst(POLICY, decoding, asked, together) < 2e-5
    for request in asked:
        [(_, alone)] = run(engine, [request]).items()
        assert alone.token_ids == together[request.id].token_ids
        torch.testing.assert_close(torch.tensor(alone.logp), torch.tensor(together[request.id].logp))


def test_without_tilt_every_bit_is_that_of_a_sampler_without_decoding(folders):
    decoding = ValueAugmented((folders["scalar"], folders["other"]))
    asked = requests(12, ((0.0, 0.0), ()), temperature=0.9)
    plain = [replace(r, params=replace(r.params, tilt=())) for r in asked]
    assert run(sampler(POLICY, decoding), asked) == run(sampler(POLICY), plain)


def test_greedy_takes_the_best_of_the_steered_logits_and_top_k_cuts_them(folders):
    decoding = ValueAugmented(folders["scalar"], 3.0, top_k=19)
    asked = requests(4, (decoding.tilt,), temperature=0.0)
    found = run(sampler(POLICY, decoding), asked)
    one = run(
        sampler(POLICY, decoding), [replace(r, params=replace(r.params, temperature=1.0, top_k=1)) for r in asked]
    )
    assert {i: c.token_ids for i, c in found.items()} == {i: c.token_ids for i, c in one.items()}
    assert all(set(c.logp) == {0.0} for c in [*found.values(), *one.values()])


def test_aborted_rows_leave_and_later_ones_are_exact(folders):
    decoding = ValueAugmented(folders["scalar"], 2.0)
    engine = sampler(POLICY, decoding, batch_rows=6)
    first, later = requests(6, (decoding.tilt,)), requests(6, (decoding.tilt,), first=30)
    engine.add(first)
    done = {c.id for c in engine.poll()}
    engine.abort([r.id for r in first if r.id not in done][:2])
    while engine.poll():
        pass
    assert worst(POLICY, decoding, later, run(engine, later)) < 2e-5


@pytest.mark.parametrize("name", ["scalar", "vocabulary", "gpt2"])
def test_rows_come_grow_pause_jump_and_go(folders, name):
    # As an engine with continuous batching and preemption would have it.
    model = open_value_model(folders[name])
    steered = Steered(Guide([model], 4, True))
    g = torch.Generator().manual_seed(0)
    rows = {}
    for number in range(30):
        for key in list(rows):
            what = int(torch.randint(0, 8, (), generator=g))
            more = {0: 0, 1: 2, 2: -1}.get(what, 1)
            if what == 3 or len(rows[key]) > 40:
                del rows[key]
            elif more < 0:
                rows[key] = rows[key][:-1] or rows[key]
            else:
                rows[key] = [*rows[key], *torch.randint(0, 19, (more,), generator=g).tolist()]
        if number % 3 != 2:
            rows[number] = torch.randint(0, 19, (1 + number % 7,), generator=g).tolist()
        logits = torch.randn(len(rows), 19, generator=g)
        asked = [None if key % 5 == 1 else Row(key, len(ids), (1.0,), lambda ids=ids: ids) for key, ids in rows.items()]
        found = steered(logits, asked, torch.tensor([ids[-1] for ids in rows.values()], dtype=torch.int64))
        for row, ids, own, new in zip(asked, rows.values(), logits, found, strict=True):
            wanted = own.clone()
            if row is not None:
                top = own.topk(4).indices
                with torch.no_grad():
                    values = model.values(torch.tensor([[*ids, a] for a in top.tolist()]))[:, -1]
                wanted[top] += values - values.mean()
            torch.testing.assert_close(new, wanted, atol=2e-5, rtol=1e-5)


def test_buffers_shrink_as_rows_leave(folders):
    body = open_value_model(folders["scalar"]).body
    alongside = Alongside(body, lambda out: out.last_hidden_state, "x", remembers=False)
    handles = alongside.join([[1, 2, 3]] * 16)
    alongside.leave(handles[:3])
    assert len(alongside.length_R) == 16
    alongside.leave(handles[3:12])
    assert len(alongside.length_R) == 4 == len(alongside.layers[0].room[0])
    alongside.leave(handles[12:])
    assert alongside.length_R == []
    alongside.join([[4]])
    assert alongside.length_R == [1]


def test_importance_weights_of_guided_rollouts_are_truncated_ratios_to_the_policy(folders):
    decoding = ValueAugmented(folders["scalar"], 3.0, top_k=19)
    asked = requests(6, (decoding.tilt,), max_tokens=12)
    found = run(sampler(POLICY, decoding), asked)
    for request in asked:
        tokens, behaviour = found[request.id].token_ids, torch.tensor([found[request.id].logp])
        ids = torch.tensor([[*request.prompt_ids, *tokens]])
        with torch.no_grad():
            logp = POLICY(input_ids=ids).logits.log_softmax(-1)[0, len(request.prompt_ids) - 1 : -1]
        old = logp.gather(1, torch.tensor(tokens)[:, None]).T
        weights, metrics = Tis(cap=2.0).weights(old, behaviour, torch.ones_like(old, dtype=torch.bool))
        torch.testing.assert_close(weights, (old - behaviour).exp().clamp(max=2.0))
        assert metrics["capped"].sum() == ((old - behaviour).exp() > 2).sum()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("r", (1,), SamplingParams(3, tilt=(1.0, 2.0)), 0), "tilt has 2 numbers.*steers with 1 models"),
        (Request("r", (1,) * 30, SamplingParams(10, tilt=(1.0,)), 0), "40 tokens.*exceed the 32 positions"),
    ],
)
def test_requests_that_are_refused(tmp_path, request_, message):
    short = value_folder(tmp_path / "short", body=tiny("Qwen3", 1, max_position_embeddings=32))
    engine = sampler(POLICY, ValueAugmented(str(short)))
    with pytest.raises(UserError, match=message):
        engine.add([request_])
    if "exceed" in message:
        engine.add([replace(request_, params=replace(request_.params, tilt=()))])


def test_a_sampler_without_decoding_refuses_a_tilt():
    with pytest.raises(UserError, match="tilt has 1 numbers, and the sampler's decoding steers with no models"):
        sampler(POLICY).add(requests(1))


def test_models_that_are_refused(tmp_path):
    other = value_folder(tmp_path / "other", alphabet="abcdefghijklmnopX")
    streams = value_folder(tmp_path / "streams", streams=2)
    state = value_folder(tmp_path / "state")
    sliding = value_folder(
        tmp_path / "sliding", body=tiny("Qwen3", 1, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    )
    (tmp_path / "empty").mkdir()
    for decoding, message in (
        (
            ValueAugmented(str(other)),
            "other and the policy policy have different vocabularies: 19 and 19 tokens, and 'X'",
        ),
        (ValueAugmented(str(streams)), "2 values per state"),
        (ValueAugmented(str(state), top_k=0), "needs a vocabulary-wide head"),
        (ValueAugmented(str(tmp_path / "gone")), "gone: the folder does not exist"),
        (ValueAugmented(str(tmp_path / "empty")), "empty: the folder holds no value_model.json"),
        (Emulated(str(tmp_path / "empty"), str(state)), "empty is no model folder"),
    ):
        with pytest.raises(UserError, match=message):
            sampler(POLICY, decoding)
    with pytest.raises(UserError, match="full attention"):
        engine = sampler(POLICY, ValueAugmented(str(sliding)))
        run(engine, requests(1))


def save_policy(folder, seed):
    module = tiny("Qwen3", seed)
    module.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return module


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_emulated_fine_tuning_is_exact(tmp_path, top_p):
    models = {name: save_policy(tmp_path / name, seed) for seed, name in enumerate(("t1", "t2", "b1", "b2"), start=20)}
    where = {name: str(tmp_path / name) for name in models}
    decoding = Emulated((where["t1"], where["t2"]), (where["b1"], where["b2"]), (0.5, 1.0), top_p=top_p)
    asked = requests(8, (decoding.tilt, (), (0.0, 2.0)), temperature=0.9)
    found = run(sampler(POLICY, decoding), asked)
    for request in asked:
        completion, strengths = found[request.id], request.params.tilt
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
        with torch.no_grad():
            logp = {n: m(input_ids=ids).logits[0].log_softmax(-1) for n, m in ({"own": POLICY} | models).items()}
        total = logp["own"].clone()
        if strengths:
            total += strengths[0] * (logp["t1"] - logp["b1"]) + strengths[1] * (logp["t2"] - logp["b2"])
            ranked, order = logp["own"].exp().sort(descending=True)
            beyond = (ranked.cumsum(1) - ranked >= top_p) & (top_p < 1)
            total[torch.zeros_like(beyond).scatter(1, order, beyond)] = -torch.inf
        exact = (total / 0.9).log_softmax(-1)[len(request.prompt_ids) - 1 : -1]
        exact = exact.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logp), exact, atol=3e-5, rtol=0)


def test_rows_of_the_policys_output_that_no_tokenizer_has_stay_as_they_are(folders):
    padded = tiny("Qwen3", 2, vocab_size=26)  # the value models have 19
    decoding = ValueAugmented(folders["scalar"], 2.0, top_k=40)
    asked = requests(6, (decoding.tilt,), max_tokens=12)
    found = run(sampler(padded, decoding), asked)
    assert any(token >= 19 for c in found.values() for token in c.token_ids)
    model = open_value_model(folders["scalar"])
    for request in asked:
        tokens = found[request.id].token_ids
        ids, start = [*request.prompt_ids, *tokens], len(request.prompt_ids)
        with torch.no_grad():
            logits = padded(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
            known = [min(token, 18) for token in ids]
            for t in range(len(tokens)):
                values = model.values(torch.tensor([[*known[: start + t], a] for a in range(19)]))[:, -1]
                logits[t, :19] += 2.0 * (values - values.mean())
        logp = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found[request.id].logp), logp, atol=2e-5, rtol=0)


def test_emulated_fine_tuning_of_a_policy_whose_output_is_padded(tmp_path):
    padded = tiny("Qwen3", 2, vocab_size=26)
    tuned, base = save_policy(tmp_path / "tuned", 20), save_policy(tmp_path / "base", 21)  # of 19
    decoding = Emulated(str(tmp_path / "tuned"), str(tmp_path / "base"), 1.0)
    asked = requests(6, (decoding.tilt,), max_tokens=12)
    found = run(sampler(padded, decoding), asked)
    assert any(token >= 19 for c in found.values() for token in c.token_ids)
    for request in asked:
        tokens = found[request.id].token_ids
        ids, start = torch.tensor([[*request.prompt_ids, *tokens]]), len(request.prompt_ids)
        with torch.no_grad():
            logits = padded(input_ids=ids).logits[0, start - 1 : -1]
            known = ids.clamp(max=18)
            deltas = [m(input_ids=known).logits[0, start - 1 : -1].log_softmax(-1) for m in (tuned, base)]
        logits[:, :19] += deltas[0] - deltas[1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found[request.id].logp), logp, atol=3e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "its model cannot be loaded"),
        ("model.safetensors", b"damaged", "its model cannot be loaded"),
        ("value_head.safetensors", b"damaged", "value_head.safetensors"),
        ("value_head.safetensors", None, "value_head.safetensors"),
        ("value_model.json", b"[]", "is no value model"),
        ("value_model.json", b'{"loss": "scalar", "kind": "token", "streams": 0}', "is no value model .*kind 'token'"),
        ("value_model.json", b'{"loss": "scalr", "kind": "state", "streams": 0}', "is no value model .*'scalr'"),
        ("config.json", b"{", ""),
    ],
)
def test_a_damaged_folder_is_named(tmp_path, name, content, message):
    folder = value_folder(tmp_path / "values")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{folder}.*{message}"):
        open_value_model(str(folder))
    with pytest.raises(UserError, match=f"{folder}.*{message}"):
        sampler(POLICY, ValueAugmented(str(folder)))


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    folder = value_folder(tmp_path / "values")
    weights = read_tensors(folder / "model.safetensors")
    missing = min(weights)
    save_file({n: t for n, t in weights.items() if n != missing}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"its weights lack .*{missing}"):
        open_value_model(str(folder))


def test_a_site_says_how_many_models_steer(folders):
    assert SteeringPlan.of(site(POLICY)) is None
    plan = SteeringPlan.of(site(POLICY, ValueAugmented((folders["scalar"], folders["gpt2"]), (1.0, 2.0))))
    assert plan.models == 2 and plan.longest == 64 and SteeringPlan.from_json(plan.to_json()) == plan
