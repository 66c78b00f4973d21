"""Models beside the policy: a critic that is trained with it, a prompt value model that a component fits."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.optimizer import Slot
from alignment.engines.roles import handles as handles_of
from alignment.engines.torch_learner import TorchLearner
from alignment.types import Batch, Prompt
from tests.engines.helpers import Reinforce, assert_close, learner_of, make_batch, tiny


class TinyCritic(nn.Module):
    """A value per token from the token itself and its place."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.out = nn.Embedding(19, 8), nn.Linear(8, 1)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.out(torch.tanh(self.token(ids_BT).cumsum(1)))[..., 0]


class CriticRole:
    """Regression of values on returns, in its own epochs and mini-batches."""

    provides = ("values",)

    def __init__(self, epochs: int = 2, minibatches: int = 2) -> None:
        torch.manual_seed(5)
        self.module: nn.Module = TinyCritic()
        self.slot: Slot | None = Slot(dict(self.module.named_parameters()), TorchLearnerConfig(lr=1e-2), 50)
        self.epochs, self.minibatches = epochs, minibatches

    def annotate(self, micro: Batch) -> Mapping[str, Tensor]:
        return {"values_BT": self.module(micro.ids_BT) * micro.loss_mask_BT}

    def prepare(self, minibatch: Batch) -> Batch:
        mask = minibatch.loss_mask_BT.float()
        return replace(minibatch, scale_BT=mask / mask.sum())

    def loss(self, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert micro.returns_BT is not None and micro.scale_BT is not None
        error_BT = torch.where(micro.loss_mask_BT, self.module(micro.ids_BT) - micro.returns_BT, 0) ** 2
        sums = {"tokens": micro.loss_mask_BT.sum(), "squared_error": error_BT.detach().sum()}
        return (micro.scale_BT * error_BT).sum(), sums

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"squared_error": float(sums["squared_error"] / sums["tokens"])}


def with_critic(**options: Any) -> TorchLearner:
    learner = learner_of(tiny(), **options)
    learner.add_role("critic", CriticRole())
    return learner


def with_returns(batch: Batch) -> Batch:
    return replace(batch, returns_BT=batch.ids_BT.float() / 19)


def critic_weights(learner: TorchLearner) -> dict[str, Tensor]:
    return dict(learner.roles["critic"].module.state_dict())


def test_a_critic_is_trained_in_its_own_epochs_whatever_the_split() -> None:
    batch = with_returns(make_batch(rows=12))
    whole, split = with_critic(), with_critic(micro_batch_tokens=24)
    start = {n: w.clone() for n, w in critic_weights(whole).items()}
    for _ in range(2):
        values = [learner.annotate(batch, {"values"}).values_BT for learner in (whole, split)]
        torch.testing.assert_close(*values)
        metrics = [learner.update(batch, Reinforce()) for learner in (whole, split)]
    assert metrics[0]["critic/optimizer_steps"] == 4 and metrics[0]["optimizer_steps"] == 1
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5)
    assert_close(critic_weights(split), critic_weights(whole))
    alone = learner_of(tiny())
    for _ in range(2):
        alone.update(batch, Reinforce())
    assert alone.fingerprint() == whole.fingerprint()  # the critic leaves the policy alone
    assert all(not torch.equal(w, start[n]) for n, w in critic_weights(whole).items())
    before = {n: w.clone() for n, w in critic_weights(whole).items()}
    whole.update(batch, Reinforce(), slot="sft")
    assert all(torch.equal(w, before[n]) for n, w in critic_weights(whole).items())
    errors = [whole.update(batch, Reinforce())["critic/squared_error"] for _ in range(20)]
    assert errors[-1] < 0.5 * errors[0]


class PromptValue:
    """A value per prompt, fitted by whoever named it in ``needs``."""

    provides = ()

    def __init__(self) -> None:
        torch.manual_seed(6)
        self.module: nn.Module = nn.Linear(2, 1)
        self.slot: Slot | None = Slot(dict(self.module.named_parameters()), TorchLearnerConfig(lr=0.1), 50)

    @property
    def version(self) -> int:
        assert self.slot is not None
        return self.slot.counts.updates

    def annotate(self, micro: Batch) -> Mapping[str, Tensor]:
        return {}

    def values(self, prompts: Any) -> Tensor:
        with torch.no_grad():
            return self._predict(prompts)

    def fit(self, prompts: Any, targets: Tensor) -> Mapping[str, float]:
        assert self.slot is not None
        self.slot.begin()
        loss = ((self._predict(prompts) - targets) ** 2).mean()
        loss.backward()
        return {"loss": self.slot.step(loss)[0]}

    def _predict(self, prompts: Any) -> Tensor:
        return self.module(torch.tensor([[1.0, float(p.row["difficulty"])] for p in prompts]))[:, 0]


def test_a_role_may_be_fitted_by_a_component_through_its_handle() -> None:
    learner = with_critic()
    learner.add_role("difficulty", PromptValue())
    handles = handles_of(learner.roles)
    assert list(handles) == ["difficulty"]
    learner.annotate(make_batch(), {"role:difficulty"})
    prompts = [Prompt(str(i), {"difficulty": i / 4}) for i in range(4)]
    targets = torch.tensor([1.0, 0.7, 0.4, 0.1])
    losses = [handles["difficulty"].fit(prompts, targets)["loss"] for _ in range(40)]
    assert losses[-1] < 0.1 * losses[0]
    assert handles["difficulty"].version == 40
    metrics = learner.update(with_returns(make_batch()), Reinforce())
    assert not [name for name in metrics if name.startswith("difficulty")]
    with pytest.raises(ValueError, match="a role 'difficulty' already"):
        learner.add_role("difficulty", PromptValue())
