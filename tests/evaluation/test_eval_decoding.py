"""`align eval --decoding`: what it does, that no decoding takes another's completions, and mistakes."""

import json
import shutil

import pytest

from alignment.evaluation.decoding import choose_decoding, decoding_identity, describe_decoding, shown_decoding
from tests.engines.guided import value_folder
from tests.engines.helpers import tiny
from tests.evaluation.evaluated import ALPHABET, align, character_model, records, results

TASKS = ("--tasks", "gcd", "--max-tokens", 6, "--samples", 2, "--temperature", 1.0, "--limit", 8)
VOCABULARY = len(ALPHABET) + 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two policies and two value models in a folder, where commands are run."""
    folder = tmp_path_factory.mktemp("decoding")
    for seed, name in enumerate(("policy", "tuned", "base")):
        character_model(folder / name, seed)
    for seed, name in enumerate(("critic", "other")):
        value_folder(folder / name, seed, alphabet=ALPHABET, body=tiny("Qwen3", seed, vocab_size=VOCABULARY))
    value_folder(folder / "stranger")
    (folder / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def evaluated(*arguments, output=None):
    where = () if output is None else ("--output", output)
    return align("eval", "policy", *TASKS, *where, *arguments)


def completions(folder):
    return [s["completion"] for line in records(folder, "gcd") for s in line["samples"]]


ALL = {
    "value_augmented": ("--set", "decoding.models=critic", "--set", "decoding.beta=30"),
    "emulated": ("--set", "decoding.tuned=tuned", "--set", "decoding.base=base", "--set", "decoding.strength=20"),
    "best_of_n": ("--set", "decoding.model=critic", "--set", "decoding.n=4"),
    "chunk_rerank": ("--set", "decoding.model=critic", "--set", "decoding.chunk_tokens=2"),
    "plain": (),
}


def test_every_decoding_evaluates_and_results_say_so(place):
    found = {}
    for name, options in ALL.items():
        done = evaluated("--decoding", name, *options)
        assert done.exit_code == 0, done.output
        folder = place / "evaluations" / ("policy" if name == "plain" else f"policy-{name}")
        assert results(folder).get("decoding", {"name": "plain"})["name"] == name
        found[name] = completions(folder)
    assert len({tuple(texts) for texts in found.values()}) == len(ALL)
    assert evaluated(output="without").exit_code == 0 and completions("without") == found["plain"]


def test_completions_are_taken_up_by_the_same_decoding_only(place):
    value = ("--decoding", "value_augmented", "--set", "decoding.models=critic")
    assert evaluated(*value, output="kept").exit_code == 0
    once = completions("kept")
    # In another folder under another name it is the same value model.
    shutil.copytree("critic", "moved", dirs_exist_ok=True)
    lines = (place / "kept" / "gcd" / "samples.jsonl").read_text().splitlines(keepends=True)
    (place / "kept" / "gcd" / "samples.jsonl").write_text("".join(lines[:-3]))
    again = evaluated("--decoding", "value_augmented", "--set", "decoding.models=[moved]", output="kept")
    assert again.exit_code == 0, again.output
    assert completions("kept") == once
    for other, named in (
        ((), "decoding"),
        ((*value, "--set", "decoding.beta=1"), "decoding.beta: 3.0 there, 1.0 now"),
        (("--decoding", "value_augmented", "--set", "decoding.models=other"), "decoding.weights"),
    ):
        refused = evaluated(*other, output="kept")
        assert refused.exit_code == 2 and named in refused.output and "differs" in refused.output, refused.output


def test_two_decodings_are_compared(place):
    assert evaluated(output="a").exit_code == 0
    named = ("--decoding", "{name: best_of_n, model: critic, n: 3}", "--set", "decoding.n=2")
    assert evaluated(*named, output="b").exit_code == 0
    assert results("b")["decoding"]["n"] == 2
    compared = align("eval", "--compare", "a", "b")
    assert compared.exit_code == 0, compared.output
    flat = " ".join(compared.output.split())
    assert "B: policy, decoded by best_of_n (model critic, n 2, beta None, dtype float32), in b" in flat
    assert "A: policy in a" in flat and "they were decoded differently: plain in A, best_of_n" in flat
    found = json.loads(align("eval", "--compare", "a", "b", "--json").stdout)
    assert found["a"]["decoding"] == "plain" and "gcd" in found["tasks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--decoding", "value_augmentd"), "there is no decoding 'value_augmentd'; did you mean 'value_augmented'?"),
        (("--set", "decoding.beta=3"), "--set decoding.beta: give --decoding NAME as well"),
        (("--decoding", "3"), "give a name, or a mapping"),
        (("--decoding", "value_augmented"), "decoding.models: 'value_augmented' needs it"),
        (("--decoding", "value_augmented", "--set", "decoding.modles=critic"), "did you mean 'models'?"),
        (("--decoding", "value_augmented", "--set", "decoding.models=gone"), "gone: the folder does not exist"),
        (("--decoding", "value_augmented", "--set", "decoding.models=empty"), "empty: the folder holds no value_model"),
        (
            ("--decoding", "value_augmented", "--set", "decoding.models=[critic,other]", "--set", "decoding.beta=[1]"),
            "beta has 1 numbers for 2 value models",
        ),
        (
            ("--decoding", "value_augmented", "--set", "decoding.models=critic", "--set", "decoding.beta=much"),
            "decoding.beta: ",
        ),
        (
            ("--decoding", "value_augmented", "--set", "decoding.models=stranger"),
            "stranger and the policy policy have different vocabularies",
        ),
        (("--decoding", "best_of_n", "--set", "decoding.model=stranger"), "have different vocabularies"),
        (("--decoding", "emulated", "--set", "decoding.tuned=gone", "--set", "decoding.base=base"), "no model folder"),
    ],
)
def test_mistakes_are_told_in_plain_words(place, arguments, message):
    done = evaluated(*arguments, output="mistake")
    assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
    assert "Traceback" not in done.output and not (place / "mistake").exists()


def test_what_is_kept_of_a_decoding(place):
    one = describe_decoding(choose_decoding("value_augmented", {"models": "critic"}))
    assert one is not None and len(one["weights"]) == 1
    assert decoding_identity(one) == decoding_identity({**one, "models": ["elsewhere"]})
    assert decoding_identity(one) != decoding_identity({**one, "top_k": 3})
    assert choose_decoding("plain", {}) is None and shown_decoding(None) == "plain"


def test_decodings_are_listed():
    done = align("list", "decodings")
    assert done.exit_code == 0 and all(name in done.output for name in ALL)
    assert "strength of each model" in " ".join(align("list", "decodings", "value_augmented").output.split())
