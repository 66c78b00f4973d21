"""Rollouts through the `vllm` sampler, beside `LLM.generate` of vLLM itself on the same work.

Each side has an engine in a process of its own, with the same model (random weights), the same prompts, lengths, seeds
and threads, log-probabilities on. They take turns, and who goes first changes every round.

    python benchmarks/vllm_throughput.py
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import harness
from grpo_sides import Stepper

GOAL = 0.9
SIDES = ("ours", "generate")
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
"""5.3 million parameters."""


@dataclass(frozen=True)
class Work:
    """What a side does in a round."""

    prompts: int = 8
    samples: int = 8
    prompt_tokens: int = 32
    completion_tokens: int = 128
    rounds: int = 8

    def prompt(self, number: int, index: int) -> list[int]:
        """Another prompt in every round, so that no side finds it in its cache."""
        return [(number * 7919 + index * 104729 + i * 31) % 4000 + 1 for i in range(self.prompt_tokens)]


QUICK = Work(prompts=2, samples=2, prompt_tokens=8, completion_tokens=8, rounds=2)


def module() -> Any:
    """The model, for its shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**MODEL)).eval()


def ours(work: Work) -> Callable[[int], int]:
    """The sampler, as the loop uses it; its weights come over the memory transport."""
    from alignment.engines.config import Site
    from alignment.engines.learner_config import TorchLearnerConfig
    from alignment.engines.memory_transport import MemoryTransport
    from alignment.engines.transport_config import MemoryTransportConfig
    from alignment.engines.vllm_config import VllmSamplerConfig
    from alignment.models import Model
    from alignment.sampling import submit
    from alignment.types import Request, SamplingParams

    site = Site(Model(module(), None, "llama"), work.prompt_tokens + work.completion_tokens)  # pyright: ignore
    learner = TorchLearnerConfig(device="cpu").build(site, 1, 0)
    sampler = VllmSamplerConfig(max_num_seqs=work.prompts * work.samples).build(site, learner)
    MemoryTransport(learner, sampler, MemoryTransportConfig()).publish(0)
    params = SamplingParams(work.completion_tokens)

    def generate(number: int) -> int:
        requests = [
            Request(f"{number}.{i}.{s}", tuple(work.prompt(number, i)), params, number * 1000 + i * 100 + s)
            for i in range(work.prompts)
            for s in range(work.samples)
        ]
        return sum(len(completion.token_ids) for completion in submit(sampler, requests))

    return generate


def generate(work: Work) -> Callable[[int], int]:
    """`LLM.generate` with the arguments that our engine has."""
    from alignment.engines.vllm_environment import prepare_vllm

    prepare_vllm()
    from vllm import LLM, SamplingParams, TokensPrompt

    folder = Path(tempfile.mkdtemp())
    module().config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}), encoding="utf-8")
    llm = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=work.prompt_tokens + work.completion_tokens,
        max_num_seqs=work.prompts * work.samples,
        kv_cache_memory_bytes=1 << 30,
        block_size=32,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
    )

    def generate(number: int) -> int:
        prompts = [TokensPrompt(prompt_token_ids=work.prompt(number, i)) for i in range(work.prompts)]
        repeated = [prompt for prompt in prompts for _ in range(work.samples)]
        params = [
            SamplingParams(
                max_tokens=work.completion_tokens,
                seed=number * 1000 + i * 100 + s,
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            for i in range(work.prompts)
            for s in range(work.samples)
        ]
        return sum(len(out.outputs[0].token_ids) for out in llm.generate(repeated, params, use_tqdm=False))

    return generate


def side(name: str, quick: bool) -> None:
    """The process of one side."""
    import alignment  # noqa: F401 - before torch: it says how threads wait

    work, stepper = (QUICK if quick else Work()), Stepper()
    run = {"ours": ours, "generate": generate}[name](work)
    run(0)  # warm
    stepper.say({"ready": True})
    stepper.wait()
    for number in range(1, work.rounds + 1):
        stepper.done(tokens=run(number))


class Process:
    """A side's process. A context manager that ends it."""

    def __init__(self, name: str, folder: Path, quick: bool) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        command = [sys.executable, __file__, "--side", name, *(["--quick"] if quick else [])]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=dict(os.environ)
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def answer(self) -> dict[str, Any]:
        """What it says next."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit(f"{self.name} ended early:\n{self.log.read_text(encoding='utf-8')[-4000:]}")

    def round(self) -> dict[str, Any]:
        """Lets it take a round."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()


def measure(quick: bool) -> dict[str, Any]:
    """All rounds of both sides, in turns."""
    work = QUICK if quick else Work()
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        sides = [stack.enter_context(Process(side_name, Path(name), quick)) for side_name in SIDES]
        for process in sides:
            process.answer()
        for number in range(work.rounds):
            for process in sides if number % 2 == 0 else reversed(sides):
                rounds[process.name].append(process.round())
    tokens = {r["tokens"] for side_rounds in rounds.values() for r in side_rounds}
    assert tokens == {work.prompts * work.samples * work.completion_tokens}, f"unequal work: {tokens}"
    pairs = list(zip(rounds["generate"], rounds["ours"], strict=True))
    ratios = {kind: median(raw[kind] / own[kind] for raw, own in pairs) for kind in ("seconds", "cpu")}
    rows = [
        {
            "side": name,
            "tokens/s": rounds[name][0]["tokens"] / median(r["seconds"] for r in rounds[name]),
            "seconds": median(r["seconds"] for r in rounds[name]),
            "CPU seconds": median(r["cpu"] for r in rounds[name]),
        }
        for name in SIDES
    ]
    goal = {
        "what": "share of the tokens/s of LLM.generate, median of pairs",
        "goal": f"at least {GOAL}",
        "measured": f"{ratios['seconds']:.3f} (by CPU time {ratios['cpu']:.3f})",
        "met": ratios["seconds"] >= GOAL,
    }
    return {
        "title": "vLLM as a sampler beside LLM.generate",
        "settings": vars(work),
        "tables": [{"title": f"{work.prompts} x {work.samples} completions of {work.completion_tokens}", "rows": rows}],
        "equal": ["Shape, prompts, lengths, seeds, log-probabilities, threads, arguments of the engine, turns."],
        "not_equal": ["Weights are random on both sides, and not the same; no token ends a completion."],
        "goals": [goal],
    }


def main() -> None:
    """The benchmark, or one side of it."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--side", choices=SIDES, help="for the benchmark itself")
    args = parser.parse_args()
    if args.side:
        side(args.side, args.quick)
    else:
        harness.finish(measure(args.quick), args.json)


if __name__ == "__main__":
    main()
