"""The order of a weight update, its deadline and its checks, with ends that only write down what is asked of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from alignment.engines.colocated import Colocated
from alignment.engines.transport import Patience, Published, Tally, compare, done, update_weights
from alignment.engines.transport_ends import LocalSender, LocalTarget
from alignment.errors import EngineFailed, UserError
from tests.engines.transport_fakes import BUCKETS, WEIGHTS, FakeSender, FakeTarget, Log, dies, never


def publish(log: Log, targets: int = 2, timeout_s: float = 60.0, **instead: Any) -> Published:
    """An update to version 7; ``instead`` is by end: ``learner``, ``engine_0``..."""
    sender = FakeSender("learner", log, instead.get("learner", {}))
    ends = [FakeTarget(f"engine {i}", log, instead.get(f"engine_{i}", {})) for i in range(targets)]
    return update_weights(sender, ends, 7, Patience("publishing policy version 7", timeout_s))


def test_order():
    log: Log = []
    published = publish(log)
    both = ("engine 0", "engine 1")
    expected = [*((e, "connect") for e in both), ("learner", "connect")]
    expected += [(e, "pause") for e in both] + [(e, "begin") for e in both] + [("learner", "gather 1")]
    for i in (1, 2, 3):  # receivers first, then the sender, and the next bucket is gathered meanwhile
        expected += [*((e, f"load {i}") for e in both), ("learner", "send"), ("learner", f"gather {i + 1}")]
    expected += [("learner", "finish"), *((e, "end") for e in both), *((e, "resume") for e in both)]
    assert log == expected
    assert published.metrics == {
        "publish_bytes": 4 * 6 * 4.0,
        "publish_tensors": 4.0,
        "publish_buckets": 3.0,
        "publish_changed": 1.0,
    }
    assert published.sent.version == 7


def test_new_weights_that_an_engine_cannot_tell_from_the_old_are_noticed(caplog):
    sender, target = FakeSender("learner", []), FakeTarget("engine", [])
    end = target.end
    target.end = lambda: done(lambda: replace(end().result(), unchanged_in="torch.bfloat16"))  # pyright: ignore
    update_weights(sender, [target], 7, Patience("", 60.0))
    assert "version 7 is new, but not one of its weights differs from the last in torch.bfloat16" in caplog.text


def test_whether_anything_changed():
    first = publish([])
    ends = FakeSender("learner", []), [FakeTarget("engine", [])]
    again = update_weights(*ends, 8, Patience("", 60.0), before=first.sent)
    assert again.metrics["publish_changed"] == 0.0
    other = replace(first.sent, checksum=first.sent.checksum ^ 1)
    ends = FakeSender("learner", []), [FakeTarget("engine", [])]
    assert update_weights(*ends, 8, Patience("", 60.0), before=other).metrics["publish_changed"] == 1.0


@pytest.mark.parametrize(
    ("end", "what", "message"),
    [
        ("engine_1", "connect", "waited 0.05 s for engine 1 to connect"),
        ("learner", "connect", "waited 0.05 s for learner to connect"),
        ("engine_0", "pause", "waited 0.05 s for engine 0 to pause"),
        ("engine_1", "begin", "waited 0.05 s for engine 1 to begin"),
        ("learner", "gather 1", "waited 0.05 s for learner to gather bucket 1"),
        ("engine_1", "load 2", "waited 0.05 s for engine 1 to pass on bucket 2"),
        ("learner", "send", "waited 0.05 s for learner to pass on bucket 1"),
        ("learner", "gather 3", "waited 0.05 s for learner to gather bucket 3"),
        ("learner", "finish", "waited 0.05 s for learner to finish"),
        ("engine_0", "end", "waited 0.05 s for engine 0 to end"),
        ("engine_0", "resume", "waited 0.05 s for engine 0 to resume"),
    ],
)
def test_who_does_not_come_is_named_and_all_abort(end: str, what: str, message: str):
    log: Log = []
    with pytest.raises(EngineFailed, match="publishing policy version 7: " + message.replace(".", r"\.") + "$"):
        publish(log, timeout_s=0.05, **{end: {what: never}})
    assert log[-3:] == [("learner", "abort"), ("engine 0", "abort"), ("engine 1", "abort")]
    # An engine with half an update never generates.
    assert what == "resume" or not any(step == "resume" for _, step in log)


def test_all_who_are_late_are_named():
    with pytest.raises(EngineFailed, match="for engine 0, engine 1, learner to pass on bucket 1"):
        publish([], timeout_s=0.05, engine_0={"load 1": never}, engine_1={"load 1": never}, learner={"send": never})


def test_a_dead_engine_ends_the_wait_for_the_others_at_once():
    log: Log = []
    # The learner and the other engine wait for the dead one on their wire, and would for the whole hour.
    stuck = {"learner": {"send": never}, "engine_0": {"load 2": never}}
    with pytest.raises(EngineFailed, match="engine 1 could not pass on bucket 2: RuntimeError: the process is gone"):
        publish(log, timeout_s=3600.0, engine_1={"load 2": dies()}, **{"engine_0": stuck["engine_0"]})
    assert log[-3:] == [("learner", "abort"), ("engine 0", "abort"), ("engine 1", "abort")]
    assert ("engine 0", "end") not in log


def test_an_error_that_the_user_can_mend_stays_as_it_is():
    def refuse() -> None:
        raise UserError("use another form")

    with pytest.raises(UserError, match="^use another form$") as raised:
        publish([], engine_0={"begin": lambda: done(refuse)})
    assert not isinstance(raised.value, EngineFailed)


def test_idle_is_called_while_waiting_and_may_end_it():
    calls = []

    def idle() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    log: Log = []
    sender, target = FakeSender("learner", log), FakeTarget("engine", log, {"load 1": never})
    with pytest.raises(KeyboardInterrupt):
        update_weights(sender, [target], 7, Patience("", 3600.0, idle))
    assert log[-2:] == [("learner", "abort"), ("engine", "abort")]


def lossy(change: Any) -> Any:
    """What an engine says that received something else."""
    tally = Tally()
    for bucket in BUCKETS:
        tally.add(bucket)
    return lambda: done(lambda: change(tally.received(7)))


def without(name: str) -> Any:
    return lambda r: replace(r, tensors=3, shapes={n: s for n, s in r.shapes.items() if n != name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, version=6), "its weights are version 6"),
        (without("layer.2.weight"), r"layer\.2\.weight did not arrive \(1 of 4 tensors\)"),
        (lambda r: replace(r, shapes=r.shapes | {"lm_head.weight": (2, 3)}), r"nobody sent lm_head\.weight"),
        (lambda r: replace(r, shapes=r.shapes | {"layer.0.weight": (3, 2)}), r"shape \[3, 2\] instead of \[2, 3\]"),
        (lambda r: replace(r, bytes=r.bytes - 1), "95 bytes, checksum .* instead of 4 tensors, 96 bytes"),
        (lambda r: replace(r, checksum=r.checksum ^ 1), "checksum 0x.* instead of .* checksum 0x"),
    ],
)
def test_what_arrived_must_be_what_was_sent(change: Any, message: str):
    log: Log = []
    with pytest.raises(EngineFailed, match=f"policy version 7: what engine 1 received .*{message}"):
        publish(log, engine_1={"end": lossy(change)})
    assert log[-1] == ("engine 1", "abort") and not any(step == "resume" for _, step in log)


def test_equal_records_pass():
    record = lossy(lambda r: r)().result()
    compare("learner", record, "engine", replace(record, shapes=dict(reversed(record.shapes.items()))))


class TestTally:
    def test_is_the_same_however_it_was_split(self):
        records = []
        for buckets in (BUCKETS, [WEIGHTS], list(reversed(BUCKETS))):
            tally = Tally()
            for bucket in buckets:
                tally.add(bucket)
            records.append(tally.received(1))
        assert records[0] == records[1] == records[2]
        assert records[0].tensors == 4 and records[0].bytes == 96 and records[0].shapes["layer.0.weight"] == (2, 3)

    def test_sees_contents_names_and_shapes(self):
        def of(weights: dict[str, torch.Tensor]) -> int:
            tally = Tally()
            tally.add(weights)
            return tally.checksum

        changed = WEIGHTS["layer.1.weight"].clone()
        changed[1, 1] += 1e-6
        swapped = {"layer.0.weight": WEIGHTS["layer.1.weight"], "layer.1.weight": WEIGHTS["layer.0.weight"]}
        variants = [WEIGHTS, WEIGHTS | {"layer.1.weight": changed}, WEIGHTS | swapped]
        assert len({of(v) for v in variants}) == 3

    def test_refuses_a_tensor_that_comes_twice(self):
        tally = Tally()
        tally.add(BUCKETS[0])
        with pytest.raises(ValueError, match=r"layer\.0\.weight, layer\.1\.weight came twice"):
            tally.add(BUCKETS[0])


class Module:
    """A learner whose weights are ``BUCKETS``, and an engine that keeps what comes."""

    def __init__(self) -> None:
        self.version, self.tally, self.updating, self.got = -1, Tally(), False, dict[str, torch.Tensor]()

    def weights(self, bucket_bytes: int, form: str = "merged"):
        assert (bucket_bytes, form) == (1 << 19, "adapter")
        yield from (dict(bucket) for bucket in BUCKETS)

    def begin_update(self, version: int) -> None:
        assert not self.updating
        self.version, self.tally, self.updating = version, Tally(), True

    def load(self, bucket: dict[str, torch.Tensor]) -> None:
        assert self.updating
        self.got |= bucket
        self.tally.add(bucket)

    def end_update(self):
        self.updating = False
        return self.tally.received(self.version)


def test_ends_in_this_process():
    sender = LocalSender(Module(), bucket_mb=0.5, form="adapter")
    engine = Module()
    for version in (1, 2):  # a second update starts from the first bucket again
        published = update_weights(sender, [LocalTarget(engine, "engine")], version, Patience("", 60.0))
        assert published.sent == engine.tally.received(version) and published.buckets == 3
    assert engine.got.keys() == WEIGHTS.keys()


def test_after_an_abort_the_next_update_starts_anew():
    sender, engine = LocalSender(Module(), 0.5, "adapter"), Module()
    broken = FakeTarget("engine", [], {"load 2": dies()})
    with pytest.raises(EngineFailed):
        update_weights(sender, [broken], 1, Patience("", 60.0))
    assert update_weights(sender, [LocalTarget(engine, "engine")], 2, Patience("", 60.0)).sent.tensors == 4


class Bed:
    """The sleeping engine, the transport and the learner of a GPU in turns."""

    def __init__(self, fails: bool = False) -> None:
        self.log: list[str] = []
        self.fails = fails

    def sleep(self) -> None:
        self.log.append("sleep")

    def wake(self, what: str) -> None:
        self.log.append(f"wake {what}")

    def publish(self, version: int) -> dict[str, float]:
        self.log.append(f"publish {version}")
        if self.fails:
            raise EngineFailed("gone")
        return {"publish_bytes": 1.0}


class TestColocated:
    def test_sleeps_before_the_learner_works_and_wakes_the_cache_last(self):
        bed = Bed()
        both = Colocated(bed, bed, lambda: bed.log.append("release"))
        assert both.publish(0) == {"publish_bytes": 1.0}
        for version in (1, 2):
            both.rest()
            both.rest()  # annotating and updating may both ask for it
            bed.log.append("learn")
            both.publish(version)
        turn = ["sleep", "learn", "release", "wake weights", "publish 1", "wake cache"]
        assert bed.log == ["publish 0", *turn, *(s.replace("1", "2") for s in turn)]

    def test_an_engine_whose_update_failed_gets_no_cache(self):
        bed = Bed(fails=True)
        both = Colocated(bed, bed)
        both.rest()
        with pytest.raises(EngineFailed):
            both.publish(1)
        assert bed.log == ["sleep", "wake weights", "publish 1"] and both.asleep
