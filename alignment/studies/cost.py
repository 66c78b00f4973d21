"""What a run has cost: model operations, and generated tokens, from the counts that it logs.

A pass of a model over a token is taken to cost ``2 N`` operations forward, and ``6 N`` forward and backward (``4 N``
under LoRA, whose frozen weights need no gradient), with N the weights of its linear layers, the output layer included:
looking an embedding up costs nothing, and attention over earlier tokens is left out. Counted are

- sampling: every prompt and completion token of every rollout, dropped ones too, a prompt once for each rollout;
- reading: old log-probabilities and entropies, those of mini-batches between the steps of an update, the reference,
  values, and values of prompts for curricula that ask;
- learning: every token of the rows, prompts included, again in every epoch: of the policy and of value models; and once
  for each reward component where a weighting asks for the inner products of their gradients;
- validation: every prompt and completion token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignment.architectures import Shape
from alignment.critics import HeadCritic, ModelCritic
from alignment.errors import UserError
from alignment.recipe import OnlineStage, Recipe, RolloutStage, Stage
from alignment.recipe_sections import ModelConfig

Unit = Literal["flops", "tokens", "steps"]
FORWARD, TRAINED, ADAPTED = 2, 6, 4


@dataclass(frozen=True)
class Sizes:
    """Weights of linear layers of the models of a stage, and operations per weight and trained token of the policy."""

    policy: int
    critic: int = 0
    prompt_value: int = 0
    trained: int = TRAINED


@dataclass(frozen=True)
class Cost:
    """What was spent up to a step."""

    flops: float = 0.0
    tokens: float = 0.0
    """Generated for training, dropped rollouts included; validation apart."""
    steps: float = 0.0


def linear_weights(shape: Shape) -> int:
    """``layers * sum(inputs * outputs) + hidden * vocabulary``."""
    return shape.layers * sum(i * o for i, o in shape.linears) + shape.hidden * shape.vocabulary


def flops(record: Mapping[str, Any], sizes: Sizes) -> float:
    """Operations of one line of ``metrics.jsonl``: of a step, or of an evaluation.

    ``2 N (prompt + completion) + 2 N read + 6 N fitted`` of the policy, a reference as large as it, and, with their own
    N, ``2 N read + 6 N fitted`` of value models.
    """

    def count(name: str) -> float:
        return float(record.get(name) or 0.0)

    sampled = FORWARD * sizes.policy * (count("prompt_tokens") + count("completion_tokens"))
    if record["kind"] == "eval":
        return sampled
    read = FORWARD * sizes.policy * (count("read_tokens/policy") + count("read_tokens/reference"))
    read += FORWARD * sizes.critic * count("read_tokens/values")
    read += FORWARD * sizes.prompt_value * count("prompt_value/read_tokens")
    fitted = [name for name in record if name == "fitted_tokens" or name.endswith("/fitted_tokens")]
    values = {"critic/fitted_tokens": sizes.critic, "prompt_value/fitted_tokens": sizes.prompt_value}
    learned = sum(
        TRAINED * values[name] * count(name) if name in values else sizes.trained * sizes.policy * count(name)
        for name in fitted
    )
    return sampled + read + learned


def sizes_of(recipe: Recipe, stage: Stage) -> Sizes:
    """The sizes of a stage's models.

    Raises:
        UserError: One is not known, or what the stage does is not counted.
    """
    model = recipe.located_model()
    policy = _weights(model, "the model")
    if isinstance(stage, OnlineStage) and stage.guidance is not None:
        raise UserError("the operations of guidance are not counted; give the budget in tokens or steps")
    found = {"critic": 0, "prompt_value": 0}
    for name, critic in (("critic", _values(stage)), ("prompt_value", getattr(stage, "prompt_value", None))):
        if isinstance(critic, ModelCritic):
            if critic.start is not None:
                raise UserError(f"the size of the {name} that begins from 'start' is not known; count tokens or steps")
            own = model if critic.model is None else critic.model.located(recipe.folder)
            found[name] = _weights(own, f"the {name}'s model")
        elif critic is not None:
            found[name] = policy if name == "critic" or isinstance(_values(stage), HeadCritic) else found["critic"]
    return Sizes(policy, **found, trained=ADAPTED if model.lora else TRAINED)


def costs(lines: Sequence[Mapping[str, Any]], sizes: Mapping[str, Sizes] | None) -> dict[int, Cost]:
    """What was spent up to and with each step of a run; evaluations of a step count with it.

    Args:
        lines: Of ``metrics.jsonl``, in their order.
        sizes: Of each stage by name; None: operations are not counted and stay 0.
    """
    spent, total = dict[int, Cost](), Cost()
    for line in sorted(lines, key=lambda line: line["step"]):
        trained = line["kind"] == "train"
        total = Cost(
            total.flops + (0.0 if sizes is None else flops(line, sizes[line["stage"]])),
            total.tokens + (float(line.get("completion_tokens") or 0) if trained else 0.0),
            float(line["step"]),
        )
        spent[line["step"]] = total
    return spent


def _values(stage: Stage) -> Any:
    return stage.values if isinstance(stage, RolloutStage) else None


def _weights(model: ModelConfig, what: str) -> int:
    shape = Shape.of(model)
    if shape is None:
        raise UserError(f"the size of {what} ({model.path}) is not known, so its operations cannot be counted; give the"
                        " budget in tokens or steps")  # fmt: skip
    return linear_weights(shape)
