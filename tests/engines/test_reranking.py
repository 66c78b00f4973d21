"""Best of n and re-ranking of chunks: what is chosen, from what, and that only the request's seed decides."""

import random
from dataclasses import replace

import pytest
import torch

from alignment.algorithms.decodings import BestOfN, ChunkRerank
from alignment.engines.config import TransformersSamplerConfig
from alignment.engines.reranking import Reranker, build_sampler, values_of
from alignment.engines.value_model import open_value_model
from alignment.errors import UserError
from alignment.sampling import Sampler
from alignment.types import Completion, Request, SamplingParams, keyed_seed
from tests.engines.guided import run, site, value_folder
from tests.engines.helpers import tiny

POLICY = tiny("Qwen3", 0)
CONFIG = TransformersSamplerConfig(batch_rows=16)
PARAMS = SamplingParams(12, stop_ids=(3,))
ASKED = [Request(f"r{i}", ((5, 6, 7), (8,))[i % 2], PARAMS, 40 + i) for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(value_folder(tmp_path_factory.mktemp("values") / "v"))


def built(decoding) -> Sampler:
    return build_sampler(CONFIG, site(POLICY, decoding), None)


def candidates(request, n):
    """The samples that best of n chooses from, made without it."""
    seeds = [request.seed, *(keyed_seed(request.seed, "candidate", 0, i) for i in range(1, n))]
    plain = CONFIG.build(site(POLICY), None)
    return list(run(plain, [replace(request, id=str(i), seed=s) for i, s in enumerate(seeds)]).values())


def test_best_of_n_is_the_sample_with_the_largest_value(folder):
    model, sampler = open_value_model(folder), built(BestOfN(folder, 5))
    assert isinstance(sampler, Reranker) and sampler.name == "transformers+best_of_n"
    found = run(sampler, ASKED)
    for request in ASKED:
        samples = {c.token_ids: c for c in candidates(request, 5)}
        with torch.no_grad():
            value = {t: float(model.values(torch.tensor([[*request.prompt_ids, *t]]))[0, -1]) for t in samples}
        best = max(value, key=value.__getitem__)
        assert found[request.id].token_ids == best
        assert found[request.id].finish_reason == samples[best].finish_reason
        torch.testing.assert_close(torch.tensor(found[request.id].logp), torch.tensor(samples[best].logp))
    assert {c.finish_reason for c in found.values()} == {"stop", "length"}


def test_one_sample_is_plain_sampling(folder):
    plain = run(CONFIG.build(site(POLICY), None), ASKED)
    assert run(built(BestOfN(folder, 1)), ASKED) == plain


def test_beta_draws_from_the_softmax_of_values_of_different_samples(folder):
    # How often the best is taken, against how often it should be, over many requests.
    model, beta, asked = open_value_model(folder), 0.5, []
    for i in range(120):
        asked.append(Request(f"r{i}", (5, 6), SamplingParams(1), 1000 + i))
    found = run(built(BestOfN(folder, 3, beta)), asked)
    off = 0.0
    for request in asked:
        tokens = list(dict.fromkeys(c.token_ids for c in candidates(request, 3)))
        p = (values_of(model, [(5, 6, *t) for t in tokens]) / beta).softmax(0)
        off += float(tokens.index(found[request.id].token_ids) == p.argmax()) - float(p.max())
    assert abs(off) / 120 < 0.13


@pytest.mark.parametrize("decoding", [BestOfN("", 4, 1.0), ChunkRerank("", 3, 4), ChunkRerank("", 2, 5, 0.5)])
def test_only_the_seed_decides_and_others_come_and_go(folder, decoding):
    decoding = replace(decoding, model=folder)
    together = run(built(decoding), ASKED)
    sampler = built(decoding)
    for request in random.Random(0).sample(ASKED, 3):
        assert run(sampler, [request])[request.id].token_ids == together[request.id].token_ids
    sampler.add(ASKED)
    sampler.abort([r.id for r in ASKED[::2]])
    left: list[Completion] = []
    while found := sampler.poll(5.0):
        left += found
    assert {c.id: c.token_ids for c in left} == {r.id: together[r.id].token_ids for r in ASKED[1::2]}
    assert sampler.poll() == []
    sampler.close()


def test_chunks_are_chosen_one_after_the_other_and_logp_is_the_policys(folder):
    model, found = open_value_model(folder), run(built(ChunkRerank(folder, 3, 4)), ASKED)
    for request in ASKED:
        completion = found[request.id]
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 3 else "length")
        assert len(completion.token_ids) == 12 or completion.finish_reason == "stop"
        assert completion.versions == ((0, 0),)
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
        with torch.no_grad():
            logp = POLICY(input_ids=ids).logits.log_softmax(-1)[0, len(request.prompt_ids) - 1 : -1]
        own = logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logp), own, atol=1e-5, rtol=0)
    # The first chunk is the best of those that there were.
    request = ASKED[0]
    short = replace(request, params=replace(PARAMS, max_tokens=4))
    tokens = list(dict.fromkeys(c.token_ids for c in candidates(short, 3)))
    best = tokens[int(values_of(model, [(*request.prompt_ids, *t) for t in tokens]).argmax())]
    assert found[request.id].token_ids[: len(best)] == best


def test_values_of_rows_of_any_length(folder):
    model = open_value_model(folder)
    rows = [tuple(range(1, 2 + i % 7)) for i in range(70)]
    with torch.no_grad():
        alone = torch.stack([model.values(torch.tensor([row]))[0, -1] for row in rows])
    torch.testing.assert_close(values_of(model, rows), alone, atol=1e-5, rtol=1e-5)


def test_refusals(folder, tmp_path):
    with pytest.raises(UserError, match="the folder does not exist"):
        built(BestOfN(str(tmp_path / "gone")))
    other = value_folder(tmp_path / "other", alphabet="abcdefghijklmnopX")
    with pytest.raises(UserError, match="different vocabularies"):
        built(ChunkRerank(str(other)))
    short = value_folder(tmp_path / "short", body=tiny("Qwen3", 1, max_position_embeddings=8))
    with pytest.raises(UserError, match="15 tokens, prompt and completion, exceed the 8 positions"):
        built(BestOfN(str(short))).add(ASKED[:1])
    with pytest.raises(UserError, match="8 samples at temperature 0 are all the same"):
        built(BestOfN(folder)).add([replace(ASKED[0], params=replace(PARAMS, temperature=0.0))])
    with pytest.raises(UserError, match="2 values per state"):
        built(BestOfN(str(value_folder(tmp_path / "streams", streams=2))))
    with pytest.raises(UserError, match="BestOfN does not steer logits; .*build_sampler"):
        CONFIG.build(site(POLICY, BestOfN(folder)), None)
    with pytest.raises(UserError, match="steers with no models"):
        built(BestOfN(folder)).add([replace(ASKED[0], params=replace(PARAMS, tilt=(1.0,)))])
