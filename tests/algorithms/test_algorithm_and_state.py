"""The bundle as a recipe states it, its needs, and the state of its components."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
from pydantic import TypeAdapter, ValidationError

from alignment.algorithms.advantages import Grpo, Rloo
from alignment.algorithms.aggregations import Constant
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.corrections import Tis
from alignment.algorithms.entropy_controls import Bonus
from alignment.algorithms.kl_penalties import K1, K2
from alignment.algorithms.policy_losses import Clip
from alignment.algorithms.state import fresh, needs_of, observe, report
from alignment.registry import REGISTRIES

ADAPTER = TypeAdapter(Algorithm)
KINDS = {
    "advantages": {"grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "opo"},
    "policy_losses": {"reinforce", "clip", "gspo", "cispo", "grpo_guard"},
    "aggregations": {"token_mean", "sequence_mean", "sequence_sum", "constant"},
    "kl_penalties": {"k1", "k2", "k3", "k3_straight_through"},
    "corrections": {"tis", "icepop", "sequence_tis", "sequence_mask", "geometric_mask"},
    "weightings": {"fixed", "normalised", "normalise_then_sum", "hypervolume", "gradient", "lagrangian", "ensemble"}
    | {"recap"},
    "entropy_controls": {"bonus", "adaptive_bonus", "high_entropy", "steer", "clip_cov", "kl_cov", "shuffled"},
    "mixers": {"none", "blend", "hpt", "relift", "luffy", "srft", "amft", "grao"},
}


REQUIRED = {
    "constant": {"length": 9},
    "lagrangian": {"thresholds": {"b": 0.5}},
    "ensemble": {"members": ["a", "b"]},
    "shuffled": {"of": {"name": "steer", "lambda_min": 0.5}},
}
"""Options without a default."""


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_registered_and_described(kind):
    registry = REGISTRIES[kind]
    assert KINDS[kind] <= set(registry.names())
    for entry in [e for e in registry if e.cls.__module__.startswith("alignment.")]:  # other tests register their own
        assert entry.summary
        assert entry.source
        assert all(option["description"] for option in entry.options())


@pytest.mark.parametrize("kind", KINDS)
def test_a_component_survives_being_written_to_a_recipe_and_read_back(kind):
    registry = REGISTRIES[kind]
    for name in KINDS[kind]:
        made = registry.build({"name": name, **REQUIRED.get(name, {})})
        assert registry.build(registry.dump(made)) == made


def test_a_recipe_mapping_becomes_the_components():
    algorithm = ADAPTER.validate_python(
        {
            "advantage": {"name": "grpo", "normalise": "none"},
            "policy_loss": {"name": "clip", "clip_high": 0.28},
            "aggregation": {"name": "constant", "length": 128},
            "kl": {"name": "k1", "coefficient": 0.01},
            "entropy_controls": ["bonus", {"name": "bonus", "coefficient": 0.1}],
            "correction": None,
            "epochs": 2,
        }
    )
    assert algorithm == Algorithm(
        advantage=Grpo(normalise="none"),
        policy_loss=Clip(clip_high=0.28),
        aggregation=Constant(128),
        kl=K1(coefficient=0.01),
        entropy_controls=(Bonus(), Bonus(coefficient=0.1)),
        correction=None,
        epochs=2,
    )
    assert ADAPTER.validate_python({}) == Algorithm()
    assert ADAPTER.validate_python({}).correction == Tis()


@pytest.mark.parametrize(
    ("mapping", "where"),
    [
        ({"advantage": "gpro"}, ("advantage",)),
        ({"policy_loss": {"name": "clip", "clip_hihg": 0.28}}, ("policy_loss", "clip_hihg")),
        ({"policy_loss": {"name": "clip", "clip_low": -1}}, ("policy_loss", "clip_low")),
        ({"aggregation": "constant"}, ("aggregation", "length")),
        ({"entropy_controls": ["bonus", "bonsu"]}, ("entropy_controls", 1)),
        ({"epochs": 0}, ("epochs",)),
        ({"epoch": 1}, ("epoch",)),
    ],
)
def test_mistakes_are_found_where_they_are(mapping, where):
    with pytest.raises(ValidationError) as caught:
        ADAPTER.validate_python(mapping)
    assert caught.value.errors()[0]["loc"][: len(where)] == where


@dataclass(frozen=True)
class Mix:
    """A weighting of advantages."""

    streams: ClassVar[bool] = True


def test_a_kl_in_the_reward_has_no_stream_of_its_own():
    with pytest.raises(ValueError, match="set kl.apply_to to 'loss'"):
        Algorithm(kl=K1(), weighting=Mix())
    Algorithm(kl=K2(), weighting=Mix())


def test_components_by_their_place_in_the_recipe():
    names = ["advantage", "policy_loss", "aggregation", "weighting", "mixer"]
    assert sorted(Algorithm(correction=None).components()) == sorted(names)
    full = Algorithm(kl=K2(), entropy_controls=(Bonus(), Bonus()))
    extra = ["kl", "correction", "entropy_controls.0", "entropy_controls.1"]
    assert sorted(full.components()) == sorted(names + extra)


@dataclass(frozen=True)
class Counter:
    """Counts what it is shown."""

    needs: ClassVar[tuple[str, ...]] = ("entropy", "role:prompt_value")

    def init(self):
        return {"seen": 0}

    def observe(self, state, signals):
        return {"seen": state["seen"] + signals.metrics["n"]}

    def metrics(self, state):
        return {"seen": state["seen"]}


def test_needs_are_collected():
    assert needs_of(Clip()) == ()
    assert needs_of(Counter()) == ("entropy", "role:prompt_value")
    assert Algorithm().needs == frozenset()
    assert Algorithm(kl=K2()).needs == {"reference"}
    assert Algorithm(kl=K1(), entropy_controls=(Counter(),)).needs == {  # pyright: ignore[reportArgumentType]
        "reference",
        "old_logp",
        "entropy",
        "role:prompt_value",
    }


def test_states_are_made_and_updated_by_name_and_others_are_kept():
    components = {"advantage": Rloo(), "a": Counter(), "kl": K2(target=0.1)}
    states = fresh(components)
    assert states == {"a": {"seen": 0}, "kl": {"coefficient": 0.001}}
    signals = SimpleNamespace(metrics={"n": 3}, batch=[])
    after = observe(components, {**states, "curricula.0": [1]}, signals)
    assert after == {"a": {"seen": 3}, "kl": {"coefficient": 0.001}, "curricula.0": [1]}
    assert states["a"] == {"seen": 0}
    with pytest.raises(KeyError):
        observe(components, {}, signals)


def test_what_components_say_of_their_states_is_named_by_their_place():
    assert report({"curricula.0": Counter(), "advantage": Rloo()}, {"curricula.0": {"seen": 3}}) == {
        "curricula.0/seen": 3.0
    }
