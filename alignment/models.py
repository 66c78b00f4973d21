"""Models: built small or loaded from a folder or hub id, with an adapter if asked, and saved as ordinary folders.

transformers and peft are imported when a model is made, so a recipe can be checked without them.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from alignment.control import add_control_tokens
from alignment.data.hub import locate_model, names_folder
from alignment.errors import UserError

if TYPE_CHECKING:
    from alignment.origin import Origin
    from alignment.recipe_sections import Build, Lora, ModelConfig

PAD, EOS = "<pad>", "<eos>"
Messages = Sequence[Mapping[str, Any]]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    pad_token_id: int | None
    eos_token_id: int | None
    all_special_tokens: list[str]
    chat_template: Any

    __call__: Callable[..., Any]
    encode: Callable[..., list[int]]
    decode: Callable[..., str]
    get_vocab: Callable[[], dict[str, int]]
    apply_chat_template: Callable[..., Any]
    save_pretrained: Callable[..., Any]


@dataclass
class Model:
    """A causal language model of transformers (inside a ``PeftModel`` under LoRA) and its tokenizer."""

    module: nn.Module
    tokenizer: Tokenizer
    name: str
    origin: "Origin | None" = None
    """How another process makes the same model."""


def load_model(config: "ModelConfig", seed: int, weights: bool = True) -> Model:
    """Builds or loads a model, in evaluation mode on the CPU. Global random state is neither used nor changed.

    Args:
        config: Which model.
        seed: Determines every weight that is not loaded: a built model, or an adapter.
        weights: False: the module is on the ``meta`` device, shapes alone, without an adapter; for a process whose
            engines live elsewhere.

    Raises:
        UserError: The folder, the tokenizer or weights are missing or do not fit together, the hub cannot be reached
            or has no such model, LoRA's targets are not in the model, or control tokens cannot be added.
    """
    if (config.path is None) == (config.build is None):
        raise UserError("model: give one of 'path' (a folder or a hub id) and 'build' (a new small model)")
    with _seeded(seed), no_progress_bars(), nullcontext() if weights else torch.device("meta"):
        model = _build(config, config.build) if config.build else _load(config, str(config.path), weights)
        if config.control:
            add_control_tokens(model.module, model.tokenizer, config.control, embeddings_trained=not config.lora)
        if config.lora and weights:
            model.module = _adapt(model.module, config.lora, config.revision)
    model.module.eval()
    return model


def load_tokenizer(config: "ModelConfig") -> Tokenizer:
    """The tokenizer of ``config.path`` without the model.

    Raises:
        UserError: There is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    place, trust = _locate(str(config.path), config.revision), config.trust_remote_code
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(place, revision=config.revision, trust_remote_code=trust)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"model.path {config.path}: {error}") from error
    if config.chat_template is not None:
        tokenizer.chat_template = _template(config.chat_template)
    return tokenizer


def _template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template {path}: {error}; name a Jinja file beside the recipe") from error


def encode_prompt(tokenizer: Tokenizer, prompt: str | Messages) -> tuple[int, ...]:
    """Tokens of ``prompt``: text as it stands, chat messages through the chat template up to the assistant's turn.

    Raises:
        UserError: Messages without a chat template or that it refuses, or a character that a character-level model
            does not know.
    """
    if not isinstance(prompt, str):
        return _encode_messages(tokenizer, [prompt])[0]
    try:
        return tuple(tokenizer.encode(prompt, add_special_tokens=False))
    except Exception as error:  # the tokenizers library raises nothing more specific
        vocabulary = tokenizer.get_vocab()
        special = tokenizer.all_special_tokens
        alphabet = "".join(token for token in sorted(vocabulary, key=vocabulary.__getitem__) if token not in special)
        unknown = [repr(c) for c in dict.fromkeys(prompt) if c not in alphabet]
        if not unknown:
            raise
        raise UserError(
            f"the model does not know {', '.join(unknown)} in {prompt!r}: its alphabet is {alphabet!r}; change the data"
            " or model.build.alphabet"
        ) from error


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str | Messages]) -> list[tuple[int, ...]]:
    """:func:`encode_prompt` of each, in one pass over them all.

    Raises:
        UserError: As there; the first prompt at fault.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    chats = [prompt for prompt in prompts if not isinstance(prompt, str)]
    try:
        encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
    except Exception:  # which text it was is found below
        return [encode_prompt(tokenizer, prompt) for prompt in prompts]
    rendered = iter(_encode_messages(tokenizer, chats) if chats else ())
    return [tuple(next(encoded)) if isinstance(prompt, str) else next(rendered) for prompt in prompts]


def _encode_messages(tokenizer: Tokenizer, chats: Sequence[Messages]) -> list[tuple[int, ...]]:
    if not tokenizer.chat_template:
        raise UserError(
            "the prompt is a list of chat messages, but the tokenizer has no chat template: give prompts as text,"
            " or put a chat_template.jinja beside the tokenizer"
        )
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    try:
        return [tuple(ids) for ids in tokenizer.apply_chat_template([list(chat) for chat in chats], **options)]
    except Exception as error:  # templates raise errors of their template engine, and Python's
        raise UserError(f"the tokenizer's chat template cannot render a prompt: {error}") from error


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ``ids`` without special tokens; spaces stay as they were generated."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stop_ids(tokenizer: Tokenizer, module: nn.Module) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's end of sequence first, then others that the model declares."""
    found = [tokenizer.eos_token_id]
    for source in (getattr(module, "generation_config", None), module.config):
        declared = getattr(source, "eos_token_id", None)
        found += declared if isinstance(declared, (list, tuple)) else [declared]
    size = _embedding_rows(module)  # a configuration may name a token of the vocabulary it was copied from
    return tuple(dict.fromkeys(int(i) for i in found if i is not None and i < size))


def _build(config: "ModelConfig", build: "Build") -> Model:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    tokenizer = _character_tokenizer(build.alphabet)
    make = {"qwen3": Qwen3Config, "llama": LlamaConfig}[build.architecture]
    architecture = make(
        vocab_size=len(tokenizer.get_vocab()),
        hidden_size=build.hidden_size,
        num_hidden_layers=build.layers,
        num_attention_heads=build.heads,
        num_key_value_heads=build.kv_heads,
        head_dim=build.hidden_size // build.heads,
        intermediate_size=build.intermediate_size,
        max_position_embeddings=build.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        module = AutoModelForCausalLM.from_config(
            architecture, dtype=getattr(torch, config.dtype), attn_implementation=config.attention
        )
    except (ImportError, ValueError) as error:
        raise UserError(f"model: {error}") from error
    return Model(module, tokenizer, f"{build.architecture}-{build.layers}x{build.hidden_size}")


def _character_tokenizer(alphabet: str) -> Tokenizer:
    """One token per character. It has no token for unknown characters, so encoding one fails."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((PAD, EOS, *alphabet))}
    assert len(vocabulary) == len(alphabet) + 2, "checking a recipe refuses a repeated character"
    fast = FastTokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))  # not in the vocabulary
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    fast.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token=PAD, eos_token=EOS)
    return tokenizer


def _load(config: "ModelConfig", path: str, weights: bool) -> Model:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    place = _locate(path, config.revision)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    load: Any = AutoModelForCausalLM.from_pretrained if weights else _shapes
    try:
        module, loaded = load(
            place,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path {path}: {error}") from error
    tokenizer = load_tokenizer(config)
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"model.path {path}: {len(missing)} weights are not in it: {', '.join(missing[:5])}")
    _check_tokenizer(tokenizer, _embedding_rows(module), path)
    module.name_or_path = place if Path(path).expanduser().exists() else path  # adapters record it as their base
    return Model(module, tokenizer, Path(path).name)


def _shapes(place: str, *, output_loading_info: bool, **options: Any) -> tuple[nn.Module, dict[str, list[str]]]:
    """What ``from_pretrained`` gives, but for the weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    asked = {name: options.pop(name) for name in ("revision", "trust_remote_code")}
    config = AutoConfig.from_pretrained(place, **asked)
    module = AutoModelForCausalLM.from_config(config, trust_remote_code=asked["trust_remote_code"], **options)
    try:
        module.generation_config = GenerationConfig.from_pretrained(place, revision=asked["revision"])
    except OSError:  # most small models have none; the configuration's own stop tokens then count
        pass
    return module, {"missing_keys": []}


def _locate(path: str, revision: str | None) -> str:
    """The folder, or the hub id, to hand to transformers for ``path``."""
    folder = Path(path).expanduser()
    if not folder.exists():
        if names_folder(path):
            where = "" if folder.is_absolute() else f", neither beside the recipe nor in {Path.cwd()}"
            raise UserError(f"model.path: there is no folder {folder}{where}")
        return locate_model(path, revision)
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        remedy = "it holds a LoRA adapter: merge it into its base first" if adapter else "is it a saved model?"
        raise UserError(f"model.path: {folder} has no config.json; {remedy}")
    names = ("tokenizer*", "vocab*", "*.model")
    # Without these files transformers would make up an empty tokenizer.
    if not any(True for name in names for _ in folder.glob(name)):
        raise UserError(f"model.path: {folder} has no tokenizer; save one there with tokenizer.save_pretrained(folder)")
    return str(folder.resolve())


def _check_tokenizer(tokenizer: Tokenizer, rows: int, path: str) -> None:
    """Refuses a tokenizer that does not fit the model; gives it a padding token if it has none."""
    vocabulary = tokenizer.get_vocab()
    if not vocabulary.keys() - set(tokenizer.all_special_tokens):  # made up, because there were no files
        raise UserError(f"model.path {path}: it has no tokenizer; save one beside the weights")
    largest = max(vocabulary.values())
    if largest >= rows:
        raise UserError(
            f"model.path {path}: the tokenizer has token {largest}, but the model's embedding has {rows} rows; they do"
            " not belong together"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path {path}: its tokenizer has no eos token, so no completion would ever end; set one")
    if tokenizer.pad_token_id is None:
        warnings.warn(f"{path}: the tokenizer has no pad token; its eos token is used for padding", stacklevel=2)
        tokenizer.pad_token_id = tokenizer.eos_token_id


def _adapt(module: nn.Module, lora: "Lora", revision: str | None) -> nn.Module:
    import peft

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    options = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] (any number does)
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        revision=revision,
    )
    try:
        return peft.get_peft_model(module, options)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, m in module.named_modules() if isinstance(m, nn.Linear)}
        raise UserError(f"model.lora.targets: {error} Its linear layers: {', '.join(sorted(linear))}") from error


def _embedding_rows(module: Any) -> int:
    return module.get_input_embeddings().weight.shape[0]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of the CPU from ``seed``; afterwards the global generator is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Transformers shows no progress bars inside."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
