"""Dialogues as tokens: what the assistant says is learned, with the token that ends its turn, and nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alignment.data.demonstrations import Dialogues, Shown, encode_demonstrations
from alignment.data.sides import demonstration
from alignment.errors import UserError
from alignment.models import encode_prompt
from alignment.types import Prompt

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
KNOWN = (TEMPLATES / "qwen2_5.jinja").read_text()
THINKING = (TEMPLATES / "qwen3.jinja").read_text()
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""No markers, and TRL does not know it."""
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{% if messages %}<|im_end|>{% endif %}[assistant]{% endif %}"
)
"""The markers leave out the token that ends a turn, and the last turn has none."""
FORGETFUL = PLAIN.replace("{{ m['content'] }}", "{% if loop.revindex < 3 %}{{ m['content'] }}{% endif %}")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


OPENING = [{"role": "system", "content": "Be brief."}, user("Hi")]
REST = [says("Hello!"), user("2+2?"), {"role": "tool", "content": "4"}, says("It is 4.")]


@pytest.fixture
def tokenizer() -> Any:
    """One token per byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    fast.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    made = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return made


def stops(tokenizer: Any) -> tuple[int, ...]:
    return (tokenizer.eos_token_id, tokenizer.pad_token_id)


def encode(tokenizer: Any, template: str, opening: Sequence[Any] = OPENING, rest: Sequence[Any] = REST) -> Shown:
    tokenizer.chat_template = template
    return Dialogues(tokenizer, stops(tokenizer)).encode(opening, rest, encode_prompt(tokenizer, opening))


def learned(tokenizer: Any, shown: Shown) -> list[str]:
    """The text of each run of trained tokens."""
    spans = [(a, b) for role, a, b in shown.turns if role == "assistant"]
    marked = [i for i, m in enumerate(shown.loss_mask) if m]
    assert marked == [i for a, b in spans for i in range(a, b)]
    return [tokenizer.decode(shown.token_ids[a:b]) for a, b in spans]


@pytest.mark.parametrize("template", [KNOWN, PLAIN, MARKED], ids=["known to TRL", "by prefixes", "own markers"])
def test_each_turn_of_the_assistant_is_learned_and_nothing_else(tokenizer: Any, template: str) -> None:
    shown = encode(tokenizer, template)
    assert learned(tokenizer, shown) == ["Hello!<|im_end|>", "It is 4.<|im_end|>"]
    assert [role for role, *_ in shown.turns] == ["assistant", "observation", "assistant"]
    assert shown.turns[0][1] == 0 and shown.turns[-1][2] == len(shown.token_ids) == len(shown.loss_mask)
    assert shown.text == "It is 4."
    whole = tokenizer.apply_chat_template([*OPENING, *REST], tokenize=False)
    prompt = tokenizer.decode(encode_prompt(tokenizer, OPENING))
    assert (prompt + tokenizer.decode(shown.token_ids)).removesuffix("<|im_end|>").strip() == whole.removesuffix(
        "<|im_end|>\n"
    )


def test_a_template_that_thinks_in_training_alone_is_marked_as_trl_does(tokenizer: Any) -> None:
    """TRL's variant shows the thoughts of all turns; the original hides those before the last question."""
    shown = encode(tokenizer, THINKING, rest=[says("<think>\na\n</think>\n\nHello!"), user("2+2?"), says("4")])
    first, second = learned(tokenizer, shown)
    assert first == "<think>\na\n</think>\n\nHello!<|im_end|>" and second == "<think>\n\n</think>\n\n4<|im_end|>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (FORGETFUL, "cannot be told from the rest: .*add the markers to the template"),
        (KNOWN.replace("<|im_end|>", "<|im_end|>{% generation %}{% endgeneration %}"), "marks nothing"),
        (MARKED.replace("[{{ m['role'] }}]", "{{ messages | length }}{{ m['role'] }}"), "renders the prompt otherwise"),
        ("{{ raise_exception('no tools') if messages | length > 2 }}hi", "cannot render the dialogue: no tools"),
    ],
)
def test_a_template_that_does_not_do_is_told(tokenizer: Any, template: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        encode(tokenizer, template)


def test_single_answers_end_with_the_end_of_sequence(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    rows = [("1+1=", (1,), "2"), (OPENING, encode_prompt(tokenizer, OPENING), REST), (OPENING, (1, 2), REST)]
    one, two, three = encode_demonstrations(rows, tokenizer, stops(tokenizer))
    assert isinstance(one, Shown) and tokenizer.decode(one.token_ids) == "2<|im_end|>" and all(one.loss_mask)
    assert two == encode(tokenizer, PLAIN)
    assert isinstance(three, str) and "renders the prompt otherwise" in three
    rollout = demonstration(Prompt("a", {"prompt": OPENING}), rows[1][1], encode(tokenizer, PLAIN))
    assert rollout.loss_mask.count(True) < len(rollout.token_ids) == len(rollout.behaviour_logp)
    assert rollout.text == "It is 4." and rollout.sampling.max_tokens == len(rollout.token_ids)


def test_dialogues_need_a_chat_template(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="needs a chat template"):
        Dialogues(tokenizer, stops(tokenizer))
