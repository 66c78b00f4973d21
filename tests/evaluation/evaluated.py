"""Small models in folders, made without training, and the command line in this process."""

import json
from pathlib import Path

import torch
from typer.testing import CliRunner

import alignment.cli as cli
from alignment.model_saving import save_model
from alignment.models import load_model
from alignment.recipe_sections import ModelConfig
from alignment.types import Rollout, SamplingParams

ALPHABET = "0123456789+-*=()%:,.abcdefghijklmnopqrstuvwxyz "
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def align(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], env={"COLUMNS": "120", "TERM": "dumb"})


def character_model(folder, seed=0, **build):
    """A model with random weights and one token per character."""
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 24, "max_positions": 64}
    config = {"build": {"alphabet": ALPHABET, **sizes, **build}}
    save_model(load_model(ModelConfig.model_validate(config), seed), folder)
    return folder


def bpe_model(folder, texts, chat_template=CHAT, max_positions=1024, seed=0):
    """A Qwen3 model with random weights and a byte-level BPE tokenizer that is trained on ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = chat_template
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        head_dim=8,
        intermediate_size=24,
        max_position_embeddings=max_positions,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        **sizes,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))


def records(folder, task):
    return [json.loads(line) for line in (Path(folder) / task / "samples.jsonl").read_text("utf-8").splitlines()]


def rollout(text, score=None, finish_reason="stop"):
    ids = tuple(range(len(text)))
    return Rollout(
        id="0.0",
        prompt_id="0",
        prompt_ids=(1,),
        token_ids=ids,
        loss_mask=(True,) * len(ids),
        behaviour_logp=(0.0,) * len(ids),
        text=text,
        finish_reason=finish_reason,
        seed=0,
        sampler="none",
        sampling=SamplingParams(8),
        versions=(),
        scores={} if score is None else {"math": score},
    )
