"""The queue in front of several engines: nothing lost or doubled, and work that is shared out evenly."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.engines.routing import Router
from alignment.types import Completion, Request, SamplingParams


def group(name: str, samples: int = 2, max_tokens: int = 8) -> list[Request]:
    prompt = tuple(name.encode())
    return [Request(f"{name}.{i}", prompt, SamplingParams(max_tokens), i) for i in range(samples)]


def done(request: Request, tokens: int = 1) -> Completion:
    return Completion(request.id, (1,) * tokens, (0.0,) * tokens, "stop", ((0, 0),))


def test_requests_of_a_prompt_go_to_one_engine_and_prompts_are_shared_out():
    router = Router("ab", capacity=4)
    router.add([r for name in "pqrs" for r in group(name)])
    given_to = router.dispatch()
    assert [len(requests) for _, requests in given_to] == [2, 2, 2, 2]
    assert [engine for engine, _ in given_to] == ["a", "b", "a", "b"]
    assert all(len({r.prompt_ids for r in requests}) == 1 for _, requests in given_to)


def test_a_full_engine_gets_nothing_and_the_rest_waits_for_whoever_is_free_first():
    router = Router("ab", capacity=2)
    router.add([r for name in "pqr" for r in group(name)])
    first = router.dispatch()
    assert len(first) == 2 and router.dispatch() == []
    slow, quick = first
    for request in quick[1]:
        assert router.finished(done(request))
    assert router.dispatch() == [(quick[0], group("r"))]
    assert router.where["r.0"] == quick[0] and router.where[slow[1][0].id] == slow[0]


def test_the_longest_of_a_wave_goes_first_and_an_earlier_wave_before_a_later():
    router = Router("a", capacity=1)
    router.add([*group("short", 1, 2), *group("long", 1, 9)])
    router.add(group("longest", 1, 99))
    order = []
    while router.pending:
        ((_, (request,)),) = router.dispatch()
        order.append(request.id)
        router.finished(done(request, 2))
    assert order == ["long.0", "short.0", "longest.0"]


def test_what_an_engine_had_goes_to_another_before_what_waits():
    router = Router("ab", capacity=2)
    router.add([r for name in "pqr" for r in group(name)])
    ((_, lost), _) = router.dispatch()
    router.finished(done(lost[0]))
    router.leave("a")
    assert router.dispatch() == [], "b is full"
    router.join("c")
    assert router.dispatch() == [("c", lost[1:]), ("c", group("r"))]
    assert not router.finished(done(lost[0])), "it was delivered"


def test_aborted_requests_are_named_by_engine_and_their_completions_are_nobodys():
    router = Router("a", capacity=1)
    router.add([*group("p", 1), *group("q", 1)])
    router.dispatch()
    assert router.abort(["p.0", "q.0", "unknown"]) == {"a": ["p.0"]}
    assert router.pending == 0 and router.dispatch() == [] and not router.finished(done(group("p", 1)[0]))


@settings(deadline=None)
@given(st.data())
def test_every_request_is_completed_exactly_once_whoever_dies(data):
    engines, capacity = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    router = Router(range(engines), capacity)
    expected, completed, added, alive = set(), [], 0, engines
    running: dict[object, list[Request]] = {}
    for step in range(60):
        action = data.draw(st.sampled_from(["add", "finish", "die", "join"]))
        if action == "add" and added < 20:
            requests = group(f"g{added}", data.draw(st.integers(1, 4)), data.draw(st.integers(1, 50)))
            expected |= {r.id for r in requests}
            router.add(requests)
            added += 1
        elif action == "finish" and any(running.values()):
            engine = data.draw(st.sampled_from([e for e, has in running.items() if has]))
            request = running[engine].pop(data.draw(st.integers(0, len(running[engine]) - 1)))
            completed += [request.id] * router.finished(done(request, data.draw(st.integers(1, 50))))
        elif action == "die" and running:
            engine = data.draw(st.sampled_from(list(running)))
            del running[engine]
            router.leave(engine)
            alive -= 1
        elif action == "join":
            router.join(f"new {step}")
            alive += 1
        for engine, requests in router.dispatch():
            running.setdefault(engine, []).extend(requests)
            assert len(running[engine]) < capacity + len(requests)
    if not alive:
        router.join("last")
    while router.pending:
        for engine, requests in router.dispatch():
            running.setdefault(engine, []).extend(requests)
        for requests in running.values():
            while requests:
                completed += [r.id for r in [requests.pop()] if router.finished(done(r))]
    assert sorted(completed) == sorted(expected)


@pytest.mark.parametrize("engines", [2, 8])
def test_work_is_within_the_bound_of_the_longest_first_rule(engines):
    """Graham: at most ``4/3 - 1/(3 n)`` of the best possible, here of the mean load or the longest."""
    lengths = [1 + (7 * i * i) % 97 for i in range(40)]
    router = Router(range(engines), capacity=1)
    router.add([r for i, length in enumerate(lengths) for r in group(f"g{i}", 1, length)])
    clock, running = [0.0] * engines, {}
    while router.pending:
        for engine, (request,) in router.dispatch():
            clock[engine] += request.params.max_tokens
            running[engine] = request
        first = min(running, key=lambda engine: clock[engine])
        router.finished(done(running.pop(first), 10**6))  # so long that every guess is max_tokens
    best = max(sum(lengths) / engines, max(lengths))
    assert max(clock) <= (4 / 3 - 1 / (3 * engines)) * best + 1e-9
