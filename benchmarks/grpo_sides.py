"""One side of `grpo_vs_trl.py`, in a process of its own: `python grpo_sides.py ours|trl FOLDER`.

`lockstep.py` says how it is asked for steps and what it answers; with each step come the seconds of its phases and the
number of completion tokens.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpo_work
from grpo_work import Work
from lockstep import Stepper


def ours(folder: Path, work: Work, stepper: Stepper) -> None:
    """`alignment.train` on a recipe, with its defaults for logs, rollouts and the flight recorder."""
    import alignment  # before torch: it says how threads wait

    import torch  # isort: skip
    from alignment.engines.config import Site, TransformersSamplerConfig, samplers
    from alignment.engines.transformers_sampler import TransformersSampler
    from alignment.metrics import Record
    from alignment.types import Group, Request

    class FixedLength(TransformersSampler):
        """Never stops before the limit: the end-of-sequence token is one like any other."""

        def add(self, requests: Sequence[Request]) -> None:
            super().add([replace(r, params=replace(r.params, stop_ids=())) for r in requests])

    @samplers.register("fixed_length", source="this benchmark")
    @dataclass(frozen=True)
    class FixedLengthConfig(TransformersSamplerConfig):
        """The embedded sampler without stop tokens."""

        def build(self, site: Site, learner: Any) -> FixedLength:
            stepper.begin(checksum=grpo_work.checksum(learner.module))
            return FixedLength(learner.module, self)

    class Steps:
        """A sink that reports each step."""

        def start(self, run: Mapping[str, Any]) -> None: ...
        def rollouts(self, step: int, stage: str, groups: Sequence[Group]) -> None: ...
        def finish(self, result: Mapping[str, Any]) -> None: ...
        def close(self) -> None: ...

        def log(self, record: Record) -> None:
            m = record.metrics
            assert m["length"] == m["length_max"] == work.completion_tokens, "a completion ended early"
            phases = {name.removeprefix("time/"): s for name, s in m.items() if name.startswith("time/")}
            del phases["total"]  # with the time spent waiting
            kept = {name: m[name] for name in ("reward", "reward_std", "mismatch_kl", "mismatch_abs_max")}
            stepper.done(phases=phases, tokens=int(m["completion_tokens"]), **kept)

    torch.set_num_threads(work.threads)
    (folder / "recipe.yaml").write_text(json.dumps(_recipe(folder, work)), encoding="utf-8")
    alignment.train(folder / "recipe.yaml", sinks=[Steps()])


def _recipe(folder: Path, work: Work) -> dict[str, Any]:
    autocast = "bfloat16" if work.precision == "bfloat16" else "none"
    return {
        "run": {"name": "ours", "output": str(folder / "runs"), "seed": work.seed, "sinks": [{"name": "jsonl"}]},
        "model": {"path": "model"},
        "data": {"train": {"name": "dataset", "path": "train.jsonl"}, "max_prompt_tokens": work.prompt_tokens},
        "rewards": [{"function": "step_reward.parity"}],
        "stages": [
            {
                "stage": "online",
                "steps": work.steps,
                "prompts_per_step": work.prompts,
                "group_size": work.group_size,
                "sampling": {"max_tokens": work.completion_tokens},
                "algorithm": {
                    "advantage": "grpo",
                    "policy_loss": {"name": "clip", "clip_low": work.clip, "clip_high": work.clip},
                    "aggregation": "token_mean",
                },
                "sampler": {"name": "fixed_length", "autocast": autocast},
                "learner": {
                    "name": "torch",
                    "lr": work.lr,
                    "max_grad_norm": work.max_grad_norm,
                    "autocast": autocast,
                    "device": "cpu",
                },
            }
        ],
    }


@dataclass
class Clock:
    """Seconds by phase of one step."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def trl(folder: Path, work: Work, stepper: Stepper) -> None:
    """`GRPOTrainer` with the same work, its optional bookkeeping off. Three of its methods are timed from outside."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOTrainer

    sys.path.append(str(folder))
    from step_reward import parity

    torch.set_num_threads(work.threads)
    clock = Clock()

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            with clock("collect"):
                return super()._generate_and_score_completions(*args, **kwargs)

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            with clock("sample"):
                found = super()._generate_single_turn(*args, **kwargs)
            assert {len(ids) for ids in found[0]} == {work.completion_tokens}, "a completion ended early"
            clock.tokens += sum(len(ids) for ids in found[0])
            return found

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            with clock("score"):
                return super()._calculate_rewards(*args, **kwargs)

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stepper.begin(checksum=grpo_work.checksum(kwargs["model"]))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "reward" not in (logs or {}):
                return  # the summary at the end
            collect = clock.seconds.pop("collect")
            phases = dict(clock.seconds)
            phases["annotate"] = collect - sum(phases.values())
            phases["update"] = time.perf_counter() - stepper.start - collect
            tokens, clock.tokens, clock.seconds = clock.tokens, 0, {}
            stepper.done(phases=phases, tokens=tokens, reward=logs["reward"], reward_std=logs["reward_std"])

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    trainer = Timed(
        model=model,
        reward_funcs=parity,
        args=_trl_config(folder, work),
        train_dataset=Dataset.from_list([json.loads(line) for line in (folder / "train.jsonl").open(encoding="utf-8")]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Steps()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _trl_config(folder: Path, work: Work) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=work.precision == "bfloat16",
        gradient_checkpointing=False,
        max_steps=work.steps,
        # One generation and one optimizer step over all completions.
        per_device_train_batch_size=work.rows,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=1,
        num_generations=work.group_size,
        shuffle_dataset=False,
        max_completion_length=work.completion_tokens,
        generation_kwargs={"min_new_tokens": work.completion_tokens},  # forbids the end-of-sequence token
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        # Token mean over the batch, as our `token_mean`; advantages divided by the group's standard deviation.
        loss_type="dapo",
        scale_rewards="group",
        epsilon=work.clip,
        beta=0.0,
        mask_truncated_completions=False,
        optim="adamw_torch",
        learning_rate=work.lr,
        weight_decay=0.0,
        max_grad_norm=work.max_grad_norm,
        lr_scheduler_type="constant",
        warmup_steps=0,
        seed=work.seed,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    """Runs the side that the arguments name."""
    side, folder = {"ours": ours, "trl": trl}[sys.argv[1]], Path(sys.argv[2])
    side(folder, grpo_work.read(folder), Stepper())


if __name__ == "__main__":
    main()
