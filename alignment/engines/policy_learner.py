"""What every learner does, wherever its weights are. It is blind to the algorithm."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from alignment.algorithms.objective import combine
from alignment.batching import split_minibatches
from alignment.engines.backend import Backend, Kept
from alignment.engines.gradients import Part, accumulate, gram_of
from alignment.engines.learner_config import LearnerOptions
from alignment.engines.learner_files import restore_learner, save_learner
from alignment.engines.logprobs import evaluating
from alignment.engines.masked_goal import goal_of
from alignment.engines.optimizer import Slot, step_metrics
from alignment.engines.policy_goal import PASS_NEEDS, PolicyGoal, PolicyObjective, Reader, fields_of_pass
from alignment.engines.roles import Goal, RoleSpec, TrainedRole
from alignment.engines.value_roles import Roles, prompt_batch
from alignment.types import Batch, keyed_seed

MAIN_SLOT = "rl"
POLICY_NEEDS = PASS_NEEDS | {"reference"}


class PolicyLearner:
    """Annotates batches and trains on them, over the weights of a backend.

    Args:
        backend: Holds the weights, and whatever is unlike between one process and several. Outside :meth:`update` its
            module is in evaluation mode.
        config: Options.
        total_updates: Length of the schedule: calls of :meth:`update` in one slot.
        seed: Of dropout, the only random choice here: its numbers depend on (seed, slot or role, number of its update,
            rank).
        reference: Keep the weights of now as the reference. Nothing is kept while a LoRA adapter is fresh: the
            reference is then the model without it.
        roles: Models beside the policy, by name; a text is another name for one of them.
    """

    def __init__(
        self,
        backend: Backend,
        config: LearnerOptions,
        total_updates: int,
        seed: int,
        reference: bool = False,
        roles: Mapping[str, RoleSpec | str] | None = None,
    ) -> None:
        self.backend, self.config, self.total_updates, self.seed = backend, config, total_updates, seed
        self.device, self.module, self.trained = backend.device, backend.module, backend.trained
        self.has_adapter = hasattr(self.module, "disable_adapter")
        self.slots: dict[str, Slot] = {MAIN_SLOT: backend.slot(total_updates)}
        self.roles = Roles()
        self.reference: Kept | None = None
        for name, spec in (roles or {}).items():
            if isinstance(spec, str):
                self.roles.names[name] = spec
            else:
                self.roles.add(name, spec.build(backend, config, total_updates))
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
            needs: Of :data:`POLICY_NEEDS`, what roles provide (``values``), and ``role:NAME``.

        Raises:
            ValueError: Nothing here provides one of the needs.
        """
        needs = set(needs)
        named = {f"role:{name}" for name in (*self.roles, *self.roles.names)}
        known = POLICY_NEEDS | {p for r in self.roles.values() for p in r.provides} | named
        if needs - known:
            raise ValueError(f"nothing provides {sorted(needs - known)}; this learner provides {sorted(known)}")
        moved, budget, fields = batch.to(self.device), self.config.micro_batch_tokens, dict[str, Tensor]()
        share = self.backend.share
        with torch.no_grad(), evaluating(*self._modules()), self.backend.computing():
            own = needs & PASS_NEEDS | (needs & {"values"} if self.roles.head else set())
            if own:
                scored = share.compute(moved, budget, lambda micro: self._annotate_policy(micro, own))
                fields |= {name: scored[name] for name in scored.keys() & {f"{need}_BT" for need in own}}
            if "reference" in needs:
                with self._reference_weights():
                    fields |= share.compute(
                        moved, budget, lambda micro: {"ref_logp_BT": self.backend.forward(micro)[0]}
                    )
            for role in self.roles.values():
                if needs & set(role.provides) and role is not self.roles.head:
                    fields |= role.backend.share.compute(moved, budget, role.annotate)
        fields = self.backend.assembled(fields)
        return replace(batch, **{name: value.to(batch.ids_BT.device) for name, value in fields.items()})

    def _annotate_policy(self, micro: Batch, needs: Collection[str]) -> dict[str, Tensor]:
        found, output = fields_of_pass(self.backend, micro, needs)
        if output and self.roles.head is not None:
            found |= self.roles.head.read(output[0], micro)
        return found

    def _modules(self) -> list[nn.Module]:
        return [self.module, *(role.backend.module for role in self.roles.values())]

    # Reference

    def refresh_reference(self, share: float = 1.0) -> None:
        """Moves the reference towards the policy's trained weights as they are now; by default the whole way.

        Raises:
            ValueError: ``share`` is not above 0 and at most 1, or is below 1 and there is no reference to move.
        """
        if not 0 < share <= 1:
            raise ValueError(f"the reference can go a share of the way that is above 0 and at most 1, not {share}")
        now = self.backend.keep()
        if share == 1:
            self.reference = now
            return
        if self.reference is None:
            raise ValueError("there is no reference that could move: refresh it as a whole first")
        for name, tensor in now.items():
            self.reference[name].lerp_(tensor, share)

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

    def merge_adapter(self, number: int) -> bool:
        """As :meth:`alignment.engines.learner_config.Learner.merge_adapter`."""
        merged = self.backend.merge_adapter(keyed_seed(self.seed, "adapter", number))
        self.reference = None
        for name, slot in self.slots.items() if merged else ():
            self.slots[name] = self.backend.slot(self.total_updates).follow(slot)
        return merged

    # Update

    def slot(self, name: str) -> Slot:
        """The optimizer ``name`` over the policy's weights, made when first asked for."""
        if name not in self.slots:
            self.slots[name] = self.backend.slot(self.total_updates)
        return self.slots[name]

    @property
    def of_prompts(self) -> tuple[str, ...]:
        """Roles that say something of prompts, by each of their names."""
        return self.roles.of_prompts

    def updates_of(self, name: str) -> int:
        """How many updates a role has had."""
        role = self.roles.named(name)
        slot = self.slots[MAIN_SLOT] if role is self.roles.head else role.slot
        return 0 if slot is None else slot.counts.updates

    def predict(self, name: str, prompts: Sequence[Sequence[int]]) -> Tensor:
        """``[len(prompts)]`` float32: the value that a role gives to the state at the end of each prompt's tokens."""
        batch, last_B = prompt_batch(prompts), torch.tensor([len(ids) - 1 for ids in prompts])
        role, budget = self.roles.named(name), self.config.micro_batch_tokens
        with torch.no_grad(), evaluating(*self._modules()), role.backend.computing():
            fields = role.backend.share.compute(batch.to(self.device), budget, role.annotate)
        return self.backend.assembled(fields)["values_BT"].to("cpu")[torch.arange(len(prompts)), last_B]

    def fit(self, name: str, prompts: Sequence[Sequence[int]], targets: Tensor) -> dict[str, float]:
        """Trains a role of prompts on ``targets`` ``[len(prompts)]``; metrics as those of :meth:`update`.

        A role that is trained on batches is not trained here as well, and has no metrics.
        """
        role = self.roles.named(name)
        if not role.of_prompts:
            return {}
        assert isinstance(role, TrainedRole) and role.slot is not None
        batch = prompt_batch(prompts, targets).to(self.device)
        with self._training():
            return self._fit(name, role, role.loss, batch, role.slot, role.backend)

    def update(self, batch: Batch, objective: PolicyObjective | None, slot: str = MAIN_SLOT) -> dict[str, float]:
        """Trains the policy on ``batch`` and, in the slot ``"rl"``, the trained roles after it.

        Args:
            batch: With everything that was credited.
            objective: Of the policy; None leaves the policy as it is and trains roles alone.
            slot: Whose optimizer; the name of a role trains that role alone.

        Returns:
            The objective's metrics over the mini-batches that were stepped on, with ``loss`` and ``grad_norm`` as
            means over them, ``lr``, ``tokens`` trained on (again in every epoch), ``update_norm`` if the objective
            asks (how far the policy's trained weights moved, as the model computes with them), and counts:
            ``optimizer_steps``, ``skipped_steps`` (not finite), ``empty_minibatches`` (nothing to train on, so no
            step), ``fitted_tokens`` (of whole rows, prompts included, that a pass went over and back) and, where
            mini-batches were read again before their steps, ``read_tokens`` (of whole rows). A role's are prefixed
            ``NAME/``; what learns masks of tokens has ``masks/grad_norm``.

        Raises:
            FloatingPointError: Too many steps in a row had no finite numbers.
            ValueError: A row is longer than ``micro_batch_tokens``.
        """
        batch, metrics = batch.to(self.device), dict[str, float]()
        if slot in self.roles:
            role = self.roles[slot]
            assert isinstance(role, TrainedRole) and role.slot is not None and objective is None
            with self._training():
                return self._fit(slot, role, role.loss, batch, role.slot, role.backend)
        own = self.slot(slot)
        with self._training():
            if objective is not None:
                head = self.roles.head if slot == MAIN_SLOT else None
                reader = Reader(self.annotate)
                plain = PolicyGoal(self.backend, objective, reader, own.counts, head)
                policy = goal_of(plain, self._reference_weights, self.roles)
                before = self.backend.keep() if objective.update_norm else None
                policy.begin()
                found = self._fit(slot, policy, policy.loss, batch, own, self.backend, objective.lr_factor)
                metrics |= {"tokens": 0.0} | found | policy.end(found)
                metrics |= {"read_tokens": float(reader.tokens)} if reader.tokens else {}
                if before is not None:
                    metrics["update_norm"] = self.backend.distance(before)
            for name, role in self.roles.items() if slot == MAIN_SLOT else ():
                if isinstance(role, TrainedRole) and role.slot is not None and not role.of_prompts:
                    fitted = self._fit(name, role, role.loss, batch, role.slot, role.backend)
                    metrics |= {f"{name}/{key}": value for key, value in fitted.items()}
        return metrics

    def gram(self, batch: Batch, objective: PolicyObjective, adv_KBT: Tensor, layers: str | None = None) -> Tensor:
        """As :func:`alignment.engines.gradients.gram_of`: of the objective over the whole of ``batch``, KL and entropy
        terms included, with the dropout of the next update. K passes forward and backward; nothing is trained.
        """
        counts = self.slots[MAIN_SLOT].counts
        batch, goal = batch.to(self.device), PolicyGoal(self.backend, objective, self.annotate, counts)

        def gradient_of(adv_BT: Tensor) -> None:
            with self._training():
                self._seed_dropout(MAIN_SLOT, self.slots[MAIN_SLOT])
                stream = goal.prepare(replace(batch, adv_BT=adv_BT.to(self.device)))
                accumulate(self.backend, goal.loss, stream, self.config.micro_batch_tokens)

        if not batch.loss_mask_BT.any():
            return torch.zeros(len(adv_KBT), len(adv_KBT), dtype=torch.float64)
        return gram_of(self.backend, gradient_of, adv_KBT, layers)

    def _seed_dropout(self, name: str, slot: Slot) -> None:
        rank = self.backend.share.rank
        torch.manual_seed(keyed_seed(self.seed, "dropout", name, slot.counts.begun, *([rank] if rank else [])))

    @contextmanager
    def _training(self) -> Iterator[None]:
        """All modules are in training mode inside, and global random state is afterwards what it was."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            for module in self._modules():
                module.train()
            try:
                yield
            finally:
                for module in self._modules():
                    module.eval()

    def _fit(
        self,
        name: str,
        goal: Goal,
        loss_of: Callable[[Batch], Part],
        batch: Batch,
        slot: Slot,
        backend: Backend,
        lr_factor: float = 1.0,
    ) -> dict[str, float]:
        """All epochs and mini-batches of one update in one slot, with dropout's numbers those of this update of it."""
        self._seed_dropout(name, slot)
        sums: dict[str, Tensor] = {}
        outcomes: list[tuple[float, float, bool]] = []
        slot.begin(lr_factor)
        empty = fitted = 0
        for epoch in range(goal.epochs):
            key = keyed_seed("minibatches", batch.seed, batch.step, epoch)
            for rows in split_minibatches(batch, goal.minibatches, key):
                minibatch = goal.prepare(batch.rows(rows))
                if not minibatch.loss_mask_BT.any():
                    empty += 1
                    continue
                fitted += int(minibatch.length_B.sum())
                loss, parts = accumulate(backend, loss_of, minibatch, self.config.micro_batch_tokens)
                outcomes.append(slot.step(loss))
                if outcomes[-1][2] and parts:
                    sums = combine(sums, parts)
        sums = self.backend.joined(sums)
        metrics = goal.finish(sums) if sums else {}
        counts = {"empty_minibatches": float(empty), "fitted_tokens": float(fitted)}
        return metrics | {"lr": slot.lr} | step_metrics(outcomes) | counts

    # Persistence

    def fingerprint(self) -> str:
        """SHA-256 over all of the policy's weights."""
        return self.backend.fingerprint()

    def save(self, folder: Path) -> None:
        """Writes trained weights, optimizer moments, a copied reference, roles and counters.

        Weights that are not trained (the base under LoRA) are recorded by their checksum only.
        """
        save_learner(self, folder)

    def restore(self, folder: Path) -> None:
        """Continues exactly from what :meth:`save` wrote, in place.

        Raises:
            ValueError: Names, shapes or types of weights, the frozen base, or the roles are not those of this learner.
        """
        restore_learner(self, folder, MAIN_SLOT)

    def close(self) -> None:
        """Ends whatever it started; may be called twice."""
        for role in self.roles.values():
            role.backend.close()
        self.backend.close()


__all__ = ["MAIN_SLOT", "PolicyLearner", "PolicyObjective"]
