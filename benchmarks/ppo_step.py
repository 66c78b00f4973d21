"""A learner's step of PPO beside one of GRPO on the same batch: what a critic costs.

The arms take turns on the same rows, with the same policy: GRPO (one update), PPO with a critic as a head on the
policy, with one of a quarter of its size, and with one of its size. Annotation, credit and update are timed, not
sampling.

    python benchmarks/ppo_step.py
    python benchmarks/ppo_step.py --quick
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import harness
import torch

from alignment.algorithms.advantages import Gae
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.credit import credit
from alignment.algorithms.objective import Objective
from alignment.algorithms.value_losses import HlGauss
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.torch_learner import TorchLearner
from alignment.engines.value_model import ValueShape
from alignment.engines.value_roles import HeadRoleSpec, ValueRoleSpec
from alignment.types import Batch


@dataclass(frozen=True)
class Sizes:
    """Of the model and the batch."""

    rows: int = 32
    tokens: int = 160
    prompt: int = 32
    hidden: int = 256
    layers: int = 4
    vocabulary: int = 4096
    rounds: int = 6


QUICK = Sizes(rows=4, tokens=24, prompt=8, hidden=32, layers=1, vocabulary=64, rounds=2)


def language_model(sizes: Sizes, hidden: int) -> Any:
    """A Llama with fresh weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=sizes.tokens,
    )
    return LlamaForCausalLM(shape)


@dataclass(frozen=True)
class Fresh:
    """An origin of a language model of this size."""

    sizes: Sizes
    hidden: int

    def make(self) -> Any:
        """A model record with the module alone."""
        return SimpleNamespace(module=language_model(self.sizes, self.hidden))


def batch_of(sizes: Sizes, seed: int) -> Batch:
    """Rows of one length with rewards of 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    mask_BT = (torch.arange(sizes.tokens) >= sizes.prompt).expand(sizes.rows, -1)
    zeros_B = torch.zeros(sizes.rows)
    return Batch(
        ids_BT=torch.randint(0, sizes.vocabulary, mask_BT.shape, generator=g),
        loss_mask_BT=mask_BT.clone(),
        length_B=torch.full((sizes.rows,), sizes.tokens),
        group_B=torch.arange(sizes.rows) // 4,
        source_B=zeros_B.to(torch.int8),
        ratio_base_B=zeros_B.to(torch.int8),
        temperature_B=torch.ones(sizes.rows),
        behaviour_logp_BT=torch.full(mask_BT.shape, -8.0) * mask_BT,
        rewards_BK=torch.randint(0, 2, (sizes.rows, 1), generator=g).float(),
        weights_K=torch.ones(1),
        scored_B=torch.ones(sizes.rows, dtype=torch.bool),
        truncated_B=zeros_B.bool(),
        key_B=torch.arange(sizes.rows),
        step=seed,
    )


def arms(sizes: Sizes) -> dict[str, tuple[TorchLearner, Algorithm]]:
    """A learner and an algorithm for each."""
    config = TorchLearnerConfig(lr=1e-4, micro_batch_tokens=8 * sizes.tokens, device="cpu")
    ppo, shape = Algorithm(advantage=Gae()), ValueShape(HlGauss())

    def learner(roles: Mapping[str, Any]) -> TorchLearner:
        return TorchLearner(language_model(sizes, sizes.hidden), config, sizes.rounds, 0, roles=roles)

    def own(hidden: int) -> TorchLearner:
        return learner({"critic": ValueRoleSpec(shape, Fresh(sizes, hidden))})  # pyright: ignore[reportArgumentType]

    return {
        "grpo": (learner({}), Algorithm()),
        "ppo, head": (learner({"critic": HeadRoleSpec(shape, 0.1)}), ppo),
        "ppo, quarter": (own(sizes.hidden // 2), ppo),
        "ppo, equal": (own(sizes.hidden), ppo),
    }


def measure(sizes: Sizes) -> Iterator[dict[str, float]]:
    """Seconds of each arm's step, round after round; the arms take turns in going first."""
    made = arms(sizes)
    for number in range(sizes.rounds):
        batch, found = batch_of(sizes, number), dict[str, float]()
        for name in made if number % 2 == 0 else reversed(made):
            learner, algorithm = made[name]
            objective = Objective.of(algorithm, {})
            start = time.process_time()
            annotated = learner.annotate(batch, objective.needs() | algorithm.needs)
            learner.update(credit(annotated, algorithm, {}), objective)
            found[name] = time.process_time() - start
        yield found


def table(rounds: list[dict[str, float]], sizes: Sizes) -> list[dict[str, Any]]:
    """Medians over rounds, of ratios within a round.

    The arithmetic: three passes of the policy for its update (forward and backward); of a critic one for values and
    three for its own update. A head shares the policy's update.
    """
    quarter, whole = (language_model(sizes, hidden).model.layers for hidden in (sizes.hidden // 2, sizes.hidden))
    quarter, whole = (sum(p.numel() for p in layers.parameters()) for layers in (quarter, whole))
    policy = whole + sizes.hidden * sizes.vocabulary  # output embeddings, which a critic of its own has not
    passes = {
        "grpo": 3.0,
        "ppo, head": 4.0,
        "ppo, quarter": 3 + 4 * quarter / policy,
        "ppo, equal": 3 + 4 * whole / policy,
    }
    return [
        {
            "step": name,
            "CPU seconds": median(r[name] for r in rounds),
            "times GRPO": median(r[name] / r["grpo"] for r in rounds),
            "arithmetic alone": count / 3,
        }
        for name, count in passes.items()
    ]


def main() -> None:
    """Runs the benchmark."""
    args = harness.parser(__doc__ or "").parse_args()
    sizes = QUICK if args.quick else Sizes()
    rounds = list(measure(sizes))[1:]
    harness.finish(
        {
            "title": "A step of PPO beside one of GRPO",
            "settings": {name: getattr(sizes, name) for name in ("rows", "tokens", "hidden", "layers", "vocabulary")},
            "tables": [{"title": "Annotation, credit and update of one batch, CPU time", "rows": table(rounds, sizes)}],
            "equal": ["Policy, rows, micro-batches, one epoch, one mini-batch, threads."],
            "not_equal": [
                "GRPO needs several completions of a prompt, PPO does not; both get the same rows here.",
                "The quarter is of the body: half the hidden size. A critic has no output embeddings.",
                "The head's pass for values goes through the output embeddings as well.",
            ],
        },
        args.json,
    )


if __name__ == "__main__":
    main()
