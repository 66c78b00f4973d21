"""What every learner does, wherever its weights are. It is blind to the algorithm."""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alignment.algorithms.objective import combine
from alignment.batching import split_minibatches
from alignment.engines.backend import Backend, Kept
from alignment.engines.learner_config import LearnerOptions
from alignment.engines.logprobs import Entropy, evaluating
from alignment.engines.optimizer import Slot
from alignment.engines.roles import Goal, Role, TrainedRole
from alignment.tensorfile import copy_into, read_tensors, write_tensors
from alignment.types import Batch, keyed_seed

MAIN_SLOT = "rl"
POLICY_NEEDS = {"old_logp", "entropy", "reference"}


class PolicyObjective(Goal, Protocol):
    """What the learner asks of :class:`alignment.algorithms.objective.Objective`."""

    @property
    def wants_entropy_grad(self) -> bool:
        """Whether the loss uses the entropy, beyond reporting it."""
        ...

    def loss(self, logp_BT: Tensor, entropy_BT: Tensor | None, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the mini-batch's loss, and sums for metrics."""
        ...


@dataclass(frozen=True)
class _PolicyGoal:
    """The objective with the policy's forward pass in front of it."""

    backend: Backend
    objective: PolicyObjective
    entropy: Entropy

    def loss(self, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logp_BT, entropy_BT = self.backend.logprobs(micro, self.entropy)
        if not micro.loss_mask_BT.any():  # a row that stands in where a rank has none: all ranks go backward together
            return logp_BT.sum(), {}
        return self.objective.loss(logp_BT, entropy_BT, micro)


class PolicyLearner:
    """Annotates batches and trains on them, over the weights of a backend.

    Args:
        backend: Holds the weights, and whatever is unlike between one process and several. Outside :meth:`update` its
            module is in evaluation mode.
        config: Options.
        total_updates: Length of the schedule: calls of :meth:`update` in one slot.
        seed: Of dropout, the only random choice here: its numbers depend on (seed, slot, number of the update, rank).
        reference: Keep the weights of now as the reference. Nothing is kept while a LoRA adapter is fresh: the
            reference is then the model without it.
    """

    def __init__(
        self, backend: Backend, config: LearnerOptions, total_updates: int, seed: int, reference: bool = False
    ) -> None:
        self.backend, self.config, self.total_updates, self.seed = backend, config, total_updates, seed
        self.device, self.module, self.trained = backend.device, backend.module, backend.trained
        self.has_adapter = hasattr(self.module, "disable_adapter")
        self.logprobs = backend.logprobs
        self.slots: dict[str, Slot] = {MAIN_SLOT: backend.slot(total_updates)}
        self.roles: dict[str, Role] = {}
        self.reference: Kept | None = None
        if reference and not backend.fresh_adapter:
            self.refresh_reference()

    @property
    def needs(self) -> frozenset[str]:
        """``old_logp`` where dropout makes the update's own log-probabilities differ from the policy's."""
        functional = getattr(self.module.config, "attention_dropout", 0.0)
        active = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.module.modules()) or bool(functional)
        return frozenset({"old_logp"} if active else ())

    # Annotation

    def annotate(self, batch: Batch, needs: Collection[str]) -> Batch:
        """The batch with what is needed filled in, without gradients or dropout, on the batch's own device.

        Rows without a token to train on, and tokens outside the loss mask, get 0.

        Args:
            batch: From :func:`alignment.batching.collate`.
            needs: Of ``old_logp``, ``entropy``, ``reference``, what roles provide (``values``), and ``role:NAME``.

        Raises:
            ValueError: Nothing here provides one of the needs.
        """
        needs = set(needs)
        known = POLICY_NEEDS | {p for r in self.roles.values() for p in r.provides} | {f"role:{n}" for n in self.roles}
        if needs - known:
            raise ValueError(f"nothing provides {sorted(needs - known)}; this learner provides {sorted(known)}")
        moved, budget, fields = batch.to(self.device), self.config.micro_batch_tokens, dict[str, Tensor]()
        share = self.backend.share
        modules = [self.module, *(r.module for r in self.roles.values())]
        with torch.no_grad(), evaluating(*modules), self.backend.computing():
            if needs & {"old_logp", "entropy"}:
                wanted = {f"{need}_BT" for need in needs & {"old_logp", "entropy"}}
                scored = share.compute(moved, budget, lambda micro: self._annotate_policy(micro, "entropy" in needs))
                fields |= {name: scored[name] for name in scored.keys() & wanted}
            if "reference" in needs:
                with self._reference_weights():
                    fields |= share.compute(moved, budget, lambda micro: {"ref_logp_BT": self.logprobs(micro)[0]})
            for name, role in self.roles.items():
                if needs & {*role.provides, f"role:{name}"}:
                    fields |= share.compute(moved, budget, role.annotate)
        fields = self.backend.assembled(fields)
        return replace(batch, **{name: value.to(batch.ids_BT.device) for name, value in fields.items()})

    def _annotate_policy(self, micro: Batch, entropy: bool) -> dict[str, Tensor]:
        logp_BT, entropy_BT = self.logprobs(micro, "value" if entropy else "none")
        return {"old_logp_BT": logp_BT} | ({} if entropy_BT is None else {"entropy_BT": entropy_BT})

    # Reference

    def refresh_reference(self, mode: str = "copy") -> None:
        """Makes the reference a frozen copy of the policy's trained weights as they are now.

        Raises:
            ValueError: ``mode`` is not ``"copy"``.
        """
        if mode != "copy":
            raise ValueError(f"the reference can be refreshed by 'copy', not by {mode!r}")
        self.reference = self.backend.keep()

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """The module computes the reference's log-probabilities inside."""
        if self.reference is None and self.has_adapter:
            with self.module.disable_adapter():  # pyright: ignore[reportCallIssue]
                yield
            return
        if self.reference is None:
            if any(slot.counts.steps for slot in self.slots.values()):
                raise ValueError(
                    "the policy has been trained and no reference was kept from before; "
                    "build the learner with reference=True"
                )
            self.refresh_reference()
        assert self.reference is not None
        with self.backend.using(self.reference):
            yield

    # Update

    def slot(self, name: str) -> Slot:
        """The optimizer ``name`` over the policy's weights, made when first asked for."""
        if name not in self.slots:
            self.slots[name] = self.backend.slot(self.total_updates)
        return self.slots[name]

    def add_role(self, name: str, role: Role) -> None:
        """Puts a model beside the policy, on the learner's device.

        Raises:
            ValueError: The name is taken, or the role is to be trained and has no slot.
        """
        if name in self.roles:
            raise ValueError(f"there is a role {name!r} already")
        if isinstance(role, TrainedRole) and role.slot is None:
            raise ValueError(f"role {name!r} has a loss but no slot to train with")
        role.module.to(self.device).eval()
        self.roles[name] = role

    def update(self, batch: Batch, objective: PolicyObjective, slot: str = MAIN_SLOT) -> dict[str, float]:
        """Trains the policy on ``batch`` and, in the slot ``"rl"``, the trained roles after it.

        Returns:
            The objective's metrics over the mini-batches that were stepped on, with ``loss`` and ``grad_norm`` as
            means over them, ``lr``, ``tokens`` trained on (again in every epoch), and counts:
            ``optimizer_steps``, ``skipped_steps`` (numbers were not finite), ``empty_minibatches`` (nothing to train
            on, so no step). A role's are prefixed ``NAME/``.

        Raises:
            FloatingPointError: Too many steps in a row had no finite numbers.
            ValueError: A row is longer than ``micro_batch_tokens``.
        """
        batch, own = batch.to(self.device), self.slot(slot)
        policy = _PolicyGoal(self.backend, objective, "gradient" if objective.wants_entropy_grad else "value")
        modules = [self.module, *(r.module for r in self.roles.values())]
        cuda = [self.device] if self.device.type == "cuda" else []
        rank = self.backend.share.rank
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(keyed_seed(self.seed, "dropout", slot, own.counts.begun, *([rank] if rank else [])))
            for module in modules:
                module.train()
            try:
                metrics = self._fit(objective, policy.loss, batch, own)
                for name, role in self.roles.items() if slot == MAIN_SLOT else ():
                    if isinstance(role, TrainedRole) and role.slot is not None:
                        fitted = self._fit(role, role.loss, batch, role.slot)
                        metrics |= {f"{name}/{key}": value for key, value in fitted.items()}
            finally:
                for module in modules:
                    module.eval()
        return metrics

    def _fit(
        self, goal: Goal, loss_of: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]], batch: Batch, slot: Slot
    ) -> dict[str, float]:
        """All epochs and mini-batches of one update in one slot."""
        sums: dict[str, Tensor] = {}
        outcomes: list[tuple[float, float, bool]] = []
        slot.begin()
        empty = 0
        for epoch in range(goal.epochs):
            key = keyed_seed("minibatches", batch.seed, batch.step, epoch)
            for rows in split_minibatches(batch, goal.minibatches, key):
                minibatch = goal.prepare(batch.rows(rows))
                if not minibatch.loss_mask_BT.any():
                    empty += 1
                    continue
                loss, parts = self._backward(loss_of, minibatch)
                outcomes.append(slot.step(loss))
                if outcomes[-1][2] and parts:
                    sums = combine(sums, parts)
        taken = [(loss, norm) for loss, norm, stepped in outcomes if stepped]
        sums = self.backend.joined(sums)
        metrics = {"tokens": 0.0} | (goal.finish(sums) if sums else {})
        if taken:
            metrics["loss"] = sum(loss for loss, _ in taken) / len(taken)
            metrics["grad_norm"] = sum(norm for _, norm in taken) / len(taken)
        return metrics | {
            "lr": slot.lr,
            "optimizer_steps": float(len(taken)),
            "skipped_steps": float(len(outcomes) - len(taken)),
            "empty_minibatches": float(empty),
        }

    def _backward(
        self, loss_of: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]], minibatch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of a mini-batch, accumulated over this rank's micro-batches; its part of the loss and of sums."""
        total, sums = torch.zeros((), device=self.device), dict[str, Tensor]()
        micros = self.backend.share.micro_batches(minibatch, self.config.micro_batch_tokens)
        for i, (_, micro) in enumerate(micros):
            with self.backend.computing():
                loss, parts = loss_of(micro)
            self.backend.backward(loss, last=i == len(micros) - 1)
            total += loss.detach()
            if parts:
                sums = combine(sums, parts)
        return total, sums

    # Persistence

    def fingerprint(self) -> str:
        """SHA-256 over all of the policy's weights."""
        return self.backend.fingerprint()

    def save(self, folder: Path) -> None:
        """Writes trained weights, optimizer moments, a copied reference, roles and counters.

        Weights that are not trained (the base under LoRA) are recorded by their checksum only.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.write(folder / "policy.safetensors")
        if self.reference is not None:
            self.backend.write(folder / "reference.safetensors", self.reference)
        record: dict[str, Any] = {"frozen": self.backend.frozen(), "reference": self.reference is not None}
        record["slots"] = {name: slot.save(folder / f"slot-{name}") for name, slot in self.slots.items()}
        record["roles"] = {}
        for name, role in self.roles.items():
            write_tensors(folder / f"role-{name}.safetensors", role.module.state_dict())
            record["roles"][name] = None if role.slot is None else role.slot.save(folder / f"role-{name}-slot")
        if self.backend.share.rank == 0:
            (folder / "learner.json").write_text(json.dumps(record, indent=1))

    def restore(self, folder: Path) -> None:
        """Continues exactly from what :meth:`save` wrote, in place.

        Raises:
            ValueError: Names, shapes or types of weights, the frozen base, or the roles are not those of this learner.
        """
        record = json.loads((folder / "learner.json").read_text())
        if record["frozen"] != self.backend.frozen():
            raise ValueError(f"{folder} belongs to another base model: the weights that are not trained differ")
        if record["roles"].keys() != self.roles.keys():
            raise ValueError(f"{folder} has roles {sorted(record['roles'])} and this learner {sorted(self.roles)}")
        self.backend.read(folder / "policy.safetensors")
        self.reference = self.backend.read_kept(folder / "reference.safetensors") if record["reference"] else None
        self.slots = {MAIN_SLOT: self.backend.slot(self.total_updates)}
        for name, counts in record["slots"].items():
            self.slot(name).restore(folder / f"slot-{name}", counts)
        for name, role in self.roles.items():
            own = role.module.state_dict()
            copy_into(own, read_tensors(folder / f"role-{name}.safetensors", own))
            if role.slot is not None:
                role.slot.restore(folder / f"role-{name}-slot", record["roles"][name])

    def close(self) -> None:
        """Ends whatever it started; may be called twice."""
        self.backend.close()


__all__ = ["MAIN_SLOT", "PolicyLearner", "PolicyObjective"]
