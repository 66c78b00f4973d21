"""Value-augmented sampling beside plain sampling, in both samplers, and beside what its arithmetic allows.

Each combination has a process of its own, whose sampler decodes the same prompts in turns with and without the value
model. Two bounds stand beside the slowdown. By FLOP: the products of ``1 + K`` tokens of the value model on top of one
token of the policy (of one token where the head is vocabulary-wide). By time: plain sampling, and for each token a bare
forward pass of the value model over as many tokens of every row, without a cache, a mask or anything else.

    python benchmarks/decoding.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import harness

GOAL = 0.75
ENGINES = ("transformers", "vllm")
SIZES = {
    "equal": {},
    "quarter": {"hidden_size": 128, "intermediate_size": 344},
    "equal, vocabulary-wide": {"kind": "vocabulary"},
}
ALPHABET = "".join(chr(0x4E00 + i) for i in range(4094))
POLICY = {"architecture": "llama", "hidden_size": 256, "intermediate_size": 688, "layers": 4, "heads": 8, "kv_heads": 8}
"""Some 4 million parameters, a quarter of them embeddings."""


@dataclass(frozen=True)
class Work:
    """What a side does."""

    rows: int = 32
    prompt_tokens: int = 32
    completion_tokens: int = 64
    top_k: int = 20
    rounds: int = 3

    def prompt(self, index: int) -> tuple[int, ...]:
        """One of eight, so that several rows share a prompt."""
        return tuple((index % 8 * 104729 + i * 31) % 4000 + 2 for i in range(self.prompt_tokens))


QUICK = Work(rows=4, prompt_tokens=8, completion_tokens=6, top_k=4, rounds=1)


def build(work: Work, seed: int, **sizes: Any) -> Any:
    """A model with random weights, which knows its origin."""
    from alignment.origin import Origin
    from alignment.recipe_sections import ModelConfig

    positions = work.prompt_tokens + work.completion_tokens
    config = {"build": {**POLICY, "alphabet": ALPHABET, "max_positions": positions, **sizes}}
    return Origin(ModelConfig.model_validate(config), seed).make()


def value_model(work: Work, size: str, folder: Path) -> Any:
    """The value model, which is in ``folder`` as well."""
    from alignment.algorithms.value_losses import Scalar
    from alignment.engines.value_model import ValueModel, ValueShape, save_value_model

    options: dict[str, Any] = dict(SIZES[size])
    shape = ValueShape(Scalar(), options.pop("kind", "state"))
    made = build(work, 1, **options)
    model = ValueModel.of(made.module, shape).eval()
    save_value_model(model, made.tokenizer, folder)
    return model


def sampler_of(engine: str, work: Work, policy: Any, decoding: Any) -> Any:
    """The sampler, with weights."""
    from alignment.engines.config import Site, TransformersSamplerConfig

    site = Site(policy, work.prompt_tokens + work.completion_tokens, decoding=decoding)
    if engine == "transformers":
        return TransformersSamplerConfig(batch_rows=work.rows).build(site, None)
    from alignment.engines.learner_config import TorchLearnerConfig
    from alignment.engines.memory_transport import MemoryTransport
    from alignment.engines.transport_config import MemoryTransportConfig
    from alignment.engines.vllm_config import VllmSamplerConfig

    learner = TorchLearnerConfig(device="cpu").build(site, 1, 0)
    sampler = VllmSamplerConfig(max_num_seqs=work.rows).build(site, learner)
    MemoryTransport(learner, sampler, MemoryTransportConfig()).publish(0)
    return sampler


def products(module: Any) -> int:
    """FLOP of the matrix products of one token, its output layer included, attention not."""
    from torch import nn

    return 2 * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def timed(function: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def side(engine: str, size: str, work: Work) -> dict[str, float]:
    """Medians of one combination, in a process of its own."""
    import alignment  # noqa: F401 - before torch: it says how threads wait

    import torch  # isort: skip

    from alignment.algorithms.decodings import ValueAugmented
    from alignment.sampling import submit
    from alignment.types import Request, SamplingParams

    with tempfile.TemporaryDirectory() as name:
        policy, model = build(work, 0), value_model(work, size, Path(name))
        decoding = ValueAugmented(name, 1.0, top_k=work.top_k)
        sampler = sampler_of(engine, work, policy, decoding)
        tokens = work.rows * work.completion_tokens

        def sample(number: int, tilt: tuple[float, ...]) -> None:
            params = SamplingParams(work.completion_tokens, tilt=tilt)
            asked = [Request(f"{number}.{i}", work.prompt(i), params, number * 1000 + i) for i in range(work.rows)]
            assert sum(len(c.token_ids) for c in submit(sampler, asked)) == tokens

        count = 1 if model.shape.kind == "vocabulary" else 1 + work.top_k
        ids = torch.randint(2, 4000, (work.rows, count))

        @torch.inference_mode()
        def bare() -> None:
            for _ in range(work.completion_tokens):
                model.head.everything(model.body(input_ids=ids, use_cache=False).last_hidden_state)

        sample(0, (1.0,)), sample(0, ()), bare()
        rounds = [
            (timed(lambda n=n: sample(n, ())), timed(lambda n=n: sample(n, (1.0,))), timed(bare))
            for n in range(1, work.rounds + 1)
        ]
        sampler.close()
    plain_s, guided_s, bare_s = (median(r[i] for r in rounds) for i in range(3))
    own = products(policy.module)
    return {
        "plain": tokens / plain_s,
        "guided": tokens / guided_s,
        "slowdown": median(g / p for p, g, _ in rounds),
        "by FLOP": (own + count * products(model)) / own,
        "by time": median((p + b) / p for p, _, b in rounds),
        "share of the bound": median((p + b) / g for p, g, b in rounds),
        "bare": tokens / bare_s,
    }


def run_side(engine: str, size: str, quick: bool) -> dict[str, float]:
    """The medians of one combination."""
    command = [sys.executable, __file__, "--side", engine, size, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    lines = [line[1:] for line in done.stdout.splitlines() if line.startswith("@")]
    if done.returncode or not lines:
        raise SystemExit(f"{engine}, {size} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return json.loads(lines[-1])


def measure(quick: bool) -> dict[str, Any]:
    """All combinations, one after another; each engine with one value model where it has to be quick."""
    work = QUICK if quick else Work()
    rows = []
    for engine in ENGINES:
        for size in ["quarter"] if quick else SIZES:
            found = run_side(engine, size, quick)
            rows.append(
                {
                    "sampler": engine,
                    "value model": size,
                    "plain tokens/s": found["plain"],
                    "value-augmented tokens/s": found["guided"],
                    "slowdown": found["slowdown"],
                    "bound by FLOP": found["by FLOP"],
                    "bound by time": found["by time"],
                    "share of the bound by time": found["share of the bound"],
                }
            )
    worst = min(row["share of the bound by time"] for row in rows)
    goal = {
        "what": "share of the tokens/s that plain sampling and a bare pass of the value model allow, worst combination",
        "goal": f"at least {GOAL}",
        "measured": f"{worst:.2f}",
        "met": worst >= GOAL,
    }
    title = f"{work.rows} rows, {work.prompt_tokens} + {work.completion_tokens} tokens, {work.top_k} candidates"
    return {
        "title": "Value-augmented sampling beside plain sampling",
        "settings": {**vars(work), "policy": POLICY},
        "tables": [{"title": title, "rows": rows}],
        "equal": ["Policy, prompts, lengths, threads, process; plain and value-augmented rounds take turns."],
        "not_equal": ["The bare pass has neither cache nor mask. Weights are random, so that no token ends a row."],
        "goals": [goal],
    }


def main() -> None:
    """The benchmark, or one side of it."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--side", nargs=2, metavar=("SAMPLER", "SIZE"), help="for the benchmark itself")
    args = parser.parse_args()
    if args.side:
        found = side(*args.side, QUICK if args.quick else Work())
        sys.stdout.write("@" + json.dumps(found) + "\n")
    else:
        harness.finish(measure(args.quick), args.json)


if __name__ == "__main__":
    main()
