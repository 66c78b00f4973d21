"""Losses of preferences and their gradients beside those of TRL's trainers: the same weights, reference and tokens.

A trainer of TRL computes with its own ``compute_loss``, from the rows as it tokenised them; we with the learner, in
micro-batches. Where we mean something else, a test says what, and compares what is common.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl.data_utils import unpair_preference_dataset

from alignment.algorithms.binary_preferences import Bco, Kto
from alignment.algorithms.preference_objective import PreferenceObjective
from alignment.algorithms.preferences import Dpo, Hinge, Ipo, LengthNormalizedDpo, Nll, Orpo, RobustDpo, Simpo
from alignment.batching import collate
from alignment.data.demonstrations import Shown, encode_demonstrations
from alignment.data.sides import columns_of, pair_of
from alignment.engines.gradients import accumulate
from alignment.engines.policy_goal import PolicyGoal
from alignment.engines.torch_learner import TorchLearner
from alignment.models import encode_prompt
from alignment.origin import Origin
from alignment.pairings import compared
from alignment.recipe_sections import ModelConfig
from alignment.types import Batch, Group, Prompt
from tests.engines.helpers import assert_close, learner_of

ROWS = [
    {"prompt": "1+2=", "chosen": "3", "rejected": "12"},
    {"prompt": "10+7=", "chosen": "17", "rejected": "5"},
    {"prompt": "3+3=", "chosen": "3+3=6", "rejected": "33"},
    {"prompt": "40+0=", "chosen": "40", "rejected": "1+40=4"},
]
LABELLED = [
    {"prompt": "1+2=", "completion": "3", "label": True},
    {"prompt": "10+7=", "completion": "5", "label": False},
    {"prompt": "3+3=", "completion": "3+3=6", "label": True},
    {"prompt": "40+0=", "completion": "1+40=4", "label": False},
    {"prompt": "2+2=", "completion": "22", "label": False},
]
"""Completions that were judged by themselves, not as many of each side."""
SIZES = {"hidden_size": 16, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 24, "max_positions": 32}
MODEL = ModelConfig.model_validate({"build": {"alphabet": "0123456789+=", **SIZES}})
MICRO_BATCH = 24
"""Tokens: several micro-batches for the four pairs."""
TRAINERS = {
    "dpo": "trl.trainer.dpo_trainer",
    "kto": "trl.trainer.kto_trainer",
    "kto/unpaired": "trl.trainer.kto_trainer",
    "orpo": "trl.experimental.orpo.orpo_trainer",
    "cpo": "trl.experimental.cpo.cpo_trainer",
}
"""Where they are; ``dpo`` is ``DPOTrainer``."""
Found = tuple[float, dict[str, Tensor]]
"""A loss, and its gradient by the name of each weight."""


class Both:
    """A policy that has moved away from its reference, and TRL's trainers on copies of the two."""

    def __init__(self, folder: Any) -> None:
        self.folder, self.trainers = folder, dict[str, Any]()
        made = Origin(MODEL, seed=1).make()
        self.tokenizer, self.first = made.tokenizer, copy.deepcopy(made.module)
        self.learner: TorchLearner = learner_of(made.module, reference=True)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in made.module.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        self.pairs = [self.pair(i, row) for i, row in enumerate(ROWS)]
        self.singles = [self.pair(i, row) for i, row in enumerate(LABELLED)]

    def pair(self, uid: int, row: dict[str, Any]) -> Group:
        """As the data of a recipe become one."""
        prompt_ids = encode_prompt(self.tokenizer, row["prompt"])
        assert self.tokenizer.eos_token_id is not None
        columns = columns_of("preferences", row)
        rows = [(row["prompt"], prompt_ids, row[side]) for side in columns]
        shown = encode_demonstrations(rows, self.tokenizer, [self.tokenizer.eos_token_id])
        sides = {side: {str(uid): each} for side, each in zip(columns, shown, strict=True) if isinstance(each, Shown)}
        return pair_of(uid, Prompt(str(uid), dict(row)), prompt_ids, sides)

    def batch(self, pairs: Sequence[Group], mismatched: bool) -> Batch:
        """As the stage makes it."""
        groups, sides = compared(pairs, mismatched, None)
        return replace(collate(groups, 0, (), ()), side_B=torch.tensor(sides, dtype=torch.int8))

    def ours(self, *losses: Any, state: Any = None, reference: bool = True, pairs: Sequence[Group] = ()) -> Found:
        """The learner's; without a ``reference`` its log-probabilities are 0."""
        objective = PreferenceObjective([(loss, state) for loss in losses])
        batch = self.batch(pairs or self.pairs, any(hasattr(loss, "mismatched") for loss in losses))
        backend, counts = self.learner.backend, self.learner.slots["rl"].counts
        if not reference:
            batch = replace(batch, ref_logp_BT=torch.zeros(batch.ids_BT.shape))
        batch = self.learner.annotate(batch, objective.needs - (set() if reference else {"reference"}))
        goal = PolicyGoal(backend, objective, self.learner.annotate, counts)
        backend.forget_gradients()
        loss, _ = accumulate(backend, goal.loss, goal.prepare(batch), MICRO_BATCH)
        return float(loss), {name: p.grad.clone() for name, p in self.learner.trained.items() if p.grad is not None}

    def trl(self, kind: str, rows: slice = slice(None), **options: Any) -> Found:
        """TRL's, from the rows of its dataset, with other options than those that it was made with."""
        trainer = self.trainers[kind] if kind in self.trainers else self._made(kind)
        old = {name: getattr(trainer, name) for name in options}
        for name, value in options.items():
            setattr(trainer, name, value)
        trainer.model.train()
        trainer.model.zero_grad()
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))[rows]])
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        for name, value in old.items():
            setattr(trainer, name, value)
        return float(loss.detach()), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    def _made(self, kind: str) -> Any:
        os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        module = import_module(TRAINERS[kind])
        method = kind.partition("/")[0]
        trainer_class, config_class = (getattr(module, method.upper() + name) for name in ("Trainer", "Config"))
        dataset = Dataset.from_list(LABELLED if kind == "kto/unpaired" else ROWS)
        common = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
        batch = {"per_device_train_batch_size": 2 * len(ROWS)}  # KTO's other completions are those of a batch
        args = config_class(output_dir=str(self.folder / kind), max_length=32, **common, **batch)
        model, reference = copy.deepcopy(self.learner.module), copy.deepcopy(self.first)
        if kind == "kto":
            dataset = unpair_preference_dataset(dataset)
        own = {"ref_model": reference} if method in ("dpo", "kto") else {}
        self.trainers[kind] = trainer_class(
            model=model, args=args, train_dataset=dataset, processing_class=self.tokenizer, **own
        )
        return self.trainers[kind]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Iterator[Both]:
    """Each trainer is made once."""
    yield Both(tmp_path_factory.mktemp("trl"))


def minus(one: Found, other: Found) -> Found:
    """What one loss has and the other has not."""
    return one[0] - other[0], {name: tensor - other[1][name] for name, tensor in one[1].items()}


def assert_same(ours: Found, theirs: Found) -> None:
    """Losses to 1e-5 and the gradient of each weight to 1e-4 of its largest number."""
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5, rel=1e-5)
    assert max(float(tensor.abs().max()) for tensor in theirs[1].values()) > 1e-3, "there is something to compare"
    assert_close(ours[1], theirs[1], rtol=1e-4)


def test_pairs_are_tokenised_alike(both):
    both.trl("dpo")
    for pair, row in zip(both.pairs, both.trainers["dpo"].train_dataset, strict=True):
        chosen, rejected = pair.rollouts
        ours = [list(ids) for ids in (chosen.prompt_ids, chosen.token_ids, rejected.token_ids)]
        assert ours == [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (Dpo(beta=0.3), {"loss_types": ["sigmoid"], "beta": 0.3}),
        (RobustDpo(beta=0.3, label_smoothing=0.2), {"loss_types": ["robust"], "beta": 0.3, "label_smoothing": 0.2}),
        (Hinge(beta=0.3), {"loss_types": ["hinge"], "beta": 0.3}),
        (Ipo(tau=0.3), {"loss_types": ["ipo"], "beta": 0.3}),
        (LengthNormalizedDpo(beta=2.0), {"loss_types": ["sigmoid_norm"], "beta": 2.0}),
        (Bco(beta=0.3), {"loss_types": ["bco_pair"], "beta": 0.3}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else value["loss_types"][0],
)
def test_losses_of_the_dpo_trainer(both, loss, options):
    assert_same(both.ours(loss), both.trl("dpo", **options))


def test_mpo(both):
    ours = both.ours(Dpo(weight=0.8), Bco(weight=0.2), Nll(mean="token", weight=1.5))
    assert_same(ours, both.trl("dpo", loss_types=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5]))


def test_label_smoothing_of_dpo_is_that_of_cpo(both):
    """TRL's DPO trainer leaves ``label_smoothing`` out of ``sigmoid``: conservative DPO is in its CPO trainer alone,
    which is DPO with a reference that gives every completion the same probability."""
    assert both.trl("dpo", loss_types=["sigmoid"], label_smoothing=0.2)[0] == both.trl("dpo", loss_types=["sigmoid"])[0]
    smoothed = {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.2, "cpo_alpha": 0.0}
    assert_same(both.ours(Dpo(beta=0.3, label_smoothing=0.2), reference=False), both.trl("cpo", **smoothed))
    with_nll = both.ours(Dpo(beta=0.3, label_smoothing=0.2), Nll(mean="token"), reference=False)
    assert_same(with_nll, both.trl("cpo", **smoothed | {"cpo_alpha": 1.0}))


def test_simpo(both):
    options = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0, "label_smoothing": 0.0}
    both.trl("cpo")
    both.trainers["cpo"].simpo_gamma = None  # it has one only where it was made for this loss
    assert_same(both.ours(Simpo(beta=2.0, gamma=1.0)), both.trl("cpo", **options))


def test_kto_with_other_prompts_completions(both):
    """From pairs, TRL's batch of all preferred rows and then all others has the same wrong completions for a prompt as
    ours: those of the pair before."""
    theirs = both.trl("kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.8)
    assert both.trainers["kto"]._metrics["train"]["kl"][-1] > 1e-3, "the shift is not 0"
    assert_same(both.ours(Kto(beta=0.3, desirable=1.2, undesirable=0.8)), theirs)


def test_kto_of_completions_that_were_judged_by_themselves(both):
    """Rows of TRL's own format; each is shown with the completion of the row before."""
    theirs = both.trl("kto/unpaired", beta=0.3, desirable_weight=1.2, undesirable_weight=0.8)
    assert both.trainers["kto/unpaired"]._metrics["train"]["kl"][-1] > 1e-3, "the shift is not 0"
    assert_same(both.ours(Kto(beta=0.3, desirable=1.2, undesirable=0.8), pairs=both.singles), theirs)


def test_orpo_but_for_its_likelihood(both):
    """The odds ratio is TRL's; its likelihood is of prompts as well, and a mean over all tokens."""
    odds = minus(both.trl("orpo", beta=0.7), both.trl("orpo", beta=0.1))
    assert_same(minus(both.ours(Orpo(lam=0.7)), both.ours(Orpo(lam=0.1))), odds)
    likelihood, ours = both.trl("orpo", beta=0.0), both.ours(Orpo(lam=1e-9))
    assert_same(ours, both.ours(Nll(), Simpo(weight=1e-9)))
    assert abs(likelihood[0] - ours[0]) > 1e-2


def test_likelihood_by_rows_is_the_mean_of_trls_of_each_pair(both):
    """TRL's ``sft`` is a mean over all tokens, so that long completions count more: here that is ``mean: token``."""
    each = [both.trl("dpo", slice(i, i + 1), loss_types=["sft"]) for i in range(len(ROWS))]
    mean = {name: torch.stack([gradient[name] for _, gradient in each]).mean(0) for name in each[0][1]}
    by_rows = both.ours(Nll(), Simpo(weight=1e-9))
    assert_same(by_rows, (sum(loss for loss, _ in each) / len(each), mean))
    by_tokens = both.trl("dpo", loss_types=["sft"])
    assert_same(both.ours(Nll(mean="token"), Simpo(weight=1e-9)), by_tokens)
    assert abs(by_rows[0] - by_tokens[0]) > 1e-2


def test_a_bco_that_remembers_is_trls_with_its_rewards_shifted(both):
    """TRL's ``bco_pair`` has no shift. With one, ours is that loss of a policy whose rewards are lower by it."""
    theirs = both.trl("dpo", loss_types=["bco_pair"], beta=0.3)
    assert_same(both.ours(Bco(beta=0.3), state={"mean": 0.0, "rows": 8.0}), theirs)
    shifted = both.ours(Bco(beta=0.3), state={"mean": 0.5, "rows": 8.0})
    assert abs(shifted[0] - theirs[0]) > 1e-2
