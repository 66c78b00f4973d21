"""The learner's update where lengths have a long tail: micro-batches by tokens (ours) beside a fixed number of rows.

Completion lengths are log-normal, as those of sampled reasoning are. Both ways hold at most the same number of padded
tokens at once: ours fills that budget with rows of similar length, the other puts as many rows together as the longest
row of all allows, in the order they come, each micro-batch padded to its own longest row. All else is the same learner;
losses and gradients agree.

    python benchmarks/long_tailed.py
    python benchmarks/long_tailed.py --budget 8192 --sigma 1.2
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import harness

import alignment  # noqa: F401 - before torch: it says how threads wait

import torch  # isort: skip
from torch import Tensor

from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.objective import Objective
from alignment.batching import plan_micro_batches
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.torch_learner import TorchLearner
from alignment.partition import Share
from alignment.types import Batch

GROUP_SIZE = 8


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a batch."""

    rows: int = 128
    prompt_tokens: int = 32
    shortest: int = 16
    longest: int = 1024
    median_tokens: int = 128
    sigma: float = 1.0
    budget: int = TorchLearnerConfig().micro_batch_tokens
    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 688
    layers: int = 4
    heads: int = 8
    rounds: int = 6


QUICK = Sizes(rows=16, longest=64, median_tokens=24, budget=384, vocabulary=64, hidden=32, layers=1, heads=2, rounds=2)


class FixedRows(Share):
    """Micro-batches with as many rows as the budget holds of the longest, in the batch's order."""

    def micro_batches(self, batch: Batch, max_tokens: int) -> list[tuple[Tensor, Batch]]:
        return [(rows, batch.rows(rows)) for rows in fixed_plan(batch.length_B, max_tokens)]


def fixed_plan(length_B: Tensor, budget: int) -> list[Tensor]:
    """Row indices of each micro-batch."""
    return list(torch.arange(len(length_B)).split(max(1, budget // int(length_B.max()))))


def padding(plan: Sequence[Tensor], length_B: Tensor) -> tuple[float, int]:
    """The share of tokens that are padding, and the most tokens of one micro-batch."""
    tokens = [len(rows) * int(length_B[rows].max()) for rows in plan]
    return 1 - int(length_B.sum()) / sum(tokens), max(tokens)


def lengths(sizes: Sizes, seed: int) -> Tensor:
    """Completion lengths of a batch."""
    drawn = torch.randn(sizes.rows, generator=torch.Generator().manual_seed(seed)) * sizes.sigma
    tokens = (math.log(sizes.median_tokens) + drawn).exp().round().long().clamp(sizes.shortest, sizes.longest)
    tokens[seed % sizes.rows] = sizes.longest  # so that the longest row, and with it the fixed count, is known
    return tokens


def batch_of(sizes: Sizes, seed: int) -> Batch:
    """A batch with random tokens and advantages."""
    drawn = torch.Generator().manual_seed(seed)
    length_B = lengths(sizes, seed) + sizes.prompt_tokens
    position_T = torch.arange(int(length_B.max()))
    present_BT = position_T < length_B[:, None]
    ids_BT = torch.randint(0, sizes.vocabulary, present_BT.shape, generator=drawn) * present_BT
    mask_BT = present_BT & (position_T >= sizes.prompt_tokens)
    adv_B = torch.randn(sizes.rows, generator=drawn)
    return Batch(
        ids_BT=ids_BT,
        loss_mask_BT=mask_BT,
        length_B=length_B,
        group_B=torch.arange(sizes.rows) // GROUP_SIZE,
        source_B=torch.zeros(sizes.rows, dtype=torch.int8),
        ratio_base_B=torch.zeros(sizes.rows, dtype=torch.int8),
        temperature_B=torch.ones(sizes.rows),
        behaviour_logp_BT=torch.full(mask_BT.shape, -math.log(sizes.vocabulary)) * mask_BT,
        rewards_BK=torch.zeros(sizes.rows, 1),
        weights_K=torch.ones(1),
        scored_B=torch.ones(sizes.rows, dtype=torch.bool),
        truncated_B=torch.zeros(sizes.rows, dtype=torch.bool),
        key_B=torch.arange(sizes.rows),
        adv_BT=adv_B[:, None] * mask_BT,
        step=seed,
    )


def learners(sizes: Sizes, autocast: str) -> dict[str, TorchLearner]:
    """One of each kind, with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = TorchLearnerConfig(lr=1e-4, micro_batch_tokens=sizes.budget, autocast=autocast, device="cpu")  # pyright: ignore[reportArgumentType]
    made = {}
    for name, share in (("by tokens", Share()), ("fixed rows", FixedRows())):
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads,
            max_position_embeddings=sizes.prompt_tokens + sizes.longest,
        )
        made[name] = TorchLearner(LlamaForCausalLM(shape), config, total_updates=sizes.rounds, seed=0)
        made[name].backend.share = share
    return made


def measure(sizes: Sizes, autocast: str) -> Iterator[dict[str, dict[str, float]]]:
    """One round after another: the same batch by both ways, which take turns in going first."""
    ways, objective = learners(sizes, autocast), Objective.of(Algorithm(), {})
    for number in range(sizes.rounds):
        batch, found = batch_of(sizes, number), {}
        for name in ways if number % 2 == 0 else reversed(ways):
            start, cpu = time.perf_counter(), time.process_time()
            metrics = ways[name].update(batch, objective)
            took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
            plan = plan_micro_batches if name == "by tokens" else fixed_plan
            pieces = plan(batch.length_B, sizes.budget)
            share, most = padding(pieces, batch.length_B)
            about = {"padding": share, "peak": float(most), "pieces": float(len(pieces)), "tokens": metrics["tokens"]}
            found[name] = took | about | {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}
        own, other = found["by tokens"], found["fixed rows"]
        tolerance = 1e-3 if autocast == "none" else 3e-2
        for key in ("loss", "grad_norm"):
            assert math.isclose(own[key], other[key], rel_tol=tolerance, abs_tol=tolerance), f"{key} differs: {found}"
        yield found


def rows_of(rounds: Sequence[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """The table: medians over rounds."""

    def row(name: str) -> dict[str, Any]:
        of = {key: median(r[name][key] for r in rounds) for key in rounds[0][name]}
        return {
            "micro-batches": name,
            "trained tokens/s": of["tokens"] / of["seconds"],
            "padding share": of["padding"],
            "micro-batches per update": round(of["pieces"]),
            "peak tokens": round(of["peak"]),
            "seconds": of["seconds"],
            "CPU seconds": of["cpu"],
        }

    return [row(name) for name in ("by tokens", "fixed rows")]


def main() -> None:
    """Runs the benchmark."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--budget", type=int, help="most tokens of a micro-batch, padding included")
    parser.add_argument("--sigma", type=float, help="spread of the logarithm of lengths")
    parser.add_argument("--autocast", choices=("none", "bfloat16"), default="none")
    args = parser.parse_args()
    sizes = QUICK if args.quick else Sizes()
    sizes = replace(sizes, budget=args.budget or sizes.budget, sigma=args.sigma or sizes.sigma)
    rounds = list(measure(sizes, args.autocast))[1:]
    speedup = median(r["fixed rows"]["seconds"] / r["by tokens"]["seconds"] for r in rounds)
    title = f"{sizes.rows} rows of {sizes.shortest} to {sizes.longest} tokens, {speedup:.2f} times as fast by tokens"
    about = ("rows", "prompt_tokens", "median_tokens", "sigma", "budget", "vocabulary", "hidden", "layers")
    harness.finish(
        {
            "title": "The learner's update on long-tailed lengths",
            "settings": {name: getattr(sizes, name) for name in about} | {"autocast": args.autocast},
            "tables": [{"title": title, "rows": rows_of(rounds)}],
            "equal": ["Learner, model, batches, most tokens at once, threads; losses and gradient norms agree."],
            "not_equal": ["Nothing but which rows share a micro-batch."],
        },
        args.json,
    )


if __name__ == "__main__":
    main()
