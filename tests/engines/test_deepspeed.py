"""The DeepSpeed learner on one and on two ranks gives what the torch learner gives, at every stage of ZeRO."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from alignment.architectures import Shape
from alignment.engines.deepspeed_config import DeepSpeedLearnerConfig
from alignment.engines.deepspeed_moments import PIECE
from alignment.engines.outgoing import outgoing
from alignment.errors import UserError
from alignment.model_size import Training, resting_bytes
from alignment.recipe_sections import ModelConfig
from alignment.tensorfile import copy_into, digest, read_tensors, weights_of
from tests.engines import rank_checks as checks
from tests.engines.helpers import chunk_mb, grpo
from tests.engines.ranks import World, worlds  # noqa: F401 - a fixture

STAGES = (0, 1, 2, 3)
ATOL = 1e-5
FIVE_TOKENS_MB = chunk_mb(5)
Numbers = dict[str, np.ndarray]


def marked(*values: Any) -> Any:
    """A case that is too slow for every commit."""
    return pytest.param(*values, marks=pytest.mark.full)


@cache
def embedded(kind: str, **options: Any) -> tuple[list[dict[str, float]], Numbers, list[Numbers]]:
    """Metrics, weights and gradients of the torch learner after the same updates."""
    learner = checks.embedded(kind, **options)
    gradients = checks.gradients_of_steps(learner)
    metrics = [learner.update(batch, grpo()) for batch in checks.batches()]
    return metrics, checks.numbers(dict(outgoing(learner.module, "merged"))), gradients


def assert_equal(ours: Numbers, theirs: Numbers, atol: float = ATOL) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol, err_msg=name)


def assert_like(ours: list[dict[str, float]], theirs: list[dict[str, float]], atol: float = ATOL) -> None:
    """The same metrics; relative where they are larger than 1."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one == {name: pytest.approx(value, rel=atol, abs=atol) for name, value in other.items()}


def on_ranks(world: World, function: Any, *args: Any, **options: Any) -> Any:
    """What every rank answers, which is the same."""
    first, *others = world.run(checks.Call(function, options), *args)
    for other in others:
        np.testing.assert_equal(other, first)
    return first


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_five_steps_are_those_of_the_torch_learner_however_micro_batched(worlds, stage, ranks):  # noqa: F811
    expected, weights, gradients = embedded("tiny")
    assert len(gradients) == 5 and all(np.abs(value).max() > 1e-4 for value in gradients[0].values())
    assert len({metrics["loss"] for metrics in expected}) == 5
    before = checks.numbers(dict(outgoing(checks.embedded("tiny").module, "merged")))
    assert all(np.abs(weights[name] - before[name]).max() > 2e-4 for name in weights), "far beyond what is tolerated"
    for tokens in (11, 10_000):
        metrics, ours, found = on_ranks(
            worlds(ranks), checks.train, "tiny", zero_stage=stage, micro_batch_tokens=tokens
        )
        assert_like(metrics, expected)
        assert_equal(ours, weights)
        for one, other in zip(found, gradients, strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize(("kind", "stage"), [("tiny", 3), ("lora", 3), marked("tiny", 1)])
def test_rows_end_to_end_change_nothing(worlds, kind, stage):  # noqa: F811
    expected, weights, gradients = embedded(kind)
    options = {"zero_stage": stage, "packing": True, "pack_tokens": 22, "micro_batch_tokens": 45}
    metrics, ours, found = on_ranks(worlds(2), checks.train, kind, **options)
    assert_like(metrics, expected)
    assert_equal(ours, weights)
    for one, other in zip(found, gradients, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize(
    ("kind", "stage", "options"),
    [
        ("untied", 3, {"logits_chunk_mb": FIVE_TOKENS_MB}),
        ("biased", 3, {"logits_chunk_mb": FIVE_TOKENS_MB}),
        ("lora", 3, {"gradient_checkpointing": True}),
        marked("adapted", 3, {"logits_chunk_mb": FIVE_TOKENS_MB}),
        marked("lora", 2, {}),
        marked("tiny", 3, {"gradient_checkpointing": True}),
        marked("tiny", 2, {"gradient_checkpointing": True, "logits_chunk_mb": FIVE_TOKENS_MB}),
        marked("tiny", 1, {"max_grad_norm": None}),
    ],
)
def test_also_other_models_and_ways_to_save_memory(worlds, kind, stage, options):  # noqa: F811
    expected, weights, _ = embedded(kind, **options)
    small = 300 if kind == "untied" else 0
    metrics, ours, _ = on_ranks(worlds(2), checks.train, kind, zero_stage=stage, whole_elements=small, **options)
    assert_like(metrics, expected)
    assert_equal(ours, weights)


@pytest.mark.parametrize(("kind", "stage"), [("fresh", 2), ("untied", 3), marked("tiny", 1), marked("lora", 3)])
def test_annotations_and_the_reference_are_those_of_the_torch_learner(worlds, kind, stage):  # noqa: F811
    learner, expected = checks.embedded(kind, reference=True), dict[str, np.ndarray]()
    for when, batch in enumerate(checks.batches(2)):
        done = learner.annotate(batch, {"old_logp", "entropy", "reference"})
        for name in ("old_logp_BT", "entropy_BT", "ref_logp_BT"):
            expected[f"{name} {when}"] = getattr(done, name).numpy()
        learner.update(done, grpo())
    assert np.abs(expected["old_logp_BT 1"] - expected["ref_logp_BT 1"]).max() > 1e-4, "the policy moved"
    small = 300 if kind == "untied" else 0
    assert_equal(on_ranks(worlds(2), checks.annotate, kind, zero_stage=stage, whole_elements=small), expected)


@pytest.mark.parametrize(
    ("stage", "dtype"), [*((stage, "float32") for stage in STAGES), *((stage, "bfloat16") for stage in (1, 2, 3))]
)
def test_what_is_not_finite_or_fails_leaves_every_rank_as_it_was(worlds, stage, dtype):  # noqa: F811
    found = on_ranks(worlds(2), checks.skip, stage, dtype=dtype)
    assert found["weights"] and found["moments"]
    assert [(m["skipped_steps"], m["optimizer_steps"]) for m in found["spoiled"]] == [(1, 0), (1, 0)]
    assert found["counts"] == {
        "begun": 5, "steps": 2, "updates": 2, "skipped": 2, "skipped_in_a_row": 0, "steps_before_moments": 0
    }  # fmt: skip
    # What is left is as if the spoiled batches had not been: also the schedule waited.
    learner = checks.embedded("tiny", total=10, schedule="linear")
    good, other = checks.batches(2)
    learner.update(good, checks.Reinforce())
    exact = dtype == "float32"
    assert_like([found["last"]], [learner.update(other, checks.Reinforce())], ATOL if exact else 0.1)
    final = checks.numbers(dict(outgoing(learner.module, "merged")))
    assert_equal(found["final"], final, ATOL if exact else 0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_it_holds_between_updates_is_what_the_plan_counts(worlds, stage, dtype):  # noqa: F811
    module: Any = checks.module_of("tiny")
    shape = Shape.read(module.config.to_dict())
    assert shape is not None
    training = Training(precision=dtype, zero=True, ranks=2, zero_stage=stage)
    for answer in worlds(2).run(checks.held, stage, dtype):
        assert answer["bytes"] == pytest.approx(resting_bytes(shape, ModelConfig(path="a"), training, False), rel=0.02)
        assert answer["whole"] == [0 if stage == 3 else shape.parameters], "at stage 3 no rank's GPU holds them all"
        assert answer["said"] == ""


def test_too_many_such_steps_in_a_row_stop_every_rank(worlds):  # noqa: F811
    message = on_ranks(worlds(2), checks.stop, 2)
    assert message.startswith("2 optimizer steps in a row had no finite numbers: the loss is inf")
    assert "not finite: the loss of rank 1." in message


@pytest.mark.parametrize(
    ("kind", "stage", "options"),
    [
        marked("tiny", 1, {}),
        ("dropout", 2, {}),
        ("tiny", 2, {"dtype": "bfloat16"}),
        ("bfloat16", 2, {}),
        ("tiny", 3, {}),
        marked("lora", 3, {}),
        marked("tiny", 0, {}),
        marked("bfloat16", 0, {}),
        marked("fresh", 2, {}),
        marked("tiny", 3, {"dtype": "bfloat16"}),
    ],
)
def test_a_resumed_learner_goes_on_exactly(worlds, tmp_path, kind, stage, options):  # noqa: F811
    world, options = worlds(2), {"zero_stage": stage, **options}
    whole, saved, end = on_ranks(world, checks.run, kind, (0, 1, 2), None, tmp_path, 1, **options)
    second, _, resumed = on_ranks(world, checks.run, kind, (2,), tmp_path, **options)
    assert second == whole[2:]
    assert resumed == end != saved
    if kind == "bfloat16":  # dtype float32 means it, whatever the model was stored in
        assert {t.dtype for t in read_tensors(tmp_path / "policy.safetensors").values()} == {torch.float32}
    assert len({m["sft/lr"] for m in whole} | {m["lr"] for m in whole}) > 1, "the schedule moves"


@pytest.mark.parametrize(("kind", "stage"), [("tiny", 3), ("lora", 2), marked("lora", 3), marked("tiny", 0)])
def test_its_policy_and_reference_are_files_of_the_torch_learner(worlds, tmp_path, kind, stage):  # noqa: F811
    _, fingerprint, _ = on_ranks(worlds(2), checks.run, kind, (0,), None, tmp_path, 0, zero_stage=stage)
    learner = checks.embedded(kind, total=6, reference=True, schedule="cosine", warmup_steps=2, lr=1e-2)
    assert learner.fingerprint() != fingerprint
    learner.save(tmp_path / "torch")
    for name in ("policy.safetensors", "reference.safetensors"):
        read_tensors(tmp_path / name, read_tensors(tmp_path / "torch" / name))
    own = weights_of(learner.module)
    new = read_tensors(tmp_path / "policy.safetensors")
    copy_into({name: own[name] for name in new}, new)
    assert learner.fingerprint() == digest(own) == fingerprint
    assert {p.name for p in tmp_path.glob("slot-rl*")} == {
        f"slot-rl.rank-0000{rank}-of-00002.safetensors" for rank in (0, 1)
    }
    with pytest.raises(UserError, match="another learner wrote it"):
        learner.restore(tmp_path)


@pytest.mark.parametrize(
    ("kind", "stage", "ranks", "then"),
    [
        marked("tiny", 2, 2, 1),
        ("lora", 1, 1, 2),
        marked("tiny", 1, 2, 1),
        marked("tiny", 2, 1, 2),
        marked("tiny", 3, 2, 1),
        marked("tiny", 0, 1, 2),
    ],
)
def test_another_number_of_ranks_goes_on_all_but_alike(worlds, tmp_path, kind, stage, ranks, then):  # noqa: F811
    options = {"zero_stage": stage}
    whole, _, _ = on_ranks(worlds(ranks), checks.run, kind, (0, 1, 2, 3), None, tmp_path, 1, **options)
    second, _, _ = on_ranks(worlds(then), checks.run, kind, (2, 3), tmp_path, **options)
    assert_like(second, whole[2:], atol=1e-3)
    fresh, _, _ = on_ranks(worlds(then), checks.run, kind, (2, 3), **options)
    assert abs(fresh[0]["sft/loss"] - whole[2]["sft/loss"]) > 0.1, "one that had forgotten would be told from it"


def whole_pieces(folder: Path) -> dict[str, torch.Tensor]:
    """What all ranks wrote of moments and float32 weights: flat tensors by file and name."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for path in folder.glob("*.rank-*.safetensors"):
        for key, tensor in read_tensors(path).items():
            name, start, stop = PIECE.fullmatch(key).groups()  # pyright: ignore[reportOptionalMemberAccess]
            assert int(stop) - int(start) == len(tensor)
            pieces.setdefault(f"{path.name.partition('.')[0]} {name}", {})[int(start)] = tensor
    for parts in pieces.values():
        assert [start + len(parts[start]) for start in sorted(parts)][:-1] == sorted(parts)[1:], "no gap, no overlap"
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("tiny", (2, {"zero_stage": 2, "dtype": "bfloat16"}), (1, {"zero_stage": 2, "dtype": "bfloat16"})),
        ("lora", (1, {"zero_stage": 1}), (2, {"zero_stage": 3})),
        marked("untied", (2, {"zero_stage": 3}), (2, {"zero_stage": 0})),
        marked("tiny", (2, {"zero_stage": 3, "dtype": "bfloat16"}), (2, {"zero_stage": 1, "dtype": "bfloat16"})),
    ],
)
def test_other_ranks_and_stages_read_every_number_exactly(worlds, tmp_path, kind, before, after):  # noqa: F811
    old, new = tmp_path / "old", tmp_path / "new"
    _, saved, _ = on_ranks(worlds(before[0]), checks.run, kind, (0, 1), None, old, 1, **before[1])
    assert on_ranks(worlds(after[0]), checks.copy, kind, old, new, **after[1]) == saved
    for name in ("policy.safetensors", "reference.safetensors"):
        assert (old / name).read_bytes() == (new / name).read_bytes()
    theirs, ours = whole_pieces(old), whole_pieces(new)
    assert len(theirs) > 20 and theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(tensor.any() for tensor in theirs.values())


@pytest.mark.full
def test_another_stage_reads_the_moments_too(worlds, tmp_path):  # noqa: F811
    whole, _, _ = on_ranks(worlds(2), checks.run, "tiny", (0, 1, 2), None, tmp_path, 1, zero_stage=2)
    second, _, _ = on_ranks(worlds(2), checks.run, "tiny", (2,), tmp_path, zero_stage=3)
    assert_like(second, whole[2:], atol=1e-3)


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (3, 2), marked(2, 2)])
def test_bfloat16_steps_on_float32_weights(worlds, tmp_path, stage, ranks):  # noqa: F811
    expected, weights, _ = embedded("tiny")
    metrics, ours, _ = on_ranks(worlds(ranks), checks.train, "tiny", zero_stage=stage, dtype="bfloat16")
    assert_like(metrics, expected, atol=0.1)
    assert_equal(ours, weights, atol=0.02)
    on_ranks(worlds(ranks), checks.run, "tiny", (0,), None, tmp_path, 0, zero_stage=stage, dtype="bfloat16")
    with safe_open(tmp_path / "policy.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - it is no mapping
    assert {t.dtype for t in tensors} == {torch.float32}
    assert any((t != t.bfloat16()).any() for t in tensors), "more digits than the model computes with"


@pytest.mark.parametrize(
    ("kind", "form", "stage"),
    [("tiny", "merged", 2), ("lora", "merged", 3), ("lora", "adapter", 3), marked("untied", "merged", 3)],
)
def test_weights_come_in_buckets_as_from_the_torch_learner(worlds, kind, form, stage):  # noqa: F811
    learner = checks.embedded(kind)
    learner.update(checks.batches(1)[0], grpo())
    named = dict(outgoing(learner.module, form))
    found = on_ranks(worlds(2), checks.publish, kind, form, 1500, zero_stage=stage)
    assert len(found) > 2 and sum(map(len, found)) == len(named)
    for bucket in found:
        assert len(bucket) == 1 or sum(value.nbytes for value in bucket.values()) <= 1500
    assert_equal({name: value for bucket in found for name, value in bucket.items()}, checks.numbers(named))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 0, "dtype": "bfloat16"}, "no float32 master weights"),
        ({"zero_stage": 0, "offload": "optimizer"}, "needs zero_stage 1, 2 or 3"),
        ({"zero_stage": 2, "offload": "parameters"}, "needs zero_stage 3"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DeepSpeedLearnerConfig(**options)


@pytest.mark.gpu
@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "parameters")])
def test_offloading_changes_nothing(worlds, stage, offload):  # noqa: F811
    expected, weights, _ = embedded("tiny")
    metrics, ours, _ = on_ranks(worlds(1, gpu=True), checks.train, "tiny", zero_stage=stage, offload=offload)
    assert_like(metrics, expected)
    assert_equal(ours, weights)
