"""The reward model's loss and gradients beside those of TRL's ``RewardTrainer``: the same weights, tokens and rows."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from alignment.algorithms.reward_losses import BradleyTerry, RewardObjective
from alignment.algorithms.value_losses import Scalar
from alignment.engines.backend import OneProcess
from alignment.engines.gradients import accumulate
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.reward_roles import draw_head
from alignment.engines.value_model import ValueModel, ValueShape
from alignment.origin import Origin
from tests.engines.helpers import assert_close
from tests.test_preference_trl import MODEL, ROWS, Both

MICRO_BATCH = 24


def theirs(
    model: ValueModel, tokenizer: Any, folder: Any, rows: Any, **options: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """TRL's loss of all rows, with their column ``margin`` if they have one, and its gradients under our names."""
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    other: Any = AutoModelForSequenceClassification.from_config(config)
    other.model.load_state_dict(model.body.state_dict())
    with torch.no_grad():
        other.score.weight.copy_(model.head.linear.weight)
    common = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    sizes = {"per_device_train_batch_size": len(rows), "max_length": 32}
    args = RewardConfig(output_dir=str(folder), disable_dropout=True, **common, **sizes, **options)
    # TRL puts the end of sequence behind a row that lacks it
    trainer = RewardTrainer(model=other, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    named = {"score.weight": "head.linear.weight"}
    grads = {named.get(n, n.replace("model.", "body.", 1)): p.grad for n, p in trainer.model.named_parameters()}
    return float(loss.detach()), grads


@pytest.mark.parametrize("margins", [None, (0.5, 0.0, 1.0, 2.0)], ids=["plain", "margins"])
@pytest.mark.parametrize("centring", [0.0, 0.05])
def test_loss_and_gradients_are_those_of_trl(tmp_path, centring, margins):
    made = Origin(MODEL, seed=1).make()
    model = ValueModel.of(made.module, ValueShape(Scalar()))
    draw_head(model, 3)
    options = {"center_rewards_coefficient": centring} if centring else {}
    marked = [{**row, "margin": m} for row, m in zip(ROWS, margins, strict=True)] if margins else ROWS
    loss, grads = theirs(model, made.tokenizer, tmp_path, marked, **options)
    both = Both(tmp_path)
    scores = [{"chosen_score": 3.0 + m, "rejected_score": 3.0} for m in margins or ()] or [{}] * len(ROWS)
    rows = [{**row, **score} for row, score in zip(ROWS, scores, strict=True)]
    pairs = [both.pair(i, row) for i, row in enumerate(rows)]
    reward_B = torch.tensor([math.nan if r.reward is None else r.reward for pair in pairs for r in pair.rollouts])
    batch = replace(both.batch(pairs, mismatched=False), reward_B=reward_B)
    backend = OneProcess(model, TorchLearnerConfig(), plain=True)
    objective = RewardObjective(BradleyTerry("scores" if margins else "none", centring), Scalar())
    ours, _ = accumulate(
        backend, lambda m: objective.loss(backend.forward(m.ids_BT), m), objective.prepare(batch), MICRO_BATCH
    )
    assert float(ours) == pytest.approx(loss, abs=1e-5)
    own = {name: p.grad for name, p in backend.trained.items() if p.grad is not None}
    bias = own.pop("head.linear.bias")  # TRL's head has none; differences do not see it
    assert bias.abs().max() < 1e-6 or centring
    assert_close(own, grads, 1e-4)
