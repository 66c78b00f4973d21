"""A checkpoint as an ordinary Hugging Face folder, read back by the libraries that everybody uses."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment import models
from alignment.checkpoint import CheckpointDamaged, Checkpoints
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.torch_learner import TorchLearner
from alignment.errors import UserError
from alignment.export import export, load_policy
from alignment.origin import policy_weights
from alignment.recipe_sections import ModelConfig
from alignment.runs import Run, open_run
from alignment.types import keyed_seed

BUILD = {"architecture": "qwen3", "alphabet": "0123456789+=", "hidden_size": 16, "layers": 2}
BUILD |= {"heads": 2, "kv_heads": 1, "intermediate_size": 24, "max_positions": 32}
LORA = {"rank": 2, "alpha": 4.0, "targets": "all-linear"}
META = {"config_hash": "c0ffee", "world_size": 1}
IDS = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 6]])


def logits(module):
    with torch.no_grad():
        return module.eval()(input_ids=IDS).logits


def trained(output, name, config, steps=(100,)):
    """A run with a checkpoint per step, each with other weights; the run's folder, and the logits of each step."""
    model = models.load_model(ModelConfig.model_validate(config), keyed_seed(3, "model"))
    learner = TorchLearner(model.module, TorchLearnerConfig(), total_updates=1, seed=0)
    expected = {}
    with open_run(output, name) as run:
        run.write_recipe(
            {"plugins": ["not_installed_here"], "run": {"name": name, "seed": 3}, "model": config}, run.folder
        )
        checkpoints = Checkpoints(run.checkpoints, 9)
        for step in steps:
            torch.manual_seed(step)
            with torch.no_grad():
                for p in learner.trained.values():
                    p.add_(0.3 * torch.randn(p.shape))
            checkpoints.save(step, lambda folder: learner.save(folder / "learner"), META)
            expected[step] = logits(model.module)
    return run.folder, expected


def load(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs"), "full", {"build": BUILD}, (100, 200, 300))


@pytest.fixture(scope="module")
def base(full, tmp_path_factory):
    return export(f"{full[0]}@300", tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def adapted(base, tmp_path):
    return trained(tmp_path / "runs", "adapted", {"path": str(base), "lora": LORA})


@pytest.mark.parametrize(("suffix", "step"), [("", 300), ("@best", 200), ("@100", 100)])
def test_the_addressed_policy_is_written(full, tmp_path, suffix, step):
    Checkpoints(full[0] / "checkpoints").mark_best(200, 1.0)
    folder = export(f"{full[0]}{suffix}", tmp_path / "deep/model")
    assert torch.equal(logits(load(folder)), full[1][step])
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt", ".md"}


def test_the_tokenizer_goes_with_it(base):
    import transformers

    model = models.load_model(ModelConfig(path=str(base)), 0)
    ids = transformers.AutoTokenizer.from_pretrained(base)("12+34=")["input_ids"]
    assert list(models.encode_prompt(model.tokenizer, "12+34=")) == ids
    assert len(ids) == 6


def test_an_adapter_alone_and_merged(adapted, tmp_path):
    import peft

    run, expected = adapted
    adapter = export(str(run), tmp_path / "adapter", "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(logits(loaded), expected[100], rtol=0, atol=0)
    merged = export(str(run), tmp_path / "merged", "merged")
    torch.testing.assert_close(logits(load(merged)), expected[100], rtol=1e-4, atol=1e-4)
    assert not (merged / "adapter_config.json").exists()
    auto = export(str(run), tmp_path / "auto")
    assert {p.name for p in auto.iterdir()} == {p.name for p in adapter.iterdir()}
    assert (auto / "adapter_config.json").exists()


def test_an_adapter_on_a_model_that_the_recipe_built(tmp_path):
    run, expected = trained(tmp_path, "built", {"build": BUILD, "lora": LORA})
    merged = export(str(run), tmp_path / "auto")
    torch.testing.assert_close(logits(load(merged)), expected[100], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="built by the recipe.*use --merged"):
        export(str(run), tmp_path / "adapter", "adapter")


def test_an_adapter_without_lora_is_refused(full, tmp_path):
    with pytest.raises(UserError, match=r"--adapter: the run has no model\.lora.*--merged"):
        export(str(full[0]), tmp_path / "model", "adapter")
    assert not (tmp_path / "model").exists()


def test_nothing_is_overwritten(full, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("used", "file"):
        with pytest.raises(UserError, match=f"{name} is not an empty folder"):
            export(str(full[0]), tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert (export(str(full[0]), tmp_path / "empty") / "config.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "used"]


def test_a_damaged_checkpoint_is_not_exported(full, tmp_path):
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(full[0], run)
    path = run / "checkpoints/step_00000200/learner/policy.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=r"learner/policy\.safetensors"):
        export(f"{run}@200", tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_an_export_that_fails_leaves_nothing(full, tmp_path, monkeypatch):
    def fails(model, folder, **_):
        folder.mkdir()
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(export.__globals__, "save_model", fails)
    with pytest.raises(OSError, match="No space"):
        export(str(full[0]), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_another_base_model_is_noticed(adapted, base, tmp_path):
    weights = base / "model.safetensors"
    good = weights.read_bytes()
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, weights, metadata={"format": "pt"})
    try:
        with pytest.raises(UserError, match="trained on another base model"):
            export(str(adapted[0]), tmp_path / "model")
    finally:
        weights.write_bytes(good)


def test_a_policy_is_copied_into_a_model_of_the_same_kind(full):
    model = models.load_model(ModelConfig.model_validate({"build": BUILD}), 0)
    load_policy(model, f"{full[0]}@100")
    assert torch.equal(logits(model.module), full[1][100])
    load_policy(model, "full", full[0].parent)
    assert torch.equal(logits(model.module), full[1][300])
    with pytest.raises(UserError, match="step 150 has no checkpoint"):
        load_policy(model, f"{full[0]}@150")


def test_weights_of_another_model_are_refused_before_anything_changes(full):
    assert "model.embed_tokens.weight" in policy_weights(full[0] / "checkpoints/step_00000100")
    for changes, message in (({"hidden_size": 32}, "another size"), ({"layers": 3}, "other weights")):
        other = models.load_model(ModelConfig.model_validate({"build": {**BUILD, **changes}}), 0)
        before = {name: p.clone() for name, p in other.module.named_parameters()}
        with pytest.raises(UserError, match=message):
            load_policy(other, f"{full[0]}@100")
        assert all(torch.equal(p, before[name]) for name, p in other.module.named_parameters())


def test_a_base_beside_the_recipe_is_found_from_anywhere(base, tmp_path, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "lab/base")
    with monkeypatch.context() as patch:
        patch.chdir("lab")
        run, expected = trained(tmp_path / "runs", "beside", {"path": "base", "lora": LORA})
    known = Run(run)
    known.write_recipe(known.read_recipe(), tmp_path / "lab")
    merged = export(str(run), tmp_path / "merged", "merged")
    torch.testing.assert_close(logits(load(merged)), expected[100], rtol=1e-4, atol=1e-4)
