"""A learner is saved and continued exactly, in a new process, or says what does not fit."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.algorithms.objective import Objective
from alignment.algorithms.policy_losses import Clip
from alignment.engines.roles import handles as handles_of
from alignment.engines.torch_learner import TorchLearner
from alignment.types import Prompt
from tests.engines.helpers import Reinforce, critic, grpo, learner_of, lora, make_batch, tiny, with_returns


def build(kind: str) -> TorchLearner:
    options: dict[str, Any] = {"total": 6, "schedule": "cosine", "warmup_steps": 2}
    if kind == "lora":
        return learner_of(lora(dropout=0.3), **options)
    roles = {"critic": critic(), "difficulty": critic(of_prompts=True)}
    return learner_of(tiny("GPT2", resid_pdrop=0.3), reference=True, roles=roles, **options)


def advance(learner: TorchLearner, step: int) -> dict[str, float]:
    batch = with_returns(replace(make_batch(seed=step), step=step))
    batch = learner.annotate(batch, {"old_logp", "reference"})
    metrics = learner.update(batch, grpo(epochs=2, minibatches=2, policy_loss=Clip()))
    for handle in handles_of(learner, lambda prompt: prompt.row["ids"]).values():
        handle.fit([Prompt("a", {"ids": [step + 1, 2]})], torch.tensor([1.0]))
    return metrics | learner.update(batch, Objective.supervised(), slot="sft")


def digests(learner: TorchLearner, folder: Path) -> dict[str, bytes]:
    learner.save(folder)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


CONTINUE = """
import sys
from pathlib import Path
import torch
from tests.engines.test_learner_state import advance, build
torch.set_num_threads(int(sys.argv[2]))
for kind in ("full", "lora"):
    folder = Path(sys.argv[1], kind)
    learner = build(kind)
    learner.restore(folder / "saved")
    for step in (1, 2):
        advance(learner, step)
    learner.save(folder / "got")
"""


def test_three_steps_equal_one_and_two_in_a_new_process_bit_for_bit(tmp_path: Path) -> None:
    saved, want = dict[str, dict[str, bytes]](), dict[str, dict[str, bytes]]()
    for kind in ("full", "lora"):
        learner = build(kind)
        advance(learner, 0)
        saved[kind] = digests(learner, tmp_path / kind / "saved")
        advance(learner, 1)
        assert all(math.isfinite(value) for value in advance(learner, 2).values())
        want[kind] = digests(learner, tmp_path / kind / "want")
        assert want[kind]["policy.safetensors"] != saved[kind]["policy.safetensors"]
    arguments = [sys.executable, "-c", CONTINUE, str(tmp_path), str(torch.get_num_threads())]
    subprocess.run(arguments, check=True, cwd=Path(__file__).parents[2])
    for kind in want:
        got = {file.name: file.read_bytes() for file in (tmp_path / kind / "got").iterdir()}
        assert got.keys() == want[kind].keys()
        assert [name for name in got if got[name] != want[kind][name]] == []
        assert {Path(name).suffix for name in got} == {".json", ".safetensors"}
    full, lora_files = want["full"], want["lora"]
    assert {"reference.safetensors", "role-critic.safetensors", "role-difficulty-slot.safetensors"} < set(full)
    assert full["reference.safetensors"] == saved["full"]["reference.safetensors"]
    assert "reference.safetensors" not in lora_files
    assert len(lora_files["policy.safetensors"]) < len(full["policy.safetensors"])


def test_restoring_something_else_says_what_differs(tmp_path: Path) -> None:
    learner = learner_of(tiny())
    learner.update(make_batch(), Reinforce())
    learner.save(tmp_path)
    with pytest.raises(ValueError, match=r"policy\.safetensors does not fit: .*weight is float32 \[24, 16\] there"):
        learner_of(tiny(intermediate_size=32)).restore(tmp_path)
    with pytest.raises(ValueError, match=r"k_norm\.weight is not part of this model"):
        learner_of(tiny("Llama")).restore(tmp_path)
    with pytest.raises(ValueError, match=r"has roles \[\] and this learner \['critic'\]"):
        learner_of(tiny(), roles={"critic": critic()}).restore(tmp_path)
    adapted = learner_of(lora())
    adapted.save(tmp_path / "lora")
    with pytest.raises(ValueError, match="another base model"):
        learner_of(lora(seed=1)).restore(tmp_path / "lora")


def test_restoring_goes_into_the_module_that_a_sampler_shares(tmp_path: Path) -> None:
    learner = learner_of(tiny())
    learner.save(tmp_path)
    want, shared = learner.fingerprint(), learner.module.get_output_embeddings().weight  # pyright: ignore[reportCallIssue]
    learner.update(make_batch(), Reinforce(), slot="sft")
    assert learner.fingerprint() != want
    learner.restore(tmp_path)
    assert learner.fingerprint() == want
    assert learner.module.get_output_embeddings().weight is shared  # pyright: ignore[reportCallIssue]
    assert list(learner.slots) == ["rl"]


def test_the_fingerprint_sees_one_bit() -> None:
    learner = learner_of(tiny())
    before = learner.fingerprint()
    with torch.no_grad():
        weight = learner.trained["model.norm.weight"]
        weight.view(torch.int32)[3] ^= 1
    assert learner.fingerprint() != before
