"""One side of `dpo_vs_trl.py`, in a process of its own: `python offline_sides.py ours|trl FOLDER`.

`lockstep.py` says how it is asked for steps and what it answers; with each step come its loss and number of tokens.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpo_work
from lockstep import Stepper
from offline_work import Work


def ours(folder: Path, work: Work, stepper: Stepper) -> None:
    """`alignment.train` on a recipe, with its defaults."""
    import alignment  # before torch: it says how threads wait

    import torch  # isort: skip
    from alignment.engines.config import Site
    from alignment.engines.learner_config import TorchLearnerConfig, learners
    from alignment.metrics import Record
    from alignment.types import Group

    @learners.register("waiting", source="this benchmark")
    @dataclass(frozen=True)
    class Waiting(TorchLearnerConfig):
        """The embedded learner, which waits for the other side before the first step."""

        def build(self, site: Site, *args: Any, **options: Any) -> Any:
            stepper.begin(checksum=grpo_work.checksum(site.model.module))
            return super().build(site, *args, **options)

    class Steps:
        """A sink that reports each step."""

        def start(self, run: Mapping[str, Any]) -> None: ...
        def rollouts(self, step: int, stage: str, groups: Sequence[Group]) -> None: ...
        def finish(self, result: Mapping[str, Any]) -> None: ...
        def close(self) -> None: ...

        def log(self, record: Record) -> None:
            stepper.done(loss=record.metrics["loss"], tokens=int(record.metrics["fitted_tokens"]))

    torch.set_num_threads(work.threads)
    (folder / "recipe.yaml").write_text(json.dumps(_recipe(folder, work)), encoding="utf-8")
    alignment.train(folder / "recipe.yaml", sinks=[Steps()])


def _recipe(folder: Path, work: Work) -> dict[str, Any]:
    rows = {"name": "dataset", "path": "train.jsonl"}
    learner = {
        "name": "waiting",
        "lr": work.lr,
        "weight_decay": 0.0,
        "max_grad_norm": work.max_grad_norm,
        "autocast": "bfloat16" if work.precision == "bfloat16" else "none",
        "device": "cpu",
    }
    stages: dict[str, Any] = {
        "dpo": {
            "stage": "preference",
            "losses": [{"name": "dpo", "beta": work.beta}],
            "pairs": {"name": "given", "batch_size": work.rows},
        },
        "sft": {"stage": "sft", "batch_size": 2 * work.rows},
    }
    return {
        "run": {"name": "ours", "output": str(folder / "runs"), "seed": work.seed, "sinks": [{"name": "jsonl"}]},
        "model": {"path": "model"},
        "data": {
            "preferences" if work.kind == "dpo" else "demonstrations": rows,
            "max_prompt_tokens": work.prompt_tokens,
        },
        "evaluation": {"every": 0},
        "stages": [{**stages[work.kind], "steps": work.steps, "learner": learner}],
    }


def trl(folder: Path, work: Work, stepper: Stepper) -> None:
    """`DPOTrainer` or `SFTTrainer` with the same work, checkpoints off."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    torch.set_num_threads(work.threads)
    seen = {"tokens": 0}

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stepper.begin(checksum=grpo_work.checksum(kwargs["model"]))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" not in (logs or {}):
                return  # the summary at the end
            tokens, seen["tokens"] = int(logs["num_tokens"]) - seen["tokens"], int(logs["num_tokens"])
            stepper.done(loss=float(logs["loss"]), tokens=tokens)

    dpo = work.kind == "dpo"
    config: Any = DPOConfig if dpo else SFTConfig
    trainer_class: Any = DPOTrainer if dpo else SFTTrainer
    own: dict[str, Any] = {"beta": work.beta} if dpo else {}
    args = config(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=work.precision == "bfloat16",
        gradient_checkpointing=False,
        max_steps=work.steps,
        # All rows, and one optimizer step over them.
        per_device_train_batch_size=work.rows if dpo else 2 * work.rows,
        gradient_accumulation_steps=1,
        max_length=work.prompt_tokens + work.most_tokens,
        optim="adamw_torch_fused",
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
        **own,
    )
    rows = [json.loads(line) for line in (folder / "train.jsonl").open(encoding="utf-8")]
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Steps()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def main() -> None:
    """Runs the side that the arguments name."""
    side, folder = {"ours": ours, "trl": trl}[sys.argv[1]], Path(sys.argv[2])
    side(folder, Work.read(folder), Stepper())


if __name__ == "__main__":
    main()
