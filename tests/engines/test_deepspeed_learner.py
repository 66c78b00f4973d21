"""The DeepSpeed learner as the driver of a run has it: two ranks on a live Ray cluster, against the torch learner."""

import os
import signal
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from alignment.algorithms.covariance import KlCov
from alignment.algorithms.masked_preferences import SparsePo
from alignment.algorithms.objective import Objective
from alignment.algorithms.preference_objective import PreferenceObjective
from alignment.algorithms.steer import Steer
from alignment.engines.config import Site
from alignment.engines.deepspeed_config import DeepSpeedLearnerConfig
from alignment.engines.deepspeed_learner import DeepSpeedLearner
from alignment.engines.learner_config import Learner, TorchLearnerConfig
from alignment.engines.object_store import finish_buckets, forget_buckets, put_bucket
from alignment.engines.packed import pack, unpack
from alignment.engines.ray_config import RayClusterConfig
from alignment.engines.token_masks import MASKS, MaskRoleSpec
from alignment.engines.torch_learner import TorchLearner
from alignment.engines.transport_ends import MEBI
from alignment.errors import EngineFailed, UserError
from alignment.origin import Origin
from alignment.recipe_sections import ModelConfig
from tests.engines.helpers import Reinforce, grpo, make_batch

BUILD = {"alphabet": "0123456789+-*/=()", "hidden_size": 16, "layers": 2, "heads": 2, "kv_heads": 2}
MODEL = ModelConfig.model_validate({"build": BUILD | {"intermediate_size": 24, "max_positions": 64}})
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "micro_batch_tokens": 40, "max_skipped_steps": 2}


def batch(step: int = 0):
    made = make_batch(9, step)
    return replace(made, step=step, ids_BT=made.ids_BT.clamp(max=16))


@dataclass(frozen=True)
class Broken(Reinforce):
    """Not finite, or wrong: on every rank or on the last alone."""

    how: str = "nan"

    def loss(self, logp_BT, entropy_BT, micro):
        loss, sums = super().loss(logp_BT, entropy_BT, micro)
        if self.how == "die" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "refuse":
            raise UserError("not like this: do that")
        if self.how == "alone" and os.environ["RANK"] == "1":
            raise ValueError("only here")
        return loss * (torch.nan if self.how == "nan" else 1.0), sums


class Opener:
    """Makes learners of two ranks."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.idle = 0

    def __call__(self, roles: dict[str, Any] | None = None, **options: Any) -> DeepSpeedLearner:
        config = DeepSpeedLearnerConfig(**{"ranks": 2, "timeout_s": 120.0, "zero_stage": 3, **OPTIONS, **options})
        origin = Origin(MODEL, seed=1)
        site = Site(replace(origin.make(weights=False), origin=origin), idle=self._idle)
        stage = SimpleNamespace(learner=config, sampler=None)
        cluster = self.stack.enter_context(RayClusterConfig(start_timeout_s=120.0).open(stage, site))
        learner = config.build(replace(site, cluster=cluster), 50, 7, reference=True, roles=roles)
        self.stack.callback(learner.close)
        return learner

    def _idle(self) -> None:
        self.idle += 1


@pytest.fixture(scope="module")
def opener(live_ray):
    with ExitStack() as stack:
        yield Opener(stack)


@pytest.fixture(scope="module")
def shared(opener, tmp_path_factory):
    """One learner for all, and its beginning."""
    learner, folder = opener(), tmp_path_factory.mktemp("beginning")
    learner.save(folder)
    return learner, folder


@pytest.fixture
def learner(shared) -> DeepSpeedLearner:
    """The learner as it was when it was made."""
    learner, folder = shared
    learner.restore(folder)
    return learner


def embedded(roles: dict[str, Any] | None = None, **options: Any) -> TorchLearner:
    config = TorchLearnerConfig(device="cpu", **OPTIONS, **options)
    return TorchLearner(Origin(MODEL, seed=1).make().module, config, 50, 7, reference=True, roles=roles)


def next_bucket(learner: DeepSpeedLearner, bucket_bytes: int, form: Any = "merged") -> dict[str, torch.Tensor] | None:
    """As the transport through the object store takes it: from all ranks together, put by the first."""
    peers, size_mb = learner.peers(), bucket_bytes / MEBI
    answers = [peer.call(put_bucket, rank == 0, size_mb, form) for rank, peer in enumerate(peers)]
    first, *others = [answer.result(60) for answer in answers]
    assert others == [None]
    return None if first is None else unpack(ray.get(first.bucket))


def whole(learner: DeepSpeedLearner, bucket_bytes: int = 2000) -> dict[str, torch.Tensor]:
    found: list[dict[str, torch.Tensor]] = []
    while (bucket := next_bucket(learner, bucket_bytes)) is not None:
        found.append({name: tensor.clone() for name, tensor in bucket.items()})
    sent = [peer.call(finish_buckets, 3) for peer in learner.peers()][0].result(60)
    assert len(found) > 3 and sent.version == 3 and sent.tensors == sum(map(len, found))
    return {name: tensor for bucket in found for name, tensor in bucket.items()}


def test_two_ranks_are_the_torch_learner(opener, learner, tmp_path):
    torch_learner = embedded()
    as_protocol: Any = learner
    assert isinstance(as_protocol, Learner) and not hasattr(learner, "module")
    assert learner.device == torch.device("cpu") and learner.of_prompts == () and learner.needs == frozenset()
    for step in range(3):
        needs = {"old_logp", "reference", "entropy", "entropy_drift"}
        annotated, expected = (each.annotate(batch(step), needs) for each in (learner, torch_learner))
        for name in ("old_logp_BT", "ref_logp_BT", "entropy_BT", "entropy_drift_BT"):
            torch.testing.assert_close(getattr(annotated, name), getattr(expected, name), rtol=0, atol=1e-4)
        # STEER asks for the policy before each step: a pass of all ranks together between two steps.
        objective = grpo(epochs=2, minibatches=2, entropy_controls=(Steer(omega="exact"), KlCov(share=0.2)))
        ours, theirs = learner.update(annotated, objective), torch_learner.update(expected, objective)
        assert ours.keys() == theirs.keys() and ours["read_tokens"] > 0
        assert {k: pytest.approx(v, rel=1e-3, abs=1e-4) for k, v in theirs.items()} == ours
    assert annotated.adv_BT is not None
    adv_KBT, asked = torch.stack([annotated.adv_BT, annotated.adv_BT.cos()]), replace(grpo(), update_norm=True)
    grams = [each.gram(annotated, asked, adv_KBT) for each in (learner, torch_learner)]
    torch.testing.assert_close(*grams, rtol=1e-3, atol=1e-5)
    norms = [each.update(annotated, asked)["update_norm"] for each in (learner, torch_learner)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert opener.idle > 0, "a run is looked after while it waits"

    sent = whole(learner)
    for name, tensor in dict(torch_learner.module.named_parameters()).items():
        torch.testing.assert_close(sent[name], tensor.detach(), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="^the model has no LoRA adapter to send"):
        next_bucket(learner, 1000, "adapter")
    for peer in learner.peers():
        peer.call(forget_buckets)

    learner.save(tmp_path / "saved")
    before = learner.fingerprint()
    one = learner.update(batch(9), Objective.supervised(), slot="sft")
    assert learner.fingerprint() != before
    learner.restore(tmp_path / "saved")
    assert learner.fingerprint() == before
    assert learner.update(batch(9), Objective.supervised(), slot="sft") == one
    learner.refresh_reference()
    learner.release()


def test_masks_of_tokens_are_learned_in_its_processes(opener):
    loss = SparsePo(beta=0.5, dropout=0.0, l1_ratio=0.02)
    roles, objective = {MASKS: MaskRoleSpec(loss.token_masks, seed=2)}, PreferenceObjective([(loss, None)])
    learner, torch_learner = opener(roles, eps=1e-3), embedded(roles, eps=1e-3)
    for step in range(2):
        pairs = replace(batch(step), side_B=torch.tensor([1, -1] * 4 + [2], dtype=torch.int8))
        ours, expected = (
            each.update(each.annotate(pairs, objective.needs), objective) for each in (learner, torch_learner)
        )
        assert ours == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in expected.items()}
        assert ours["masks/grad_norm"] > 0 and ours["pairs"] == 3


def test_transports_reach_every_rank(learner):
    peers = learner.peers()
    assert [peer.name[:14] for peer in peers] == ["learner rank 0", "learner rank 1"]
    answers = [peer.call(rank_of, "rank") for peer in peers]
    assert [answer.result(60) for answer in answers] == ["rank 0 of 2", "rank 1 of 2"]
    refused: Future[Any] = peers[1].call(refuse)
    error = refused.exception(60)
    assert type(error) is UserError and str(error) == "this rank does not"
    first = whole(learner)
    next_bucket(learner, 2000)
    for peer in peers:
        peer.call(forget_buckets)  # given up half way
    second = whole(learner, 2500)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rank_of(learner: Any, word: str) -> str:
    return f"{word} {learner.backend.share.rank} of {learner.backend.share.ranks}"


def refuse(learner: Any) -> None:
    raise UserError("this rank does not")


def test_errors_are_those_of_the_ranks(learner):
    with pytest.raises(ValueError, match="^nothing provides") as raised:
        learner.annotate(batch(), {"values"})
    assert type(raised.value) is ValueError
    with pytest.raises(UserError, match="^not like this: do that$"):
        learner.update(batch(), Broken(how="refuse"))
    before = learner.fingerprint()
    assert learner.update(batch(), Broken())["skipped_steps"] == 1
    with pytest.raises(FloatingPointError, match="2 optimizer steps in a row") as stopped:
        learner.update(batch(), Broken())
    assert type(stopped.value) is FloatingPointError and "Traceback" not in str(stopped.value)
    assert learner.fingerprint() == before, "after errors of all ranks they are still together"


@pytest.mark.full
def test_ranks_that_are_apart_are_not_waited_for_again(opener):
    learner = opener()
    with pytest.raises(ValueError, match="^only here$"):
        learner.update(batch(), Broken(how="alone"))
    with pytest.raises(EngineFailed, match="cannot fingerprint: its ranks are no longer together since.*only here"):
        learner.fingerprint()
    learner.close()
    learner.close()


def test_a_wait_can_be_given_up_and_the_next_call_is_answered(learner):
    expected = embedded()

    class Enough(Exception):
        """What a stop raises."""

    def stop() -> None:
        raise Enough

    site = learner.site
    learner.site = replace(site, idle=stop)
    with pytest.raises(Enough):
        for step in range(50):  # one of them takes long enough to be waited for
            expected.update(batch(step), grpo())
            learner.update(batch(step), grpo())
    learner.site = site
    for name, tensor in whole(learner).items():
        torch.testing.assert_close(tensor, expected.module.state_dict()[name], rtol=0, atol=1e-2)


def test_a_dead_rank_is_named_and_nothing_is_tried_again(learner, tmp_path):
    """The last test of this learner."""
    pid = learner.cluster.places[learner.actors[1]._actor_id.hex()].pid
    with pytest.raises(EngineFailed, match=rf"^learner rank 1 \(process {pid} on .*the learner to update"):
        learner.update(batch(), Broken(how="die"))
    with pytest.raises(EngineFailed, match=f"cannot save: .*process {pid}"):
        learner.save(tmp_path)


def test_it_needs_a_cluster():
    site = Site(Origin(MODEL, 1).make(weights=False))
    with pytest.raises(UserError, match="cluster: ray"):
        DeepSpeedLearnerConfig().build(site, 1, 0)


def test_packed_tensors_are_the_same_without_a_copy():
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "c": torch.tensor(3),
    }
    packed = pack(tensors)
    for _, array in packed.values():
        array.flags.writeable = False  # as in Ray's store
    back = unpack(packed)
    assert all(back[name].dtype == t.dtype and torch.equal(back[name], t) for name, t in tensors.items())
    assert back["a"].data_ptr() == tensors["a"].data_ptr() and isinstance(packed["b"][1], np.ndarray)
