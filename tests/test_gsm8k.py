"""GSM8K from the file as it is published: a small Qwen3 with a BPE tokenizer and a chat template, as from the hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

import alignment
from tests.test_train import Recorder

TOKENS = 2000
LIMIT = 160
TEMPLATE = "{question}\nPut your final answer after \\boxed{} or ####."
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_pairs(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer of ``texts`` that ends a turn as ChatML does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast: Any = Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(tokenizer: Any, folder: Path) -> None:
    """A folder with a tiny Qwen3 of random weights and ``tokenizer``."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        head_dim=12,
        intermediate_size=96,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(folder: Path, train: Path, test: Path) -> Path:
    questions = {"name": "dataset", "path": str(train), "prompt": TEMPLATE, "chat": True}
    values = {
        "run": {"name": "gsm8k", "output": str(folder / "runs"), "sinks": ["jsonl"], "rollouts_every": 1},
        "model": {"path": "model"},
        "data": {
            "train": questions,
            "demonstrations": {**questions, "field_map": {"completion": "answer"}, "size": 64},
            "eval": {**questions, "path": str(test), "size": 8},
            "max_prompt_tokens": LIMIT,
        },
        "rewards": [{"name": "math", "answer_in": "box_or_number"}],
        "evaluation": {"every": 0},
        "stages": [
            {"stage": "sft", "steps": 3, "batch_size": 8, "learner": {"name": "torch", "lr": 3e-3}},
            {
                "stage": "online",
                "steps": 3,
                "prompts_per_step": 4,
                "group_size": 4,
                "sampling": {"max_tokens": 32},
                "algorithm": {"advantage": "grpo"},
                "learner": {"name": "torch", "lr": 1e-3},
            },
        ],
    }
    with (folder / "gsm8k.yaml").open("w") as file:
        YAML().dump(json.loads(json.dumps(values)), file)
    return folder / "gsm8k.yaml"


@pytest.fixture(scope="module")
def run(real_data, tmp_path_factory) -> tuple[dict[str, Any], Recorder, Any, list[dict[str, str]]]:
    folder, train = tmp_path_factory.mktemp("gsm8k"), real_data / "gsm8k/train.jsonl"
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    tokenizer = byte_pairs([row["question"] + row["answer"] for row in rows])
    qwen3(tokenizer, folder / "model")
    sink = Recorder()
    result = alignment.train(recipe(folder, train, real_data / "gsm8k/test.jsonl"), sinks=[sink])
    return result, sink, tokenizer, rows


def asked(question: str) -> str:
    """What the model reads."""
    text = f"{question}\nPut your final answer after \\boxed{{}} or ####."
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_grpo_takes_steps_on_chat_prompts(run):
    result, sink, tokenizer, rows = run
    assert result["status"] == "complete"
    assert [(stage["stage"], stage["steps"]) for stage in result["stages"]] == [("sft", 3), ("online", 3)]
    questions = {asked(row["question"]): row for row in rows}
    assert len(sink.groups) == 3 * 4
    for group in sink.groups:
        for rollout in group.rollouts:
            text = tokenizer.decode(rollout.prompt_ids, skip_special_tokens=False)
            assert questions[text]["answer"] == group.prompt.row["answer"]
            assert len(rollout.prompt_ids) <= LIMIT
            assert rollout.scored and rollout.scores["math"].status in ("ok", "wrong", "unparseable")
            assert rollout.text == tokenizer.decode(rollout.token_ids, skip_special_tokens=True)


def test_the_first_stage_learns_the_solutions_and_both_are_measured(run):
    result, sink, _, _ = run
    losses = [record.metrics["loss"] for record in sink.records if record.kind == "train"][:3]
    assert losses[2] < losses[0], losses
    trained = [record.metrics for record in sink.records if record.kind == "train"][3:]
    assert len(trained) == 3 and all(abs(metrics["mismatch_kl"]) < 1e-5 for metrics in trained)
    assert all(metrics["unscored"] == 0 and metrics["rollouts"] == 16 for metrics in trained)
    assert result["eval"]["before"]["n"] == result["eval"]["after"]["n"] == 8
    assert result["stages"][0]["labels"] == {"demonstrations": 24}


def test_over_long_questions_are_counted(run):
    result, _, tokenizer, rows = run
    encoded = tokenizer([asked(row["question"]) for row in rows], add_special_tokens=False)["input_ids"]
    longer = sum(len(ids) > LIMIT for ids in encoded)
    report = result["data"]["train"]
    assert 0 < longer < 1000, "some are, most are not"
    assert (report["rows"], report["over_long"], report["used"], report["bad"]) == (7473, longer, 7473 - longer, 0)
    assert report["distinct"] == report["used"] and 0.02 < report["floor"] < 0.04
    assert result["data"]["demonstrations"]["rows"] == 64 and result["data"]["eval"]["rows"] == 8


def test_what_was_written_can_be_read(run):
    result, _, _, _ = run
    folder = Path(result["folder"])
    assert json.loads((folder / "result.json").read_text())["data"] == result["data"]
    written = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert written
