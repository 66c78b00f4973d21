"""Building, loading, adapting and saving models, and what users are told when it cannot be done."""

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.errors import UserError
from alignment.model_saving import save_model
from alignment.models import Model, decode, encode_prompt, load_model, stop_ids
from alignment.recipe_sections import ModelConfig
from tests.engines.helpers import tiny

ALPHABET = "0123456789+-= \n"
BUILD = {"alphabet": ALPHABET, "hidden_size": 16, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 24}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])


def built(seed: int = 0, build: dict[str, Any] | None = None, **options: Any) -> Model:
    return load_model(ModelConfig(build=BUILD | (build or {}), **options), seed)  # pyright: ignore[reportArgumentType]


def loaded(path: Path | str, seed: int = 0, **options: Any) -> Model:
    return load_model(ModelConfig(path=str(path), **options), seed)


def logp(module: Any) -> Tensor:
    with torch.no_grad():
        return module.eval()(input_ids=IDS).logits.float().log_softmax(-1)


def far_from_zero(module: Any) -> None:
    """Fresh adapters are zero; give every trained weight a value that shows."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(built(), tmp_path / "base")
    return tmp_path / "base"


def test_importing_it_does_not_import_transformers():
    code = "import sys, alignment.models; print(sorted({'transformers', 'peft', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_built_model_is_what_was_asked_for(architecture):
    model = built(build={"architecture": architecture, "max_positions": 77})
    config: Any = model.module.config
    assert config.model_type == architecture
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (16, 2, 77)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (2, 1, len(ALPHABET) + 2)
    assert model.module.get_input_embeddings().weight is model.module.get_output_embeddings().weight  # pyright: ignore
    assert not model.module.training
    assert stop_ids(model.tokenizer, model.module) == (model.tokenizer.eos_token_id,)
    assert model.tokenizer.pad_token_id not in (None, model.tokenizer.eos_token_id)


def test_dtype_and_attention_are_as_asked(folder):
    for model in (built(dtype="bfloat16", attention="eager"), loaded(folder, dtype="bfloat16", attention="eager")):
        assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
        assert model.module.config._attn_implementation == "eager"  # pyright: ignore


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_weights_depend_on_the_seed_alone(lora):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = built(5, lora=lora).module.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two, other = built(5, lora=lora).module.state_dict(), built(6, lora=lora).module.state_dict()
    assert all(torch.equal(one[n], two[n]) for n in one)
    different = {n for n in one if not torch.equal(one[n], other[n])}
    assert any("embed_tokens" in n for n in different) and (not lora or any("lora_A" in n for n in different))


def test_characters_are_tokens_and_come_back(folder):
    for tokenizer in (built().tokenizer, loaded(folder).tokenizer):
        text = "12 + 34= \n-7"
        ids = encode_prompt(tokenizer, text)
        assert len(ids) == len(text) and decode(tokenizer, ids) == text
        assert decode(tokenizer, (*ids, tokenizer.eos_token_id, tokenizer.pad_token_id)) == text  # pyright: ignore
        assert encode_prompt(tokenizer, "") == ()
        assert sorted({i for c in ALPHABET for i in encode_prompt(tokenizer, c)}) == list(range(2, len(ALPHABET) + 2))


def test_text_is_encoded_as_it_stands():
    tokenizer: Any = built().tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    assert tokenizer("12").input_ids == [1, 3, 4]
    assert encode_prompt(tokenizer, "12") == (3, 4)


def test_an_unknown_character_is_an_error_that_names_it(folder):
    for tokenizer in (built().tokenizer, loaded(folder).tokenizer):
        with pytest.raises(UserError, match=r"does not know 'x', '\*' in '1x\*2x'.*alphabet is '0123456789\+-= "):
            encode_prompt(tokenizer, "1x*2x")


def test_messages_go_through_the_chat_template():
    tokenizer = built(build={"alphabet": "ua:12=\n"}).tokenizer
    messages = [{"role": "user", "content": "1=2"}]
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(tokenizer, messages)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[:1] + ':' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    assert encode_prompt(tokenizer, messages) == encode_prompt(tokenizer, "u:1=2\na:")


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama", "GPT2"])
def test_a_saved_folder_is_an_ordinary_one(architecture, tmp_path):
    module: Any = tiny(architecture)
    save_model(Model(module, built().tokenizer, "x"), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logp(theirs), logp(module))
    assert AutoTokenizer.from_pretrained(tmp_path)("1+2=")["input_ids"] == [3, 12, 4, 14]
    ours = loaded(tmp_path)
    assert torch.equal(logp(ours.module), logp(module))
    assert ours.name == tmp_path.name


@pytest.mark.parametrize("architecture", ["Qwen2", "Llama", "GPT2"])
def test_an_adapter_is_saved_merged_or_alone(architecture, tmp_path):
    save_model(Model(tiny(architecture), built().tokenizer, "x"), tmp_path / "base")
    model = loaded(tmp_path / "base", lora={"rank": 3, "alpha": 7.0})
    fresh = logp(model.module)
    assert torch.equal(fresh, logp(loaded(tmp_path / "base").module))
    assert {n.split(".")[-3] for n, p in model.module.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    far_from_zero(model.module)
    adapted, before = logp(model.module), {n: t.clone() for n, t in model.module.state_dict().items()}
    assert (adapted - fresh).abs().max() > 0.01

    save_model(model, tmp_path / "merged")
    save_model(model, tmp_path / "adapter", merge=False)
    assert all(torch.equal(t, before[n]) for n, t in model.module.state_dict().items())
    for name in ("merged", "adapter"):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(logp(theirs), adapted, atol=1e-5, rtol=0)
        assert AutoTokenizer.from_pretrained(tmp_path / name)("1+2=")["input_ids"] == [3, 12, 4, 14]
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    torch.testing.assert_close(logp(loaded(tmp_path / "merged").module), adapted, atol=1e-5, rtol=0)
    with model.module.disable_adapter():  # pyright: ignore[reportCallIssue]
        assert torch.equal(logp(model.module), fresh)  # the reference
    with pytest.raises(UserError, match="it holds a LoRA adapter"):
        loaded(tmp_path / "adapter")


def test_lora_adapts_the_layers_it_is_told_to():
    module = built(lora={"rank": 2, "targets": ["q_proj", "down_proj"]}).module
    adapted = {n.split(".lora_")[0].split(".")[-1] for n, p in module.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "down_proj"}
    with pytest.raises(UserError, match=r"model\.lora\.targets: .*qproj.* linear layers: down_proj, .*q_proj"):
        built(lora={"rank": 2, "targets": ["qproj"]})


def test_an_adapter_alone_needs_a_base_to_come_back_to(tmp_path):
    with pytest.raises(UserError, match="nowhere to load it from; save it merged"):
        save_model(built(lora={"rank": 2}), tmp_path, merge=False)
    with pytest.raises(UserError, match="no LoRA adapter"):
        save_model(built(), tmp_path, merge=False)
    save_model(built(lora={"rank": 2}), tmp_path)
    assert torch.equal(logp(loaded(tmp_path).module), logp(built().module))


def test_stop_tokens_are_those_of_tokenizer_and_model():
    model = built()
    module: Any = model.module
    module.generation_config.eos_token_id = [5, 1, 4000]  # the last is of a larger vocabulary
    module.config.eos_token_id = 7
    assert stop_ids(model.tokenizer, module) == (1, 5, 7)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/none"):
        loaded(tmp_path / "none")
    with pytest.raises(UserError, match="base has no config.json; is it a saved model"):
        (tmp_path / "base").mkdir()
        loaded(tmp_path / "base")


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="base has no tokenizer; save one there"):
        loaded(folder)


def test_an_empty_tokenizer_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # transformers made it up
    with pytest.raises(UserError, match="base: it has no tokenizer; save one beside"):
        loaded(folder)


def test_a_tokenizer_must_fit_the_model(folder):
    built(build={"alphabet": ALPHABET + "xyz"}).tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="the tokenizer has token 19, but the model's embedding has 17 rows"):
        loaded(folder)


def without(folder: Path, *names: str) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in names}))


def test_padding_falls_back_to_eos_with_a_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(folder)
    without(folder, "pad_token")
    with pytest.warns(UserWarning, match="no pad token; its eos token is used"):
        tokenizer = loaded(folder).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_a_tokenizer_without_an_end_is_refused(folder):
    without(folder, "eos_token")
    with pytest.raises(UserError, match="no eos token"):
        loaded(folder)


def test_missing_or_damaged_weights_are_refused(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({n: t for n, t in weights.items() if "layers.1.mlp" not in n}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"3 weights are not in it: model\.layers\.1\.mlp"):
        loaded(folder)
    save_file({n: t[..., :-1].contiguous() for n, t in weights.items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="base: .*size mismatch|mismatched"):
        loaded(folder)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="model.path .*base: "):
        loaded(folder)
    file.unlink()
    with pytest.raises(UserError, match="model.path .*base: .*model.safetensors"):
        loaded(folder)


def test_code_that_comes_with_a_model_is_not_run_unless_trusted(folder):
    marker = folder / "ran"
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="trust_remote_code"):
        loaded(folder)
    assert not marker.exists()


@pytest.fixture
def no_hub(monkeypatch):
    """Nobody listens at the hub's address, and whoever would wait and ask again is caught."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda s: pytest.fail(f"waits {s} s to ask again"))


def test_an_unreachable_hub_is_said_at_once(no_hub):
    with pytest.raises(
        UserError, match="'some/model' is no folder here, .* hub cannot be reached .* path of its folder"
    ):
        loaded("some/model")


def test_a_model_that_was_downloaded_before_needs_no_hub(no_hub, folder, tmp_path, monkeypatch):
    repository = tmp_path / "cache" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / "abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model: Any = loaded("some/model", lora={"rank": 2})
    assert model.name == "model"
    assert model.module.active_peft_config.base_model_name_or_path == "some/model"
    assert torch.equal(logp(model.module), logp(built().module))


def test_what_the_hub_refuses_and_what_is_no_id_at_all(monkeypatch):
    with pytest.raises(UserError, match="'a b/c' is neither a folder nor a hub id"):
        loaded("a b/c")

    def missing(*_: Any, **__: Any) -> None:
        response: Any = SimpleNamespace(status_code=404, headers={}, request=None)
        raise huggingface_hub.errors.RepositoryNotFoundError("404: no such repository", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", missing)
    with pytest.raises(UserError, match="'some/model' is no folder, and the hub says: 404: no such repository"):
        loaded("some/model")


def test_exactly_one_of_path_and_build():
    for config in (ModelConfig(), ModelConfig(path="x", build=BUILD)):  # pyright: ignore[reportArgumentType]
        with pytest.raises(UserError, match="one of 'path'"):
            load_model(config, 0)


def test_no_progress_bar_is_shown(folder, capfd):
    AutoModelForCausalLM.from_pretrained(folder)
    assert "Loading weights" in capfd.readouterr().err  # left alone, transformers shows one
    save_model(loaded(folder, lora={"rank": 2}), folder.parent / "merged")
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""


def test_attention_that_is_not_installed_is_the_users_error():
    with pytest.raises(UserError, match="model: .*FlashAttention2"):
        built(attention="flash_attention_2")
