"""Control tokens: two tokens that say, in front of a completion, whether it is one to imitate.

Conditional training ("Pretraining Language Models with Human Preferences", arXiv 2302.08582) learns completions of both
kinds, each behind its token; what is sampled afterwards stands behind the token of the aligned ones, and is never one
of the two itself. The model's own configuration says which they are, so that every process, and whoever loads the saved
model here, knows.
"""

from typing import TYPE_CHECKING, Any

import torch

from alignment.errors import UserError

if TYPE_CHECKING:
    from alignment.models import Tokenizer
    from alignment.recipe_sections import Control

KEY = "control_tokens"
"""Of the configuration of a transformers model."""


def control_ids(tokenizer: "Tokenizer", module: Any) -> tuple[int, ...]:
    """The tokens for aligned and for misaligned completions; none for a model without them."""
    known = getattr(module.config, KEY, None)
    if not known:
        return ()
    vocabulary = tokenizer.get_vocab()
    return vocabulary[known["aligned"]], vocabulary[known["misaligned"]]


def prompt_cue(tokenizer: "Tokenizer", module: Any) -> tuple[int, ...]:
    """What stands behind a prompt whose completion is sampled, compared with others or rewarded."""
    return control_ids(tokenizer, module)[:1]


def share_control_tokens(module: Any, policy: Any) -> None:
    """Makes the configuration of ``module``, which was trained on the policy's rows, name the policy's tokens."""
    if (known := getattr(policy.config, KEY, None)) != getattr(module.config, KEY, None):
        setattr(module.config, KEY, known)


def add_control_tokens(module: Any, tokenizer: Any, control: "Control", embeddings_trained: bool) -> None:
    """Gives tokenizer and model the tokens of ``control``, as special tokens, where they have them not yet.

    The embedding grows by the tokens that it has no rows for. New tokens begin as the mean of all others: without
    random numbers, and as nothing in particular.

    Args:
        module: A causal language model of transformers, without an adapter.
        tokenizer: Its tokenizer.
        control: Which tokens.
        embeddings_trained: Whether training changes embeddings.

    Raises:
        UserError: A token is an ordinary one, or ends or pads completions; or it is new and nothing would ever tell the
            two apart.
    """
    names = {"aligned": control.aligned, "misaligned": control.misaligned}
    before = tokenizer.get_vocab()
    for kind, token in names.items():
        if token in (tokenizer.eos_token, tokenizer.pad_token) or (
            token in before and token not in tokenizer.all_special_tokens
        ):
            raise UserError(f"model.control.{kind}: {token!r} is a token of the model already; take a text that is not")
    new = [token for token in names.values() if token not in before]
    if new and not embeddings_trained:
        raise UserError(
            f"model.control: {' and '.join(new)} are new tokens, and LoRA does not train their embeddings, so they "
            "would stay alike; train all weights first (without model.lora), or take a model that has them"
        )
    tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in new]
    if new and max(ids) >= len(module.get_input_embeddings().weight):
        module.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    for layer in (module.get_input_embeddings(), module.get_output_embeddings()) if new else ():
        with torch.no_grad():
            layer.weight[ids] = layer.weight[: min(ids)].float().mean(0).to(layer.weight.dtype)
    setattr(module.config, KEY, names)
    if getattr(module, "generation_config", None) is not None:  # for whoever samples with transformers alone
        module.generation_config.bad_words_ids = [[vocabulary[token]] for token in names.values()]
