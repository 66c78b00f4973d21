"""The driver's handle of a DeepSpeed learner: its ranks are Ray actors, and all of them get every call."""

import gc
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from torch import Tensor

from alignment.engines.config import Site
from alignment.engines.deepspeed_config import DeepSpeedLearnerConfig
from alignment.errors import EngineFailed, UserError
from alignment.origin import Origin
from alignment.types import Batch

T = TypeVar("T")
GRACE_S = 5.0
"""When a rank fails, how long the others may take to fail alike, as they do when a batch or a file is wrong."""


class LearnerRank:
    """One rank, as an actor: it holds a :class:`alignment.engines.deepspeed_rank.DeepSpeedRank`.

    Args:
        origin: Where every rank gets the same model from.
        config: Options.
        total_updates: As the learner's.
        seed: As the learner's.
        reference: As the learner's.
        roles: As the learner's.
    """

    def __init__(
        self,
        origin: Origin,
        config: DeepSpeedLearnerConfig,
        total_updates: int,
        seed: int,
        reference: bool,
        roles: Mapping[str, Any],
    ) -> None:
        self.origin, self.config, self.arguments = origin, config, (total_updates, seed, reference, roles)
        self.learner: Any = None

    def start(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """Meets the other ranks and makes the models; what the learner needs annotated, and its roles of prompts."""
        from alignment.engines.deepspeed_rank import DeepSpeedRank, join_ranks

        rank, ranks, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        join_ranks(rank, ranks, self.config.timeout_s, local)
        self.learner = DeepSpeedRank(self.origin.make().module, self.config, *self.arguments)
        return self.learner.needs, self.learner.of_prompts

    def annotate(self, batch: Batch, needs: Collection[str]) -> dict[str, Tensor]:
        """The fields that are new; of the first rank, since all have the same."""
        done = self.learner.annotate(batch, needs)
        if self.learner.backend.share.rank:
            return {}
        names = [field.name for field in fields(done)]
        return {name: getattr(done, name) for name in names if getattr(done, name) is not getattr(batch, name)}

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """``function(learner, *args)``."""
        return function(self.learner, *args)

    def ask(self, method: str, *args: Any) -> Any:
        """What the learner's ``method`` returns."""
        return getattr(self.learner, method)(*args)

    def release(self) -> None:
        """Gives memory of the GPU that is cached and not used back."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class RankPeer:
    """One rank for a transport; see :class:`alignment.engines.transport_ends.Peer`."""

    def __init__(self, actor: Any, name: str) -> None:
        self.actor, self.name = actor, name

    def call(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Runs ``function(rank, *args)`` in the rank's process, after all that was called before."""
        answer: Future[T] = Future()

        def finish(done: Future[T]) -> None:
            error = done.exception()
            if error is None:
                answer.set_result(done.result())
            else:
                answer.set_exception(_cause(error))

        self.actor.call.remote(function, *args).future().add_done_callback(finish)
        return answer


class DeepSpeedLearner:
    """Trains the policy in ``config.ranks`` processes that the cluster of ``site`` places.

    Batches come from the memory of the CPU; each travels once and every rank reads it. Errors of a rank are raised as
    the rank raised them.

    Args:
        site: The model, of which only :attr:`alignment.models.Model.origin` is used, and the cluster.
        config: Options.
        total_updates: Length of the schedule: calls of :meth:`update` in one slot.
        seed: Of dropout: its numbers depend on (seed, slot, number of the update, rank).
        reference: Keep the weights of now as the reference.
        roles: Models beside the policy, by name; a text is another name for one of them.

    Raises:
        UserError: There is no cluster, or nothing to train.
        EngineFailed: A rank could not be started.
    """

    def __init__(
        self,
        site: Site,
        config: DeepSpeedLearnerConfig,
        total_updates: int,
        seed: int,
        reference: bool = False,
        roles: Mapping[str, Any] | None = None,
    ) -> None:
        if site.cluster is None:
            raise UserError("learner deepspeed: its ranks are processes of their own, so the stage needs cluster: ray")
        assert site.model.origin is not None, "processes of their own make the model themselves"
        self.site, self.config, self.cluster = site, config, site.cluster
        self.device = torch.device("cpu")
        self._broken: str | None = None
        """Why the ranks no longer answer together."""
        arguments = (site.model.origin, config, total_updates, seed, reference, dict(roles or {}))
        self.actors: list[Any] = self.cluster.learner_actors(LearnerRank, config.ranks, *arguments)
        self.needs: frozenset[str]
        """``old_logp`` where dropout makes the update's own log-probabilities differ from the policy's."""
        self.of_prompts: tuple[str, ...]
        """Models beside the policy that say something of prompts, by each of their names."""
        self.needs, self.of_prompts = self._all("start")[0]

    def annotate(self, batch: Batch, needs: Collection[str]) -> Batch:
        """The batch with what is needed filled in.

        Raises:
            ValueError: Nothing here provides one of the needs.
        """
        return replace(batch, **self._all("annotate", ray.put(batch), frozenset(needs))[0])

    def update(self, batch: Batch, objective: Any, slot: str = "rl") -> dict[str, float]:
        """Trains on ``batch``; metrics as of :meth:`alignment.engines.policy_learner.PolicyLearner.update`.

        Raises:
            FloatingPointError: Too many steps in a row had no finite numbers.
            ValueError: A row is longer than ``micro_batch_tokens``.
        """
        return self._ask("update", ray.put(batch), ray.put(objective), slot)[0]

    def gram(self, batch: Batch, objective: Any, adv_KBT: Tensor, layers: str | None = None) -> Tensor:
        """As :meth:`alignment.engines.policy_learner.PolicyLearner.gram`.

        Raises:
            ValueError: No trained weight's name has ``layers``, a regular expression, in it.
        """
        return self._ask("gram", ray.put(batch), ray.put(objective), ray.put(adv_KBT), layers)[0]

    def predict(self, name: str, prompts: Sequence[Sequence[int]]) -> Tensor:
        """``[len(prompts)]`` float32: the value that a role gives to the state at the end of each prompt's tokens."""
        return self._ask("predict", name, prompts)[0]

    def fit(self, name: str, prompts: Sequence[Sequence[int]], targets: Tensor) -> dict[str, float]:
        """Trains a role of prompts on ``targets`` ``[len(prompts)]``; metrics."""
        return self._ask("fit", name, prompts, targets)[0]

    def updates_of(self, name: str) -> int:
        """How many updates a role has had."""
        return self._ask("updates_of", name)[0]

    def refresh_reference(self, share: float = 1.0) -> None:
        """Moves the reference towards the policy's trained weights as they are now; by default the whole way.

        Raises:
            ValueError: ``share`` is not above 0 and at most 1, or is below 1 and there is no reference to move.
        """
        self._ask("refresh_reference", share)

    def merge_adapter(self, number: int) -> bool:
        """As :meth:`alignment.engines.learner_config.Learner.merge_adapter`."""
        return self._ask("merge_adapter", number)[0]

    def save(self, folder: Path) -> None:
        """Every rank writes its part to ``folder``, which all of them have to see, and the first what is whole."""
        self._ask("save", folder.absolute())

    def restore(self, folder: Path) -> None:
        """Continues from what :meth:`save` wrote: exactly, if there were as many ranks.

        Raises:
            ValueError: Names, shapes or types of weights, or the frozen base, are not those of this learner.
        """
        self._ask("restore", folder.absolute())

    def fingerprint(self) -> str:
        """SHA-256 over all of the policy's weights."""
        return self._ask("fingerprint")[0]

    def peers(self) -> list[RankPeer]:
        """The ranks, for a transport, which takes their weights from all of them together."""
        return [RankPeer(actor, self.cluster.name_of(actor)) for actor in self.actors]

    def release(self) -> None:
        """Ranks give memory of their GPUs that they have cached and do not use back."""
        self._all("release")

    def close(self) -> None:
        """Ends the ranks; may be called twice."""
        while self.actors:
            self.cluster.kill(self.actors.pop())
        self._broken = "it was closed"

    def _ask(self, method: str, *args: Any) -> list[Any]:
        """What the method of every rank's learner returned."""
        return self._all("ask", method, *args, what=method.replace("_", " "))

    def _all(self, method: str, *args: Any, what: str | None = None) -> list[Any]:
        """What every actor's method returned."""
        what = what or method
        self._check(what)
        return self._wait([getattr(actor, method).remote(*args) for actor in self.actors], what)

    def _check(self, what: str) -> None:
        if self._broken is not None:
            raise EngineFailed(f"the learner cannot {what}: {self._broken}")

    def _wait(self, refs: list[Any], what: str) -> list[Any]:
        """The ranks' answers.

        Raises:
            EngineFailed: A rank died, or there was no answer in time. Nothing is tried again.
        """
        given_up = False

        def idle() -> None:
            nonlocal given_up
            given_up = True  # unless it comes back
            self.site.idle()
            given_up = False

        try:
            return self.cluster.wait(refs, f"the learner to {what}", self.config.timeout_s, idle)
        except (UserError, RayError) as error:
            if given_up:
                raise
            cause = _cause(error)
            if isinstance(cause, EngineFailed) or not _all_failed(refs):
                self._broken = f"its ranks are no longer together since {type(cause).__name__}: {cause}"
            if cause is error:
                raise
            raise cause from error


def _cause(error: BaseException) -> BaseException:
    """What an actor raised, as it raised it, if it is something that a learner is known to raise."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, (ValueError, FloatingPointError)) else error


def _all_failed(refs: list[Any]) -> bool:
    """Whether every rank came out of the call with an error, so that none is left waiting for another."""
    ready, pending = ray.wait(refs, num_returns=len(refs), timeout=GRACE_S)
    failed = 0
    for ref in ready:
        try:
            ray.get(ref)
        except RayError:
            failed += 1
    return not pending and failed == len(ready)


__all__ = ["DeepSpeedLearner", "LearnerRank", "RankPeer"]
