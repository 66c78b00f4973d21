"""Sizes of models against published totals and built models, and memory against what autograd keeps."""

import itertools
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.hypervolume import Hypervolume
from alignment.algorithms.masked_preferences import Mapo, SparsePo
from alignment.algorithms.preferences import Dpo
from alignment.architectures import KNOWN, Shape
from alignment.engines.deepspeed_config import DeepSpeedLearnerConfig
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.model_size import (
    Training,
    activation_bytes,
    cache_bytes_per_token,
    engine_bytes,
    host_bytes,
    max_positions,
    memory_bytes,
    resting_bytes,
    training_bytes,
)
from alignment.recipe import OnlineStage, PreferenceStage
from alignment.recipe_sections import Lora, ModelConfig

PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
}
"""What the hub says of their safetensors."""
SEVEN = KNOWN["Qwen/Qwen2.5-7B"]
P = SEVEN.parameters


def transformers_config(kind: str, shape: Shape) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        kind,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=512,
    )


def built(kind: str, shape: Shape) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(transformers_config(kind, shape), attn_implementation="sdpa")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    assert KNOWN[name].parameters == PUBLISHED[name]


def test_every_known_model_has_the_size_of_a_published_one():
    sizes = {shape.parameters for name, shape in KNOWN.items() if not name.startswith("allenai/")}
    assert sizes == set(PUBLISHED.values())
    assert KNOWN["allenai/Llama-3.1-Tulu-3-8B"].parameters == PUBLISHED["meta-llama/Llama-3.1-8B"] + 2 * 8 * 4096


@pytest.mark.parametrize(
    ("kind", "name"),
    [("qwen2", "Qwen/Qwen2.5-0.5B"), ("qwen3", "Qwen/Qwen3-0.6B"), ("llama", "meta-llama/Llama-3.1-8B")],
)
def test_parameters_are_those_of_the_model_that_is_built(kind, name):
    shape = KNOWN[name]
    with torch.device("meta"):
        model = built(kind, shape)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert Shape.read(model.config.to_dict()) == replace(shape, positions=512)


def test_a_hub_id_is_looked_up_and_a_folder_read(tmp_path):
    model = ModelConfig(path="Qwen/Qwen2.5-Math-7B")
    assert Shape.of(model) == replace(SEVEN, positions=4096) and max_positions(model) == 4096
    assert Shape.of(ModelConfig(path="some/model")) is None and max_positions(ModelConfig(path="some/model")) is None
    transformers_config("qwen2", SEVEN).save_pretrained(tmp_path)
    found = Shape.of(ModelConfig(path=str(tmp_path)))
    assert found is not None and {**asdict(found), "positions": None} == asdict(SEVEN)
    assert max_positions(ModelConfig(path=str(tmp_path))) == 512


def saved_bytes(model: Any, tokens: int, autocast: bool) -> int:
    """What a forward pass through the layers keeps for the backward pass, beside parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (key := tensor.untyped_storage().data_ptr()) not in own:
            seen[key] = tensor  # held, so that no other storage gets its place
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


SMALL = [  # hidden, heads x head size, key-value heads and MLP in different proportions
    Shape(100, 128, 2, 4, 2, 32, 512, tied=True),
    Shape(100, 128, 2, 8, 2, 32, 384, tied=True),
    Shape(100, 192, 2, 4, 4, 64, 640, tied=True),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_activations_are_what_autograd_keeps(kind, precision, checkpointing):
    for shape in SMALL:
        shape = replace(shape, head_norms=kind == "qwen3", biases=kind == "qwen2")
        kept: dict[tuple[int, int], int] = {}
        for layers, tokens in itertools.product((1, 2), (64, 128)):
            model = built(kind, replace(shape, layers=layers)).train()
            model = model.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            kept[layers, tokens] = saved_bytes(model, tokens, precision == "autocast")
        layer = {tokens: kept[2, tokens] - kept[1, tokens] for tokens in (64, 128)}
        per_token = (layer[128] - layer[64]) / 64
        between = (2 if precision == "bfloat16" else 4) * shape.hidden
        expected = between if checkpointing else activation_bytes(shape, precision)
        assert per_token == pytest.approx(expected, rel=0.02), shape
        casts = layer[64] - 64 * per_token
        weights = sum(inputs * outputs for inputs, outputs in shape.linears)
        if not checkpointing:
            assert casts == pytest.approx(2 * weights if precision == "autocast" else 0, rel=0.02, abs=64)


def sizes(learner: Any, model: ModelConfig | None = None, reference: bool = False) -> dict[str, int]:
    model = model or ModelConfig(path="Qwen/Qwen2.5-7B", dtype="bfloat16")
    return training_bytes(SEVEN, model, Training.of(learner, model), row_tokens=1024, rows=64, reference=reference)


def resting(learner: Any, model: ModelConfig | None = None, reference: bool = False) -> int:
    model = model or ModelConfig(path="Qwen/Qwen2.5-7B", dtype="bfloat16")
    return resting_bytes(SEVEN, model, Training.of(learner, model), reference)


def zero(**options: Any) -> DeepSpeedLearnerConfig:
    return DeepSpeedLearnerConfig(**{"ranks": 8, "dtype": "bfloat16", **options})


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "optimizer"),
    [
        (1, 2 * P, 4 * P + 2 * P, 12 * P // 8),
        (2, 2 * P, 4 * P // 8 + 4 * P // 8, 12 * P // 8),
        (3, 2 * P // 8, 4 * P // 8 + 4 * P // 8, 12 * P // 8),
    ],
)
def test_stages_of_zero_share_what_they_say(stage, parameters, gradients, optimizer):
    found = sizes(zero(zero_stage=stage), reference=True)
    assert (found["parameters"], found["gradients"], found["optimizer"]) == (parameters, gradients, optimizer)
    assert found["reference"] == parameters
    largest = SEVEN.vocabulary * SEVEN.hidden
    kept = {1: 4 * P, 2: 0, 3: 4 * P // 8 + 2 * largest}[stage]
    assert resting(zero(zero_stage=stage), reference=True) == 2 * parameters + optimizer + kept
    assert found["buckets"] == 2 * (2 * largest + (10**9 if stage == 3 else 0))


def test_one_rank_has_everything_and_buckets_too():
    found = sizes(zero(ranks=1))
    assert found["optimizer"] == 12 * P and found["buckets"] == 2 * 2 * SEVEN.vocabulary * SEVEN.hidden


@pytest.mark.parametrize(
    ("ranks", "stage", "dtype", "each"),
    [
        (1, 0, "float32", 4 + 8),
        (1, 1, "float32", 4 + 12),
        (4, 2, "float32", 4 + 12 / 4),
        (1, 3, "float32", 4 + 12 + 4),
        (1, 1, "bfloat16", 2 + 12 + 4),
        (4, 1, "bfloat16", 2 + 12 / 4 + 4),
        (1, 2, "bfloat16", 2 + 12),
        (4, 3, "bfloat16", (2 + 12 + 4) / 4),
    ],
)
def test_a_rank_at_rest_keeps_what_deepspeed_never_gives_back(ranks, stage, dtype, each):
    """Bytes of each parameter; tests/engines/test_deepspeed.py compares them with those of an engine."""
    bucket = SEVEN.vocabulary * SEVEN.hidden * (2 if dtype == "bfloat16" else 4) if stage == 3 else 0
    assert resting(zero(ranks=ranks, zero_stage=stage, dtype=dtype)) == pytest.approx(each * P + bucket, rel=1e-9)


def test_offloading_moves_to_the_host():
    model = ModelConfig(path="Qwen/Qwen2.5-7B", dtype="bfloat16")
    optimizer, everything = zero(offload="optimizer"), zero(zero_stage=3, offload="parameters")
    assert sizes(optimizer)["optimizer"] == 0 and sizes(optimizer)["parameters"] == 2 * P
    assert sizes(everything)["parameters"] == 0
    assert resting(everything) == 2 * SEVEN.vocabulary * SEVEN.hidden, "a bucket"
    in_float32 = Training.of(zero(dtype="float32"), model)
    assert host_bytes(SEVEN, model, in_float32) == 4 * P, "it is made float32 there"
    assert host_bytes(SEVEN, model, Training.of(zero(), model)) == 2 * P, "each rank loads the model"
    assert host_bytes(SEVEN, model, Training.of(zero(ranks=4, offload="optimizer"), model)) == 12 * P // 4 + 4 * P // 4


@pytest.mark.parametrize(
    ("dtype", "autocast", "lora", "parameters", "trained_bytes"),
    [
        ("float32", "none", None, 4 * P, 4),
        ("float32", "bfloat16", None, 4 * P + 2 * P, 4),
        ("bfloat16", "none", None, 2 * P, 2),
        ("bfloat16", "none", Lora(rank=8), 2 * P + 4 * SEVEN.trainable(Lora(rank=8)), 4),
    ],
)
def test_in_one_process(dtype, autocast, lora, parameters, trained_bytes):
    model = ModelConfig(path="Qwen/Qwen2.5-7B", dtype=dtype, lora=lora)
    found = sizes(TorchLearnerConfig(autocast=autocast), model, reference=True)
    trained = SEVEN.trainable(lora)
    assert found["parameters"] == parameters
    assert (found["gradients"], found["optimizer"]) == (trained_bytes * trained, 2 * trained_bytes * trained)
    assert (found["reference"] == 0) == (lora is not None)
    copies = 2 * P if autocast == "bfloat16" else 0
    kept = sum(found[name] for name in ("parameters", "reference", "optimizer")) - copies
    assert resting(TorchLearnerConfig(autocast=autocast), model, reference=True) == kept


@pytest.mark.parametrize(
    ("learner", "on_gpu", "on_host"),
    [
        (TorchLearnerConfig(), 2 * P, 0),
        (zero(zero_stage=2), 2 * P, 0),
        (zero(zero_stage=3), 2 * P // 8, 0),
        (zero(zero_stage=3, offload="parameters"), 0, 2 * P // 8),
    ],
)
def test_weights_from_before_an_update_are_kept_where_its_size_is_asked_for(learner, on_gpu, on_host):
    model = ModelConfig(path="Qwen/Qwen2.5-7B", dtype="bfloat16")
    online: dict[str, Any] = {"steps": 1, "learner": learner}
    plain = Training.of_stage(OnlineStage(**online), model)
    asked = Training.of_stage(OnlineStage(**online, algorithm=Algorithm(weighting=Hypervolume())), model)
    of_plain, of_asked = (training_bytes(SEVEN, model, t, 1024, 64, reference=False) for t in (plain, asked))
    assert of_plain["weights before"] == 0 and of_asked == of_plain | {"weights before": on_gpu}
    assert resting_bytes(SEVEN, model, asked, False) == resting_bytes(SEVEN, model, plain, False), "gone afterwards"
    assert host_bytes(SEVEN, model, asked) == host_bytes(SEVEN, model, plain) + on_host


def test_micro_batches_bound_activations_and_chunks_the_logits():
    layers, layer = SEVEN.layers, activation_bytes(SEVEN, "bfloat16")
    plain = sizes(zero(micro_batch_tokens=4096, logits_chunk_mb=64))
    assert plain["activations"] == 4096 * layers * layer and plain["logits"] == 3 * 64 * 2**20
    less = sizes(zero(micro_batch_tokens=4096, gradient_checkpointing=True))
    assert less["activations"] == 4096 * (layers * 2 * SEVEN.hidden + layer)
    assert sizes(zero(micro_batch_tokens=10**6))["activations"] == 64 * 1024 * layers * layer, "no more than there is"
    assert sizes(zero(micro_batch_tokens=1))["activations"] == 1024 * layers * layer, "a row is never cut"


def test_masks_of_tokens_keep_the_references_logits_and_states():
    model = ModelConfig(path="Qwen/Qwen2.5-7B", dtype="bfloat16")

    def found(loss: Any) -> dict[str, int]:
        learner = TorchLearnerConfig(micro_batch_tokens=4096)
        return memory_bytes(SEVEN, model, PreferenceStage(steps=1, losses=(loss,), learner=learner), 64, 1024)

    logits, states = 4096 * 4 * SEVEN.vocabulary, 4096 * SEVEN.layers * SEVEN.hidden
    assert "masks" not in found(Dpo()) and found(Mapo())["masks"] == logits
    assert found(SparsePo())["masks"] == logits + (2 + 8) * states
    independent = found(SparsePo(masks="independent"))
    assert independent["masks"] == logits + (2 + 16) * states
    assert independent["total"] == found(Dpo())["total"] + independent["masks"]


def test_the_cache_is_split_by_key_value_heads():
    per_token = 2 * 28 * 4 * 128 * 2
    assert [cache_bytes_per_token(SEVEN, "bfloat16", n) for n in (1, 2, 4)] == [per_token // n for n in (1, 2, 4)]
    assert cache_bytes_per_token(SEVEN, "bfloat16", 28) == per_token // 4, "each GPU has a head at least"
    assert cache_bytes_per_token(SEVEN, "float32") == 2 * per_token
    found = engine_bytes(SEVEN, "bfloat16", 2, 40 * 2**30)
    assert found["weights"] == P and sum(found.values()) == 40 * 2**30
